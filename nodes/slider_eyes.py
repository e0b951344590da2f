"""What looks at the pictures: a CLIP_VISION (DINOv2 too), or the model's own features where none is wired."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dmd_core.families import Family
from ..dmd_core.sliders import own_features
from ..dmd_core.weights.checkpoint import base_hash
from .comfy_autograd import KeepInputs, own_weights
from .comfy_source import NativeTeacher

ENCODERS = ("clip_vision_model", "siglip_vision_model", "dinov2")  # whose attention has a backward on every device
LEVEL = 0.15  # of the timesteps: the noise level at which the model's own layers are read


@dataclass(frozen=True)
class Eyes:
    embed: Callable[[Tensor], Tensor]  # latents -> [b d], differentiable
    name: str


OWN = "the model itself"


def eyes_of(clip_vision: Any) -> str:
    """What will look, before anything is loaded; two encoders of one kind are told apart by their weights."""
    if clip_vision is None:
        return OWN
    weights = {f"diffusion_model.{k}": v for k, v in clip_vision.model.state_dict().items()}
    return f"{title_of(clip_vision)}, {base_hash(weights)}"


def title_of(clip_vision: Any) -> str:
    return f"{clip_vision.model_type.replace('_model', '')}, {clip_vision.image_size} pixels"


def own_eyes(teacher: NativeTeacher, model: Any, family: Family, empty: Any) -> Eyes:
    """The middle one of the layers that the family is judged in, at a low noise level and with the empty prompt."""
    try:
        (layer,) = family.feature_layers([n for n, _ in teacher.net.named_modules() if n], 1)
    except ValueError as error:
        raise ValueError(f"{error}: connect a CLIP_VISION and the VAE, which then look at the pictures") from error
    top = teacher.schedule.timestep(torch.tensor([teacher.schedule.sigma_max]))
    sigma = float(teacher.schedule.sigma((LEVEL * top).to(top.dtype))[0])
    embed = own_features(model, teacher.net, [layer], empty, sigma)
    return Eyes(embed, f"{OWN} ({layer})")


def clip_eyes(teacher: NativeTeacher, clip_vision: Any, vae: Any) -> Eyes:
    """Through the VAE's decoder and the image encoder, both with a gradient."""
    if vae is None:
        raise ValueError("a CLIP_VISION looks at pictures, and without a VAE there are none; connect the VAE too")
    if clip_vision.model_type not in ENCODERS:
        raise ValueError(
            f"the CLIP_VISION is a {clip_vision.model_type}; connect a CLIP vision, SigLIP or DINOv2 model"
        )

    def load() -> None:
        """All three at once, and again when one was pushed out."""
        wanted, present = [vae.patcher, clip_vision.patcher, teacher.patcher], mm.loaded_models()
        if not all(any(p is q for q in present) for p in wanted):
            mm.load_models_gpu(wanted)
            teacher.load()
        for net in (vae.first_stage_model, clip_vision.model):  # a preview may have loaded it in inference mode
            own_weights(net, next(net.parameters()).device)
            net.requires_grad_(False)

    def embed(latents: Tensor) -> Tensor:
        load()
        samples = teacher.latent_out(latents).to(vae.device, vae.vae_dtype)
        with KeepInputs() if torch.is_grad_enabled() else nullcontext():  # image encoders add in place
            pictures = vae.first_stage_model.decode(samples)
            pictures = pictures[:, :, 0] if pictures.ndim == 5 else pictures  # of a video, the first frame
            seen = prepared(vae.process_output(pictures.float().clone()), clip_vision).to(clip_vision.load_device)
            out = clip_vision.model(pixel_values=seen, intermediate_output=-2)
        return F.normalize(out[2].float(), dim=1).to(latents.device)

    return Eyes(embed, title_of(clip_vision))


def prepared(pictures: Tensor, clip_vision: Any) -> Tensor:
    """What the stock encode node does, less its rounding to 8 bits, which has no gradient. [n 3 h w] in 0..1"""
    size = clip_vision.image_size
    scale = size / min(pictures.shape[-2:])
    wanted = [round(scale * s) for s in pictures.shape[-2:]]
    pictures = F.interpolate(pictures[:, :3], wanted, mode="bicubic", antialias=True)
    top, left = ((s - size) // 2 for s in wanted)
    pictures = pictures[..., top : top + size, left : left + size].clamp(0, 1)
    mean, std = (torch.tensor(v).to(pictures)[:, None, None] for v in (clip_vision.image_mean, clip_vision.image_std))
    return (pictures - mean) / std
