"""Whole networks from diffusers' names to their own: undone by independent converters, every bit is where it was."""

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from diffusers_tiny import unet
from safetensors.torch import load_file, save_file

from dmd_core.backends.flux_keys import flux_state
from dmd_core.families import FAMILIES
from dmd_core.weights.doctor import diagnose, repair
from dmd_core.weights.layouts import convertible, native_pieces

UNET = {"block_out_channels": (16, 32), "layers_per_block": 1}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def flux2():
    return diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def z_image():
    return diffusers.ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6]
    )


def wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=2, image_dim=24, added_kv_proj_dim=24,
    )  # fmt: skip


NETS = {"sd15": unet, "sdxl": lambda: unet(**SDXL), "sd3": sd3, "flux": flux, "flux2": flux2, "z_image": z_image}
NETS["wan"] = wan
BACK = {
    "sd15": lambda s: theirs.convert_ldm_unet_checkpoint(prefixed(s), {**UNET, "class_embed_type": None}),
    "sdxl": lambda s: theirs.convert_ldm_unet_checkpoint(
        prefixed(s), {**UNET, "class_embed_type": None, "addition_embed_type": "text_time"}
    ),
    "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": flux_state,  # diffusers' own is for one width only
    "flux2": theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    "z_image": theirs.convert_z_image_transformer_checkpoint_to_diffusers,
    "wan": theirs.convert_wan_transformer_to_diffusers,
}


def prefixed(state):
    return {f"model.diffusion_model.{k}": v for k, v in state.items()}


def weights(name):
    rng = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=rng) for k, v in NETS[name]().state_dict().items()}


def own(state, name):
    pieces = native_pieces({k: tuple(v.shape) for k, v in state.items()}, FAMILIES[name])
    return {n: p.join([state[k] for k in p.keys]) for n, p in pieces.items()}


@pytest.mark.parametrize("name", NETS)
def test_independent_code_brings_every_tensor_back(name):
    state = weights(name)
    back = BACK[name](own(state, name))
    assert set(back) == set(state)
    for key, value in state.items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2"])
def test_the_halves_of_the_last_modulation_change_places(name):
    state = weights(name)
    given, found = state["norm_out.linear.weight"], own(state, name)["final_layer.adaLN_modulation.1.weight"]
    assert not torch.equal(found, given)
    assert torch.equal(found, given.roll(len(given) // 2, 0))


def test_an_upsampler_stands_behind_the_attention_of_its_level():
    """The independent converters take it from either place; ComfyUI's network has it in one."""
    assert "output_blocks.1.2.conv.weight" in own(weights("sdxl"), "sdxl")
    assert "output_blocks.1.1.conv.weight" in own(weights("sd15"), "sd15")


def test_a_file_with_a_hole_or_a_stranger_is_refused():
    shapes = {k: tuple(v.shape) for k, v in weights("flux").items()}
    holed = {k: v for k, v in shapes.items() if k != "transformer_blocks.0.attn.to_k.weight"}
    with pytest.raises(ValueError, match=r"img_attn.qkv.weight' has 3 parts, only .*to_q.*to_v.* is in the file"):
        native_pieces(holed, FAMILIES["flux"])
    with pytest.raises(ValueError, match=r"no place for .transformer_blocks\.0\.motion\.weight"):
        native_pieces({**shapes, "transformer_blocks.0.motion.weight": (4, 4)}, FAMILIES["flux"])
    with pytest.raises(ValueError, match="cannot be translated"):
        native_pieces(shapes, FAMILIES["generic"])
    assert not convertible(FAMILIES["qwen_image"]), "its own names are diffusers'"


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("prefix", ["", "module.", "transformer."])
def test_the_doctors_copy_holds_the_networks_own_names(name, prefix, tmp_path):
    state, path = weights(name), tmp_path / "model.safetensors"
    save_file({prefix + k: v.half() for k, v in state.items()}, path, {"author": "me"})
    found = diagnose(path)
    assert any("diffusers'" in f.text for f in found.findings)
    assert found.structure.family == name
    levels = {f.level for f in found.findings if "diffusers'" in f.text}
    assert levels == {"problem" if name in ("wan", "flux2") else "note"}
    fixed = repair(path, tmp_path / "out", "model")
    wanted = own({k: v.half() for k, v in state.items()}, name)
    copy = load_file(fixed)
    assert set(copy) == set(wanted)
    assert all(torch.equal(copy[k], v) for k, v in wanted.items())
    after = diagnose(fixed)
    assert (after.structure.layout, after.repairable) == ("native", False)
    assert after.header.metadata["author"] == "me"
