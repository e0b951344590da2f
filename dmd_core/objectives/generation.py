"""What the distillation objectives share: the student's input, and the noised states that the losses look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..data import Batch
from ..denoiser import Denoiser
from ..samplers import sample_restart, start
from ..schedule import Flow, Schedule, add_noise, expand

SIGMA_FLOOR = 1e-3  # keeps 1 / sigma^2 finite at the clean end

# eps-MSE of a VP model and velocity-MSE of a flow model are both |x0_hat - x0|^2 / sigma^2: the teacher's own weighting
WEIGHTS = {
    "native": lambda s: s**-2,
    "v": lambda s: s**-2 + 1,  # v-MSE of a VP model: does not vanish at zero terminal SNR
    "edm": lambda s: s**-2 + 4,  # 1 / sigma^2 + 1 / sigma_data^2
    "min_snr": lambda s: (s**-2).clamp_max(5.0),
    "x0": torch.ones_like,
}


def denoising_weight(kind: str, sigma: Tensor) -> Tensor:
    if kind not in WEIGHTS:
        raise ValueError(f"denoising weight {kind!r} is not known; use one of {', '.join(map(repr, WEIGHTS))}")
    return WEIGHTS[kind](sigma.clamp_min(SIGMA_FLOOR))


def gaussian(shape: Sequence[int], rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), generator=rng, device=rng.device).to(dtype)


def working_dtype(params: Mapping[str, nn.Parameter]) -> torch.dtype:
    """Latents live in fp32 or better, whatever the parameters are kept in."""
    return torch.promote_types(next(iter(params.values())).dtype, torch.float32)


def noise_levels(schedule: Schedule, n: int, rng: torch.Generator, low: float, high: float, shift: float) -> Tensor:
    """Uniform in time between the fractions low and high; flow times are shifted (0: by the schedule's own shift)."""
    if shift and isinstance(schedule, Flow):
        schedule = replace(schedule, shift=shift)
    return schedule.sample(n, rng, low, high)


def noised(schedule: Schedule, x0: Tensor, sigma: Tensor, rng: torch.Generator) -> Tensor:
    return add_noise(schedule, x0, gaussian(x0.shape, rng, x0.dtype), sigma)


@dataclass(frozen=True)
class Probe:
    """A noised generated sample: where the scores are compared and the critic learns."""

    x: Tensor
    sigma: Tensor  # [b]
    target: Tensor  # what a critic of these states has to predict
    weight: Tensor  # [b], the critic's weighting


def probe(schedule: Schedule, x0: Tensor, sigma: Tensor, rng: torch.Generator, kind: str) -> Probe:
    return Probe(noised(schedule, x0, sigma, rng), sigma, x0, denoising_weight(kind, sigma))


def probe_above(
    schedule: Schedule, x: Tensor, below: float, above: float, rng: torch.Generator, kind: str = "native"
) -> Probe:
    """x, a state at level `below` of a trajectory, noised further to a random level under `above` (TDM).

    Its distribution is not "clean latents plus noise", so the critic's target is the x0 form of its score: with
    r = b / a and s^2 = r^2 - r_below^2, x / a - (r^2 / s) eps. Its variance explodes as s falls; s^2 / r^2 in the
    weight makes up for that, and is 1 for clean latents.
    """
    ends = schedule.timestep(torch.tensor([max(below, SIGMA_FLOOR), above], device=x.device)).to(x)
    # the outer hundredths are left out: there s, or a at sigma 1 of a flow, is zero
    u = 0.01 + 0.98 * torch.rand(len(x), generator=rng, device=rng.device).to(x)
    sigma = schedule.sigma(ends[0] + u * (ends[1] - ends[0])).to(x)
    a, b = schedule.coeffs(sigma)
    a_below, b_below = schedule.coeffs(torch.tensor(below).to(x))
    r, r_below = b / a, b_below / a_below
    s = (r**2 - r_below**2).sqrt()
    eps = gaussian(x.shape, rng, x.dtype)
    state = x / a_below + expand(s, x) * eps
    return Probe(
        expand(a, x) * state, sigma, state - expand(r**2 / s, x) * eps, denoising_weight(kind, sigma) * s**2 / r**2
    )


def check_sigmas(sigmas: Sequence[float], schedule: Schedule) -> None:
    """A student's noise levels fall from at most sigma_max and stop above 0 (the last step always goes to 0)."""
    falling = all(a > b for a, b in pairwise(sigmas))
    top = schedule.sigma_max * 1.001  # rounding of published tables
    if not sigmas or not falling or sigmas[-1] <= 0 or sigmas[0] > top:
        raise ValueError(
            f"student sigmas are {tuple(sigmas)}; give one or more falling values above 0 and up to "
            f"{schedule.sigma_max:g}, without the final 0"
        )


def student_input(
    student: Denoiser,
    sigmas: Sequence[float],
    batch: Batch,
    rng: torch.Generator,
    dtype: torch.dtype,
    simulate: bool = True,
    gamma: float = 1.0,
) -> tuple[Tensor, int]:
    """A state that the student meets when it samples, and the index of its level: one index for the whole batch.

    Backward simulation (DMD2 sec. 4.5) walks there without gradient from pure noise; otherwise the batch's latents are
    noised, and pure noise takes their place at the first level, so that no signal leaks in.
    """
    # without axes: with one row in each of many processes, [1] would be a draw of rows, and each would have its own k
    drawn = torch.randint(len(sigmas), (), generator=rng, device=rng.device)
    k = int(drawn) if len(sigmas) > 1 else 0  # reading it makes the host wait for the device
    z = gaussian(batch.shape, rng, dtype)
    if k and not simulate:
        level = torch.full((len(z),), sigmas[k], dtype=dtype, device=z.device)
        return add_noise(student.schedule, batch.clean("starting from noised data").to(z), z, level), k
    x = start(student.schedule, z, torch.full((len(z),), sigmas[0], dtype=dtype, device=z.device))
    if not k:
        return x, 0
    levels = torch.tensor(sigmas[: k + 1], dtype=dtype, device=rng.device)
    return sample_restart(student, x, levels, batch.cond, rng, gamma), k
