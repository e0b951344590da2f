"""Are sliders what they promise? Every figure on pictures that neither training nor calibration saw."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dmd_core import demo, metrics, shapes
from dmd_core.objectives.sliding import at
from dmd_core.objectives.text_slider import Words
from dmd_core.sliders import Axis, Bench, Calibration, random_strengths
from dmd_core.sliders.directions import MAIN

from .record import Table
from .slider_lab import ETA, FOUND, HELD_OUT, MANY, PROMPTS, SPAN, TOPIC, WORDS, Lab, cards

SEEDS = (0, 1, 2)  # of training
START = 0.875  # the noise level where start 0.3 begins (shift 3)
DIGITS = 3  # of the table's figures
PLAIN = "the prompts themselves"
RANKED = 48  # pictures at 40 steps whose ranks are taken
SHARE = 0.25  # of the usable range, for random strengths: eight at once leave the prompt at half of it
MINUTES = "processor time of discovery over five minutes"
Figures = dict[tuple[str, str], float]  # (what, of which slider) -> figure
Made = tuple[Axis, Calibration]

# what -> (bound, in words; does a figure hold it)
BOUNDS = {
    "rank correlation per picture": (">= 0.95", lambda v: v >= 0.95),
    "range": (">= 0.6", lambda v: v >= 0.6),
    "largest drift of another factor": ("<= 0.1", lambda v: abs(v) <= 0.1),
    "+1, in sd": ("0.75 to 1.25", lambda v: 0.75 <= v <= 1.25),
    "-1 over +1": ("0.75 to 1.25", lambda v: 0.75 <= v <= 1.25),
    "additivity error of three at 0.5": ("<= 0.1", lambda v: v <= 0.1),
    "drift from start 0.3 over whole drift": ("< 1", lambda v: v < 1),
    "control: equal ends, range": ("< 0.05", lambda v: abs(v) < 0.05),
    "control: untrained, range": ("< 0.05", lambda v: abs(v) < 0.05),
    "control: random of equal norm, range over the real one's": ("< 0.3", lambda v: abs(v) < 0.3),
    "control: swapped prompts, range over the real one's": ("-1.4 to -0.6", lambda v: -1.4 <= v <= -0.6),
    "split-half |cos|": (">= 0.95", lambda v: v >= 0.95),
    MINUTES: ("< 1", lambda v: v < 1),
    "best rank correlation of any direction": (">= 0.8", lambda v: v >= 0.8),
}


def bound_of(what: str) -> tuple[str, Any]:
    """A bound holds for every number of steps. It judges what the table shows: 0.9499999999999997 is 0.95."""
    words, holds = BOUNDS.get(what.partition(", ")[0], BOUNDS.get(what, ("", None)))
    return words, holds and (lambda v: holds(round(v, DIGITS)))


# --- what is measured -------------------------------------------------------------------------------------------------


def cross_talk(here: Lab) -> Figures:
    """One factor of drawn scenes goes from end to end and nothing else changes: what does the judge say of the rest?"""
    rng, found = torch.Generator().manual_seed(9), {}
    scene = shapes.world.sample(96, rng, pairs=0.0)
    scene = scene.take(~torch.isin(scene.shape[:, 0], torch.tensor(shapes.world.ROUND)))
    ends = {"radius": shapes.world.RADIUS} | dict.fromkeys(("x", "y"), (-shapes.world.PLACE, shapes.world.PLACE))
    for factor, values in ends.items():
        reads = []
        for value in values:
            drawn = replace(scene, **{factor: torch.full_like(getattr(scene, factor), value)})
            with torch.no_grad():
                reads.append(here.read(here.world.autoencoder.encode(shapes.world.render(drawn))))
        moved = {k: (reads[1][k] - reads[0][k]).mean().item() for k in SPAN}
        found["the judge itself: range read", factor] = moved.pop(factor)
        found["the judge itself: largest drift read", factor] = max(map(abs, moved.values()))
    return found


def by_prompts(here: Lab) -> Figures:
    """What the words themselves drag along, and how sure a mean of so many pictures is."""
    found: Figures = {}
    for factor in PROMPTS:
        moved = here.between(factor)
        found[f"{PLAIN}: range", factor] = moved.pop(factor).mean().item()
        most = max(moved.values(), key=lambda v: abs(v.mean().item()))
        found[f"{PLAIN}: largest drift", factor] = most.mean().abs().item()
        found[f"{PLAIN}: standard error of that drift", factor] = most.std().item() / len(most) ** 0.5
    return found


def from_words(here: Lab, made: Mapping[str, Made]) -> Figures:
    found: Figures = {}
    for factor, (axis, calibration) in made.items():
        found |= ones(here.bench(factor=factor), factor, axis, factor)
        found |= {("usable from", factor): calibration.usable[0], ("usable to", factor): calibration.usable[1]}
        for steps, ranked in ((WORDS.sample_steps, None), (4, None), (40, RANKED)):
            judged = here.judged(factor, factor, calibration.usable, here.bench(steps), ranked)
            found |= named(judged, factor, f", {steps} steps")
    found["additivity error of three at 0.5", "all"] = added(here)
    return found | late(here, made, found)


def ones(bench: Bench, name: str, axis: Axis, of: str) -> Figures:
    """Both ends of the unit, of the prompts that it was found with, on many pictures that it was not found on."""
    base = bench({}, MANY)
    plus, minus = (axis.along(bench({name: s}, MANY) - base).mean().item() for s in (1.0, -1.0))
    return {("+1, in sd", of): plus, ("-1 over +1", of): -minus / plus}


def named(judged: Mapping[str, float], factor: str, suffix: str = "") -> Figures:
    words = {"rank": "rank correlation per picture", "range": "range", "drift": "largest drift of another factor"}
    return {(words[k] + suffix, factor): v for k, v in judged.items()}


def added(here: Lab) -> float:
    """How far all at once are from the sum of each alone, in shares of a factor's span."""

    def moved(strengths: Mapping[str, float]) -> dict[str, Tensor]:
        return here.read(here.bench().latents(strengths, HELD_OUT))

    base, worst = moved({}), 0.0
    for s in (0.5, -0.5):
        together, alone = moved(dict.fromkeys(PROMPTS, s)), [moved({n: s}) for n in PROMPTS]
        for f in PROMPTS:
            total = sum((a[f] - base[f]).mean() for a in alone)
            worst = max(worst, abs((together[f] - base[f]).mean() - total).item())
    return worst


def late(here: Lab, made: Mapping[str, Made], found: Figures) -> Figures:
    """Off until 30 % of the sampling: what that does to the drift and to the range, over all three."""
    rows = [here.judged(f, f, c.usable, here.bench(below=START), 8) for f, (_, c) in made.items()]
    ratios: Figures = {}
    for k, what in (("drift", "largest drift of another factor"), ("range", "range")):
        whole = sum(found[f"{what}, {WORDS.sample_steps} steps", f] for f in made)
        ratios[f"{k} from start 0.3 over whole {k}", "all"] = sum(r[k] for r in rows) / whole
    return ratios


def controls(here: Lab, factor: str, made: Made, real: float) -> Figures:
    """What must fail, at the unit and the range of a real slider."""
    _, calibration = made
    words, bench = here.words[factor], here.bench()
    pool = here.pool(factor)
    here.fit("same", replace(words, negative=words.positive), pool, 0)
    here.fit("swapped", Words(words.neutral, words.negative, words.positive), pool, 0)
    here.bank.new("untrained", WORDS.rank, torch.Generator().manual_seed(5))
    here.random_like("random", factor)
    for adapter in here.bank.sets["swapped"].values():
        adapter.up.data *= calibration.unit
    names = ("same", "swapped", "untrained", "random")
    far = {n: here.judged(n, factor, calibration.usable, bench, 8)["range"] for n in names}
    return {
        ("control: equal ends, range", factor): far["same"],
        ("control: untrained, range", factor): far["untrained"],
        ("control: random of equal norm, range over the real one's", factor): far["random"] / real,
        ("control: swapped prompts, range over the real one's", factor): far["swapped"] / real,
    }


def discovered(here: Lab, seed: int) -> Figures:
    """Own direction by the eyes it was found with; the world's factors by the recogniser."""
    began = time.process_time()
    made, (_, _, directions) = here.discovered(seed), here.topic_pool
    found: Figures = {(MINUTES, f"{len(made)} sliders"): (time.process_time() - began) / 300}
    bench = here.topic_bench()
    ranks = dict.fromkeys(SPAN, 0.0)
    for i, (name, (axis, calibration)) in enumerate(made.items()):
        _, seen = here.sweep(name, calibration.usable, bench)
        for factor, values in seen.items():
            ranks[factor] = max(ranks[factor], abs(here.rank(calibration.usable, values)))
        if directions.explained[i] < MAIN:
            continue
        of = f"direction {i + 1} ({directions.explained[i]:.0%})"
        found |= {("split-half |cos|", of): directions.stability[i].item()}
        if calibration.monotony is not None:  # else the usable range is too small to tell
            found |= {("rank correlation per picture, own direction", of): calibration.monotony}
        found |= ones(bench, name, axis, of)
    best = "best rank correlation of any direction"
    return found | {(best, factor): rank for factor, rank in ranks.items()} | diversity(here, made, seed == SEEDS[0])


def diversity(here: Lab, made: Mapping[str, Made], plain: bool, n: int = 64) -> Figures:
    """The paper's use: random strengths for every picture. Distance of recogniser features, and prompts shown right."""
    seeds, cond = range(6_000_000, 6_000_000 + n), here.world.encode([TOPIC])
    mixes = random_strengths(cards(made), n, torch.Generator().manual_seed(1), SHARE)
    mixed = [here.few(at(here.student, **mix), cond, [seed]) for mix, seed in zip(mixes, seeds, strict=True)]
    sets = {"student, random strengths": torch.cat(mixed)}
    if plain:
        sets["student"] = here.few(here.student, cond, seeds)
        sets["teacher, 40 steps"] = here.sampling(40)(here.teacher, cond, seeds)
    found: Figures = {}
    for of, latents in sets.items():
        pictures = here.world.pictures(latents)
        with torch.no_grad():
            features = here.world.recogniser.features(pictures)
        right = shapes.captions.accuracy([TOPIC] * n, demo.read(here.world, pictures))
        found |= {("mean pairwise distance", of): metrics.pairwise_distance(features), ("prompts right", of): right}
    return found


# --- the table --------------------------------------------------------------------------------------------------------


def words_measured(seed: int) -> Figures:
    """All of one training seed; the judge's own cross-talk and the controls come with the first."""
    here = Lab()
    made = {factor: here.made(factor, seed) for factor in PROMPTS}
    found = from_words(here, made)
    if seed != SEEDS[0]:
        return found
    real = found[f"range, {WORDS.sample_steps} steps", "x"]
    return cross_talk(here) | by_prompts(here) | found | controls(here, "x", made["x"], real)


def rows_of(found: Iterable[Figures]) -> list[dict[str, Any]]:
    together: dict[tuple[str, str], list[float]] = {}
    for figures in found:
        for key, value in figures.items():
            together.setdefault(key, []).append(value)
    rows = []
    for (what, of), values in together.items():
        bound, holds = bound_of(what)
        row = {"what": what, "of": of, "median": round(median(values), DIGITS)}
        row |= {"seeds": " / ".join(f"{v:.3g}" for v in values), "bound": bound}
        rows.append(row | {"holds": ("yes" if holds(median(values)) else "**no**") if holds else ""})
    return rows


def table(found: Iterable[Figures]) -> Table:
    return Table(
        "sliders_shapes",
        "Sliders on the shapes world",
        "sliders made by the nodes' functions, with the settings below, on the embedded world: median over three "
        "training seeds. Ranges and "
        "drifts are shares of a factor's whole range, from end to end of a slider's usable range, as the frozen "
        "recogniser reads them, which took no part in training or calibration",
        seed="0 to 2",
        settings={f"words {k}": v for k, v in (chosen(WORDS) | {"eta": ETA}).items()}
        | {f"discovery {k}": v for k, v in chosen(FOUND).items()},
        rows=rows_of(found),
        notes=[
            "rank correlation per picture: Spearman of five strengths over the usable range, mean over "
            f"{len(HELD_OUT)} pictures ({RANKED} at 40 steps). Ranges and drifts: means over {len(HELD_OUT)}. "
            "Neither training nor calibration saw them; their prompts are plain ('a red cross'). +1 and -1: "
            f"{len(MANY)} pictures of the prompts of training.",
            "Prompts of training: 'a large red cross top left on dark' against 'a small ...', 'a small red cross top "
            "right on dark' against '... left ...': what the slider shall not move is fixed in them, four ways.",
            f"{PLAIN}: 'a ... left' against 'a ... right' and so on under the same seeds, without a slider, at "
            f"{WORDS.sample_steps} steps.",
            f"random strengths: all sliders at once, each within {SHARE:g} of its usable range.",
            "The world has two sizes and two sides, nothing between: a picture that is already large has no way to go.",
        ],
    )


def chosen(settings: Any) -> dict[str, Any]:
    return {k: v for k, v in asdict(settings).items() if k in ("steps", "batch", "pool", "rank", "seeds")}


def on_cpu(done: Callable[[Table], object] = lambda table: None) -> Table:
    """An hour on a busy machine: rows are kept as they come."""
    found: list[Figures] = []
    for seed in SEEDS:
        found.append(words_measured(seed))
        done(table(found))
        found[-1] |= discovered(Lab(), seed)
    return table(found)
