"""Where a headless run gets its model: the embedded shapes, or diffusers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import shapes
from .adapters import AdapterBank
from .conditioning import Cond
from .denoiser import NetDenoiser
from .families import Family, by_name, detect
from .inpaint import Partial
from .prompts import fingerprint

if TYPE_CHECKING:
    from .runfile import ModelSettings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SHAPES_SIZE = shapes.world.CANVAS


@dataclass(frozen=True, kw_only=True)
class Source:
    """A frozen network and what belongs to it."""

    net: nn.Module
    denoiser: NetDenoiser
    family: Family
    shape: tuple[int, int, int]  # of a latent
    device: torch.device
    encoder: str  # fingerprint of the text encoders and their settings
    encode: Callable[[Sequence[str]], Cond]
    free_text: Callable[[], None]
    checkpoint: Callable[[AdapterBank], None]
    pictures: Callable[[Tensor], Tensor] | None = None  # latents -> [n 3 h w] in -1..1
    latents: Callable[[Tensor], Tensor] | None = None  # the other way
    features: Callable[[Tensor], Tensor] | None = None  # pictures -> [n d], to compare them in
    partial: Partial | None = None  # the network, some of its tokens at a time
    view: Callable[[nn.Module, bool], NetDenoiser] | None = None  # of a copy of the network, checkpointed or not


def load_source(model: "ModelSettings", device: torch.device) -> Source:
    if model.dtype not in DTYPES:
        raise ValueError(f"[model] dtype is {model.dtype!r}; use one of {', '.join(DTYPES)}")
    return shapes_source(model, device) if model.path == "shapes" else diffusers_source(model, device)


def shapes_source(model: "ModelSettings", device: torch.device) -> Source:
    net, text = shapes.load_teacher().to(device), shapes.load_text_encoder().to(device)
    autoencoder, recogniser = shapes.load_autoencoder().to(device), shapes.load_recogniser().to(device)
    size = model.size or SHAPES_SIZE
    height = model.height or size

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Cond:
        return Cond(*text.encode(prompts))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return recogniser.features(images.to(device))

    return Source(
        net=net,
        denoiser=shapes.teacher.denoiser(net),
        family=detect(net),
        shape=(shapes.teacher.CHANNELS, height // 8, size // 8),
        device=device,
        encoder=fingerprint([text]),
        encode=encode,
        free_text=lambda: None,
        checkpoint=lambda bank: None,
        pictures=torch.no_grad()(lambda latents: autoencoder.decode(latents).clamp(-1, 1)),
        latents=torch.no_grad()(lambda images: autoencoder.encode(images.to(device))),
        features=features if size == height == SHAPES_SIZE else None,
        partial=shapes.teacher.Partial(net),
        view=lambda copied, _checkpointing: shapes.teacher.denoiser(copied),
    )


def diffusers_source(model: "ModelSettings", device: torch.device) -> Source:
    from .backends.diffusers import load

    bundle = load(model.path, device, DTYPES[model.dtype], config=model.config or None, size=model.size or None)
    size = model.size or bundle.native_size
    height = model.height or size

    def encode(prompts: Sequence[str]) -> Cond:
        return bundle.encode(prompts, height, size)

    has_vae = getattr(bundle.pipeline, "vae", None) is not None
    return Source(
        net=bundle.net,
        denoiser=bundle.denoiser,
        family=family_of(bundle.family, bundle.net),
        shape=bundle.latent_shape(height, size),
        device=device,
        encoder=fingerprint(bundle.text_encoders(), bundle.family, size, height),
        encode=encode,
        free_text=bundle.drop_text_encoders,
        checkpoint=bundle.checkpoint_blocks,
        view=bundle.view,
        pictures=torch.no_grad()(lambda latents: bundle.to_images(latents).clamp(-1, 1)) if has_vae else None,
        latents=torch.no_grad()(bundle.to_latents) if has_vae else None,
    )


def family_of(name: str, net: nn.Module) -> Family:
    """The pipeline names the family, whatever the width of the network; the two kinds of FLUX.1 differ in layers."""
    return detect(net) if name == "flux" else by_name({"sd21": "sd2"}.get(name, name))
