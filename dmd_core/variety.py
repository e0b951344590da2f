"""Seed variety for few-step students, whose images of one prompt look alike.

The first step decides the composition. Whatever differs there from seed to seed differs in the image, and the later
steps, which see the prompt as it is, repair the rest.
"""

import torch
from torch import Tensor
from torch.nn import functional


def draws(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    """Unit noise for each of `count` samples [count ...]; sample i of a batch gets what it would get with seed + i."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed((seed + i) % 2**63)) for i in range(count)]
    return torch.stack(rows)


def jitter_prompt(tokens: Tensor, strength: float, seed: int) -> Tensor:
    """Text tokens [b t c] moved in random directions, by `strength` times the length of each token."""
    noise = draws(tuple(tokens.shape[1:]), seed, len(tokens)).to(tokens)
    size = tokens.float().pow(2).mean(-1, keepdim=True).sqrt().to(tokens)
    return tokens + strength * size * noise


def jitter_image(x0: Tensor, strength: float, seed: int, cells: int = 4) -> Tensor:
    """A predicted image [b c ... h w] with smooth random light and colour added: `cells` blots a side.

    strength is in standard deviations of the image itself.
    """
    height, width = x0.shape[-2:]
    noise = draws((x0.shape[1], cells, cells), seed, len(x0))
    noise = functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    noise = noise / noise.std((1, 2, 3), keepdim=True)
    noise = noise.reshape(*noise.shape[:2], *[1] * (x0.ndim - 4), height, width).to(x0)
    size = x0.float().flatten(1).std(1).to(x0).reshape(-1, *[1] * (x0.ndim - 1))
    return x0 + strength * size * noise
