"""Noise schedules: x_t = a(sigma) * x0 + b(sigma) * eps, where sigma has ComfyUI's meaning for every family."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# ComfyUI's stand-in for alpha_bar(T) = 0: sigma stays finite (about 4518), so v models never divide by zero.
ZERO_TERMINAL_ALPHA_BAR = 4.8973451890853435e-08


def expand(v: Tensor, like: Tensor) -> Tensor:
    """[b] -> [b 1 ... 1], so that v broadcasts against like."""
    return v.reshape(v.shape + (1,) * (like.ndim - v.ndim))


class Schedule(Protocol):
    @property
    def sigma_max(self) -> float: ...

    def coeffs(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a(sigma), b(sigma)."""

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told about the noise level."""

    def sigma(self, timestep: Tensor) -> Tensor:
        """The inverse of timestep."""

    def sample(self, n: int, rng: torch.Generator, low: float = 0.02, high: float = 0.98) -> Tensor:
        """Noise levels for training, uniform in time between the fractions low and high. [n]"""


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    a, b = (expand(c.to(x0), x0) for c in schedule.coeffs(sigma))
    return a * x0 + b * eps


def shift_time(t: Tensor, shift: float) -> Tensor:
    """SD3 eq. 23: moves flow times towards noise when shift > 1."""
    return shift * t / (1 + (shift - 1) * t)


def uniform(n: int, rng: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=rng, device=rng.device)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: a = 1 - sigma, b = sigma; sigma in [0, 1], already shifted."""

    shift: float = 1.0
    sigma_max: float = 1.0
    num_timesteps: int = 1000

    def coeffs(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - sigma, sigma

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.num_timesteps

    def sigma(self, timestep: Tensor) -> Tensor:
        return timestep / self.num_timesteps

    def sample(self, n: int, rng: torch.Generator, low: float = 0.02, high: float = 0.98) -> Tensor:
        return shift_time(uniform(n, rng, low, high), self.shift)

    def logit_normal(self, n: int, rng: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """SD3's training times, before the shift logit-normal(mean, std)."""
        u = torch.randn(n, generator=rng, device=rng.device) * std + mean
        return shift_time(u.sigmoid().clamp(1e-3, 1 - 1e-3), self.shift)


class Discrete:
    """DDPM-family (VP) schedule in ComfyUI's coordinate x = x0 + sigma * eps, i.e. a = 1, b = sigma."""

    def __init__(self, alphas_cumprod: Tensor):
        alpha_bar = alphas_cumprod.double()
        self.alphas_cumprod = alpha_bar.float()
        self.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().float()
        self.log_sigmas = self.sigmas.log()
        self._moved: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_betas(
        cls, kind: str, start: float, end: float, num_timesteps: int, zero_terminal_snr: bool = False
    ) -> "Discrete":
        if kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, num_timesteps, dtype=torch.float64)
        else:
            raise ValueError(f"beta schedule {kind!r} is not known; use 'scaled_linear' or 'linear'")
        alpha_bar = (1 - betas).cumprod(0)
        return cls(zero_terminal(alpha_bar) if zero_terminal_snr else alpha_bar)

    def _table(self, name: str, device: torch.device) -> Tensor:
        """sigmas or log_sigmas there. Copied once: every copy to a GPU makes the host wait for all that is queued."""
        table = getattr(self, name)
        if table.device == device:
            return table
        source, moved = self._moved.get((name, device), (None, table))
        if source is not table:  # the host may put its own in place
            moved = table.to(device)
            self._moved[name, device] = (table, moved)
        return moved

    @property
    def sigma_max(self) -> float:
        return self.sigmas[-1].item()

    @property
    def sigma_min(self) -> float:
        return self.sigmas[0].item()

    def coeffs(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma

    def timestep(self, sigma: Tensor) -> Tensor:
        """Nearest trained timestep, as ComfyUI rounds it."""
        log_sigmas = self._table("log_sigmas", sigma.device)
        distance = sigma.float().log().unsqueeze(-1) - log_sigmas
        return distance.abs().argmin(-1)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Log-linear between the trained timesteps."""
        t = timestep.float().clamp(0, len(self.sigmas) - 1)
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        log_sigmas = self._table("log_sigmas", t.device)
        return ((1 - w) * log_sigmas[low] + w * log_sigmas[high]).exp()

    def sample(self, n: int, rng: torch.Generator, low: float = 0.02, high: float = 0.98) -> Tensor:
        count = len(self.sigmas)
        t = torch.randint(int(low * count), int(high * count), (n,), generator=rng, device=rng.device)
        return self._table("sigmas", rng.device)[t]


def zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """Rescaled so that the last step carries no signal (Lin et al. 2023, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2).clamp_min(ZERO_TERMINAL_ALPHA_BAR)


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022: a = 1, b = sigma, the network is told log(sigma) / 4."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    mean: float = -1.2
    std: float = 1.2

    def coeffs(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma

    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()

    def sigma(self, timestep: Tensor) -> Tensor:
        return (timestep * 4).exp()

    def sample(self, n: int, rng: torch.Generator, low: float = 0.02, high: float = 0.98) -> Tensor:
        """Log-normal, EDM table 1; low and high are quantiles."""
        normal = torch.distributions.Normal(0.0, 1.0)
        return (self.mean + self.std * normal.icdf(uniform(n, rng, low, high))).exp()
