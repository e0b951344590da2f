"""A loaded diffusers model: its denoiser, and what turns prompts and pictures into what the denoiser takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from .. import conditioning
from ..adapters import AdapterBank
from ..conditioning import Cond
from ..denoiser import NetDenoiser
from .nets import Kind, latent_channels, native_size

PROMPTS_AT_ONCE = 16  # a T5 batch this large stays near 1 GB of activations
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, kw_only=True, repr=False)  # a network's repr fills screens
class Bundle:
    """Frozen weights; train adapters on `net` (AdapterBank) or on a deepcopy of it."""

    family: str
    net: Any  # diffusers' module, frozen and in eval mode
    denoiser: NetDenoiser
    kind: Kind
    pipeline: Any  # text encoders, tokenizers and VAE; parts that were not on disk are None
    device: torch.device

    @property
    def factor(self) -> int:
        """Pixels per latent pixel."""
        return self.pipeline.vae_scale_factor

    @property
    def native_size(self) -> int:
        """Side in pixels that the network was trained at."""
        return native_size(self.net, self.factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        step = self.factor * self.kind.patch
        if height < step or width < step or height % step or width % step:
            near = [max(step, round(side / step) * step) for side in (height, width)]
            raise ValueError(f"size is {height}x{width}; multiples of {step} fit {self.family}: {near[0]}x{near[1]}")
        return latent_channels(self.net, self.kind), height // self.factor, width // self.factor

    def encode(
        self,
        prompts: Sequence[str],
        height: int | None = None,
        width: int | None = None,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        guidance: float = 3.5,
    ) -> Cond:
        """What the prompts mean to the network, one row each.

        height and width: the picture's size in pixels; original and crop: SDXL's size conditioning as (height, width)
        and (top, left); guidance: for networks that embed it. The text encoders visit the device and go back to CPU.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(p, str) for p in texts):
            raise ValueError(f"prompts are {texts[:3]!r}; give at least one text ('' is a valid prompt)")
        if not self.text_encoders():
            raise ValueError(
                f"this {self.family} was loaded without text encoders; give a diffusers folder that has them "
                "(config=FOLDER for a single file), or use conditioning that was encoded elsewhere"
            )
        chunks = [texts[i : i + PROMPTS_AT_ONCE] for i in range(0, len(texts), PROMPTS_AT_ONCE)]
        with self._text_encoders_here(), torch.no_grad():
            cond = conditioning.cat([self.kind.encode(self.pipeline, chunk, self.device) for chunk in chunks])
        extras = self._sizes(len(texts), height or self.native_size, width or self.native_size, original, crop)
        if getattr(self.net.config, "guidance_embeds", False):
            extras["guidance"] = torch.full((len(texts),), guidance, device=self.device)
        return Cond(cond.cross, cond.pooled, {**cond.extras, **extras})

    def _sizes(self, n: int, height: int, width: int, original: Any, crop: tuple[int, int]) -> dict[str, Tensor]:
        def rows(*values: float) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device).expand(n, -1)

        if getattr(self.net.config, "addition_embed_type", None) == "text_time":
            return {"time_ids": rows(*(original or (height, width)), *crop, height, width)}
        if getattr(self.net, "use_additional_conditions", False):  # PixArt-alpha at 1024
            return {"resolution": rows(height, width), "aspect_ratio": rows(height / width)}
        return {}

    def text_encoders(self) -> list[nn.Module]:
        found = [getattr(self.pipeline, n, None) for n in TEXT_ENCODERS]
        return [m for m in found if m is not None]

    @contextmanager
    def _text_encoders_here(self) -> Iterator[None]:
        try:
            for module in self.text_encoders():
                module.to(self.device)
            yield
        finally:
            for module in self.text_encoders():
                module.to("cpu")

    def drop_text_encoders(self) -> None:
        """Frees their memory; encode() works no more."""
        for name in TEXT_ENCODERS:
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)

    def to_latents(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Pictures [b 3 h w] in -1..1 -> latents as the network sees them; with rng a sample, else the mean."""
        refuse_nonfinite("images", images)
        vae = self._vae()
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        if rng is None:
            z = posterior.mode()
        else:
            eps = torch.randn(posterior.mean.shape, generator=rng, device=rng.device)
            z = posterior.mean + posterior.std * eps.to(posterior.mean)
        shift, scale = vae_range(vae, z)
        return (z - shift) * scale

    def to_images(self, latents: Tensor) -> Tensor:
        """Latents as the network sees them -> pictures [b 3 h w], about -1..1. Differentiable."""
        refuse_nonfinite("latents", latents)
        vae = self._vae()
        shift, scale = vae_range(vae, latents)
        z = latents.to(vae.device, torch.float32) / scale + shift
        return vae.decode(z.to(vae.dtype), return_dict=False)[0]

    def _vae(self) -> Any:
        if getattr(self.pipeline, "vae", None) is None:
            raise ValueError(
                f"this {self.family} was loaded without a VAE; give a diffusers folder that has vae/ with weights "
                "(config=FOLDER for a single file)"
            )
        return self.pipeline.vae.to(self.device)

    def view(self, copied: Any, checkpointing: bool) -> NetDenoiser:
        """A copy of the network as a denoiser, in the dtype of its own weights."""
        if checkpointing:
            copied.enable_gradient_checkpointing()
        dtype = next(copied.parameters()).dtype
        return NetDenoiser(partial(self.kind.call, copied), self.denoiser.schedule, self.denoiser.prediction, dtype)

    def checkpoint_blocks(self, bank: AdapterBank | None = None) -> None:
        """Trades time for memory: blocks are recomputed in backward, under the adapter mix of their forward."""
        contexts = bank.checkpoint_contexts if bank is not None else noop_context_fn

        def run(block: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

        self.net.enable_gradient_checkpointing(run)


def refuse_nonfinite(what: str, value: Tensor) -> None:
    finite = value.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{what} {list(value.shape)} hold NaN or infinite numbers in samples {bad[:8]}; they must be finite: "
            "lower the learning rate or use bf16 instead of fp16 if a training made them"
        )


def vae_range(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """shift, scale: the network sees (z - shift) * scale."""
    config = vae.config
    factor = torch.tensor(float(config.scaling_factor), device=like.device)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        column = [torch.tensor(v, dtype=torch.float32, device=like.device).reshape(1, -1, 1, 1) for v in (mean, std)]
        return column[0], factor / column[1]
    return torch.tensor(float(config.get("shift_factor") or 0.0), device=like.device), factor
