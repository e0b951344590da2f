"""The engine's one interface to a diffusion model: (x, sigma, cond) -> predicted clean latent x0."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from .conditioning import fit
from .schedule import Schedule, expand

EDM_SIGMA_DATA = 0.5


class Denoiser(Protocol):
    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """x: [b c ...], sigma: [b] -> x0, same shape as x, fp32 or better."""


def apart(denoiser: Denoiser, cond: Any, n: int) -> list[list[int]]:
    """The samples that one call of the network serves: all, where the denoiser does not say (see ComfyDenoiser)."""
    ask = getattr(denoiser, "apart", None)
    return [list(range(n))] if ask is None else ask(cond, n)


class Prediction(Enum):
    """What a network outputs. Nothing outside this class branches on it."""

    EPS = "eps"
    V = "v"
    FLOW = "flow"
    X0 = "x0"
    EDM = "edm"

    def scale_in(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network sees unit variance; flow states have it already, x0 networks take the state as it is."""
        s = expand(sigma, x)
        if self in (Prediction.EPS, Prediction.V):
            return x / (s**2 + 1).sqrt()
        if self is Prediction.EDM:
            return x / (s**2 + EDM_SIGMA_DATA**2).sqrt()
        return x

    def to_x0(self, out: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Clean latent from a raw network output, for a state x at noise level sigma."""
        s = expand(sigma, x)
        if self is Prediction.X0:
            return out
        if self in (Prediction.EPS, Prediction.FLOW):
            return x - s * out
        if self is Prediction.V:
            return x / (s**2 + 1) - out * s / (s**2 + 1).sqrt()
        var = s**2 + EDM_SIGMA_DATA**2
        return x * EDM_SIGMA_DATA**2 / var + out * s * EDM_SIGMA_DATA / var.sqrt()

    def from_x0(self, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The network output that means x0: the inverse of to_x0."""
        s = expand(sigma, x)
        if self is Prediction.X0:
            return x0
        if self in (Prediction.EPS, Prediction.FLOW):
            return (x - x0) / s
        if self is Prediction.V:
            return (x / (s**2 + 1) - x0) * (s**2 + 1).sqrt() / s
        var = s**2 + EDM_SIGMA_DATA**2
        return (x0 - x * EDM_SIGMA_DATA**2 / var) * var.sqrt() / (s * EDM_SIGMA_DATA)


@dataclass
class NetDenoiser:
    """A raw network as a denoiser; net(x_scaled, timestep, cond) is a closure, cond whatever it takes."""

    net: Callable[[Tensor, Tensor, Any], Tensor]
    schedule: Schedule
    prediction: Prediction
    dtype: torch.dtype | None = None  # what the network computes in; None: the dtype of x

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = sigma.to(x)
        x_in = self.prediction.scale_in(x, sigma)
        out = self.net(x_in.to(self.dtype or x.dtype), self.schedule.timestep(sigma), cond)
        return self.prediction.to_x0(out.to(x.dtype), x, sigma)


@dataclass
class Guided:
    """Classifier-free guidance is just another denoiser. scale as in KSampler, 1 is none; one negative serves all."""

    inner: Denoiser
    scale: float
    negative: Any

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        if self.scale == 1:
            return self.inner(x, sigma, cond)
        positive, negative = self.inner(x, sigma, cond), self.inner(x, sigma, fit(self.negative, len(x)))
        return negative + self.scale * (positive - negative)
