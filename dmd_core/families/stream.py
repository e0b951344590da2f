"""Transformers with one token stream: Z-Image, Wan, PixArt; and the fallback for families that have no name here."""

from ..denoiser import Prediction
from .family import Family, Layers, Same
from .names import Names

_QKV = ("to_q", "to_k", "to_v")

# --- Z-Image ----------------------------------------------------------------------------------------------------------

Z_IMAGE_WIDTH = 3840
_Z_BLOCK = r"(layers|noise_refiner|context_refiner)"
_Z_PATH = r"(?:layers|noise_refiner|context_refiner)\.\d+"
_Z_ATTENTION = rf"{_Z_PATH}\.attention\.(?:qkv|out|to_[qkv]|to_out\.0)"


def _is_z_image(seen: Names) -> bool:
    if not seen.has(rf"{_Z_BLOCK}_\d+_(attention|feed_forward)_"):
        return False
    # Lumina 2 has the same blocks, but modulates through layer 1 of a pair
    if seen.has(rf"{_Z_BLOCK}_\d+_adaLN_modulation_0") or seen.has(rf"{_Z_BLOCK}_\d+_attention_to_[qkv]$"):
        return True
    return seen.width(rf"{_Z_BLOCK}_\d+_(attention_(qkv|out)|feed_forward_w[13])$") == Z_IMAGE_WIDTH


def _z_block(block: str) -> tuple[Same, ...]:
    return (
        Same(f"{block}.attention.qkv", tuple(f"{block}.attention.{n}" for n in _QKV)),
        Same(f"{block}.attention.out", (f"{block}.attention.to_out.0",)),
        *(Same(f"{block}.feed_forward.w{i}", (f"{block}.feed_forward.w{i}",)) for i in (1, 2, 3)),
    )


def _alike(*names: str) -> tuple[Same, ...]:
    """Layers and tables of one name in both."""
    return tuple(Same(n, (n,)) for n in names)


def _z_whole(block: str) -> tuple[Same, ...]:
    norms = (Same(f"{block}.attention.{x}_norm", (f"{block}.attention.norm_{x}",)) for x in "qk")
    plain = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation.0")
    return (*norms, *_alike(*(f"{block}.{n}" for n in plain)))


Z_IMAGE = Family(
    name="z_image",
    title="Z-Image",
    recognises=_is_z_image,
    diffusers_mark=rf"{_Z_BLOCK}_\d+_attention_to_|all_x_embedder",
    layers=Layers(
        self_attention=_Z_ATTENTION,
        cross_attention=_Z_ATTENTION,
        kv=rf"{_Z_PATH}\.attention\.(?:qkv|to_[kv])",
        rest=rf"{_Z_PATH}\.feed_forward\.w[123]",
    ),
    blocks=_Z_PATH,
    features=(r"noise_refiner\.\d+", r"layers\.\d+"),
    prediction=Prediction.FLOW,
    latent_channels=16,
    downscale=8,
    shift=3.0,
    cfg=(3.0, 5.0),
    lora="transformer",
    same=(
        *_z_block("layers.{}"),
        *_z_block("noise_refiner.{}"),
        *_z_block("context_refiner.{}"),
        Same("x_embedder", ("all_x_embedder.2-1",)),
        Same("final_layer.linear", ("all_final_layer.2-1.linear",)),
    ),
    whole=(
        *_z_whole("layers.{}"),
        *_z_whole("noise_refiner.{}"),
        *_z_whole("context_refiner.{}"),
        Same("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
        *_alike("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1"),
        *_alike("x_pad_token", "cap_pad_token"),
    ),
    architecture="z-image",
    base_version="zimage",
)


# --- Wan 2.1 and 2.2 --------------------------------------------------------------------------------------------------


def _is_wan(seen: Names) -> bool:
    native = seen.has(r"blocks_\d+_(self_attn|cross_attn)_[qkvo]$")
    return native or seen.has(r"blocks_\d+_attn[12]_to_[qkv]$")


def _wan_attention(native: str, diffusers: str) -> tuple[Same, ...]:
    pairs = zip("qkvo", (*_QKV, "to_out.0"), strict=True)
    return tuple(Same(f"blocks.{{}}.{native}.{a}", (f"blocks.{{}}.{diffusers}.{b}",)) for a, b in pairs)


WAN = Family(
    name="wan",
    title="Wan",
    recognises=_is_wan,
    diffusers_mark=r"blocks_\d+_attn[12]_to_|condition_embedder",
    layers=Layers(
        self_attention=r"blocks\.\d+\.self_attn\.[qkvo]|blocks\.\d+\.attn1\.(?:to_[qkv]|to_out\.0)",
        cross_attention=r"blocks\.\d+\.cross_attn\.(?:[qkvo]|[kv]_img)"
        r"|blocks\.\d+\.attn2\.(?:to_[qkv]|to_out\.0|add_[kv]_proj)",
        kv=r"blocks\.\d+\.cross_attn\.(?:[kv]|[kv]_img)|blocks\.\d+\.attn2\.(?:to_[kv]|add_[kv]_proj)",
        rest=r"blocks\.\d+\.ffn\.(?:[02]|net\.0\.proj|net\.2)",
    ),
    blocks=r"blocks\.\d+",
    features=(r"blocks\.\d+",),
    prediction=Prediction.FLOW,
    latent_channels=16,
    downscale=8,
    shift=8.0,
    student_shift=5.0,  # lightx2v, Self-Forcing
    cfg=(3.5, 6.0),
    text_tokens=0,  # text has attention of its own
    lora="diffusion_model",
    same=(
        *_wan_attention("self_attn", "attn1"),
        *_wan_attention("cross_attn", "attn2"),
        Same("blocks.{}.cross_attn.k_img", ("blocks.{}.attn2.add_k_proj",)),
        Same("blocks.{}.cross_attn.v_img", ("blocks.{}.attn2.add_v_proj",)),
        Same("blocks.{}.ffn.0", ("blocks.{}.ffn.net.0.proj",)),
        Same("blocks.{}.ffn.2", ("blocks.{}.ffn.net.2",)),
        Same("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
        Same("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
        Same("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
        Same("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
        Same("time_projection.1", ("condition_embedder.time_proj",)),
        Same("head.head", ("proj_out",)),
    ),
    whole=(
        Same("patch_embedding", ("patch_embedding",)),
        *(
            Same(f"blocks.{{}}.{native}.norm_{x}", (f"blocks.{{}}.{diffusers}.norm_{x}",))
            for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
            for x in "qk"
        ),
        Same("blocks.{}.cross_attn.norm_k_img", ("blocks.{}.attn2.norm_added_k",)),
        Same("blocks.{}.norm3", ("blocks.{}.norm2",)),
        Same("blocks.{}.modulation", ("blocks.{}.scale_shift_table",)),
        Same("head.modulation", ("scale_shift_table",)),
        *(
            Same(f"img_emb.{native}", (f"condition_embedder.image_embedder.{diffusers}",))
            for native, diffusers in (
                ("proj.0", "norm1"),
                ("proj.1", "ff.net.0.proj"),
                ("proj.3", "ff.net.2"),
                ("proj.4", "norm2"),
                ("emb_pos", "pos_embed"),
            )
        ),
    ),
    architecture="wan2.1",
    base_version="wan",
)


# --- PixArt -----------------------------------------------------------------------------------------------------------

PIXART_WIDTH = 1152


def _is_pixart(seen: Names) -> bool:
    if seen.has(r"blocks_\d+_cross_attn_(kv_linear|q_linear)$"):
        return True
    attention = r"transformer_blocks_\d+_attn[12]_to_[qkv]$"
    # LTX-Video has the same blocks, without an image position embedding, twice as wide
    return seen.has(attention) and (
        seen.has(r"pos_embed_proj", r"adaln_single_") or seen.width(rf"{attention}") == PIXART_WIDTH
    )


_PIXART = "transformer_blocks.{}"
PIXART = Family(
    name="pixart",
    title="PixArt",
    recognises=_is_pixart,
    diffusers_mark=r"transformer_blocks_",
    layers=Layers(
        self_attention=r"blocks\.\d+\.attn\.(?:qkv|proj)|transformer_blocks\.\d+\.attn1\.(?:to_[qkv]|to_out\.0)",
        cross_attention=r"blocks\.\d+\.cross_attn\.(?:q_linear|kv_linear|proj)"
        r"|transformer_blocks\.\d+\.attn2\.(?:to_[qkv]|to_out\.0)",
        kv=r"blocks\.\d+\.cross_attn\.kv_linear|transformer_blocks\.\d+\.attn2\.to_[kv]",
        rest=r"blocks\.\d+\.mlp\.fc[12]|transformer_blocks\.\d+\.ff\.net\.(?:0\.proj|2)",
    ),
    blocks=r"(?:transformer_)?blocks\.\d+",
    features=(r"(?:transformer_)?blocks\.\d+",),
    prediction=Prediction.EPS,
    latent_channels=4,
    downscale=8,
    betas=("linear", 0.0001, 0.02),
    cfg=(3.5, 5.5),
    lora="transformer",
    same=(
        Same("blocks.{}.attn.qkv", tuple(f"{_PIXART}.attn1.{n}" for n in _QKV)),
        Same("blocks.{}.attn.proj", (f"{_PIXART}.attn1.to_out.0",)),
        Same("blocks.{}.cross_attn.q_linear", (f"{_PIXART}.attn2.to_q",)),
        Same("blocks.{}.cross_attn.kv_linear", (f"{_PIXART}.attn2.to_k", f"{_PIXART}.attn2.to_v")),
        Same("blocks.{}.cross_attn.proj", (f"{_PIXART}.attn2.to_out.0",)),
        Same("blocks.{}.mlp.fc1", (f"{_PIXART}.ff.net.0.proj",)),
        Same("blocks.{}.mlp.fc2", (f"{_PIXART}.ff.net.2",)),
        Same("t_block.1", ("adaln_single.linear",)),
        Same("final_layer.linear", ("proj_out",)),
    ),
    whole=(
        Same("x_embedder.proj", ("pos_embed.proj",)),
        Same("blocks.{}.scale_shift_table", ("transformer_blocks.{}.scale_shift_table",)),
        Same("final_layer.scale_shift_table", ("scale_shift_table",)),
        Same("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
        Same("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
        *(
            Same(f"{native}.mlp.{i}", (f"adaln_single.emb.{diffusers}_embedder.linear_{j}",))
            for native, diffusers in (
                ("t_embedder", "timestep"),
                ("csize_embedder", "resolution"),
                ("ar_embedder", "aspect_ratio"),
            )
            for i, j in ((0, 1), (2, 2))
        ),
    ),
    architecture="pixart-sigma",
    base_version="pixart",
)


# --- anything else ----------------------------------------------------------------------------------------------------

# repeated blocks only; ends, embedders, modulations and norms stay as they are
_INSIDE = r"(?!.*(?:mod\b|_mod|modulation|adaln|adaLN|embed|norm|head\b|pos_)).*\.\d+\."
_CROSS = r"(?:cross|attn2|context_block|txt_attn|add_[qkv]|encoder_attn)"
GENERIC = Family(
    name="generic",
    title="a family without a name here",
    recognises=lambda seen: True,
    diffusers_mark=r"(?!)",  # none: names are written as they are
    layers=Layers(
        self_attention=rf"(?!.*{_CROSS}){_INSIDE}.*att[en].*",
        cross_attention=rf"{_INSIDE}.*{_CROSS}.*",
        kv=rf"{_INSIDE}.*{_CROSS}.*(?:[._](?:to_)?[kv]|kv(?:_linear)?|qkv|[kv]_proj|add_[kv]_proj)",
        rest=rf"(?!.*att[en]){_INSIDE}.*",
    ),
    blocks=r"[^.]*(?:blocks|layers)\.\d+",
    features=(r"[^.]*(?:blocks|layers)\.\d+",),
    prediction=Prediction.FLOW,
    latent_channels=16,
    downscale=8,
    cfg=(3.0, 5.0),
    lora="diffusion_model",
)
