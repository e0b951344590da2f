"""What stands in the hole before sampling: few-step students take colour and structure of their first guess from it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import binary, blur, check


def neutral(image: Tensor, known: Tensor) -> Tensor:
    """Middle grey."""
    return torch.full_like(image, 0.5)


def mean(image: Tensor, known: Tensor) -> Tensor:
    """The mean colour of what is known."""
    weight = known[:, None].to(image)
    total = weight.sum((2, 3), keepdim=True)
    colour = (image * weight).sum((2, 3), keepdim=True) / total.clamp_min(1)
    return torch.where(total > 0, colour, 0.5).expand_as(image)


def blurred(image: Tensor, known: Tensor) -> Tensor:
    """A wide blur of the known pixels; far from them it falls back to push-pull, which has no gaps."""
    weight = known[:, None].to(image)
    radius = max(2.0, min(image.shape[-2:]) / 16)
    total = blur(weight, radius)
    return torch.where(total > 1e-3, blur(image * weight, radius) / total.clamp_min(1e-3), push_pull(image, known))


def push_pull(image: Tensor, known: Tensor) -> Tensor:
    """Smooth interpolation over a pyramid: averages of the known, then each gap from the level above it."""
    weight = known[:, None].to(image)
    if not known.any():
        return neutral(image, known)
    return _push_pull(image * weight, weight)


def _push_pull(colour: Tensor, weight: Tensor) -> Tensor:
    """colour is premultiplied by weight."""
    h, w = colour.shape[-2:]
    here = colour / weight.clamp_min(1e-12)
    if bool((weight > 0).all()) or max(h, w) == 1:
        # an image without any known pixel stays grey
        return torch.where(weight > 0, here, 0.5)
    pad = (0, w % 2, 0, h % 2)
    total = 4 * F.avg_pool2d(F.pad(weight, pad), 2)
    summed = 4 * F.avg_pool2d(F.pad(colour, pad), 2)
    capped = total.clamp_max(1)
    above = _push_pull(summed / total.clamp_min(1e-12) * capped, capped)
    above = F.interpolate(above, scale_factor=2, mode="bilinear", align_corners=False)[..., :h, :w]
    return weight * here + (1 - weight) * above


PREFILLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "push-pull": push_pull,
    "blur": blurred,
    "mean": mean,
    "neutral": neutral,
}


def prefill(image: Tensor, mask: Tensor, kind: str = "push-pull") -> Tensor:
    """image [b c h w] in 0..1 with its hole filled; known pixels stay as they are, to the bit."""
    if kind not in PREFILLS:
        raise ValueError(f"prefill {kind!r} is not known; choose one of {', '.join(PREFILLS)}")
    hole = binary(check(image, mask))
    filled = PREFILLS[kind](image, ~hole)
    return torch.where(hole[:, None], filled.to(image).clamp(0, 1), image)
