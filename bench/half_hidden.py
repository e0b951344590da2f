"""Objects half hidden by a hole: the scenes of the inpainting tables, and who judges how they were completed.

Imported as a part of this package, and by inpainting_quality_host.py alone, where `dmd_core` is the pack's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from dmd_core import demo, inpaint, shapes

SIDE, CELL = 128, 8  # pixels of the canvas, of a latent cell
EDGE = 32  # where the scene begins: it stands in the middle, 64 pixels wide
PLACES = ((-1, -1), (-1, 1), (1, -1), (1, 1))  # the object is left or right, top or bottom
# the pixels of a scene that are hidden: right half of the object, whichever its radius
COLUMNS, ROWS = {-1: (24, 48), 1: (40, 64)}, {-1: (0, 40), 1: (24, 64)}
PROMPT = "a thing"


@dataclass
class Group:
    """Pictures with the object at one place, so that one hole serves them all."""

    scene: Any
    picture: torch.Tensor  # [b 3 h w] in -1..1
    mask: torch.Tensor  # [b h w]


def groups(pictures: int, seed: int) -> list[Group]:
    """One per place, of so many pictures each."""
    return [group(place, pictures, 100 * seed + i) for i, place in enumerate(PLACES)]


def group(place: tuple[int, int], pictures: int, seed: int) -> Group:
    rng = torch.Generator().manual_seed(seed)
    scene = shapes.world.sample(pictures, rng, pairs=0.0)
    # within the trained places, but near one edge between cells: about half of the object is hidden
    centre = torch.tensor(place) * 0.30 + 0.12 * (torch.rand(pictures, 2, generator=rng) - 0.5)
    scene = replace(scene, x=centre[:, :1].repeat(1, 2), y=centre[:, 1:].repeat(1, 2))
    mask = torch.zeros(pictures, SIDE, SIDE)
    (left, right), (top, bottom) = COLUMNS[place[0]], ROWS[place[1]]
    mask[:, EDGE + top : EDGE + bottom, EDGE + left : EDGE + right] = 1
    return Group(scene, framed(scene), mask)


def framed(scene: Any) -> torch.Tensor:
    """The scene as it was trained, its background around it. [b 3 h w]"""
    picture = (scene.light.reshape(-1, 1, 1, 1) * 2 - 1).repeat(1, 3, SIDE, SIDE)
    picture[..., EDGE : EDGE + 64, EDGE : EDGE + 64] = shapes.world.render(scene)
    return picture


def prefilled(picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The hole filled from around it: an autoencoder would carry what was there into the known cells beside it."""
    return 2 * inpaint.prefill(picture / 2 + 0.5, mask) - 1


def right(world: Any, group: Group, result: torch.Tensor) -> torch.Tensor:
    """Which objects are whole again. [b] bool"""
    seen = demo.read(world, result[..., EDGE : EDGE + 64, EDGE : EDGE + 64])
    same = [getattr(seen, k)[:, 0] == getattr(group.scene, k)[:, 0] for k in ("shape", "colour")]
    near = (seen.radius[:, 0] - group.scene.radius[:, 0]).abs() < 0.06
    return torch.stack([*same, near, seen.count == 1]).all(0)


def cells(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(mask[:, None], CELL)[:, 0]


def judged(world: Any, groups: list[Group], fill: Callable[[Group], torch.Tensor]) -> float:
    """Share of pictures that are right with what was generated in their hole."""
    found = [right(world, g, inpaint.composite(g.picture, fill(g), g.mask)) for g in groups]
    return torch.cat(found).float().mean().item()
