"""The engine's samplers as ComfyUI SAMPLERs, and one call that samples a LATENT."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..dmd_core.samplers import sample_restart, start
from ..dmd_core.schedule import Schedule
from .comfy_denoiser import schedule_of

SAME_LEVEL = 1e-3  # relative; levels pass through fp32 and other nodes


class HostDenoiser:
    """ComfyUI's guided, masked model as a Denoiser."""

    def __init__(self, model: Callable[..., Tensor], schedule: Schedule, **options: Any):
        self.model, self.schedule, self.options = model, schedule, options

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.model(x, sigma, **self.options)


class RestartSampler(comfy.samplers.Sampler):
    """sample_restart in ComfyUI's graph: masks, previews, cancelling, split SIGMAS.

    gammas: for each of the levels, so that a part of the list keeps its own. top: the level where a new image begins;
    there the start is unit-variance noise, whatever the LATENT holds, also where that is not the model's highest level
    (the t = 399 of one-step DMD2, which stock samplers start 24 % too weak).
    """

    def __init__(self, levels: Sequence[float], gammas: Sequence[float], keep: str = "time", top: float | None = None):
        self.levels, self.gammas, self.keep, self.top = list(levels), list(gammas), keep, top

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        sampling = model_wrap.inner_model.model_sampling
        inner = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        inner.noise, inner.latent_image = noise, latent_image
        denoiser = HostDenoiser(inner, schedule_of(sampling), denoise_mask=denoise_mask, **extra_args)
        steps = len(sigmas) - 1

        def report(i: int, x0: Tensor, x: Tensor) -> None:
            if callback is not None:
                callback(i, x0, x, steps)

        x = self.first_state(denoiser.schedule, sigmas[0], noise, latent_image)
        rng = generator(x.device, extra_args.get("seed"))
        x = sample_restart(denoiser, x, sigmas, None, rng, self.gammas_of(sigmas), report, keep=self.keep)
        return sampling.inverse_noise_scaling(sigmas[-1], x)

    def first_state(self, schedule: Schedule, sigma: Tensor, noise: Tensor, latent: Tensor | None) -> Tensor:
        new = latent is None or not latent.any()
        if self.top is not None and noise.any():  # without noise a half-done image is carried on
            new = new or abs(float(sigma) - self.top) <= SAME_LEVEL * self.top
        return start(schedule, noise, sigma, None if new else latent)

    def gammas_of(self, sigmas: Tensor) -> list[float]:
        levels = torch.tensor(self.levels)
        nearest = (sigmas[:-1].cpu().float().unsqueeze(-1) - levels).abs().argmin(-1)
        return [self.gammas[i] for i in nearest.tolist()]


def generator(device: torch.device, seed: int | None) -> torch.Generator:
    """The noise that stock samplers draw between steps, so that equal settings give equal images."""
    return torch.Generator(device).manual_seed((seed or 0) + (device.type == "cpu"))


def sample_latent(
    model: Any,
    guider: Any,
    sampler: Any,
    sigmas: Tensor,
    latent: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """A LATENT through a guider, as SamplerCustomAdvanced does it."""
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    found = guider.sample(
        noise,
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio_")}
    return out | {"samples": found.to(comfy.model_management.intermediate_device())}


def guider_of(model: Any, positive: Any, negative: Any, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider
