"""Measures of sets of pictures: distance between distributions, coverage, spread."""

from collections.abc import Mapping

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features [n d], in float64."""
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"the Frechet distance got {len(a)} and {len(b)} samples; it needs at least 2 on each side")
    mean_a, mean_b = a.double().mean(0), b.double().mean(0)
    cov_a, cov_b = torch.cov(a.double().T), torch.cov(b.double().T)
    # tr sqrt(A B) = tr sqrt(sqrt(A) B sqrt(A)), which is symmetric, so eigh is enough
    root = _sqrt(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    value = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(value.item(), 0.0)


def frechet_limit(a: Tensor, b: Tensor, rng: torch.Generator, halves: int = 8) -> float:
    """The Frechet distance that more and more samples a would tend to; b should be several times as many.

    From few samples the plain distance comes out too large, by about c / n, even between equal distributions; twice the
    distance at n minus the one at n / 2 is free of that (Chong and Forsyth, 2020). May come out slightly below 0.
    """
    orders = [torch.randperm(len(a), generator=rng)[: len(a) // 2] for _ in range(halves)]
    return 2 * frechet(a, b) - sum(frechet(a[i], b) for i in orders) / halves


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def coverage(classes: Tensor, total: int) -> float:
    """Share of `total` classes that occur at all in classes [n], or in the combinations of [n k]."""
    if total < 1:
        raise ValueError(f"coverage of {total} classes has no meaning; give how many there are")
    return len(torch.unique(classes, dim=0)) / total


def spread(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """Standard deviation of each continuous factor over the reference's; 1 means equally varied."""
    return {k: (v.double().std() / reference[k].double().std()).item() for k, v in values.items()}


def pairwise_distance(features: Tensor) -> float:
    """Mean distance between two different samples of features [n d]: how varied a set is."""
    if len(features) < 2:
        raise ValueError(f"the mean pairwise distance got {len(features)} samples; it needs at least 2")
    return torch.pdist(features.double()).mean().item()
