"""Masks to train with: strokes, boxes, blobs, outpainting borders, crops, evenly over the (logarithm of the) area."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import rings

FINE = 4  # cells of a drawn mask per token, each way


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Shares of the kinds are relative; areas are shares of the picture."""

    strokes: float = 3.0
    boxes: float = 2.0
    blobs: float = 3.0
    outpaint: float = 2.0
    crops: float = 1.0  # a box of 10 to 50 % stays, anywhere in the picture
    all: float = 1.5  # whole pictures keep text-to-image alive
    least: float = 0.01
    most: float = 0.6


def draw_masks(n: int, height: int, width: int, rng: torch.Generator, config: MaskConfig | None = None) -> Tensor:
    """[n h w] of 0 and 1; the areas of a batch are stratified: log-uniform, one per n-th part of the range."""
    config = config or MaskConfig()
    if not 0 < config.least < config.most <= 1:
        raise ValueError(f"areas from {config.least} to {config.most} were asked for; they must rise and lie in 0 to 1")
    shares = torch.tensor([config.strokes, config.boxes, config.blobs, config.outpaint, config.crops, config.all])
    kinds = torch.multinomial(shares, n, replacement=True, generator=rng).tolist()
    place = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n
    low, high = math.log(config.least), math.log(config.most)
    areas = (low + (high - low) * place).exp().tolist()
    draw = (_strokes, _boxes, _blobs, _outpaint, _crop, _all)
    return torch.stack([draw[k](height, width, a, rng) for k, a in zip(kinds, areas, strict=True)])


def draw_holes(n: int, rows: int, columns: int, rng: torch.Generator, config: MaskConfig | None = None) -> Tensor:
    """Holes of a batch in tokens, bool [n rows*columns]: each of its own shape, all of one size, so that they stack.

    The first one decides the size; the others are drawn near it and then grow or shrink to it along their edge.
    """
    config = config or MaskConfig()
    first = _touched(draw_masks(1, rows * FINE, columns * FINE, rng, config))
    share = first.float().mean().item()
    if n == 1 or share == 1:
        return first.flatten(1).expand(n, -1).clone()
    near = replace(config, least=0.8 * share, most=min(1.0, 1.25 * share), all=0.0)
    others = draw_masks(n - 1, rows * FINE, columns * FINE, rng, near)
    return torch.cat([first.flatten(1), _sized(others, int(first.sum()), rng)])


def _touched(masks: Tensor) -> Tensor:
    return F.max_pool2d(masks[:, None], FINE)[:, 0].bool()


def _sized(masks: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """The tokens deepest in each mask, as many as said. [n rows*columns]"""
    covered = F.avg_pool2d(masks[:, None], FINE)[:, 0]
    touched = covered > 0
    depth = rings(~touched) - rings(touched) + covered
    depth = depth.flatten(1) + 1e-3 * torch.rand(len(masks), covered[0].numel(), generator=rng)
    return torch.zeros_like(depth, dtype=torch.bool).scatter(1, depth.topk(count, 1).indices, True)


def _uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=rng).item()


def _level(field: Tensor, area: float) -> Tensor:
    """The highest cells of a field [h w], as many as the area says (at least one)."""
    count = max(1, round(area * field.numel()))
    top = field.flatten().topk(count).indices
    return torch.zeros(field.numel()).index_fill(0, top, 1.0).reshape(field.shape)


def _all(height: int, width: int, area: float, rng: torch.Generator) -> Tensor:
    return torch.ones(height, width)


def _boxes(height: int, width: int, area: float, rng: torch.Generator, most: int = 3) -> Tensor:
    """One to three boxes that share the area; where they overlap it is smaller."""
    mask = torch.zeros(height, width)
    count = int(torch.randint(1, most + 1, (), generator=rng)) if area * height * width >= 12 else 1
    for _ in range(count):
        aspect = math.exp(_uniform(rng, -0.7, 0.7))
        h = min(height, max(1, round(math.sqrt(area / count * height * width * aspect))))
        w = min(width, max(1, round(area / count * height * width / h)))
        top, left = int(_uniform(rng, 0, height - h + 1)), int(_uniform(rng, 0, width - w + 1))
        mask[top : top + h, left : left + w] = 1
    return mask


def _blobs(height: int, width: int, area: float, rng: torch.Generator) -> Tensor:
    """Object-like: a level set of smooth noise that is high near one point."""
    coarse = 3 + int(torch.randint(0, 4, (), generator=rng))
    noise = torch.randn(1, 1, coarse, coarse, generator=rng)
    noise = F.interpolate(noise, (height, width), mode="bicubic", align_corners=True)[0, 0]
    y, x = _grid(height, width)
    radius = math.sqrt(area) + 0.05
    far = ((y - _uniform(rng)) ** 2 + (x - _uniform(rng)) ** 2) / radius**2
    return _level(0.5 * noise - far, area)


def _strokes(height: int, width: int, area: float, rng: torch.Generator) -> Tensor:
    """The cells nearest to a wandering line."""
    y, x = _grid(height, width)
    points = [torch.tensor([_uniform(rng), _uniform(rng)])]
    heading = _uniform(rng, 0, 2 * math.pi)
    for _ in range(int(torch.randint(2, 8, (), generator=rng))):
        heading += _uniform(rng, -1.2, 1.2)
        step = _uniform(rng, 0.1, 0.35) * torch.tensor([math.sin(heading), math.cos(heading)])
        points.append((points[-1] + step).clamp(0, 1))
    here = torch.stack([y, x], -1)
    distance = torch.full((height, width), torch.inf)
    for a, b in pairwise(points):
        along = b - a
        t = (((here - a) * along).sum(-1) / along.square().sum().clamp_min(1e-8)).clamp(0, 1)
        distance = torch.minimum(distance, (here - a - t[..., None] * along).norm(dim=-1))
    return _level(-distance, area)


def _outpaint(height: int, width: int, area: float, rng: torch.Generator) -> Tensor:
    """All but a box: one, two or all sides, as when a picture is extended (large areas; at least a tenth)."""
    area = max(area, 0.1)
    keep = torch.rand(4, generator=rng) < 0.5
    if keep.all():
        keep[int(torch.randint(0, 4, (), generator=rng))] = False
    top, bottom, left, right = (0.0 if k else _uniform(rng, 0.3, 1.0) for k in keep.tolist())
    low, high = 0.0, 1.0
    for _ in range(30):  # bisection: how far the sides come in
        scale = (low + high) / 2
        kept = max(0.0, 1 - scale * (top + bottom)) * max(0.0, 1 - scale * (left + right))
        low, high = (scale, high) if 1 - kept < area else (low, scale)
    mask = torch.ones(height, width)
    rows = slice(round(low * top * height), height - round(low * bottom * height))
    columns = slice(round(low * left * width), width - round(low * right * width))
    mask[rows, columns] = 0
    return mask if mask.any() else _boxes(height, width, area, rng)


def _crop(height: int, width: int, area: float, rng: torch.Generator) -> Tensor:
    """All but one box anywhere, as when a cropped picture gets its surroundings back (GenCrop's 10 to 50 %)."""
    kept = 1 - _boxes(height, width, _uniform(rng, 0.1, 0.5), rng, 1)
    return kept if kept.any() else _boxes(height, width, area, rng)


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    return y[:, None].expand(height, width), x[None].expand(height, width)
