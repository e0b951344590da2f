"""Jitter that differs from seed to seed, has the size that is asked for, and repeats itself."""

import torch

from dmd_core.metrics import pairwise_distance
from dmd_core.variety import jitter_image, jitter_prompt


def test_a_prompt_moves_by_its_own_size_and_differently_per_sample():
    tokens = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1) * 3
    moved = jitter_prompt(tokens, 0.5, 7)
    step = (moved - tokens).pow(2).mean().sqrt() / tokens.pow(2).mean().sqrt()
    assert 0.45 < step < 0.55
    assert pairwise_distance(moved.flatten(1)) > 0.5 * tokens[0].norm()
    assert pairwise_distance(tokens.flatten(1)) == 0  # the control
    assert torch.equal(jitter_prompt(tokens, 0.5, 7), moved)
    assert not torch.equal(jitter_prompt(tokens, 0.5, 8), moved)
    assert torch.equal(jitter_prompt(tokens, 0.0, 7), tokens)


def test_a_sample_is_moved_alike_in_a_batch_and_alone():
    tokens = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(jitter_prompt(tokens, 0.5, 7)[2:], jitter_prompt(tokens[2:], 0.5, 9))


def test_an_image_gets_smooth_noise_of_its_own_size():
    x0 = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2
    added = jitter_image(x0, 0.3, 7) - x0
    torch.testing.assert_close(added.flatten(1).std(1), 0.3 * x0.flatten(1).std(1), rtol=0.02, atol=0)
    neighbours = (added[..., 1:] * added[..., :-1]).mean() / added.pow(2).mean()
    assert neighbours > 0.9
    assert (x0[..., 1:] * x0[..., :-1]).mean().abs() / x0.pow(2).mean() < 0.1  # the control: white noise
    video = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert jitter_image(video, 0.3, 7).shape == video.shape
