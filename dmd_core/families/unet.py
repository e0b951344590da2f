"""UNets of the Stable Diffusion line: SD 1.x, SD 2.x, SDXL."""

from dataclasses import replace

from ..denoiser import Prediction
from .family import Family, Layers
from .names import Names

_ATTENTION = r"(?:to_q|to_k|to_v|to_out\.0)"
_LAYERS = Layers(
    self_attention=rf".*\.attn1\.{_ATTENTION}",
    cross_attention=rf".*\.attn2\.{_ATTENTION}",
    kv=r".*\.attn2\.(?:to_k|to_v)",
    # with attention these are the 788 (SDXL) and 278 (SD 1.5) layers that DMD2, LCM and Hyper-SD adapt
    rest=r".*\.ff\.net\.(?:0\.proj|2)|.*\.proj_(?:in|out)"
    r"|(?:input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+\.(?:in_layers\.2|emb_layers\.1|out_layers\.3"
    r"|skip_connection|op|conv)"
    r"|.*\.resnets\.\d+\.(?:conv1|conv2|time_emb_proj|conv_shortcut)|.*\.(?:down|up)samplers\.0\.conv",
)

# 768, 1024, 2048: the text width is what tells the three lines apart in real files
SD1_WIDTH, SD2_WIDTH, SDXL_WIDTH = 768, 1024, 2048
_CROSS = r".*attn2_to_[kv]$"
# attention at the first level, or a fourth level: only SD 1.x and 2.x
_SD1_MARK = (
    r"(input_blocks_[12]_1_transformer|input_blocks_(9|10|11)_|output_blocks_(9|10|11)_"
    r"|down_blocks_0_attentions|down_blocks_3|up_blocks_3)"
)
# a vector condition, or more than one transformer block per layer: only SDXL
_SDXL_MARK = r"(label_emb_|add_embedding_|.*_transformer_blocks_[1-9]\d*_)"


def _is_unet(seen: Names) -> bool:
    foreign = (r".*time_stack", r".*motion_modules", r".*temporal", r"input_hint_block|controlnet_|zero_convs")
    if any(seen.has(p) for p in foreign):  # video UNets and ControlNets share the names
        return False
    return seen.has(r"(input_blocks|output_blocks)_\d+_\d") or seen.has(
        r"(down|up)_blocks_\d+_(attentions|resnets|downsamplers|upsamplers)_|mid_block_(attentions|resnets)_"
    )


def _is_sdxl(seen: Names) -> bool:
    if not _is_unet(seen):
        return False
    width = seen.width(_CROSS)
    if width in (SD1_WIDTH, SD2_WIDTH, SDXL_WIDTH):
        return width == SDXL_WIDTH
    return seen.has(_SDXL_MARK) and not seen.has(_SD1_MARK)


def _is_sd1(seen: Names) -> bool:
    if not _is_unet(seen):
        return False
    width = seen.width(_CROSS)
    if width in (SD1_WIDTH, SD2_WIDTH, SDXL_WIDTH):
        return width == SD1_WIDTH
    return seen.has(_SD1_MARK) and not seen.has(_SDXL_MARK)


def _is_sd2(seen: Names) -> bool:
    return _is_unet(seen) and seen.width(_CROSS) == SD2_WIDTH


SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5",
    recognises=_is_sd1,
    diffusers_mark=r"(down_blocks|up_blocks|mid_block)_",
    layers=_LAYERS,
    blocks=r"(?:input|output)_blocks\.[1-9]\d*\.0|output_blocks\.0\.0|middle_block\.[02]|.*\.resnets\.\d+"
    r"|.*\.transformer_blocks\.\d+",
    # ComfyUI calls the layers of a block one by one, so its blocks themselves have no output to read
    features=(
        r"input_blocks\.[1-9]\d*\.0|down_blocks\.\d+\.resnets\.\d+",
        r"middle_block\.2|mid_block\.resnets\.1",
        r"output_blocks\.\d+\.0|up_blocks\.\d+\.resnets\.\d+",
    ),
    prediction=Prediction.EPS,
    latent_channels=4,
    downscale=8,
    betas=("scaled_linear", 0.00085, 0.012),
    cfg=(1.75, 3.0),
    lora="kohya",
    architecture="stable-diffusion-v1",
    base_version="sd_v1",
)
SD2 = replace(
    SD15,
    name="sd2",
    title="Stable Diffusion 2",
    recognises=_is_sd2,
    architecture="stable-diffusion-v2-512",
    base_version="sd_v2",
)
SDXL = replace(
    SD15,
    name="sdxl",
    title="Stable Diffusion XL",
    recognises=_is_sdxl,
    cfg=(5.0, 8.0),
    one_step=399,  # DMD2's one-step SDXL; needs unit noise at that level
    architecture="stable-diffusion-xl-v1-base",
    base_version="sdxl_base_v1-0",
)
