"""Samplers are plain functions of (denoiser, x, sigmas, cond, rng); sigmas fall to 0, x starts at sigmas[0]."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .schedule import Discrete, Flow, Schedule, add_noise, expand

Callback = Callable[[int, Tensor, Tensor], None]  # step index, x0, x


def start(schedule: Schedule, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Pure noise at level sigma, as KSampler starts."""
    level = torch.as_tensor(sigma, device=noise.device, dtype=noise.dtype).expand(len(noise))
    return add_noise(schedule, torch.zeros_like(noise), noise, level)


def unit_start(schedule: Schedule, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Pure noise of unit variance as the network sees it, whatever level it is told.

    At sigma_max this is how KSampler starts (max_denoise). DMD2's one-step SDXL student is told t=399 and still sees
    pure noise: there start() would be wrong by sqrt(1 + 1 / sigma^2).
    """
    if isinstance(schedule, Discrete):
        return noise * (1 + torch.as_tensor(sigma).to(noise) ** 2).sqrt()
    return noise if isinstance(schedule, Flow) else start(schedule, noise, sigma)


@torch.no_grad()
def sample_restart(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Any,
    rng: torch.Generator,
    gamma: float = 1.0,
    callback: Callback | None = None,
) -> Tensor:
    """Predict x0, then re-noise to the next level. gamma 1: fresh noise (DMD2, LCM); 0: deterministic (DDIM, Euler).

    In between (TCD's gamma) the state goes deterministically to the level s of (1 - gamma) times the next timestep and
    fresh noise brings it back up: x' = a' * (x0 + r_s * eps_hat + sqrt(r'^2 - r_s^2) * z) with r = b / a.
    """
    sigmas = sigmas.to(x.device)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma.expand(len(x)), cond)
        if callback is not None:
            callback(i, x0, x)
        x = renoise(denoiser.schedule, x, x0, sigma, after, rng, gamma) if after > 0 else x0
    return x


def renoise(
    schedule: Schedule, x: Tensor, x0: Tensor, sigma: Tensor, after: Tensor, rng: torch.Generator, gamma: float
) -> Tensor:
    if gamma == 1:
        eps = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        return add_noise(schedule, x0, eps, after.expand(len(x0)))
    a, b = (expand(c, x0) for c in schedule.coeffs(sigma.expand(len(x0))))
    eps_hat = (x - a * x0) / b
    a_next, b_next = (expand(c, x0) for c in schedule.coeffs(after.expand(len(x0))))
    if gamma == 0:
        return a_next * x0 + b_next * eps_hat
    level = schedule.sigma((1 - gamma) * schedule.timestep(after.reshape(1))).to(x0)
    a_s, b_s = schedule.coeffs(level)
    kept, full = b_s / a_s, b_next / a_next
    z = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
    return a_next * (x0 + kept * eps_hat + (full**2 - kept**2).clamp_min(0).sqrt() * z)


@torch.no_grad()
def sample_euler(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, callback: Callback | None = None) -> Tensor:
    """First order; d = (x - x0) / sigma is dx/dsigma for VE and flow states alike."""
    sigmas = sigmas.to(x.device)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma.expand(len(x)), cond)
        if callback is not None:
            callback(i, x0, x)
        x = x + (after - sigma) * (x - x0) / sigma
    return x


@torch.no_grad()
def sample_heun(denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, callback: Callback | None = None) -> Tensor:
    """Second order (Karras et al. 2022, algorithm 1): two calls a step, one on the last."""
    sigmas = sigmas.to(x.device)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma.expand(len(x)), cond)
        if callback is not None:
            callback(i, x0, x)
        slope = (x - x0) / sigma
        guess = x + (after - sigma) * slope
        if after > 0:
            x0 = denoiser(guess, after.expand(len(x)), cond)
            slope = (slope + (guess - x0) / after) / 2
        x = x + (after - sigma) * slope
    return x
