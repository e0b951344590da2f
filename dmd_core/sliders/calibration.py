"""Strength 1 is made to mean one standard deviation; then the range, side effects and sums of sliders are measured.

The unit is found on one set of seeds, everything reported is measured on another. Training alone fixes no unit: with
the same steps the effect at +1 varied 80-fold with rank, initialisation and layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import Adapted, AdapterBank
from ..objectives.sliding import at, count, pick
from .directions import ALIKE, principal
from .instant import Joining
from .pool import Sampling, embedded

TELLING = 3  # strengths of which a rank correlation says something

Measure = Callable[[Mapping[str, float], Sequence[int]], Tensor]  # strengths, seeds -> features [n d]


@dataclass(frozen=True)
class Bench:
    """Features of the pictures that given seeds make at given strengths; sliders join at noise level `below`."""

    model: Adapted
    sampling: Sampling
    cond: Any
    embed: Callable[[Tensor], Tensor]
    below: float = inf
    device: Any = "cpu"

    def __call__(self, strengths: Mapping[str, float], seeds: Sequence[int]) -> Tensor:
        return embedded(self.embed, self.latents(strengths, seeds), self.sampling.batch)

    def latents(self, strengths: Mapping[str, float], seeds: Sequence[int]) -> Tensor:
        model = Joining(self.model, at(self.model, **strengths), self.below)
        # a prompt belongs to a seed, so that every strength sees the same pairs
        index = torch.tensor(seeds) % count(self.cond)
        return self.sampling(model, pick(self.cond, index), seeds, self.device)


@dataclass(frozen=True)
class Axis:
    """What a slider shall move, in units of the frozen model's own spread, and what it shall leave alone.

    vector: [d], reads the position along the axis; others: unit vectors [k d], the pool's other principal directions.
    pattern: [d], what a movement by one along the vector looks like; none: the vector itself, of length 1.
    """

    vector: Tensor
    sd: float
    others: Tensor
    other_sds: Tensor
    pattern: Tensor | None = None

    def along(self, moved: Tensor) -> Tensor:
        """[n d] -> [n] standard deviations"""
        return moved @ self.vector / self.sd

    def drift(self, moved: Tensor) -> float:
        """Largest mean displacement along any other direction, in that direction's standard deviations."""
        if len(self.others) == 0:
            return 0.0
        mean = moved.mean(0)
        if self.pattern is not None:
            mean = mean - (mean @ self.vector) * self.pattern
        return ((self.others @ mean) / self.other_sds).abs().max().item()


def axis_along(
    vector: Tensor, pool: Tensor, pattern: Tensor | None = None, share: float = 0.01, most: int = 16
) -> Axis:
    """An axis through a pool's features [n d]; other directions count if they hold `share` of the variance."""
    if float(vector.norm()) == 0:
        raise ValueError("the direction to measure along has no length; the two ends of the slider look the same")
    vector = F.normalize(vector.double(), dim=0)
    shown = vector if pattern is None else pattern.double() / (pattern.double() @ vector)
    centred = pool.double() - pool.double().mean(0)
    along = centred @ vector
    sd = along.std().item()
    if sd <= ALIKE * pool.double().norm(dim=1).mean().item():
        raise ValueError(
            f"the {len(pool)} pictures of the pool do not differ along this slider, so it has no unit; "
            "use a neutral prompt that leaves open what the slider changes, or more seeds"
        )
    vectors, sds = principal(centred - along[:, None] * shown)
    kept = (sds.square() >= share * centred.square().sum() / (len(pool) - 1)).nonzero()[:most, 0]
    own = None if pattern is None else shown.float()
    return Axis(vector.float(), sd, vectors[kept].float(), sds[kept].float(), own)


def axis_between(positive: Tensor, negative: Tensor, pool: Tensor) -> Axis:
    """The axis that words ask for: features of the frozen model's pictures of both ends, same seeds. [n d] each

    Read where the ends differ most against all else that varies (a linear discriminant, shrunk towards the identity):
    along their plain difference other things vary too, so that one standard deviation would be much more than what
    the words mean. On the shapes world the position along the plain difference of 28 pairs correlates by 0.35 with the
    size of the thing, along the discriminant by 0.72.
    """
    apart = (positive.double() - negative.double()).mean(0)
    rows = torch.cat([f.double() - f.double().mean(0) for f in (positive, negative, pool)])
    _, singular, vectors = torch.linalg.svd(rows, full_matrices=False)
    variances = singular.square() / len(rows)
    shrunk = variances.mean()  # of what so few pictures can show
    if float(shrunk) == 0:
        return axis_along(apart, pool)
    inside = vectors @ apart
    vector = vectors.T @ (inside / (variances + shrunk)) + (apart - vectors.T @ inside) / shrunk
    return axis_along(vector, pool, apart)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    seeds: int = 16  # to find the unit with
    held_out: int = 16  # to measure on
    first_seed: int = 1_000_000  # far from those of pools
    # of the unit, both signs: two is where words are trained, on the shapes world; to three, other things move more
    multiples: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    most: float = 16.0  # largest raw strength that is tried
    max_drift: float = 1.0  # standard deviations of any other direction, inside the usable range
    rise: float = 0.05  # each step must still bring this share of the growth around 0
    nothing: float = 0.05  # standard deviations at the best strength: less is no effect


@dataclass(frozen=True)
class Point:
    """One strength of the sweep: mean response and its spread over seeds, largest drift; in standard deviations."""

    strength: float
    response: float
    spread: float
    drift: float


@dataclass(frozen=True)
class Calibration:
    """unit: the trained strength that became 1; usable: strengths; monotony: mean per-seed Spearman inside `usable`,
    None where fewer than three strengths lie in it."""

    unit: float
    points: tuple[Point, ...]
    usable: tuple[float, float]
    monotony: float | None
    verdict: str

    def point(self, strength: float) -> Point:
        return next(p for p in self.points if p.strength == strength)


def calibrate(measure: Measure, name: str, axis: Axis, config: CalibrationConfig) -> Calibration:
    """Sweeps one slider; does not change it (see bake). Deterministic: the same seeds at every strength."""
    first, last = config.first_seed, config.first_seed + config.seeds
    unit, reached = find_unit(measure, name, axis, range(first, last), config)
    seeds = range(last, last + config.held_out)
    base = measure({}, seeds)
    moved = {0.0: torch.zeros_like(base)}

    def swept(multiples: Sequence[float]) -> tuple[dict[float, Tensor], tuple[Point, ...], tuple[float, float]]:
        moved.update({s * m: measure({name: s * m * unit}, seeds) - base for m in multiples for s in (-1.0, 1.0)})
        along = {m: axis.along(moved[m]) for m in sorted(moved)}
        points = tuple(Point(m, a.mean().item(), a.std().item(), axis.drift(moved[m])) for m, a in along.items())
        usable = usable_range(points, config)
        return {m: a for m, a in along.items() if usable[0] <= m <= usable[1]}, points, usable

    inside, points, usable = swept(config.multiples)
    if len(inside) < TELLING and reached >= config.nothing:  # too coarse to tell: closer to 0
        inside, points, usable = swept([min(config.multiples) / n for n in (2, 4)])
    monotony = per_seed_spearman([*inside], torch.stack([*inside.values()])) if len(inside) >= TELLING else None
    return Calibration(unit, points, usable, monotony, verdict(reached, points, usable, config))


def find_unit(
    measure: Measure, name: str, axis: Axis, seeds: Sequence[int], config: CalibrationConfig
) -> tuple[float, float]:
    """The raw strength at which both poles together respond by one standard deviation, and that response.

    A slider that never gets there keeps the strength of its largest response.
    """
    seen = {0.0: 0.0}

    def respond(strength: float) -> float:
        both = measure({name: strength}, seeds) - measure({name: -strength}, seeds)
        seen[strength] = axis.along(both).mean().item() / 2
        return seen[strength]

    strength = 1.0
    while (
        respond(strength) < 1 and 2 * strength <= config.most and seen[strength] > 1.05 * seen.get(strength / 2, -inf)
    ):
        strength *= 2
    if seen[strength] < 1:
        best = max(seen, key=lambda k: seen[k])
        return (best or 1.0), seen[best]
    for turn in range(5):
        high = min(s for s, r in seen.items() if r >= 1)
        low = max(s for s, r in seen.items() if s < high and r < 1)
        # interpolation alone creeps where the response saturates: one end of the bracket would never move
        share = 0.5 if turn % 2 else (1 - seen[low]) / (seen[high] - seen[low])
        guess = low + share * (high - low)
        if abs(respond(guess) - 1) < 0.03:
            break
    best = min(seen, key=lambda k: abs(seen[k] - 1))
    return best, seen[best]


def usable_range(points: Sequence[Point], config: CalibrationConfig) -> tuple[float, float]:
    """How far from 0 a side still grows and nothing else moves too much.

    A side that stands still may go on while the other grows, for one may flip sooner: on the shapes world ranges that
    ended where their own side stopped were lopsided, and what moves alike at both ends (size, of a slider for height)
    no longer cancelled. It may not fall, and a side that does nothing at all is not usable.
    """
    by = {p.strength: p for p in points}
    strengths = sorted(s for s in by if s > 0)
    both = {0.0: 0.0} | {s: (by[s].response - by[-s].response) / 2 for s in strengths}
    enough = config.rise * both[strengths[0]] / strengths[0]

    def reach(sign: float) -> float:
        last = 0.0
        for s in strengths:
            point = by[sign * s]
            own, step = sign * (point.response - by[sign * last].response), s - last
            grows = max(own, both[s] - both[last]) >= enough * step and sign * point.response >= enough * s
            falls = own < -2 * point.spread / config.held_out**0.5
            if enough <= 0 or not grows or falls or point.drift > config.max_drift:
                break
            last = s
        return sign * last if last else 0.0

    return reach(-1.0), reach(1.0)


def verdict(reached: float, points: Sequence[Point], usable: tuple[float, float], config: CalibrationConfig) -> str:
    """works, or in a word what is wrong."""
    one = next(p for p in points if p.strength == 1)
    error = one.spread / config.held_out**0.5
    if reached < config.nothing or one.response < 2 * error:
        return "nothing"
    if usable[0] > -0.5 or usable[1] < 0.5:
        near = (p for p in points if 0 < abs(p.strength) <= 0.5)
        return "drifts" if any(p.drift > config.max_drift for p in near) else "one way"
    return "works" if reached > 0.75 else "weak"


def per_seed_spearman(strengths: Sequence[float], values: Tensor) -> float:
    """Mean over seeds of the rank correlation between strength and response. values: [strengths seeds]

    Equal values share their rank; what never changes follows nothing, which counts 0.
    """
    ranks, order = ranked(values), ranked(torch.tensor(strengths, dtype=torch.float64)[:, None])
    ranks, order = ranks - ranks.mean(0), order - order.mean(0)
    size = ranks.norm(dim=0) * order.norm(dim=0)
    return torch.where(size > 0, (ranks * order).sum(0) / size.clamp_min(1e-12), 0.0).mean().item()


def ranked(values: Tensor) -> Tensor:
    """Ranks along the first axis, the mean one where values are equal."""
    lower, equal = values[:, None] > values[None], values[:, None] == values[None]
    return lower.sum(1).double() + (equal.sum(1).double() - 1) / 2


def additivity(
    measure: Measure, axes: Mapping[str, Axis], seeds: Sequence[int], strength: float = 0.5
) -> dict[str, float]:
    """How far all sliders together are from the sum of each alone, along each one's axis, in standard deviations."""
    errors = dict.fromkeys(axes, 0.0)
    base = measure({}, seeds)
    for s in (strength, -strength):
        alone = sum((measure({n: s}, seeds) - base for n in axes), torch.zeros_like(base))
        together = measure(dict.fromkeys(axes, s), seeds) - base
        for name, axis in axes.items():
            errors[name] = max(errors[name], axis.along(together - alone).mean().abs().item())
    return errors


@torch.no_grad()
def bake(bank: AdapterBank, name: str, unit: float) -> None:
    """Strength 1 from now on is what `unit` was; all of it goes into `up`, so that alpha stays the rank."""
    for adapter in bank.sets[name].values():
        adapter.up.mul_(unit)
