"""Procedural pictures with known factors: one or two flat shapes on a plain background, drawn from signed distances."""

import math
from dataclasses import dataclass, fields

import torch
from einops import rearrange
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
TEXTURES = ("plain", "striped", "dotted")
ROUND = (0, 4)  # circle and ring: their rotation cannot be seen

RGB = torch.tensor(
    [
        [0.86, 0.10, 0.12],
        [0.96, 0.52, 0.08],
        [0.97, 0.88, 0.15],
        [0.13, 0.66, 0.22],
        [0.15, 0.80, 0.85],
        [0.15, 0.25, 0.90],
        [0.58, 0.16, 0.74],
    ]
)

CANVAS = 64  # pixels: 16 tokens, which a small teacher masters in half an hour

# Lengths are in half canvases (the canvas spans -1..1), angles in radians. A word is only said of a scene that
# shows it clearly, and only counts as shown beyond the middle between it and its opposite.
#
# Wide scenes fill every range evenly: the autoencoder and the recogniser are trained on them, so that they also serve
# what lies between two words. The teacher's scenes are clear ones: each factor lies in the part that a word names,
# which a small network learns sooner.
RADIUS = (0.30, 0.54)
SMALL, LARGE, SIZE_SPLIT = 0.37, 0.47, 0.42
PLACE = 0.40  # centres of single objects lie in -PLACE..PLACE
ASIDE, SIDE_SPLIT = 0.18, 0.0
TILT = math.radians(28)  # below 36 degrees, where a star looks the same again
TILTED, STRAIGHT, TILT_SPLIT = math.radians(19), math.radians(5), math.radians(12)
LIGHT, DARK, LIGHT_SPLIT = (0.76, 0.97), (0.03, 0.17), 0.5
PAIR_RADIUS = (0.27, 0.36)
PAIR_SHARE, WIDE_PAIR_SHARE = 0.10, 0.20
CLEAR = {
    "small": (0.33, SMALL),
    "large": (0.48, 0.54),
    "aside": (0.24, 0.36),
    "tilted": (TILTED, TILT),
    "straight": (-math.radians(4), math.radians(4)),
    "light": (0.86, 0.95),
    "dark": (0.05, 0.14),
    "pair": (0.31, 0.36),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is in each picture; slot 0 is the only object, or the left one of two."""

    count: Tensor  # [b] 1 or 2
    shape: Tensor  # [b 2] index into SHAPES
    colour: Tensor  # [b 2] index into COLOURS
    texture: Tensor  # [b 2] index into TEXTURES; objects of a pair are always plain
    radius: Tensor  # [b 2]
    x: Tensor  # [b 2] centre, to the right
    y: Tensor  # [b 2] centre, downwards
    angle: Tensor  # [b 2] clockwise
    light: Tensor  # [b] background brightness, 0..1

    def __len__(self) -> int:
        return len(self.count)

    def take(self, index: Tensor | slice) -> "Scene":
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def sample(n: int, rng: torch.Generator, pairs: float = PAIR_SHARE) -> Scene:
    """n clear scenes, as the teacher knows them: a share `pairs` with two objects, none textured."""

    def within(part: str, *shape: int) -> Tensor:
        low, high = CLEAR[part]
        return low + (high - low) * torch.rand(n, *shape, generator=rng)

    def either(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(torch.rand(first.shape, generator=rng) < 0.5, first, second)

    two = torch.rand(n, generator=rng) < pairs
    pair = two[:, None]
    x, y = (either(within("aside", 2), -within("aside", 2)) for _ in range(2))
    beside = torch.tensor([-0.48, 0.48]) + 0.04 * (2 * torch.rand(n, 2, generator=rng) - 1)
    straight = within("straight", 2)
    return Scene(
        count=1 + two.long(),
        shape=torch.randint(len(SHAPES), (n, 2), generator=rng),
        colour=torch.randint(len(COLOURS), (n, 2), generator=rng),
        texture=torch.zeros(n, 2, dtype=torch.long),
        radius=torch.where(pair, within("pair", 2), either(within("small", 2), within("large", 2))),
        x=torch.where(pair, beside, x),
        y=torch.where(pair, 0.4 * y, y),
        angle=torch.where(pair, straight, either(straight, within("tilted", 2))),
        light=either(within("light"), within("dark")),
    )


def sample_wide(n: int, rng: torch.Generator, pairs: float = WIDE_PAIR_SHARE, textured: float = 0.0) -> Scene:
    """n scenes over all of every range: a share `textured` of single objects is striped or dotted."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=rng)

    def index(k: int, *shape: int) -> Tensor:
        return torch.randint(k, (n, *shape), generator=rng)

    two = torch.rand(n, generator=rng) < pairs
    side = torch.tensor([-0.48, 0.48])
    light = torch.where(torch.rand(n, generator=rng) < 0.5, uniform(*LIGHT), uniform(*DARK))
    pair = two[:, None]
    return Scene(
        count=1 + two.long(),
        shape=index(len(SHAPES), 2),
        colour=index(len(COLOURS), 2),
        texture=torch.where(pair | (torch.rand(n, 2, generator=rng) >= textured), 0, 1 + index(len(TEXTURES) - 1, 2)),
        radius=torch.where(pair, uniform(*PAIR_RADIUS, 2), uniform(*RADIUS, 2)),
        x=torch.where(pair, side + uniform(-0.09, 0.09, 2), uniform(-PLACE, PLACE, 2)),
        y=torch.where(pair, uniform(-0.35, 0.35, 2), uniform(-PLACE, PLACE, 2)),
        angle=uniform(-TILT, TILT, 2),
        light=light,
    )


def distance(shape: int, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to one shape's edge in units of its radius, negative inside; u right, v down."""
    if shape == 0:
        return torch.hypot(u, v) - 0.92
    if shape == 1:
        return torch.maximum(u.abs(), v.abs()) - 0.80
    if shape == 2:
        slope = math.sqrt(3) / 2
        return torch.maximum(v + 0.12, slope * u.abs() - 0.5 * (v + 0.12)) - 0.58
    if shape == 3:
        return _star(u, v, outer=1.08, inner=0.50)
    if shape == 4:
        return (torch.hypot(u, v) - 0.70).abs() - 0.24
    upright = torch.maximum(u.abs() - 0.31, v.abs() - 0.95)
    return torch.minimum(upright, torch.maximum(u.abs() - 0.95, v.abs() - 0.31))


def _star(u: Tensor, v: Tensor, outer: float, inner: float) -> Tensor:
    # Fold the plane into half of one of the five points: there the edge is one straight line from the tip to the notch.
    half = math.pi / 5
    turn = torch.atan2(u, -v)
    turn = (torch.remainder(turn + half, 2 * half) - half).abs()
    reach = torch.hypot(u, v)
    notch_x, notch_y = inner * math.cos(half), inner * math.sin(half)
    edge = math.hypot(outer - notch_x, notch_y)
    normal_x, normal_y = notch_y / edge, (outer - notch_x) / edge
    return (reach * turn.cos() - outer) * normal_x + reach * turn.sin() * normal_y


def _pattern(texture: int, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance to the darker marks of a texture, in units of the radius."""
    if texture == 1:
        period = 0.66
        return (torch.remainder(v + period / 2, period) - period / 2).abs() - period / 4
    period = 0.62
    cell_u = torch.remainder(u + period / 2, period) - period / 2
    cell_v = torch.remainder(v + period / 2, period) - period / 2
    return torch.hypot(cell_u, cell_v) - 0.19


def render(scene: Scene, height: int = CANVAS, width: int | None = None) -> Tensor:
    """Anti-aliased pictures [b 3 h w] in -1..1; on canvases that are not square, distances keep their shape."""
    width = width or height
    unit = min(height, width) / 2  # pixels per half canvas
    rows = (torch.arange(height) + 0.5 - height / 2) / unit
    columns = (torch.arange(width) + 0.5 - width / 2) / unit
    stretch_x, stretch_y = width / (2 * unit), height / (2 * unit)
    image = scene.light.reshape(-1, 1, 1, 1).repeat(1, 3, height, width)
    for slot in (0, 1):
        present = scene.count > slot
        for shape in range(len(SHAPES)):
            for texture in range(len(TEXTURES)):
                mine = present & (scene.shape[:, slot] == shape) & (scene.texture[:, slot] == texture)
                if mine.any():
                    _draw(image, mine.nonzero()[:, 0], scene, slot, rows, columns, (stretch_x, stretch_y), unit)
    return image * 2 - 1


def _draw(image, index, scene, slot, rows, columns, stretch, unit) -> None:
    shape, texture = int(scene.shape[index[0], slot]), int(scene.texture[index[0], slot])

    def column(values: Tensor) -> Tensor:
        return rearrange(values[index, slot], "b -> b 1 1")

    radius, angle = column(scene.radius), column(scene.angle)
    right = (columns[None, None, :] - column(scene.x) * stretch[0]) / radius
    down = (rows[None, :, None] - column(scene.y) * stretch[1]) / radius
    cos, sin = angle.cos(), angle.sin()
    u, v = right * cos + down * sin, down * cos - right * sin
    pixels = radius * unit  # one radius in pixels: coverage falls from 1 to 0 over one pixel around the edge
    cover = (0.5 - distance(shape, u, v) * pixels).clamp_(0, 1)[:, None]
    ink = rearrange(RGB[scene.colour[index, slot]], "b c -> b c 1 1")
    if texture:
        ink = ink * (1 - 0.52 * (0.5 - _pattern(texture, u, v) * pixels).clamp_(0, 1)[:, None])
    image[index] = torch.lerp(image[index], ink.expand(-1, -1, *cover.shape[-2:]), cover)
