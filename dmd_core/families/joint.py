"""Transformers in which a text and an image stream attend jointly: SD3, Qwen-Image, Flux, Flux.2."""

from dataclasses import replace
from math import exp

from ..denoiser import Prediction
from .family import Family, Layers, Same
from .names import Names

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
# diffusers names that SD3, Flux and Qwen-Image share
_IMAGE = r"transformer_blocks\.\d+\.attn2?\.(?:to_[qkv]|to_out\.0)"
_TEXT = r"transformer_blocks\.\d+\.attn\.(?:add_[qkv]_proj|to_add_out)"
_TEXT_KV = r"transformer_blocks\.\d+\.attn\.add_[kv]_proj"
_SHARED = r"transformer_blocks_\d+_attn_(to_[qkv]|add_[qkv]_proj|to_add_out|to_out_0)$"


def _parts(block: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.attn.{n}" for n in names)


# --- SD3, SD3.5 -------------------------------------------------------------------------------------------------------


def _embedder(native: str, diffusers: str, layers: tuple[str, str]) -> tuple[Same, ...]:
    """Two linear layers, as timesteps, pooled text and guidance pass through."""
    pairs = zip(layers, ("linear_1", "linear_2"), strict=True)
    return tuple(Same(f"{native}.{a}", (f"{diffusers}.{b}",)) for a, b in pairs)


SD3_WIDTHS = (1536, 2432)  # medium, 3.5 large


def _is_sd3(seen: Names) -> bool:
    if seen.has(r"joint_blocks_\d+_(x_block|context_block)_"):
        return True
    if seen.has(_SHARED, r"transformer_blocks_\d+_ff(_context)?_net_", r"pos_embed_proj"):
        return True
    alone = not seen.has(r"single_transformer_blocks_") and not seen.has(r"transformer_blocks_\d+_(img|txt)_")
    return seen.has(_SHARED) and alone and seen.width(_SHARED) in SD3_WIDTHS


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3",
    recognises=_is_sd3,
    diffusers_mark=r"transformer_blocks_",
    layers=Layers(
        self_attention=rf"joint_blocks\.\d+\.x_block\.attn2?\.(?:qkv|proj)|{_IMAGE}",
        cross_attention=rf"joint_blocks\.\d+\.context_block\.attn\.(?:qkv|proj)|{_TEXT}",
        kv=rf"joint_blocks\.\d+\.context_block\.attn\.qkv|{_TEXT_KV}",
        rest=r"joint_blocks\.\d+\.(?:x|context)_block\.mlp\.fc[12]"
        r"|transformer_blocks\.\d+\.ff(?:_context)?\.net\.(?:0\.proj|2)",
    ),
    blocks=r"(?:joint_blocks|transformer_blocks)\.\d+",
    features=(r"joint_blocks\.\d+\.x_block\.mlp|transformer_blocks\.\d+\.ff",),
    prediction=Prediction.FLOW,
    latent_channels=16,
    downscale=8,
    shift=3.0,
    cfg=(4.0, 5.0),
    text_tokens=154,  # 77 of CLIP, 77 of T5
    lora="transformer",
    same=(
        Same("joint_blocks.{}.x_block.attn.qkv", _parts("transformer_blocks.{}", _QKV)),
        Same(
            "joint_blocks.{}.x_block.attn2.qkv",
            tuple(f"transformer_blocks.{{}}.attn2.{n}" for n in _QKV),
        ),
        Same("joint_blocks.{}.context_block.attn.qkv", _parts("transformer_blocks.{}", _ADDED)),
        Same("joint_blocks.{}.x_block.attn.proj", ("transformer_blocks.{}.attn.to_out.0",)),
        Same("joint_blocks.{}.x_block.attn2.proj", ("transformer_blocks.{}.attn2.to_out.0",)),
        Same("joint_blocks.{}.context_block.attn.proj", ("transformer_blocks.{}.attn.to_add_out",)),
        Same("joint_blocks.{}.x_block.mlp.fc1", ("transformer_blocks.{}.ff.net.0.proj",)),
        Same("joint_blocks.{}.x_block.mlp.fc2", ("transformer_blocks.{}.ff.net.2",)),
        Same("joint_blocks.{}.context_block.mlp.fc1", ("transformer_blocks.{}.ff_context.net.0.proj",)),
        Same("joint_blocks.{}.context_block.mlp.fc2", ("transformer_blocks.{}.ff_context.net.2",)),
        Same("joint_blocks.{}.x_block.adaLN_modulation.1", ("transformer_blocks.{}.norm1.linear",)),
        Same("context_embedder", ("context_embedder",)),
        Same("final_layer.linear", ("proj_out",)),
        Same("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
    ),
    whole=(
        Same("pos_embed", ("pos_embed.pos_embed",)),
        Same("x_embedder.proj", ("pos_embed.proj",)),
        *_embedder("t_embedder", "time_text_embed.timestep_embedder", ("mlp.0", "mlp.2")),
        *_embedder("y_embedder", "time_text_embed.text_embedder", ("mlp.0", "mlp.2")),
        *(
            Same(f"joint_blocks.{{}}.{native}.ln_{x}", (f"transformer_blocks.{{}}.{diffusers}_{x}",))
            for native, diffusers in (
                ("x_block.attn", "attn.norm"),
                ("x_block.attn2", "attn2.norm"),
                ("context_block.attn", "attn.norm_added"),
            )
            for x in "qk"
        ),
        # the text of the last block is modulated before attention only, as the final layer is
        Same(
            "joint_blocks.{last}.context_block.adaLN_modulation.1",
            ("transformer_blocks.{last}.norm1_context.linear",),
            swap=True,
        ),
        Same("joint_blocks.{}.context_block.adaLN_modulation.1", ("transformer_blocks.{}.norm1_context.linear",)),
    ),
    architecture="stable-diffusion-3",
    base_version="sd3m",
)


SHAPES_WIDTH = 192  # the embedded world's teacher


def _is_shapes(seen: Names) -> bool:
    return seen.has(r"joint_blocks_\d+_") and seen.width(r"joint_blocks_\d+_x_block_attn_qkv$") == SHAPES_WIDTH


SHAPES = replace(SD3, title="Shapes (SD3 layout)", recognises=_is_shapes, cfg=(2.0, 2.0), text_tokens=12)


# --- Qwen-Image -------------------------------------------------------------------------------------------------------

QWEN_WIDTH = 3072


def _is_qwen(seen: Names) -> bool:
    if seen.has(r"single_transformer_blocks_"):
        return False
    if seen.has(r"transformer_blocks_\d+_(img|txt)_(mlp_net|mod_1)"):
        return True
    # 60 blocks of width 3072; Flux has 19 such blocks
    return seen.has(_SHARED, r"transformer_blocks_[2-5]\d_") and seen.width(_SHARED) == QWEN_WIDTH


QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    recognises=_is_qwen,
    diffusers_mark=r"transformer_blocks_",  # ComfyUI keeps diffusers' names
    layers=Layers(
        self_attention=_IMAGE,
        cross_attention=_TEXT,
        kv=_TEXT_KV,
        rest=r"transformer_blocks\.\d+\.(?:img|txt)_mlp\.net\.(?:0\.proj|2)",
    ),
    blocks=r"transformer_blocks\.\d+",
    features=(r"transformer_blocks\.\d+\.img_mlp",),
    prediction=Prediction.FLOW,
    latent_channels=16,
    downscale=8,
    shift=exp(1.15),
    student_shift=3.0,  # Qwen-Image-Lightning
    cfg=(3.0, 5.0),
    lora="transformer",
    architecture="qwen-image",
    base_version="qwen_image",
)


# --- Flux -------------------------------------------------------------------------------------------------------------

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_FLUX_NATIVE = r"(double|single)_blocks_\d+_"
FLUX2_RATIO = 9


def _is_native_flux(seen: Names) -> bool:
    """Of the line at all: HunyuanVideo and Chroma have blocks of the same names."""
    foreign = (r"distilled_guidance_layer", r"txt_in_individual_token_refiner", r".*_mod_linear$")
    return seen.has(_FLUX_NATIVE) and not any(seen.has(p) for p in foreign)


def _is_flux2(seen: Names) -> bool:
    if seen.has(r"single_transformer_blocks_\d+_attn_to_qkv_mlp_proj") or seen.has(r"double_stream_modulation_img"):
        return True
    if seen.has(r"transformer_blocks_\d+_ff(_context)?_linear_(in|out)$"):
        return True
    if not _is_native_flux(seen):
        return False
    # gated feed-forward layers are wider: 3 + 2 * 3 against 3 + 4, 2 * 3 against 4
    return seen.ratio(r"single_blocks_\d+_linear1$") == FLUX2_RATIO or seen.ratio(r"double_.*_mlp_0$") == 6


def _is_flux(seen: Names) -> bool:
    if seen.has(r"single_transformer_blocks_\d+_(proj_mlp|attn_to_[qkv])$"):
        return not seen.has(r"distilled_guidance_layer")
    if not _is_native_flux(seen) or _is_flux2(seen):
        return False
    if seen.has(r"double_blocks_(19|[2-9]\d)_") or seen.has(r"single_blocks_(3[89]|[4-9]\d)_"):
        return False
    modulated = seen.has(r"(double_blocks_\d+_(img|txt)_mod_lin|single_blocks_\d+_modulation_lin)$")
    return modulated or seen.ratio(r"single_blocks_\d+_linear1$") == 7 or seen.ratio(r"double_.*_mlp_0$") == 4


def _is_schnell(seen: Names) -> bool:
    whole = seen.has(r"img_in$") or seen.has(r"x_embedder$")
    return _is_flux(seen) and whole and not seen.has(r"(guidance_in|time_text_embed_guidance_embedder)")


def _flux_stream(native: str, added: str, parts: tuple[str, ...], out: str, mod: str) -> tuple[Same, ...]:
    return (
        Same(f"double_blocks.{{}}.{native}_attn.qkv", _parts(_DOUBLE, parts)),
        Same(f"double_blocks.{{}}.{native}_attn.proj", (f"{_DOUBLE}.attn.{out}",)),
        Same(f"double_blocks.{{}}.{native}_mlp.0", (f"{_DOUBLE}.{added}.net.0.proj",)),
        Same(f"double_blocks.{{}}.{native}_mlp.2", (f"{_DOUBLE}.{added}.net.2",)),
        Same(f"double_blocks.{{}}.{native}_mod.lin", (f"{_DOUBLE}.{mod}.linear",)),
    )


def _flux_norms() -> tuple[Same, ...]:
    """Their parameter is `scale` in the authors' files."""
    places = (
        ("double_blocks.{}.img_attn", f"{_DOUBLE}.attn.norm"),
        ("double_blocks.{}.txt_attn", f"{_DOUBLE}.attn.norm_added"),
        ("single_blocks.{}", f"{_SINGLE}.attn.norm"),
    )
    return tuple(
        Same(f"{native}.norm.{name}_norm.scale", (f"{diffusers}_{name[0]}.weight",))
        for native, diffusers in places
        for name in ("query", "key")
    )


_IN_OUT = ("in_layer", "out_layer")
_FLUX_ENDS = (
    Same("img_in", ("x_embedder",)),
    Same("txt_in", ("context_embedder",)),
    Same("final_layer.linear", ("proj_out",)),
    Same("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
)
FLUX = Family(
    name="flux",
    title="FLUX.1",
    recognises=_is_flux,
    diffusers_mark=r"(single_)?transformer_blocks_",
    layers=Layers(
        self_attention=r"double_blocks\.\d+\.img_attn\.(?:qkv|proj)|single_blocks\.\d+\.linear[12]"
        rf"|{_IMAGE}|single_transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_qkv_mlp_proj|to_out)",
        cross_attention=rf"double_blocks\.\d+\.txt_attn\.(?:qkv|proj)|{_TEXT}",
        kv=rf"double_blocks\.\d+\.txt_attn\.qkv|{_TEXT_KV}",
        rest=r"double_blocks\.\d+\.(?:img|txt)_mlp\.[02]"
        r"|transformer_blocks\.\d+\.ff(?:_context)?\.(?:net\.0\.proj|net\.2|linear_in|linear_out)"
        r"|single_transformer_blocks\.\d+\.(?:proj_mlp|proj_out)",
    ),
    blocks=r"(?:double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.\d+",
    # diffusers' blocks return text first; ComfyUI's double blocks return the image first
    features=(
        r"double_blocks\.\d+|transformer_blocks\.\d+\.ff",
        r"single_blocks\.\d+|single_transformer_blocks\.\d+\.(?:proj_out|attn\.to_out)",
    ),
    prediction=Prediction.FLOW,
    latent_channels=16,
    downscale=8,
    shift=exp(1.15),
    cfg=(1.0, 1.0),
    embedded_guidance=3.5,
    text_tokens=256,
    lora="transformer",
    same=(
        *_flux_stream("img", "ff", _QKV, "to_out.0", "norm1"),
        *_flux_stream("txt", "ff_context", _ADDED, "to_add_out", "norm1_context"),
        Same("single_blocks.{}.linear1", (*_parts(_SINGLE, _QKV), f"{_SINGLE}.proj_mlp")),
        Same("single_blocks.{}.linear2", (f"{_SINGLE}.proj_out",)),
        Same("single_blocks.{}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
        *_FLUX_ENDS,
    ),
    whole=(
        *_flux_norms(),
        *_embedder("time_in", "time_text_embed.timestep_embedder", _IN_OUT),
        *_embedder("vector_in", "time_text_embed.text_embedder", _IN_OUT),
        *_embedder("guidance_in", "time_text_embed.guidance_embedder", _IN_OUT),
    ),
    architecture="flux-1-dev",
    base_version="flux1",
)
FLUX_SCHNELL = replace(
    FLUX,
    title="FLUX.1-schnell",
    recognises=_is_schnell,
    shift=1.0,
    embedded_guidance=None,
    architecture="flux-1-schnell",
)
FLUX2 = replace(
    FLUX,
    name="flux2",
    title="FLUX.2",
    recognises=_is_flux2,
    latent_channels=128,
    downscale=16,
    shift=exp(2.02),
    embedded_guidance=4.0,
    text_tokens=512,
    same=(
        Same("double_blocks.{}.img_attn.qkv", _parts(_DOUBLE, _QKV)),
        Same("double_blocks.{}.txt_attn.qkv", _parts(_DOUBLE, _ADDED)),
        Same("double_blocks.{}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
        Same("double_blocks.{}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
        Same("double_blocks.{}.img_mlp.0", (f"{_DOUBLE}.ff.linear_in",)),
        Same("double_blocks.{}.img_mlp.2", (f"{_DOUBLE}.ff.linear_out",)),
        Same("double_blocks.{}.txt_mlp.0", (f"{_DOUBLE}.ff_context.linear_in",)),
        Same("double_blocks.{}.txt_mlp.2", (f"{_DOUBLE}.ff_context.linear_out",)),
        Same("single_blocks.{}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
        Same("single_blocks.{}.linear2", (f"{_SINGLE}.attn.to_out",)),
        *_FLUX_ENDS,
    ),
    whole=(
        *_flux_norms(),
        *_embedder("time_in", "time_guidance_embed.timestep_embedder", _IN_OUT),
        *_embedder("guidance_in", "time_guidance_embed.guidance_embedder", _IN_OUT),
        *(
            Same(f"{n}.lin", (f"{n}.linear",))
            for n in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        ),
    ),
    architecture="flux-2",
    base_version="flux2",
)
