"""Masks [b h w] in 0..1: checked, repaired, grown, softened, and told apart into islands."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .. import cancel


def check(image: Tensor, mask: Tensor) -> Tensor:
    """The mask, one per image; image [b c h w]. A single mask serves a whole batch."""
    if image.ndim != 4 or mask.ndim != 3:
        raise ValueError(
            f"got an image of shape {list(image.shape)} and a mask of shape {list(mask.shape)}; "
            "the image must be [b c h w] and the mask [b h w]"
        )
    if image.shape[-2:] != mask.shape[-2:]:
        (h, w), (mh, mw) = image.shape[-2:], mask.shape[-2:]
        raise ValueError(
            f"the image is {w} x {h} and the mask {mw} x {mh}; they must have the same size; resize one of them "
            "(in ComfyUI by the node Resize Image/Mask, match size)"
        )
    if len(mask) not in (1, len(image)):
        raise ValueError(
            f"got {len(image)} images and {len(mask)} masks; give one mask, or one per image ({len(image)})"
        )
    for name, value in (("image", image), ("mask", mask)):
        if not torch.isfinite(value).all():
            raise ValueError(f"the {name} holds NaN or infinite values; look at the node that made it")
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(
            f"the mask's values go from {mask.min().item():g} to {mask.max().item():g}; they must lie in 0 to 1"
        )
    return mask.expand(len(image), -1, -1)


def binary(mask: Tensor) -> Tensor:
    """Where a pixel may change at all, as bool: everywhere but at exactly 0."""
    return mask > 0


def stabilise(mask: Tensor, low: float = 0.1, high: float = 0.9) -> Tensor:
    """Values up to low become 0, from high on 1: painted masks carry 0.99 and stray 0.01, which nodes round at will."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"the mask's limits are {low} and {high}; they must be rising and within 0 to 1")
    return torch.where(mask <= low, 0.0, torch.where(mask >= high, 1.0, mask))


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """Grown by a square of 2 * pixels + 1; shrunk if negative."""
    if pixels == 0:
        return mask
    cancel.ask()
    # two passes of one dimension cost 2 (2r+1) instead of (2r+1)^2
    size, pad = 2 * abs(pixels) + 1, abs(pixels)
    value = mask[:, None].float() * (1 if pixels > 0 else -1)
    value = F.max_pool2d(value, (size, 1), 1, (pad, 0))
    value = F.max_pool2d(value, (1, size), 1, (0, pad))[:, 0]
    return (value if pixels > 0 else -value).to(mask.dtype)


def blur(value: Tensor, pixels: float) -> Tensor:
    """Gaussian over [b c h w] with sigma = pixels / 2; the border repeats, so nothing darkens towards it."""
    radius = round(pixels)
    if radius < 1:
        return value
    cancel.ask()
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32, device=value.device)
    kernel = torch.exp(-0.5 * (offset / (pixels / 2)) ** 2)
    kernel = (kernel / kernel.sum()).expand(value.shape[1], 1, -1)
    value = F.pad(value, (radius, radius, radius, radius), mode="replicate")
    value = F.conv2d(value, rearrange(kernel, "c one k -> c one k 1"), groups=len(kernel))
    return F.conv2d(value, rearrange(kernel, "c one k -> c one 1 k"), groups=len(kernel))


def soften(mask: Tensor, pixels: float) -> Tensor:
    """Edges faded outwards only: what was 1 stays 1, so the whole hole is still replaced."""
    if pixels <= 0:
        return mask
    reach = round(pixels)
    faded = blur(dilate(mask, reach)[:, None], pixels)[:, 0]
    return torch.maximum(mask, torch.where(dilate(mask, 2 * reach) > 0, faded, 0.0).clamp(0, 1))


def ring(mask: Tensor, pixels: int) -> Tensor:
    """The known pixels within reach of the hole, as bool."""
    hole = binary(mask)
    return dilate(hole.float(), pixels).bool() & ~hole


def fill_holes(mask: Tensor) -> Tensor:
    """What full pixels enclose becomes full, soft inner edges included: a drawn outline turns into a disc."""
    passable = mask < 1
    border = torch.zeros_like(passable)
    border[:, [0, -1]] = True
    border[:, :, [0, -1]] = True
    outer = _spread((passable & border).long(), passable) > 0
    return torch.where(passable & ~outer, 1.0, mask)


def islands(mask: Tensor) -> Tensor:
    """[b h w] of 0 (known) and 1..n: parts of each mask that do not touch, each its own number."""
    hole = binary(mask)
    b, h, w = mask.shape
    label = torch.arange(1, h * w + 1, device=mask.device).reshape(1, h, w) * hole
    label = _spread(label, hole)
    out = torch.zeros_like(label)
    for i in range(b):
        found = torch.unique(label[i][hole[i]])
        out[i][hole[i]] = torch.searchsorted(found, label[i][hole[i]]) + 1
    return out


def _spread(value: Tensor, open_: Tensor) -> Tensor:
    """The largest value that can be reached through open cells, sweeping whole runs of a row or column at a time."""
    value = value * open_
    while True:
        cancel.ask()
        swept = _sweep(value, open_)
        swept = _sweep(swept.mT, open_.mT).mT
        if torch.equal(swept, value):
            return value
        value = swept


def _sweep(value: Tensor, open_: Tensor) -> Tensor:
    run = (~open_).long().cumsum(-1)  # a number per stretch of open cells
    best = value.new_zeros(*value.shape[:-1], value.shape[-1] + 1).scatter_reduce(-1, run, value, "amax")
    return best.gather(-1, run) * open_
