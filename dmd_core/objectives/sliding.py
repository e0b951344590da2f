"""What the slider objectives share: the model at a strength, prompts by number, and the states to train on."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapted
from ..conditioning import Cond
from ..schedule import Schedule, add_noise
from .generation import gaussian


def at(model: Adapted, **strengths: float) -> Adapted:
    """The model with sliders added to the mix it has (a few-step LoRA, say); strength 0 is the model itself."""
    return replace(model, scales={**model.scales, **strengths})


def pick(cond: Any, index: Tensor) -> Any:
    """Prompts by number from an encoded list; a single prompt serves all, other kinds are left to the network."""
    if isinstance(cond, Cond):
        return cond.expand(len(index)) if len(cond) == 1 else cond.take(index)
    if isinstance(cond, Tensor):
        return cond.expand(len(index), *cond.shape[1:]) if len(cond) == 1 else cond[index.to(cond.device)]
    return cond


def count(cond: Any) -> int:
    return len(cond) if isinstance(cond, Cond | Tensor) else 1


def noise_levels(
    schedule: Schedule, n: int, rng: torch.Generator, sigmas: Sequence[float], low: float, high: float
) -> Tensor:
    """Where to train: a few-step model knows only its own levels, any other model all of them. [n]"""
    if not sigmas:
        return schedule.sample(n, rng, low, high)
    index = torch.randint(len(sigmas), (n,), generator=rng, device=rng.device)
    return torch.tensor(sigmas, device=rng.device)[index]


def noised(schedule: Schedule, versions: Sequence[Tensor], sigma: Tensor, rng: torch.Generator) -> list[Tensor]:
    """Versions of the same samples [b ...] under one and the same noise."""
    eps = gaussian(versions[0].shape, rng, versions[0].dtype)
    return [add_noise(schedule, x0, eps, sigma) for x0 in versions]
