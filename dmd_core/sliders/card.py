"""What is known about a slider, as it travels in its file's metadata."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from .calibration import Calibration, Point

KEY = "dmd_slider"
VERSION = 1
KINDS = ("text", "image pairs", "discovered")
VERDICTS = {
    "works": "works",
    "nothing": "DOES NOTHING that was measured",
    "drifts": "drags other things along",
    "one way": "works to one side only",
    "weak": "is weak",
}


@dataclass(frozen=True, kw_only=True)
class SliderCard:
    """Strengths are those of the file (1 = one standard deviation); responses and drifts are standard deviations."""

    kind: str
    name: str
    prompts: Mapping[str, Any]
    encoder: str  # what looked at the pictures
    base: str
    base_hash: str
    rank: int
    layers: str
    unit: float
    usable: tuple[float, float]
    points: tuple[Point, ...]
    monotony: float | None  # None: the usable range holds too few strengths
    verdict: str
    ends: tuple[str, str] | None = None  # plus, minus
    explained: float | None = None  # share of the pool's variance, discovered ones
    stability: float | None = None  # split-half |cos|, discovered ones
    additivity: float | None = None  # error in a mix at +-0.5
    training: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"slider kind {self.kind!r} is not known; use one of {', '.join(map(repr, KINDS))}")

    @property
    def warning(self) -> str:
        """What a person must know before saving or using it; empty when all is well."""
        texts = {
            "works": "",
            "nothing": f"{self.name} does not move what it should; train it longer or on more layers",
            "drifts": f"{self.name} moves other things too much; its usable range is {describe(self.usable)}",
            "one way": f"{self.name} works to one side only; its usable range is {describe(self.usable)}",
            "weak": f"{self.name} is weak: it never moves its direction by a whole standard deviation",
        }
        return texts[self.verdict]

    def metadata(self) -> dict[str, str]:
        return {KEY: json.dumps(asdict(self), ensure_ascii=False)}


def card(calibration: Calibration, **facts: Any) -> SliderCard:
    """facts: kind, name, prompts, encoder, base, base_hash, rank, layers, and what else is known."""
    c = calibration
    measured: dict[str, Any] = {"unit": c.unit, "usable": c.usable, "points": c.points}
    measured |= {"monotony": c.monotony, "verdict": c.verdict}
    return SliderCard(**measured, **facts)


def from_metadata(metadata: Mapping[str, str]) -> SliderCard | None:
    """None for files of other makers: they work, but nothing is known of their unit and range."""
    if KEY not in metadata:
        return None
    try:
        known = {f.name for f in fields(SliderCard)}
        # a newer version may know more; what it adds is left out
        found = {k: v for k, v in json.loads(metadata[KEY]).items() if k in known}
        found |= {"points": tuple(Point(**p) for p in found["points"]), "usable": tuple(found["usable"])}
        found["ends"] = tuple(found["ends"]) if found.get("ends") else None
        return SliderCard(**found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"this file says that it is a slider of this pack, but its card cannot be read ({error}); save it again"
        ) from error


def random_strengths(
    cards: Sequence[SliderCard], n: int, rng: torch.Generator, share: float = 1.0
) -> list[dict[str, float]]:
    """n mixes for variety: every slider at random within `share` of its measured range."""

    def draw(low: float, high: float) -> float:
        return share * (low + (high - low) * float(torch.rand(1, generator=rng, device=rng.device)))

    return [{c.name: draw(*c.usable) for c in cards} for _ in range(n)]


def describe(usable: tuple[float, float]) -> str:
    return f"{usable[0]:+g} to {usable[1]:+g}"


def words(c: SliderCard) -> str:
    """What was measured, for people: what it does, how far, what else moves, and first of all if it works."""
    at = {p.strength: p for p in c.points}
    plus, minus, side = at[1.0], at[-1.0], max(at[1.0].drift, at[-1.0].drift)
    ends = f" ({c.ends[1]} - {c.ends[0]})" if c.ends else ""
    follows = "the range is too small to tell if effect follows strength"
    if c.monotony is not None:
        follows = f"effect follows strength with a rank correlation of {c.monotony:.2f}"
    made = f", rank {c.rank} on {c.layers} layers" + (f" of {c.base}" if c.base else "")
    lines = [
        f"{c.name}{ends}: a slider from {c.kind}{made}" if c.kind != "discovered" else f"{c.name}{ends}{made}",
        f"  {VERDICTS[c.verdict]}; use it from {describe(c.usable)}",
        f"  +1 moves it by {plus.response:+.2f} standard deviations of what the model varies in, -1 by "
        f"{minus.response:+.2f}; other things by up to {side:.2f}",
        f"  per picture, {follows}; looked at by {c.encoder}",
    ]
    if c.explained is not None and c.stability is not None:
        lines.append(f"  {c.explained:.0%} of the pool's variety, and {c.stability:.2f} of 1 the same in halves of it")
    if c.additivity is not None:
        lines.append(f"  in a mix with the others at +-0.5 it is off the sum by {c.additivity:.2f} standard deviations")
    return "\n".join([*lines, *([f"  WARNING: {c.warning}"] if c.warning else [])])
