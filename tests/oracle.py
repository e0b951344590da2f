"""Exact teachers: the posterior mean of a Gaussian or a mixture is known in closed form, so losses can be checked."""

import math

import torch
from torch import Tensor

from dmd_core.schedule import Schedule, expand


class Gaussian:
    """Denoiser of N(mean, std^2 I)."""

    def __init__(self, schedule: Schedule, mean: Tensor | float, std: float):
        self.schedule, self.mean, self.std = schedule, mean, std

    def gain(self, sigma: Tensor) -> Tensor:
        a, b = self.schedule.coeffs(sigma)
        return a * self.std**2 / (a**2 * self.std**2 + b**2)

    def __call__(self, x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        a, _ = self.schedule.coeffs(sigma)
        return self.mean + expand(self.gain(sigma), x) * (x - expand(a, x) * self.mean)


class Mixture:
    """Denoiser of a mixture of isotropic Gaussians in the plane. cond: None, or [b] component numbers, -1 for all."""

    def __init__(self, schedule: Schedule, means: Tensor, std: float, weights: Tensor | None = None):
        self.schedule, self.means, self.std = schedule, means, std
        self.weights = torch.ones(len(means)) if weights is None else weights
        self.weights = self.weights / self.weights.sum()
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        a, b = (expand(c, x) for c in self.schedule.coeffs(sigma))
        means, variance = self.means.to(x), (a * self.std) ** 2 + b**2
        offset = x[:, None] - a[:, None] * means
        logits = self.weights.to(x).log() - offset.square().sum(-1) / (2 * variance)
        if cond is not None:
            other = (cond[:, None] >= 0) & (cond[:, None] != torch.arange(len(means)))
            logits = logits.masked_fill(other, -math.inf)
        each = means + (a * self.std**2 / variance)[:, None] * offset
        return (logits.softmax(1)[..., None] * each).sum(1)

    def sample(self, n: int, rng: torch.Generator, stratified: bool = False) -> Tensor:
        """stratified: exact shares, which lowers the noise floor of distances between samples."""
        if stratified:
            k = torch.searchsorted(self.weights.cumsum(0), (torch.arange(n) + 0.5) / n).clamp_max(len(self.means) - 1)
        else:
            k = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        return self.means[k] + self.std * torch.randn(n, 2, generator=rng)

    def measure(self, x: Tensor) -> dict[str, float]:
        """How a sample compares: fidelity, coverage and spread move in different directions, so all of them."""
        distance = torch.cdist(x, self.means)
        nearest, mode = distance.min(1)
        hit = nearest < 4 * self.std
        share = torch.bincount(mode[hit], minlength=len(self.means)) / len(x) / self.weights
        spread = (x[hit] - self.means[mode[hit]]).square().mean().sqrt() if hit.any() else torch.tensor(math.nan)
        reference = self.sample(len(x), torch.Generator().manual_seed(12345), stratified=True)
        return {
            "in_mode": hit.float().mean().item(),
            "modes": int((share > 0.25).sum()),
            "min_share": share.min().item(),
            "spread": spread.item(),
            "sw2": sliced_wasserstein(x, reference),
        }


def ring(schedule: Schedule, modes: int = 8, radius: float = 2.0, std: float = 0.1) -> Mixture:
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return Mixture(schedule, radius * torch.stack([angle.cos(), angle.sin()], 1), std)


def unequal(schedule: Schedule) -> Mixture:
    """Three modes with shares 3 : 1 : 1."""
    means = torch.tensor([[1.5, 0.0], [-1.5, 0.5], [0.0, -1.5]])
    return Mixture(schedule, means, 0.2, torch.tensor([3.0, 1.0, 1.0]))


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128) -> float:
    """SW2 of two samples of one size."""
    rng = torch.Generator().manual_seed(777)
    directions = torch.nn.functional.normalize(torch.randn(a.shape[1], projections, generator=rng), dim=0)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt().item()
