"""Captions in a small vocabulary: said of a scene, and read back as the factors they name."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from . import world
from .world import COLOURS, SHAPES, Scene

FREE = -1  # a factor that a caption leaves open
SIZES, TILTS, SIDES, HEIGHTS, LIGHTS = (
    ("small", "large"),
    ("straight", "tilted"),
    ("left", "right"),
    ("top", "bottom"),
    ("dark", "light"),
)
WORDS = (
    *("a", "an", "thing", "of", "on"),
    *(*SHAPES, *COLOURS, *SIZES, *TILTS, *SIDES, *HEIGHTS, *LIGHTS),
)
# What can be named. Names that end in 2 are of the right one of two objects.
FACTORS = {
    "count": ("one", "two"),
    "shape": SHAPES,
    "colour": COLOURS,
    "shape2": SHAPES,
    "colour2": COLOURS,
    "size": SIZES,
    "tilt": TILTS,
    "side": SIDES,
    "height": HEIGHTS,
    "light": LIGHTS,
}
# Shares of captions that name a factor which the scene shows clearly.
SAID = {
    "shape": 0.95,
    "colour": 0.90,
    "size": 0.4,
    "tilt": 0.4,
    "side": 0.5,
    "height": 0.5,
    "light": 0.5,
}


def describe(scene: Scene, rng: torch.Generator) -> list[str]:
    """One caption per scene; what it does not say is free."""
    chance = torch.rand(len(scene), 2 * len(SAID), generator=rng).tolist()
    flip = (torch.rand(len(scene), generator=rng) < 0.5).tolist()
    facts = _clear(scene)
    rows = [dict(zip(facts, values, strict=True)) for values in zip(*(v.tolist() for v in facts.values()), strict=True)]
    return [_sentence(fact, c, f) for fact, c, f in zip(rows, chance, flip, strict=True)]


def _sentence(fact: dict[str, int], chance: list[float], flip: bool) -> str:
    def word(factor: str, slot: int = 0) -> list[str]:
        key = factor + "2" * slot
        said = fact[key] != FREE and chance[2 * list(SAID).index(factor) + slot] < SAID[factor]
        return [FACTORS[key][fact[key]]] if said else []

    def noun(slot: int) -> list[str]:
        return word("colour", slot) + (word("shape", slot) or ["thing"])

    words = ["a"]
    if fact["count"]:
        words += [*noun(1), "right", "of", "a", *noun(0)] if flip else [*noun(0), "left", "of", "a", *noun(1)]
    else:
        words += word("size") + word("tilt") + noun(0)
        place = word("height") + word("side")
        words += place
    light = word("light")
    words += ["on", *light] if light else []
    return " ".join(
        "an" if w == "a" and after == "orange" else w for w, after in zip(words, [*words[1:], ""], strict=True)
    )


def _clear(scene: Scene) -> dict[str, Tensor]:
    """The factors that a scene shows clearly enough to be named. [b] each"""
    two, free = scene.count == 2, torch.full_like(scene.count, FREE)
    angle, radius = scene.angle[:, 0].abs(), scene.radius[:, 0]

    def either(first: Tensor, second: Tensor) -> Tensor:
        return torch.where(two, FREE, torch.where(second, 1, torch.where(first, 0, free)))

    x, y = scene.x[:, 0], scene.y[:, 0]
    tilt = either(angle < world.STRAIGHT, angle > world.TILTED)
    return {
        "count": two.long(),
        "shape": scene.shape[:, 0],
        "colour": scene.colour[:, 0],
        "shape2": torch.where(two, scene.shape[:, 1], free),
        "colour2": torch.where(two, scene.colour[:, 1], free),
        "size": either(radius < world.SMALL, radius > world.LARGE),
        "tilt": torch.where(_round(scene), free, tilt),
        "side": either(x < -world.ASIDE, x > world.ASIDE),
        "height": either(y < -world.ASIDE, y > world.ASIDE),
        "light": (scene.light > world.LIGHT_SPLIT).long(),
    }


def _round(scene: Scene) -> Tensor:
    return torch.isin(scene.shape[:, 0], torch.tensor(world.ROUND))


def shown(scene: Scene) -> dict[str, Tensor]:
    """Every factor of a scene as a class, continuous ones split in the middle. [b] each"""
    first = {"size": scene.radius > world.SIZE_SPLIT, "side": scene.x > 0, "height": scene.y > 0}
    first |= {"tilt": scene.angle.abs() > world.TILT_SPLIT}
    return {
        "count": scene.count - 1,
        "shape": scene.shape[:, 0],
        "colour": scene.colour[:, 0],
        "shape2": scene.shape[:, 1],
        "colour2": scene.colour[:, 1],
        "light": (scene.light > world.LIGHT_SPLIT).long(),
        **{k: v[:, 0].long() for k, v in first.items()},
    }


def named(captions: Sequence[str]) -> dict[str, Tensor]:
    """The factors that captions name, FREE where they leave them open. [b] each"""
    rows = [_parse(caption) for caption in captions]
    return {k: torch.tensor([row.get(k, FREE) for row in rows]) for k in FACTORS}


def words(caption: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", caption.lower())


def _parse(caption: str) -> dict[str, int]:
    text = words(caption)
    relation = next((i for i in range(len(text) - 1) if text[i] in SIDES and text[i + 1] == "of"), None)
    if relation is None:
        found = {k: _find(text, FACTORS[k]) for k in FACTORS if k != "count" and not k.endswith("2")}
        # a caption that names no object may show any number of them
        is_one = found["shape"] is not None or "thing" in text
        return {k: v for k, v in (found | {"count": 0 if is_one else None}).items() if v is not None}
    halves = text[:relation], text[relation + 2 :]
    left, right = halves if text[relation] == "left" else halves[::-1]
    found = {"shape": _find(left, SHAPES), "colour": _find(left, COLOURS), "light": _find(text, LIGHTS)}
    found |= {"shape2": _find(right, SHAPES), "colour2": _find(right, COLOURS), "count": 1}
    return {k: v for k, v in found.items() if v is not None}


def _find(text: Sequence[str], options: Sequence[str]) -> int | None:
    return next((options.index(w) for w in text if w in options), None)


def agreement(captions: Sequence[str], scene: Scene) -> dict[str, Tensor]:
    """Per factor, whether a scene shows what the caption names; free factors agree. [b] bool each"""
    wanted, seen = named(captions), shown(scene)
    result = {k: (wanted[k] == FREE) | (wanted[k] == seen[k]) for k in FACTORS}
    result["tilt"] |= _round(scene)  # a circle's rotation cannot be seen
    return result


def accuracy(captions: Sequence[str], scene: Scene) -> float:
    """Share of pictures that show everything their caption names."""
    return torch.stack(list(agreement(captions, scene).values())).all(0).float().mean().item()
