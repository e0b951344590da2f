"""Tiny random models of ComfyUI's families, as its own classes build them. Import only inside a ComfyUI process.

Detection accepts no tiny file for most families, so the model classes are built directly with small configs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models as supported
import torch
from comfy.model_base import ModelType

TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Tiny:
    build: Callable[[], Any]  # -> BaseModel
    context: int  # width of the text tokens
    shape: tuple[int, ...]  # [c (t) h w]
    pooled: int | None = None
    mask: bool = False  # the family asks for an attention mask
    options: tuple[tuple[str, Any], ...] = ()


def unet(**changes: Any) -> dict[str, Any]:
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "use_spatial_transformer": True,
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 48,
        "use_linear_in_transformer": False,
        "legacy": False,
        "use_temporal_attention": False,
        "use_checkpoint": False,
        "adm_in_channels": None,
        "dtype": torch.float32,
        **changes,
    }


def sd15(model_type: ModelType = ModelType.EPS) -> Any:
    config = supported.SD15(unet())
    config.unet_config.update(num_heads=4)
    return comfy.model_base.BaseModel(config, model_type=model_type, device="cpu")


def sdxl() -> Any:
    depths = {"transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}
    config = supported.SDXL(
        unet(**depths, use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential")
    )
    config.unet_config.update(num_head_channels=16)
    return comfy.model_base.SDXL(config, device="cpu")


def sd3() -> Any:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
    config = supported.SD3(
        {
            "in_channels": 16,
            "out_channels": 16,
            "pos_embed_scaling_factor": None,
            "depth": 2,
            "patch_size": 2,
            "input_size": None,
            "adm_in_channels": 32,
            "context_embedder_config": embedder,
            "num_patches": 96 * 96,
            "pos_embed_max_size": 96,
            "qk_norm": "rms",
            "dtype": torch.float32,
        }
    )
    return comfy.model_base.SD3(config, device="cpu")


def flux_config(**changes: Any) -> dict[str, Any]:
    return {
        "image_model": "flux",
        "axes_dim": [16, 56, 56],
        "num_heads": 1,
        "mlp_ratio": 4.0,
        "theta": 10000,
        "in_channels": 16,
        "out_channels": 16,
        "qkv_bias": True,
        "txt_ids_dims": [],
        "hidden_size": 128,
        "context_in_dim": 64,
        "patch_size": 2,
        "vec_in_dim": 32,
        "depth": 2,
        "depth_single_blocks": 2,
        "guidance_embed": True,
        "dtype": torch.float32,
        **changes,
    }


def flux() -> Any:
    return comfy.model_base.Flux(supported.Flux(flux_config()), device="cpu")


def flux2() -> Any:
    config = flux_config(
        image_model="flux2",
        axes_dim=[32, 32, 32, 32],
        mlp_ratio=3.0,
        theta=2000,
        in_channels=128,
        out_channels=128,
        qkv_bias=False,
        ops_bias=False,
        txt_ids_dims=[3],
        patch_size=1,
        vec_in_dim=None,
        global_modulation=True,
        mlp_silu_act=True,
        default_ref_method="index",
        ref_index_scale=10.0,
    )
    return comfy.model_base.Flux2(supported.Flux2(config), device="cpu")


def z_image() -> Any:
    config = supported.ZImage(
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": 64,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
            "dtype": torch.float32,
        }
    )
    return comfy.model_base.Lumina2(config, device="cpu")


def qwen_image() -> Any:
    config = supported.QwenImage(
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "joint_attention_dim": 64,
            "dtype": torch.float32,
        }
    )
    return comfy.model_base.QwenImage(config, device="cpu")


def wan() -> Any:
    config = supported.WAN21_T2V(
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 128,
            "out_dim": 16,
            "num_heads": 1,
            "ffn_dim": 256,
            "num_layers": 2,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "in_dim": 16,
            "text_dim": 64,
            "dtype": torch.float32,
        }
    )
    return comfy.model_base.WAN21(config, device="cpu")


def anima() -> Any:
    config = supported.Anima(
        {
            "image_model": "anima",
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 128,
            "num_blocks": 2,
            "num_heads": 1,
            "concat_padding_mask": True,
            "crossattn_emb_channels": 1024,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop",
            "min_fps": 1,
            "max_fps": 30,
            "use_adaln_lora": True,
            "adaln_lora_dim": 32,
            "rope_h_extrapolation_ratio": 4.0,
            "rope_w_extrapolation_ratio": 4.0,
            "rope_t_extrapolation_ratio": 1.0,
            "extra_per_block_abs_pos_emb": False,
            "dtype": torch.float32,
        }
    )
    return comfy.model_base.Anima(config, device="cpu")


def ltxv() -> Any:
    config = supported.LTXV(
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": 64,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": 64,
            "num_layers": 2,
            "dtype": torch.float32,
        }
    )
    return comfy.model_base.LTXV(config, device="cpu")


FAMILIES: dict[str, Tiny] = {
    "sd15_eps": Tiny(build=sd15, context=48, shape=(4, 16, 16)),
    "sd15_v": Tiny(build=lambda: sd15(ModelType.V_PREDICTION), context=48, shape=(4, 16, 16)),
    "sdxl": Tiny(build=sdxl, context=48, shape=(4, 16, 16), pooled=1280, options=(("width", 128), ("height", 128))),
    "sd3": Tiny(build=sd3, context=64, shape=(16, 16, 16), pooled=32),
    "flux": Tiny(build=flux, context=64, shape=(16, 16, 16), pooled=32, options=(("guidance", 3.5),)),
    "flux2": Tiny(build=flux2, context=64, shape=(128, 8, 8), options=(("guidance", 4.0),)),
    "z_image": Tiny(build=z_image, context=64, shape=(16, 16, 16)),
    "qwen_image": Tiny(build=qwen_image, context=64, shape=(16, 1, 16, 16)),
    "wan": Tiny(build=wan, context=64, shape=(16, 3, 8, 8)),
    "anima": Tiny(build=anima, context=1024, shape=(16, 1, 16, 16)),
    "ltxv": Tiny(build=ltxv, context=64, mask=True, shape=(128, 2, 4, 4)),
}


def patcher(name: str, seed: int = 0, inference: bool = True) -> Any:
    """MODEL of a family with random weights, made in inference mode as ComfyUI's loaders run."""
    with torch.inference_mode(inference):
        model = randomize(FAMILIES[name].build(), seed)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def randomize(model: Any, seed: int) -> Any:
    """Unit gain and biases, also where families start from zero (gates, last layers): every path must count."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            value = torch.randn(p.shape, generator=rng) / p[0].numel() ** 0.5
        else:
            value = 0.5 * torch.randn(p.shape, generator=rng) + (1.0 if name.endswith(("weight", "scale")) else 0.0)
        p.data = value
    for name, b in model.named_buffers():
        if name.endswith("pos_embed"):  # SD3 leaves it as the memory was: sometimes NaN
            b.data = torch.randn(b.shape, generator=rng)
    return model


def conditioning(name: str, seed: int, tokens: int = TOKENS) -> list[Any]:
    """One prompt, as CLIPTextEncode would give it."""
    tiny = FAMILIES[name]
    rng = torch.Generator().manual_seed(seed)
    options = dict(tiny.options)
    if tiny.pooled:
        options["pooled_output"] = torch.randn(1, tiny.pooled, generator=rng)
    if tiny.mask:
        options["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    with torch.inference_mode():
        return [[torch.randn(1, tokens, tiny.context, generator=rng).clone(), options]]
