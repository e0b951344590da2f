import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd_core.families import FAMILIES, GENERIC, PRESETS, Names, by_name, detect, layer_path, naming, spelled, split_key
from dmd_core.weights import keys

GOLDEN = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in (Path(__file__).parent / "golden/keys").iterdir()}
NAMES = sorted(GOLDEN)
PREFIXES = [
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "model.",
    "unet.",
    "module.",
    "base_model.model.",
    "_orig_mod.",
]
LINEAR = nn.Linear(2, 2)


def lora_of(layers, style):
    ends = {"kohya": (".lora_down.weight", ".lora_up.weight", ".alpha"), "peft": (".lora_A.weight", ".lora_B.weight")}
    flat = [f"lora_unet_{n.replace('.', '_')}" if style == "kohya" else f"transformer.{n}" for n in layers]
    return [n + e for n in flat for e in ends[style]]


def blocks(template, count, *parts):
    return [f"{template.format(i)}.{p}" for i in range(count) for p in parts]


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
JOINT = (*QKV, "attn.add_q_proj", "attn.add_k_proj", "attn.to_add_out")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_family_is_told_by_its_module_names_and_by_its_files_whatever_their_prefix(name, prefix):
    names = [prefix + n for n in GOLDEN[name]["names"]]
    assert detect(names).name == name
    assert detect([f"{n}.weight" for n in names]).name == name
    assert naming(names, by_name(name)) == ("diffusers" if name == "qwen_image" else "native")


@pytest.mark.parametrize("name", NAMES)
def test_only_one_family_recognises_a_model(name):
    seen = Names(GOLDEN[name]["names"])
    assert [f.name for f in FAMILIES.values() if f is not GENERIC and f.recognises(seen)] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_text_encoders_and_vae_of_a_checkpoint_do_not_confuse(name):
    extra = ["first_stage_model.decoder.mid.attn_1.q.weight", "cond_stage_model.transformer.text_model.a.weight"]
    extra += ["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert detect([*extra, *(f"model.diffusion_model.{n}.weight" for n in GOLDEN[name]["names"])]).name == name
    assert detect(extra) is GENERIC


@pytest.mark.parametrize("name", NAMES)
def test_our_own_lora_of_a_family_is_never_taken_for_another(name):
    shapes = {}
    for layer, key in GOLDEN[name]["keys"].items():
        out, width, *kernel = GOLDEN[name]["layers"][layer]
        shapes |= {f"{key}.lora_down.weight": (4, width, *kernel), f"{key}.lora_up.weight": (out, 4, *kernel)}
    assert detect(shapes).name in (name, "generic")
    assert detect(list(shapes)).name in (name, "generic")


LINEAR1 = "diffusion_model.single_blocks.0.linear1"
UNET_SD = blocks("down_blocks_{}_attentions_0_transformer_blocks_0", 3, "attn1_to_q", "attn2_to_k")
UNET_XL = blocks("input_blocks_4_1_transformer_blocks_{}", 2, "attn1_to_q", "attn2_to_k")


@pytest.mark.parametrize(
    ("expected", "source"),
    [
        ("sd15", lora_of(UNET_SD, "kohya")),
        ("sdxl", lora_of(UNET_XL, "kohya")),
        ("sdxl", {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)}),
        ("sd15", {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}),
        ("sd2", {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 1024)}),
        ("sd3", lora_of(blocks("joint_blocks.{}", 2, "x_block.attn.qkv"), "kohya")),
        ("sd3", {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536)}),
        ("sd3", [*blocks("transformer_blocks.{}", 2, *JOINT, "ff.net.0.proj"), "pos_embed.proj"]),
        ("flux", lora_of(blocks("double_blocks.{}", 2, "img_attn.qkv", "img_mod.lin"), "kohya")),
        ("flux", lora_of(blocks("single_transformer_blocks.{}", 2, *QKV, "proj_mlp"), "peft")),
        ("flux", {f"{LINEAR1}.lora_A.weight": (4, 3072), f"{LINEAR1}.lora_B.weight": (21504, 4)}),
        ("flux2", {f"{LINEAR1}.lora_A.weight": (4, 3072), f"{LINEAR1}.lora_B.weight": (27648, 4)}),
        ("flux2", lora_of(blocks("single_transformer_blocks.{}", 2, "attn.to_qkv_mlp_proj"), "peft")),
        ("qwen_image", lora_of(blocks("transformer_blocks.{}", 2, *JOINT, "img_mlp.net.2"), "peft")),
        ("qwen_image", {f"transformer.transformer_blocks.{i}.attn.to_q.lora_A.weight": (4, 3072) for i in range(60)}),
        ("z_image", lora_of(blocks("layers.{}", 30, "attention.to_q"), "peft")),
        ("z_image", {"diffusion_model.layers.0.attention.qkv.lora_A.weight": (4, 3840)}),
        ("wan", ["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.ffn.0.lora_A.weight"]),
        ("wan", lora_of(blocks("blocks.{}", 2, "attn1.to_q", "attn2.to_k"), "peft")),
        ("wan", ["lora_unet__blocks_0_cross_attn_k.lora_down.weight"]),
        ("pixart", lora_of(blocks("blocks.{}", 2, "cross_attn.kv_linear"), "kohya")),
        ("pixart", {"base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 1152)}),
    ],
)  # fmt: skip
def test_published_key_styles_are_recognised(expected, source):
    assert detect(source).name == expected


@pytest.mark.parametrize(
    "source",
    [
        [],
        ["hello", "", "a.b.c"],
        lora_of(blocks("transformer_blocks.{}", 2, *JOINT), "peft"),  # SD3, Flux or Qwen
        lora_of(blocks("mid_block.attentions.{}", 1, "transformer_blocks.0.attn1.to_q"), "kohya"),  # SD 1.5 or SDXL
        ["double_blocks.0.img_attn.qkv", "txt_in.individual_token_refiner.blocks.0.norm1"],  # HunyuanVideo
        ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "distilled_guidance_layer.norms.0"],  # Chroma
        {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 3072)},  # Flux or Flux.2 klein
        {"transformer_blocks.0.attn1.to_q.weight": (2048, 2048), "adaln_single.linear.weight": (9, 9)},  # LTX-Video
        {"layers.0.attention.qkv.weight": (3840, 2304), "layers.0.adaLN_modulation.1.weight": (9216, 1024)},  # Lumina 2
        ["blocks.0.self_attn.q_proj", "blocks.0.cross_attn.k_proj"],  # Anima
        [*UNET_SD, "input_hint_block.0", "input_blocks.1.1.transformer_blocks.0.attn1.to_q"],  # ControlNet
        ["input_blocks.1.1.time_stack.0.attn1.to_q", "input_blocks.1.1.transformer_blocks.0.attn1.to_q"],  # SVD
    ],
)
def test_where_two_families_are_possible_nothing_is_assumed(source):
    assert detect(source) is GENERIC


def test_flux_without_guidance_is_schnell_and_needs_no_shift():
    names = [n for n in GOLDEN["flux"]["names"] if not n.startswith("guidance_in")]
    assert (detect(names).title, detect(names).shift) == ("FLUX.1-schnell", 1.0)
    assert detect(GOLDEN["flux"]["names"]).title == "FLUX.1"
    assert detect(names).name == "flux"  # one family: their LoRAs load on each other


def targets(family, names, preset="all"):
    return {n for n in names if by_name(family).targets(preset)(n, LINEAR)}


@pytest.mark.parametrize("name", NAMES)
def test_presets_divide_the_target_layers(name):
    names = GOLDEN[name]["names"]
    own, cross, kv = (targets(name, names, p) for p in ("self-attention", "cross-attention", "kv"))
    everything, rest = targets(name, names), targets(name, names, "no-cross-attention")
    assert everything >= set(GOLDEN[name]["layers"])
    assert targets(name, names, "attention") == own | cross
    assert kv
    assert kv < cross
    assert rest
    assert not rest & cross
    assert rest | cross == everything
    assert own == cross if name == "z_image" else not own & cross


@pytest.mark.parametrize("name", NAMES)
def test_targets_do_not_depend_on_where_the_network_hangs(name):
    names = GOLDEN[name]["names"]
    assert {f"diffusion_model.{n}" for n in targets(name, names)} == targets(
        name, [f"diffusion_model.{n}" for n in names]
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_targets_are_linear_and_plain_convolution_layers_only(preset):
    accepts = by_name("sdxl").targets(preset)
    for module in (nn.LayerNorm(2), nn.Conv2d(4, 4, 1, groups=2), nn.Conv3d(2, 2, 1), nn.Identity()):
        for layer in GOLDEN["sdxl"]["names"]:
            assert not accepts(layer, module)


def test_ends_embedders_and_modulations_stay_as_they_are():
    for name in NAMES:
        found = targets(name, GOLDEN[name]["names"])
        words = (
            "embed",
            "mod.",
            "modulation",
            "norm",
            "final",
            "time_",
            "vector",
            "guidance",
            "head",
            "img_in",
            "txt_in",
        )
        odd = [n for n in found if any(w in n for w in words) or n in ("input_blocks.0.0", "out.2")]
        assert not odd, name


def test_an_unknown_preset_or_family_names_what_is_accepted():
    with pytest.raises(ValueError, match=r"'everything'.*all, attention"):
        by_name("sd15").targets("everything")
    with pytest.raises(ValueError, match=r"'sd9'.*sd15.*generic"):
        by_name("sd9")


@pytest.mark.parametrize(
    ("config", "family", "count"),
    [
        ({"cross_attention_dim": 768, "attention_head_dim": 8}, "sd15", 278),
        (
            {
                "block_out_channels": (320, 640, 1280),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "cross_attention_dim": 2048,
                "attention_head_dim": (5, 10, 20),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            "sdxl",
            788,
        ),
    ],
)
def test_the_real_unets_have_as_many_targets_as_published_accelerator_loras(config, family, count):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel(**config)
    found = detect(net)
    assert found.name == family
    assert sum(found.targets()(n, m) for n, m in net.named_modules()) == count
    assert detect([n for n, _ in net.named_modules()]).name == family
    assert naming(net, found) == "diffusers"
    kinds = [n.partition("_")[0] for n in found.feature_layers([n for n, _ in net.named_modules()])]
    assert list(dict.fromkeys(kinds)) == ["down", "mid", "up"]


def diffusers_transformers():
    import diffusers

    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
    sd3 = {"caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 16, "sample_size": 16}
    z = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
    wan = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 32}
    pixart = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    return {
        "sd3": lambda: diffusers.SD3Transformer2DModel(**sizes, **sd3),
        "flux": lambda: diffusers.FluxTransformer2DModel(
            **sizes, num_single_layers=2, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=True
        ),
        "flux2": lambda: diffusers.Flux2Transformer2DModel(**sizes, num_single_layers=2, axes_dims_rope=(2, 2, 2, 2)),
        "qwen_image": lambda: diffusers.QwenImageTransformer2DModel(**sizes, axes_dims_rope=(2, 2, 4)),
        "z_image": lambda: diffusers.ZImageTransformer2DModel(**z, axes_dims=[4, 6, 6], axes_lens=[16, 16, 16]),
        "wan": lambda: diffusers.WanTransformer3DModel(**wan),
        "pixart": lambda: diffusers.PixArtTransformer2DModel(**pixart, caption_channels=16, sample_size=8),
    }


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "qwen_image", "z_image", "wan", "pixart"])
def test_the_diffusers_network_of_a_family_has_the_same_targets_as_comfyui_s(name):
    """Both tiny networks have the same blocks: each native target is a diffusers target or several of them fused."""
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        net = diffusers_transformers()[name]()
    names = [n for n, _ in net.named_modules()]
    family = detect(net)
    assert family.name == detect(names).name == name
    assert naming(names, family) == "diffusers"
    layers = [n for n, m in net.named_modules() if family.targets()(n, m)]
    assert len(set(keys.lora_keys(layers, family, names).values())) == len(layers)  # ComfyUI has a place for each
    native = {t.name for n in layers for t in keys.twins(n, family)} or set(layers)
    assert native == set(GOLDEN[name]["layers"])
    assert family.feature_layers(names)
    assert family.block_names(names)


def test_the_generic_family_trains_repeated_blocks_of_anything():
    names = [
        "layers.0.attn.q",
        "layers.0.mlp.0",
        "layers.0.cross_attn.k",
        "layers.0.cross_attn.q",
        "layers.0.norm1.linear",
    ]
    names += ["embed.0.proj", "head", "time.0", "layers.0.adaLN_modulation.1"]
    assert targets("generic", names) == {*names[:4], "time.0"} - {"time.0"}
    assert targets("generic", names, "kv") == {"layers.0.cross_attn.k"}
    assert targets("generic", names, "self-attention") == {"layers.0.attn.q"}


@pytest.mark.parametrize(
    ("family", "steps", "expected"),
    [
        ("sdxl", 4, [14.614641, 4.081729, 1.612886, 0.693205, 0]),  # 999 749 499 249
        ("sdxl", 1, [1.160578, 0]),  # DMD2's one-step model starts at 399
        ("sd15", 1, [14.614641, 0]),
        ("sd3", 4, [1, 0.9, 0.75, 0.5, 0]),
        ("z_image", 8, [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]),
        ("qwen_image", 4, [1, 0.9, 0.75, 0.5, 0]),
        ("wan", 4, [1, 0.9375, 0.8333, 0.625, 0]),
        ("flux2", 2, [1, 0.8829, 0]),
    ],
)
def test_few_step_lists_are_the_published_ones(family, steps, expected):
    torch.testing.assert_close(by_name(family).sigmas(steps), torch.tensor(expected).float(), rtol=0, atol=6e-5)


def test_few_step_lists_have_as_many_steps_as_asked_and_fall():
    for family in FAMILIES.values():
        for steps in (1, 2, 3, 4, 8):
            sigmas = family.sigmas(steps)
            assert len(sigmas) == steps + 1
            assert (sigmas.diff() < 0).all()
            assert sigmas[-1] == 0
    assert by_name("sdxl").timesteps(8) == (999, 874, 749, 624, 499, 374, 249, 124)  # Lightning's
    with pytest.raises(ValueError, match="0 steps"):
        by_name("sd15").timesteps(0)
    with pytest.raises(ValueError, match="sigmas"):
        by_name("flux").timesteps(4)


@pytest.mark.parametrize("name", NAMES)
def test_feature_layers_run_from_shallow_to_deep(name):
    names = GOLDEN[name]["names"]
    found = by_name(name).feature_layers(reversed(names))
    assert sorted(found, key=names.index) == found
    assert len(by_name(name).feature_layers(names, 1)) == 1
    assert by_name(name).feature_layers(names, 99) == by_name(name).feature_layers(names)
    assert by_name(name).block_names(names)
    with pytest.raises(ValueError, match="no feature layer"):
        by_name(name).feature_layers(["nothing"])


@pytest.mark.parametrize(
    ("key", "layer", "part"),
    [
        ("lora_unet_a_b.lora_down.weight", "lora_unet_a_b", "down"),
        ("transformer.a.b.lora_B.weight", "transformer.a.b", "up"),
        ("a.b.lora_A.default.weight", "a.b", "down"),
        ("a.b.lora_B", "a.b", "up"),
        ("a.attn1.processor.to_q_lora.up.weight", "a.attn1.processor.to_q", "up"),
        ("a.b.lora.down.weight", "a.b", "down"),
        ("a.b.lora_linear_layer.up.weight", "a.b", "up"),
        ("a.b.alpha", "a.b", "alpha"),
        ("a.b.hada_w1_a", "a.b", "hada_w1_a"),
        ("a.b.lokr_w1", "a.b", "lokr_w1"),
        ("a.b.dora_scale", "a.b", "dora_scale"),
        ("a.b.weight", "a.b", "weight"),
        ("a.b", "a.b", ""),
    ],
)
def test_keys_split_into_layer_and_part(key, layer, part):
    assert split_key(key) == (layer, part)


def test_names_of_one_layer_agree_in_every_spelling():
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    for name in (path, f"unet.{path}", f"base_model.model.{path}", f"model.diffusion_model.{path}", path[:-2]):
        assert layer_path(name) == path
    assert spelled("lora_unet_" + path.replace(".", "_")) == spelled(path)
    assert spelled(path.replace("attn1.", "attn1.processor.")) == spelled(path)
