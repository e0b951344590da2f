"""The generated picture into the given one: colours matched on the ring, edges faded, known pixels exact to the bit."""

import torch
from torch import Tensor

from .masks import binary, check, dilate, islands, ring


def match_ring(generated: Tensor, original: Tensor, mask: Tensor, pixels: int = 16, least: int = 16) -> Tensor:
    """The generated picture [b c h w] with mean and spread per channel as the original's on the ring around the hole.

    The ring is known in both, so its difference is what the autoencoder changed. Only its pixels are counted; a ring
    of fewer than `least` pixels changes nothing.
    """
    mask = check(original, mask)
    weight = ring(mask, pixels)[:, None].to(original)
    count = weight.sum((2, 3), keepdim=True)
    mean_g, std_g = _moments(generated, weight, count)
    mean_o, std_o = _moments(original, weight, count)
    # a flat ring says nothing about contrast
    gain = torch.where(std_g > 1e-3, (std_o / std_g.clamp_min(1e-3)).clamp(0.5, 2.0), 1.0)
    matched = (generated - mean_g) * gain + mean_o
    return torch.where(count >= least, matched, generated)


def _moments(value: Tensor, weight: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    mean = (value * weight).sum((2, 3), keepdim=True) / count.clamp_min(1)
    variance = ((value - mean).square() * weight).sum((2, 3), keepdim=True) / count.clamp_min(1)
    return mean, variance.sqrt()


def fade(mask: Tensor, pixels: float) -> Tensor:
    """How much of the generated picture shows: 0 outside, rising to the mask's value within so many pixels inside.

    Each island reaches its full value somewhere, however thin it is.
    """
    if pixels <= 0:
        return mask
    hole = binary(mask)
    layer = hole.float()
    inside = layer.clone()  # how many pixels deep, up to `pixels`
    for _ in range(round(pixels)):
        layer = dilate(layer, -1)
        inside = inside + layer
    label = islands(mask)
    flat = label.flatten(1)
    peak = inside.new_zeros(len(mask), int(flat.max()) + 1).scatter_reduce(1, flat, inside.flatten(1), "amax")
    return torch.where(hole, mask * inside / peak.gather(1, flat).reshape(mask.shape).clamp_min(1), 0.0)


def composite(original: Tensor, generated: Tensor, mask: Tensor, feather: float = 0.0) -> Tensor:
    """Original where the mask is 0, to the bit; generated where it is 1; both [b c h w]."""
    mask = check(original, mask)
    if generated.shape != original.shape:
        raise ValueError(
            f"the generated picture is {list(generated.shape)} and the original {list(original.shape)}; "
            "they must have the same shape"
        )
    alpha = fade(mask, feather)[:, None].to(original)
    blended = torch.where(alpha == 1, generated.to(original), torch.lerp(original, generated.to(original), alpha))
    return torch.where(binary(mask)[:, None], blended, original)
