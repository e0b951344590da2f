"""Frechet distance, coverage, spread, pairwise distance against closed forms."""

import pytest
import torch

from dmd_core import metrics


def test_frechet_of_known_gaussians(rng):
    x = torch.randn(40_000, 3, generator=rng, dtype=torch.float64)
    # one-dimensional closed form per axis: (mean difference)^2 + (std difference)^2
    y = x.flip(0) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, -2.0])
    assert metrics.frechet(x, y) == pytest.approx(1 + 4 + 0 + 1 + 4, rel=0.03)


def test_frechet_is_symmetric_and_zero_only_for_the_same_distribution(rng):
    a = torch.randn(500, 8, generator=rng)
    b = torch.randn(500, 8, generator=rng) @ torch.randn(8, 8, generator=rng)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a), rel=1e-9)
    assert metrics.frechet(a, b) > 1


def test_frechet_bears_features_that_never_vary(rng):
    a = torch.cat([torch.randn(50, 4, generator=rng), torch.zeros(50, 80)], 1)
    assert metrics.frechet(a, a + 1) == pytest.approx(84, rel=1e-6)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="1 and 5 samples"):
        metrics.frechet(torch.zeros(1, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="got 1 samples"):
        metrics.pairwise_distance(torch.zeros(1, 2))


def test_coverage_counts_combinations():
    pairs = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 0]])
    assert metrics.coverage(pairs, 4) == 0.75
    assert metrics.coverage(pairs[:, 0], 2) == 1.0


def test_spread_is_relative_to_the_reference(rng):
    x = torch.randn(1000, generator=rng)
    assert metrics.spread({"x": 0.5 * x + 3}, {"x": x})["x"] == pytest.approx(0.5)


def test_pairwise_distance_of_a_square():
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    assert metrics.pairwise_distance(corners) == pytest.approx((4 + 2 * 2**0.5) / 6)
