"""Samplers are plain functions of (denoiser, x, sigmas, cond, rng); sigmas fall to 0, x starts at sigmas[0].

One sampler covers the few-step zoo. Every one of them predicts x0, goes deterministically to a level below the next
one and brings fresh noise back up. They differ in how much of the old noise they keep: Euler, DDIM and Lightning all
of it, LCM and DMD2 none, TCD and Turbo a part. `gamma` says how much, `keep` in which coordinate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .schedule import Schedule, add_noise, expand

Callback = Callable[[int, Tensor, Tensor], None]  # step index, x0, x
Noise = torch.Generator | Callable[[Tensor], Tensor]  # where unit noise like a given tensor comes from

KEEP = ("time", "tcd", "variance", "ancestral")


def start(schedule: Schedule, noise: Tensor, sigma: Tensor | float, latent: Tensor | None = None) -> Tensor:
    """Where sampling begins at level sigma: pure noise, or a given latent under noise (img2img).

    Pure noise takes the variance of a training state, a^2 + b^2 for unit-variance latents, so that the network sees
    unit variance at every level: sigma alone would be 24 % too small at the t = 399 of one-step DMD2.
    """
    level = torch.as_tensor(sigma, device=noise.device, dtype=noise.dtype).expand(len(noise))
    if latent is not None:
        return add_noise(schedule, latent.to(noise), noise, level)
    a, b = (expand(c, noise) for c in schedule.coeffs(level))
    return (a**2 + b**2).sqrt() * noise


@dataclass
class Masked:
    """A denoiser that already knows the clean latent where mask is 0; mask 1 is to be made anew. mask: [b 1 h w].

    Mixing x0 is enough for every sampler here: what they derive from (x, x0) then is the noise that the known part
    carries, so it is re-noised to the next level by itself. Only the first state has to be `enter`ed.
    """

    inner: Denoiser
    latent: Tensor
    mask: Tensor

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def enter(self, x: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
        """The first state, its known part put at level sigma."""
        return self.mask * x + (1 - self.mask) * start(self.schedule, noise, sigma, self.latent)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        x0 = self.inner(x, sigma, cond)
        return self.mask * x0 + (1 - self.mask) * self.latent.to(x0)


@torch.no_grad()
def sample_restart(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Any,
    rng: Noise | None,
    gamma: float | Sequence[float] = 1.0,
    callback: Callback | None = None,
    keep: str = "time",
) -> Tensor:
    """Predict x0, then re-noise to the next level. gamma 1: fresh noise (DMD2, LCM); 0: deterministic (DDIM, Euler).

    In between, with r = b / a: x' = a' * (x0 + r_s * eps_hat + sqrt(r'^2 - r_s^2) * z), where `keep` gives r_s:
    time       r at (1 - gamma) times the next timestep, none at gamma 1
    tcd        the same, but down to timestep 0 at most, whose r is not 0 in VP (TCD eq. 12 on its table)
    variance   sqrt(1 - gamma^2) * r', so eps = sqrt(1 - gamma^2) * eps_hat + gamma * z
    ancestral  r'^2 / r at gamma 1 (Turbo's sampler, k-diffusion's eta)
    gamma may be one number, or one per step (the last step has nothing to re-noise, its number is ignored).
    """
    levels = check_sigmas(sigmas)
    gammas = per_step(gamma, len(levels) - 1)
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}; use one of {', '.join(KEEP)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sigmas = sigmas.to(x.device)
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x0 = denoiser(x, sigma.expand(len(x)), cond)
        if callback is not None:
            callback(i, x0, x)
        x = renoise(denoiser.schedule, x, x0, sigma, after, rng, gammas[i], keep) if levels[i + 1] > 0 else x0
    return x


def renoise(
    schedule: Schedule,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    after: Tensor,
    rng: Noise | None,
    gamma: float,
    keep: str = "time",
) -> Tensor:
    if gamma == 1 and keep in ("time", "variance"):
        return add_noise(schedule, x0, draw(rng, x0), after.expand(len(x0)))
    a, b = schedule.coeffs(sigma.to(x0))
    a_next, b_next = schedule.coeffs(after.to(x0))
    eps_hat = (x - a * x0) / b
    if gamma == 0:
        return a_next * x0 + b_next * eps_hat
    full = b_next / a_next
    if keep == "variance":
        kept = (1 - gamma**2) ** 0.5 * full
    elif keep == "ancestral":
        # in the coordinate r = b / a, where a flow is a VE process too; r is infinite at sigma 1
        kept = full * (1 - gamma**2 * (1 - (full * a / b) ** 2)).clamp_min(0).sqrt()
    else:
        kept = noise_in_time(schedule, after, gamma).to(x0)
    fresh = (full**2 - kept**2).clamp_min(0).sqrt()
    return a_next * (x0 + kept * eps_hat + fresh * draw(rng, x0))


def noise_in_time(schedule: Schedule, after: Tensor, gamma: float) -> Tensor:
    """b / a at the time (1 - gamma) * t of the level after."""
    t = schedule.timestep(after.reshape(1))
    back = (1 - gamma) * t
    a, b = schedule.coeffs(schedule.sigma(back if t.is_floating_point() else back.floor()))
    return (b / a).squeeze(0)


def draw(rng: Noise | None, like: Tensor) -> Tensor:
    """Unit noise of like's shape, dtype and device; a generator draws in fp32, as every host does."""
    if rng is None:
        raise ValueError("these settings re-noise between steps but there is no random generator; pass rng, or gamma 0")
    if isinstance(rng, torch.Generator):
        return torch.randn(like.shape, generator=rng, device=rng.device).to(like)
    return rng(like)


def check_sigmas(sigmas: Tensor) -> list[float]:
    """The levels as numbers (one transfer instead of one per step)."""
    levels = [float(s) for s in sigmas.tolist()]
    falling = all(high > low for high, low in pairwise(levels))
    if len(levels) < 2 or not falling or levels[-1] < 0:
        raise ValueError(
            f"sigmas are {[round(s, 4) for s in levels]}; at least two are needed, strictly falling, the last usually 0"
        )
    return levels


def per_step(gamma: float | Sequence[float], steps: int) -> list[float]:
    given = [float(gamma)] * steps if isinstance(gamma, int | float) else [float(g) for g in gamma]
    if len(given) == steps - 1:
        given.append(0.0)
    if len(given) != steps or not all(0 <= g <= 1 for g in given):
        raise ValueError(f"gamma is {gamma} for {steps} steps; give one number from 0 to 1, or one for each step")
    return given


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


def sampled(
    denoiser: Denoiser, noise: Tensor, sigmas: Tensor, cond: Any, rng: Noise | None, gamma: float | None
) -> Tensor:
    """A picture from unit noise. gamma as in `sample_restart`; None: plain Euler."""
    x = start(denoiser.schedule, noise, sigmas[0])
    if gamma is None:
        return sample_euler(denoiser, x, sigmas, cond)
    return sample_restart(denoiser, x, sigmas, cond, rng, gamma)
