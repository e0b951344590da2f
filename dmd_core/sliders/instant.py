"""A slider without training, and one that joins late: both are just denoisers."""

from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from ..conditioning import fit
from ..denoiser import Denoiser
from ..schedule import Schedule


@dataclass
class Instant:
    """What a text slider would learn, computed at inference: three forwards per step instead of one (FreeSliders).

    below: works at noise levels up to this one; strength 0 and the levels above cost one forward and change nothing.
    """

    inner: Denoiser
    positive: Any
    negative: Any
    strength: float = 1.0
    below: float = inf

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        x0 = self.inner(x, sigma, cond)
        if self.strength == 0 or float(sigma.max()) > self.below:
            return x0
        positive = self.inner(x, sigma, fit(self.positive, len(x)))
        return x0 + self.strength * (positive - self.inner(x, sigma, fit(self.negative, len(x))))


@dataclass
class Joining:
    """`late` from noise level `below` down, `early` above it: a slider that starts after the composition is settled."""

    early: Denoiser
    late: Denoiser
    below: float

    @property
    def schedule(self) -> Schedule:
        return self.late.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return (self.early if float(sigma.max()) > self.below else self.late)(x, sigma, cond)
