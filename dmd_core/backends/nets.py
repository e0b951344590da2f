"""How each family's network is called and its prompts are encoded; what its scheduler config means to the engine."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..conditioning import Cond
from ..denoiser import Prediction
from ..schedule import ZERO_TERMINAL_ALPHA_BAR, Discrete, Flow, Schedule

# --- network calls: (net, x, timestep, cond) -> raw output shaped like x; x decides the dtype


def call_unet(net: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    added = None
    if "time_ids" in cond.extras:
        # time ids stay fp32: sizes above 2048 are not exact in half precision
        added = {"text_embeds": pooled(cond, x), "time_ids": cond.extras["time_ids"].to(x.device)}
    cross = cond.cross.to(x)
    return net(x, t, encoder_hidden_states=cross, added_cond_kwargs=added, return_dict=False)[0]


def call_sd3(net: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return net(x, cond.cross.to(x), pooled(cond, x), t, return_dict=False)[0]


def call_flux(net: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Packs 2x2 patches into tokens; the network multiplies its time by 1000 itself."""
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        raise ValueError(f"latent is {list(x.shape)}; Flux takes even heights and widths (pixels in multiples of 16)")
    guidance = None
    if net.config.guidance_embeds:
        if "guidance" not in cond.extras:
            raise ValueError(
                "this Flux embeds its guidance and the conditioning carries none; "
                "add extras={'guidance': tensor of one number per prompt} (3.5 is usual), as encode() does"
            )
        guidance = cond.extras["guidance"].to(x)
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    # made in place: a copy to a GPU would make the host wait. fp32: positions above 256 are not exact in bf16
    axes = (torch.arange(n, device=x.device, dtype=torch.float32) for n in (rows, columns))
    row, column = torch.meshgrid(*axes, indexing="ij")
    image_ids = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
    out = net(
        rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        cond.cross.to(x),
        pooled(cond, x),
        t / 1000,
        image_ids,
        torch.zeros(cond.cross.shape[1], 3, device=x.device),
        guidance,
        return_dict=False,
    )[0]
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


def call_pixart(net: Any, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The second half of the output channels is a learned variance, which nobody here uses."""
    sizes = {k: cond.extras[k].to(x) if k in cond.extras else None for k in ("resolution", "aspect_ratio")}
    mask = cond.extras["mask"].to(x) if "mask" in cond.extras else None
    out = net(
        x,
        encoder_hidden_states=cond.cross.to(x),
        timestep=t,
        added_cond_kwargs=sizes,
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]


def pooled(cond: Cond, x: Tensor) -> Tensor:
    if cond.pooled is None:
        raise ValueError("this family needs a pooled text vector and the conditioning has none; use its own encode()")
    return cond.pooled.to(x)


# --- prompts: (pipeline, prompts, device) -> cross, pooled, extras. The pipelines' own code, so equal to the host's.
# An empty prompt is encoded as text, as ComfyUI does; the SDXL pipeline alone would use zeros for a missing negative.


def encode_sd(pipe: Any, prompts: list[str], device: torch.device) -> Cond:
    return Cond(pipe.encode_prompt(prompts, device, 1, False)[0])


def encode_two_clips(pipe: Any, prompts: list[str], device: torch.device) -> Cond:
    cross, _, vector, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return Cond(cross, vector)


def encode_sd3(pipe: Any, prompts: list[str], device: torch.device) -> Cond:
    cross, _, vector, _ = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
    return Cond(cross, vector)


def encode_flux(pipe: Any, prompts: list[str], device: torch.device) -> Cond:
    tokens = 512 if pipe.transformer.config.guidance_embeds else 256  # schnell was trained with 256
    cross, vector, _ = pipe.encode_prompt(prompts, None, device=device, max_sequence_length=tokens)
    return Cond(cross, vector)


def encode_pixart(pipe: Any, prompts: list[str], device: torch.device) -> Cond:
    cross, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
    return Cond(cross, extras={"mask": mask})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between pipelines: calling the network, encoding prompts, finding both in a single file."""

    family: str
    net: str  # name of the component
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor]
    encode: Callable[[Any, list[str], torch.device], Cond]
    flow: bool = False
    patch: int = 1  # latent pixels that must come in multiples
    in_file: Mapping[str, str]  # text encoder -> key prefix in an all-in-one checkpoint


CLIP_T5 = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.t5xxl."}
SD3_TEXT = {
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
SDXL_TEXT = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}
SD = Kind(family="sd15", net="unet", call=call_unet, encode=encode_sd, in_file={"text_encoder": "cond_stage_model."})
SDXL = Kind(family="sdxl", net="unet", call=call_unet, encode=encode_two_clips, in_file=SDXL_TEXT)
SD3 = Kind(family="sd3", net="transformer", call=call_sd3, encode=encode_sd3, flow=True, patch=2, in_file=SD3_TEXT)
FLUX = Kind(family="flux", net="transformer", call=call_flux, encode=encode_flux, flow=True, patch=2, in_file=CLIP_T5)
PIXART = Kind(
    family="pixart", net="transformer", call=call_pixart, encode=encode_pixart, patch=2, in_file={"text_encoder": "t5."}
)
PIPELINES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
    "PixArtAlphaPipeline": PIXART,
    "PixArtSigmaPipeline": PIXART,
}


def native_size(net: Any, factor: int) -> int:
    size = getattr(net.config, "sample_size", None) or 128  # Flux has no size of its own: 1024 pixels
    return (size if isinstance(size, int) else size[0]) * factor


def latent_channels(net: Any, kind: Kind) -> int:
    return net.config.in_channels // 4 if kind is FLUX else net.config.in_channels


# --- noise schedules


def schedule_of(scheduler: Any, kind: Kind, size: int) -> tuple[Schedule, Prediction]:
    """The training schedule that a scheduler config describes; size in pixels, for shifts that depend on it."""
    config = scheduler.config
    if kind.flow:
        if "shift" not in config:
            raise ValueError(
                f"scheduler {type(scheduler).__name__} has no flow shift; {kind.family} takes "
                "FlowMatchEulerDiscreteScheduler"
            )
        return Flow(shift=flow_shift(config, (size // 16) ** 2)), Prediction.FLOW
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    predictions = {"epsilon": Prediction.EPS, "v_prediction": Prediction.V}
    kind_of_output = config.get("prediction_type", "epsilon")
    if alpha_bar is None or kind_of_output not in predictions:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} with prediction {kind_of_output!r} cannot be used; "
            "a DDPM-family scheduler (DDIM, Euler, DPM-Solver, PNDM) with 'epsilon' or 'v_prediction' can"
        )
    alpha_bar = alpha_bar.double().cpu().clone()
    if config.get("rescale_betas_zero_snr"):
        alpha_bar[-1] = ZERO_TERMINAL_ALPHA_BAR  # diffusers' schedulers disagree about this one; ComfyUI's value
    return Discrete(alpha_bar), predictions[kind_of_output]


def flow_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Flux's shift grows with the number of image tokens: exp(mu), mu linear between two sizes."""
    if not config.get("use_dynamic_shifting"):
        return float(config["shift"])
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (top - base) * (tokens - low) / (high - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
