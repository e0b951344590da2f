"""Few-step noise levels: the grids that distilled models were trained on, and how to stay on them.

VP families name their levels by timestep, flow families by sigma. A list here ends above 0; `ending` appends the 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import Schedule, shift_time


def trailing(steps: int, count: int = 1000) -> list[int]:
    """Evenly spaced and counted from the noisy end: what Lightning, Hyper and DMD2 train on. 4: 999 749 499 249."""
    return [round(count - i * count / steps) - 1 for i in range(steps)]


def turbo(steps: int, count: int = 1000) -> list[int]:
    """The first n of ten: Stability's own Turbo sampling stays at high noise and then jumps. 4: 999 899 799 699."""
    if steps > 10:
        raise ValueError(f"Turbo's list has 10 levels, {steps} steps were asked for; use 1 to 4")
    return trailing(10, count)[:steps]


def lcm(steps: int, strength: float = 1.0, grid: int = 50, count: int = 1000) -> list[int]:
    """Evenly chosen among the `grid` timesteps of consistency training. 4: 999 759 499 259.

    A strength below 1 (img2img) keeps the lower part of the grid and spreads the steps over it, so it stays on it.
    """
    trained = [(i + 1) * (count // grid) - 1 for i in range(int(grid * strength))][::-1]
    if steps > len(trained):
        raise ValueError(
            f"{steps} steps at strength {strength:g} do not fit the {len(trained)} trained timesteps; "
            "use fewer steps or a higher strength"
        )
    return [trained[math.floor(i * len(trained) / steps)] for i in range(steps)]


def shifted(steps: int, shift: float = 1.0) -> list[float]:
    """Flow levels 1, (n-1)/n, ... 1/n after the shift; ComfyUI's `simple`. 4 at shift 3: 1 0.9 0.75 0.5."""
    return [shift_time(torch.tensor(1 - i / steps, dtype=torch.float64), shift).item() for i in range(steps)]


def unshift(sigma: float, shift: float) -> float:
    """The inverse of shift_time."""
    return sigma / (shift - (shift - 1) * sigma)


def flux_shift(tokens: int, base: float = 0.5, top: float = 1.15) -> float:
    """FLUX.1's shift grows with the image: mu is linear in the tokens from 256 to 4096; shift = exp(mu)."""
    return math.exp(base + (top - base) * (tokens - 256) / (4096 - 256))


def flux2_shift(tokens: int, steps: int) -> float:
    """FLUX.2's empirical mu: two lines in the tokens (10 and 200 steps), linear in the steps between them."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(at_200)
    slope = (at_200 - at_10) / 190
    return math.exp(slope * steps + at_200 - 200 * slope)


def trig_to_flow(angle: float) -> float:
    """TrigFlow's time in [0, pi/2] (sCM, rCM) as a flow sigma: sin / (sin + cos)."""
    return math.sin(angle) / (math.sin(angle) + math.cos(angle))


def ending(levels: Sequence[float] | Tensor) -> Tensor:
    """The levels, then 0."""
    given = torch.as_tensor(levels, dtype=torch.float32)
    return torch.cat([given, given.new_zeros(1)])


def at_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> Tensor:
    """Sigmas of a VP model at these timesteps, then 0."""
    return ending(schedule.sigma(torch.tensor(timesteps)))


def tail(levels: Sequence[float], shares: Sequence[float], denoise: float) -> list[float]:
    """The levels that redo about `denoise` of the work: a trained grid is cut, never spread anew.

    Starts at the level whose share of time is nearest (the noisier one when two are). Below denoise 1 the level of
    pure noise is left out, for it would drop the image that was given. A model with a single level has no choice.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}; it must be above 0 (keep all) and at most 1 (new image)")
    if denoise == 1:
        return list(levels)
    choices = [i for i, share in enumerate(shares) if share < 0.9985] or [0]
    return list(levels[min(choices, key=lambda i: (abs(shares[i] - denoise), i)) :])
