"""Crops with context around the islands of a mask, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import binary, islands

SMALL = 1.15  # how many times the usual side is larger than a crop's before that is enlarged


@dataclass(frozen=True)
class Box:
    """Pixels top..top+height, left..left+width of image `index`."""

    index: int
    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width

    def of(self, value: Tensor) -> Tensor:
        """[b ... h w] -> [... height width]"""
        return value[self.index, ..., self.top : self.top + self.height, self.left : self.left + self.width]

    def overlaps(self, other: "Box") -> bool:
        rows = self.top < other.top + other.height and other.top < self.top + self.height
        columns = self.left < other.left + other.width and other.left < self.left + self.width
        return self.index == other.index and rows and columns


def box_of(hole: Tensor, index: int = 0) -> Box | None:
    """The smallest box around the true cells of [h w]; None where there is none."""
    rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
    if not len(rows):
        return None
    top, left = int(rows[0]), int(columns[0])
    return Box(index, top, left, int(rows[-1]) - top + 1, int(columns[-1]) - left + 1)


def around(box: Box, size: tuple[int, int], factor: float, multiple: int, usual: int = 0) -> Box:
    """The box with context: scaled by factor, rounded up, and moved (not cut) where it would leave the picture.

    usual: the model draws pictures of about usual * usual pixels; a smaller box grows to that, as far as there is more.
    """
    if factor < 1:
        raise ValueError(f"the context factor is {factor}; 1 means no context, 1.5 to 3 are usual")
    wanted = [round(length * factor + multiple) for length in (box.height, box.width)]  # never without any context
    rows, columns = grown(wanted, size, usual)
    height, top = _span(box.top, box.height, size[0], rows, multiple)
    width, left = _span(box.left, box.width, size[1], columns, multiple)
    return Box(box.index, top, left, height, width)


def grown(sides: Sequence[int], size: tuple[int, int], usual: int) -> list[int]:
    """Sides within a picture, at least usual * usual pixels where it has them: a square first, then up to 4 to 1."""
    sides = [min(side, limit) for side, limit in zip(sides, size, strict=True)]
    short = int(sides[1] < sides[0])
    for i, most in ((short, usual), (1 - short, 2 * usual), (short, 2 * usual)):
        sides[i] = max(sides[i], min(usual**2 // max(1, sides[1 - i]), most, size[i]))
    return sides


def enlarged(box: Box, usual: int, multiple: int) -> tuple[int, int] | None:
    """Rows and columns to sample a box at that is much smaller than what the model draws; None: as it is."""
    factor = usual / box.area**0.5
    if factor < SMALL:
        return None
    height, width = (max(1, round(side * factor / multiple)) * multiple for side in (box.height, box.width))
    return height, width


def _span(start: int, length: int, limit: int, wanted: int, multiple: int) -> tuple[int, int]:
    wanted = min(-(-wanted // multiple) * multiple, limit // multiple * multiple or limit)
    wanted = max(wanted, length)
    first = start + length // 2 - wanted // 2
    return wanted, max(0, min(first, limit - wanted))


def merged(boxes: Sequence[Box]) -> list[Box]:
    """Boxes that overlap become one, until none do."""
    out: list[Box] = []
    for box in boxes:
        while hit := next((o for o in out if o.overlaps(box)), None):
            out.remove(hit)
            top, left = min(box.top, hit.top), min(box.left, hit.left)
            bottom = max(box.top + box.height, hit.top + hit.height)
            right = max(box.left + box.width, hit.left + hit.width)
            box = Box(box.index, top, left, bottom - top, right - left)
        out.append(box)
    return out


def crops(mask: Tensor, factor: float = 1.5, multiple: int = 16, separate: bool = True, usual: int = 0) -> list[Box]:
    """Boxes with context around each mask [b h w], all of one size, so that they make one batch.

    usual: see around. separate: distant islands get their own; else one box per image. Images without a hole get none.
    """
    size = (mask.shape[-2], mask.shape[-1])
    tight: list[Box] = []
    for i, one in enumerate(mask):
        label = islands(one[None])[0] if separate else binary(one).long()
        found = [box_of(label == n, i) for n in range(1, int(label.max()) + 1)]
        tight += merged([around(b, size, factor, multiple, usual) for b in found if b is not None])
    if not tight:
        return []
    # growing all to the largest can make them touch again; a hole may lie in two crops, the later one is pasted last
    height, width = max(b.height for b in tight), max(b.width for b in tight)
    return [_resized(b, height, width, size) for b in tight]


def _resized(box: Box, height: int, width: int, size: tuple[int, int]) -> Box:
    top = max(0, min(box.top + box.height // 2 - height // 2, size[0] - height))
    left = max(0, min(box.left + box.width // 2 - width // 2, size[1] - width))
    return Box(box.index, top, left, height, width)


def cut(value: Tensor, boxes: Sequence[Box]) -> Tensor:
    """[b ... h w] -> [n ... height width]"""
    return torch.stack([box.of(value) for box in boxes])


def paste(canvas: Tensor, parts: Tensor, boxes: Sequence[Box]) -> Tensor:
    """The parts put back, scaled if they have another size than their box; canvas [b c h w], parts [n c h w]."""
    if len(parts) != len(boxes):
        raise ValueError(f"got {len(parts)} pictures for {len(boxes)} regions; give one per region, in their order")
    out = canvas.clone()
    for part, box in zip(parts, boxes, strict=True):
        box.of(out).copy_(resized(part[None], (box.height, box.width))[0])
    return out


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """[n c h w] in 0..1 at another size; the very pictures where they have it."""
    if pictures.shape[-2:] == size:
        return pictures
    return F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
