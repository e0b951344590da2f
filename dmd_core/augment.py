"""Random changes of latents, the same on two sides: what makes a perceptual metric on latents usable."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Augment = Callable[[Tensor], Tensor]


def random_augment(shape: tuple[int, ...], rng: torch.Generator) -> Augment:
    """Geometry, contrast and cut-out for latents [b c h w], drawn once per sample; other shapes stay as they are."""
    if len(shape) != 4:
        return lambda x: x
    b, c, h, w = shape

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=rng, device=rng.device)

    angle, zoom = uniform(-0.3, 0.3, b), uniform(0.8, 1.25, b)  # radians, factor
    flip = uniform(0, 1, b).round() * 2 - 1
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [cos * flip, -sin, uniform(-0.25, 0.25, b), sin * flip, cos, uniform(-0.25, 0.25, b)]
    matrix = torch.stack(rows, 1).reshape(b, 2, 3)
    contrast, offset = uniform(0.8, 1.2, b, c, 1, 1), uniform(-0.2, 0.2, b, c, 1, 1)
    top, left = uniform(-1, 1, b, 1, 1), uniform(-1, 1, b, 1, 1)
    y = torch.linspace(-1, 1, h, device=rng.device)[None, :, None]
    x = torch.linspace(-1, 1, w, device=rng.device)[None, None, :]
    keep = (((y - top).abs() > 0.25) | ((x - left).abs() > 0.25)).float()[:, None]  # a quarter of each side is cut

    def apply(latents: Tensor) -> Tensor:
        grid = F.affine_grid(matrix.to(latents), list(latents.shape), align_corners=False)
        moved = F.grid_sample(latents, grid, padding_mode="reflection", align_corners=False)
        return (moved * contrast.to(latents) + offset.to(latents)) * keep.to(latents)

    return apply
