"""Sliders on the shapes world, judged by its recogniser, which no loss and no calibration here has seen.

Everything is measured on seeds that neither training nor calibration used; every bound has the measured number beside
it. Factors are in shares of the range that the world itself draws them from, so 1 is from one extreme to the other.
"""

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median

import pytest
import torch
from torch import Tensor

from dmd_core import demo, families, metrics, shapes
from dmd_core.adapters import Adapted, AdapterBank, Targets
from dmd_core.objectives.slider_space import SliderSpace, SliderSpaceConfig
from dmd_core.objectives.sliding import at, pick
from dmd_core.objectives.text_slider import SliderPrompts, TextSlider, TextSliderConfig, Words
from dmd_core.shapes import world as facts
from dmd_core.sliders import (
    Axis,
    Bench,
    Calibration,
    CalibrationConfig,
    Pool,
    PoolBatches,
    Sampling,
    additivity,
    axis_along,
    axis_between,
    bake,
    calibrate,
    draw_pool,
    embedded,
    find_directions,
    own_features,
)
from dmd_core.sliders.calibration import per_seed_spearman
from dmd_core.train import TrainConfig, train

pytestmark = pytest.mark.slow

LATENT = demo.LATENT
SEEDS = (0, 1, 2)  # of training; results are medians over them
HELD_OUT = range(5_000_000, 5_000_016)
# circles and rings show no angle, so what the recogniser says about theirs means nothing
THINGS = ("red cross", "blue square", "green star", "yellow triangle", "purple cross", "cyan star", "orange square")
PROMPTS = {
    "radius": SliderPrompts(neutral="a {}", positive="a large {}", negative="a small {}", attributes=THINGS),
    "x": SliderPrompts(neutral="a {}", positive="a {} at the right", negative="a {} at the left", attributes=THINGS),
    "y": SliderPrompts(neutral="a {}", positive="a {} at the bottom", negative="a {} at the top", attributes=THINGS),
}
SPAN = {
    "radius": facts.RADIUS[1] - facts.RADIUS[0],
    "x": 2 * facts.PLACE,
    "y": 2 * facts.PLACE,
    "angle": 2 * facts.TILT,
    "light": facts.LIGHT[1] - facts.DARK[0],
}
STEPS, BATCH, RANK, LR = 120, 8, 4, 1e-3
FACTORS = tuple(PROMPTS)


@dataclass
class Lab:
    """The frozen world, and one bank that holds every slider of this module."""

    world: demo.World
    bank: AdapterBank
    model: Adapted
    negative: object
    layers: Targets

    def sampling(self, steps: int, guidance: float = 2.0) -> Sampling:
        return Sampling(shape=LATENT, sigmas=demo.levels(steps)[:-1], guidance=guidance, negative=self.negative)

    def read(self, latents: Tensor) -> dict[str, Tensor]:
        """Continuous factors in shares of their span. [n] each"""
        scene = demo.read(self.world, self.world.pictures(latents))
        return {k: v / SPAN[k] for k, v in demo.continuous(scene).items() if k in SPAN}


@lru_cache
def lab() -> Lab:
    world = demo.World.load(torch.device("cpu"))
    bank = AdapterBank(world.net)
    layers = families.detect(world.net).targets("all")
    return Lab(world, bank, Adapted(world.teacher, bank), world.encode([""]), layers)


def embed(latents: Tensor) -> Tensor:
    here = lab()
    return own_features(here.model, here.world.net, ["joint_blocks.1.x_block.mlp"], here.negative, sigma=0.15)(latents)


@lru_cache
def neutral_pool(n: int = 224) -> Pool:
    here = lab()
    return Pool.join(list(draw_pool(here.model, here.sampling(8), words("radius").neutral, n)))


@lru_cache
def words(factor: str) -> Words:
    return PROMPTS[factor].encode(lab().world.encode)


def bench(steps: int = 8, **changes) -> Bench:
    here = lab()
    return Bench(here.model, here.sampling(steps), words("radius").neutral, embed, **changes)


@lru_cache
def axis(factor: str) -> Axis:
    """What the words ask for, as the model's own features see it."""
    b = bench()
    ends = [
        embedded(embed, b.sampling(b.model, pick(end, torch.arange(28) % len(end)), range(28)))
        for end in (words(factor).positive, words(factor).negative)
    ]
    return axis_between(*ends, embedded(embed, neutral_pool().latents))


def fit(name: str, chosen: Words, seed: int, config: TextSliderConfig) -> None:
    here = lab()
    here.bank.new(name, RANK, torch.Generator().manual_seed(seed), here.layers)
    objective = TextSlider(here.model, name, chosen, config)
    for _ in train(
        objective, PoolBatches(neutral_pool(), BATCH, seed), TrainConfig(steps=STEPS, seed=seed, cooldown=0.5)
    ):
        pass


@lru_cache
def trained(factor: str, seed: int) -> Calibration:
    """A slider of the bank named factor+seed, calibrated and baked."""
    name = f"{factor}{seed}"
    began = time.perf_counter()
    fit(name, words(factor), seed, TextSliderConfig(lr=LR))
    seconds = time.perf_counter() - began
    found = calibrate(bench(), name, axis(factor), CalibrationConfig(seeds=14, held_out=14))
    bake(lab().bank, name, found.unit)
    print(
        f"{name}: {seconds:.0f} s, unit {found.unit:.2f}, range {found.usable}, "
        f"+1 {found.point(1.0).response:.2f} sd, -1 {found.point(-1.0).response:.2f} sd, "
        f"drift {found.point(1.0).drift:.2f}, monotony {found.monotony:.3f}, {found.verdict}"
    )
    return found


def sweep(name: str, usable: tuple[float, float], b: Bench, points: int = 5) -> tuple[list[float], dict[str, Tensor]]:
    """Factors read back at evenly spaced strengths of the usable range. [strengths seeds] each"""
    strengths = torch.linspace(*usable, points).tolist()
    reads = [lab().read(b.latents({name: s}, HELD_OUT)) for s in strengths]
    return strengths, {k: torch.stack([r[k] for r in reads]) for k in SPAN}


def judged(name: str, factor: str, usable: tuple[float, float], b: Bench) -> dict[str, float]:
    strengths, seen = sweep(name, usable, b)
    means = {k: v.mean(1) for k, v in seen.items()}
    others = {k: (v[-1] - v[0]).abs().item() for k, v in means.items() if k != factor}
    return {
        "spearman": per_seed_spearman(strengths, seen[factor]),
        "range": (means[factor][-1] - means[factor][0]).item(),
        "drift": max(others.values()),
        **{f"drift {k}": v for k, v in others.items()},
    }


def over_seeds(factor: str, b: Bench) -> dict[str, float]:
    rows = [judged(f"{factor}{s}", factor, trained(factor, s).usable, b) for s in SEEDS]
    result = {k: median(r[k] for r in rows) for k in rows[0]}
    print(
        factor, {k: f"{v:.3f}" for k, v in result.items()}, "spearman per seed", [f"{r['spearman']:.3f}" for r in rows]
    )
    return result


# --- the judge itself ------------------------------------------------------------------------------------------------


def test_the_readouts_own_cross_talk_is_small():
    """Ground truth: one factor of a drawn scene goes from end to end, nothing else changes; what does the judge say?"""
    rng = torch.Generator().manual_seed(9)
    scene = facts.sample(96, rng, pairs=0.0)
    scene = scene.take(~torch.isin(scene.shape[:, 0], torch.tensor(facts.ROUND)))
    ends = {"radius": facts.RADIUS, "x": (-facts.PLACE, facts.PLACE), "y": (-facts.PLACE, facts.PLACE)}
    for factor, (low, high) in ends.items():
        reads = []
        for value in (low, high):
            drawn = replace(scene, **{factor: torch.full_like(getattr(scene, factor), value)})
            with torch.no_grad():
                reads.append(lab().read(lab().world.autoencoder.encode(facts.render(drawn))))
        moved = {k: (reads[1][k] - reads[0][k]).mean().item() for k in SPAN}
        print("readout", factor, {k: f"{v:+.3f}" for k, v in moved.items()})
        assert moved[factor] == pytest.approx(1.0, abs=0.15)
        assert max(abs(v) for k, v in moved.items() if k != factor) < 0.06


# --- text sliders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", FACTORS)
def test_a_slider_from_words_moves_its_factor_and_little_else(factor):
    got = over_seeds(factor, bench())
    assert got["spearman"] >= 0.95
    assert got["range"] >= 0.6
    assert got["drift"] <= 0.1


@pytest.mark.parametrize("steps", [4, 40])
def test_it_works_at_four_steps_and_at_forty(steps):
    got = judged("x0", "x", trained("x", 0).usable, bench(steps))
    print(f"{steps} steps", {k: f"{v:.3f}" for k, v in got.items()})
    assert got["spearman"] >= 0.95
    assert got["range"] >= 0.6
    assert got["drift"] <= 0.1


@pytest.mark.parametrize("factor", FACTORS)
def test_strength_one_is_one_sd_both_ways_on_seeds_not_seen(factor):
    """As the model's own features see it; calibration used other seeds."""
    b, base = bench(), None
    for seed in SEEDS:
        trained(factor, seed)
        base = b({}, HELD_OUT) if base is None else base
        plus, minus = (
            axis(factor).along(b({f"{factor}{seed}": s}, HELD_OUT) - base).mean().item() for s in (1.0, -1.0)
        )
        print(f"{factor}{seed}: +1 {plus:.3f} sd, -1 {minus:.3f} sd")
        assert 0.75 <= plus <= 1.25
        assert 0.75 <= -minus / plus <= 1.25


def test_controls_fail():
    """Equal ends, swapped ends, an untrained slider and a random one of equal norm, at the range of a real one."""
    usable, unit = trained("x", 0).usable, trained("x", 0).unit
    here, b = lab(), bench()
    real = judged("x0", "x", usable, b)
    same = replace(words("x"), negative=words("x").positive)
    swapped = Words(words("x").neutral, words("x").negative, words("x").positive)
    for name, chosen in (("same", same), ("swapped", swapped)):
        fit(name, chosen, 0, TextSliderConfig(lr=LR))
        bake(here.bank, name, unit)
    here.bank.new("untrained", RANK, torch.Generator().manual_seed(5), here.layers)
    here.bank.new("random", RANK, rng := torch.Generator().manual_seed(6), here.layers)
    for layer, adapter in here.bank.sets["random"].items():
        like = here.bank.sets["x0"][layer]
        adapter.up.data = torch.randn(adapter.up.shape, generator=rng)
        adapter.up.data *= (like.up @ like.down).norm() / (adapter.up @ adapter.down).norm()
    got = {n: judged(n, "x", usable, b) for n in ("same", "swapped", "untrained", "random")}
    print({n: {k: f"{v:.3f}" for k, v in g.items() if " " not in k} for n, g in [("real", real), *got.items()]})
    assert abs(got["same"]["range"]) < 0.05
    assert abs(got["untrained"]["range"]) == 0
    assert abs(got["random"]["range"]) < 0.3 * real["range"]
    assert got["swapped"]["spearman"] < -0.9
    assert got["swapped"]["range"] < -0.6 * real["range"]


def test_three_sliders_add_up_at_half_strength():
    """In shares of each factor's span, as the recogniser sees it."""
    names = {f: f"{f}0" for f in FACTORS}
    for f in FACTORS:
        trained(f, 0)
    b = bench()

    def moved(strengths: dict[str, float]) -> dict[str, Tensor]:
        return lab().read(b.latents(strengths, HELD_OUT))

    base, worst = moved({}), 0.0
    for s in (0.5, -0.5):
        together = moved(dict.fromkeys(names.values(), s))
        alone = [moved({n: s}) for n in names.values()]
        for f in FACTORS:
            total = sum((a[f] - base[f]).mean() for a in alone)
            worst = max(worst, abs((together[f] - base[f]).mean() - total).item())
            assert abs(total) > 0.1  # sliders that do nothing would add up as well
    in_sds = additivity(b, {n: axis(f) for f, n in names.items()}, HELD_OUT)
    print(f"additivity error {worst:.3f} of a span; in sds {in_sds}")
    assert worst <= 0.1


def test_joining_late_lowers_cross_talk():
    """Off for the first 30 % of the steps: the drift per unit of effect falls; the effect falls too."""
    rows = {}
    for name, below in (("full", float("inf")), ("late", 0.7)):
        got = [judged(f"{f}0", f, trained(f, 0).usable, bench(10, below=below)) for f in FACTORS]
        rows[name] = {k: sum(g[k] for g in got) / len(got) for k in ("range", "drift")}
    print(rows)
    assert rows["late"]["drift"] < rows["full"]["drift"]
    assert rows["late"]["range"] < rows["full"]["range"]


# --- discovery -------------------------------------------------------------------------------------------------------

COUNT, TOPIC = 8, "a blue square"


@dataclass
class Found:
    axes: dict[str, Axis]
    calibrations: dict[str, Calibration]
    stability: list[float]
    explained: list[float]
    bench: Bench
    pool: Pool
    seconds: float


@lru_cache
def student() -> Adapted:
    """A four-step student by the demo's own recipe, as another set of the bank."""
    here = lab()
    run = demo.distil(here.world, demo.DemoConfig().four, demo.DemoConfig())
    run.student.bank.detach()
    here.bank.load("student", run.state)
    return Adapted(here.world.teacher, here.bank, {"student": 1.0})


@lru_cache
def discovered() -> Found:
    here, model = lab(), student()
    began = time.perf_counter()
    cond = here.world.encode([TOPIC])
    sampling = Sampling(shape=LATENT, sigmas=demo.SIGMAS[4], gamma=1.0, batch=32)
    pool = Pool.join(list(draw_pool(model, sampling, cond, 384)))
    features = embedded(embed, pool.latents, 32)
    directions = find_directions(features, COUNT, torch.Generator().manual_seed(0))
    named = {f"d{i}": (directions.vectors[i], directions.sds[i].item()) for i in range(COUNT)}
    for i, name in enumerate(named):
        here.bank.new(name, 1, torch.Generator().manual_seed(i), here.layers)
    config = SliderSpaceConfig(sigmas=demo.SIGMAS[4], lr=2e-3)
    objective = SliderSpace(model, named, embed, cond, config)
    for _ in train(objective, PoolBatches(pool, 8), TrainConfig(steps=40 * COUNT, cooldown=0.5)):
        pass
    b = Bench(model, sampling, cond, embed)
    axes = {n: axis_along(v, features) for n, (v, _) in named.items()}
    calibrations = {}
    for name in named:
        calibrations[name] = calibrate(
            b, name, axes[name], CalibrationConfig(seeds=12, held_out=12, multiples=(0.5, 1.0, 2.0))
        )
        bake(here.bank, name, calibrations[name].unit)
    seconds = time.perf_counter() - began
    print(f"discovery of {COUNT}: {seconds:.0f} s")
    return Found(axes, calibrations, directions.stability.tolist(), directions.explained.tolist(), b, pool, seconds)


def test_discovered_directions_are_stable_and_their_sliders_follow_them():
    found = discovered()
    base, rows = found.bench({}, HELD_OUT), {}
    for i, (name, axis_) in enumerate(found.axes.items()):
        c = found.calibrations[name]
        plus, minus = (axis_.along(found.bench({name: s}, HELD_OUT) - base).mean().item() for s in (1.0, -1.0))
        rows[name] = (found.explained[i], found.stability[i], c.monotony, plus, minus, c.usable, c.verdict)
        print(name, [f"{v:.3f}" if isinstance(v, float) else v for v in rows[name]])
    main = [r for r in rows.values() if r[0] >= 0.05]  # directions that hold a twentieth of the variance or more
    assert len(main) >= 3
    for _explained, stability, monotony, plus, minus, *_ in main:
        assert stability >= 0.95
        assert monotony >= 0.95
        assert 0.75 <= plus <= 1.25
        assert 0.75 <= -minus / plus <= 1.25


def test_discovery_finds_the_worlds_main_factors():
    """The recogniser judges: for each factor that the pool varies in, some slider moves it and in every seed."""
    found = discovered()
    best: dict[str, tuple[float, str]] = dict.fromkeys(SPAN, (0.0, ""))
    for name, c in found.calibrations.items():
        strengths, seen = sweep(name, c.usable, found.bench)
        rho = {k: abs(per_seed_spearman(strengths, v)) for k, v in seen.items()}
        print(name, {k: f"{v:.2f}" for k, v in rho.items()})
        best = {k: max(best[k], (rho[k], name)) for k in SPAN}
    print(best)
    for factor in ("x", "y", "radius", "light"):
        assert best[factor][0] >= 0.8


def test_random_strengths_bring_variety_back():
    """The paper's use. How much of the teacher's diversity the student regains, at equal prompt accuracy."""
    here, found = lab(), discovered()
    seeds = range(6_000_000, 6_000_000 + 96)
    rng = torch.Generator().manual_seed(1)

    def features_of(latents: Tensor) -> Tensor:
        return torch.cat([here.world.recogniser.features(p) for p in here.world.pictures(latents).split(64)])

    names = list(found.axes)
    mixed = []
    for seed in seeds:  # a mix per picture
        mix = {n: float(torch.randn(1, generator=rng)) for n in names}
        mix = {n: max(min(s, found.calibrations[n].usable[1]), found.calibrations[n].usable[0]) for n, s in mix.items()}
        mixed.append(found.bench.sampling(at(found.bench.model, **mix), found.bench.cond, [seed]))
    rows = {
        "teacher": here.sampling(40)(here.model, found.bench.cond, seeds),
        "student": found.bench.latents({}, seeds),
        "student with sliders": torch.cat(mixed),
    }
    distance = {k: metrics.pairwise_distance(features_of(v)) for k, v in rows.items()}
    right = {
        k: shapes.captions.accuracy([TOPIC] * len(v), demo.read(here.world, here.world.pictures(v)))
        for k, v in rows.items()
    }
    print({k: (f"{distance[k]:.3f}", f"{right[k]:.3f}") for k in rows})
    assert distance["student with sliders"] > distance["student"]
    assert right["student with sliders"] >= right["student"] - 0.03
