"""Normalized attention guidance (Chen et al. 2025): negative prompts inside attention, for models at cfg 1."""

import torch
from torch import Tensor


def guided_attention(positive: Tensor, negative: Tensor, scale: float, limit: float, blend: float) -> Tensor:
    """What attention gives for the prompt, pushed away from what it gives for the negative one. [... tokens channels]

    z = z+ + scale * (z+ - z-), its L1 norm per token held at `limit` times that of z+ (tau in the paper), then `blend`
    (alpha) of it into z+. Scale 0 is z+. Other implementations count from 1: their 3 is a scale of 2.
    """
    z, away = positive.float(), positive.float() - negative.float()
    pushed = z + scale * away
    before, after = (t.abs().sum(-1, keepdim=True) for t in (z, pushed))
    # written as a step away from z+, so that equal prompts change nothing
    held = (limit * before / after.clamp_min(1e-12)).clamp_max(1.0)
    return (z + blend * (held * pushed - z)).to(positive.dtype)


def tiled(tokens: Tensor, length: int) -> Tensor:
    """Text tokens [b t c] repeated to a length, or cut to it: attention takes prompts of one length together."""
    times = -(-length // tokens.shape[1])
    return tokens.repeat(1, times, *[1] * (tokens.ndim - 2))[:, :length]


def per_sample(values: Tensor, count: int) -> Tensor:
    """A prompt for each of `count` samples: one for all, one for each, or the last one again for those without."""
    if len(values) >= count:
        return values[:count]
    return torch.cat([values, values[-1:].expand(count - len(values), *values.shape[1:])])
