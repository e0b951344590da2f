"""The shapes world as a laboratory: sliders made as the nodes make them, judged by the recogniser that no loss sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace

import torch
from torch import Tensor

from dmd_core import demo, families, shapes
from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.objectives.slider_space import SliderSpace, SliderSpaceConfig
from dmd_core.objectives.sliding import count, pick
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
from dmd_core.sliders.directions import Directions
from dmd_core.sliders.settings import DiscoverySettings, SliderSettings
from dmd_core.train import TrainConfig, train
from dmd_core.weights.lora import load_lora

# more pictures, steps, rank and eta than in the graphs "Shapes - a slider from words" and "Shapes - discover sliders"
WORDS = SliderSettings(steps=200, batch=8, rank=4, pool=224, seeds=28, sample_steps=8, cfg=2.0, at_once=24)
FOUND = DiscoverySettings(steps=100, batch=4, rank=4, pool=4096, seeds=16, sliders=8, at_once=32)
LR, ETA, COOLDOWN, LEVEL = 1e-3, 4.0, 0.5, 0.15
TOPIC = "a blue square"
# neither trained nor calibrated on. The world flips between two sides: with 16 pictures the standard error of a drift
# is 0.1, the bound itself
HELD_OUT = range(7_000_000, 7_000_160)
MANY = range(7_000_000, 7_000_256)
# circles and rings show no angle, so what the recogniser says about theirs means nothing
THINGS = ("red cross", "blue square", "green star", "yellow triangle", "purple cross", "cyan star", "orange square")


def among(*sentences: str) -> tuple[str, ...]:
    """What a slider shall not move is fixed in the prompts that it learns from: four ways, in which every pair of two
    such things comes as often as any other. But for the side of the slider for height: with it said too, most things
    lie low, and the two ends are no longer alike."""
    return tuple(s.format(thing) for thing in THINGS for s in sentences)


PROMPTS = {
    "radius": SliderPrompts(
        neutral="a {}",
        positive="a large {}",
        negative="a small {}",
        attributes=among(
            "{} top left on dark", "{} top right on light", "{} bottom left on light", "{} bottom right on dark"
        ),
    ),
    "x": SliderPrompts(
        neutral="a {} {}",
        positive="a {} right {}",
        negative="a {} left {}",
        attributes=among(
            "small {} top|on dark", "large {} top|on light", "small {} bottom|on light", "large {} bottom|on dark"
        ),
    ),
    "y": SliderPrompts(
        neutral="a {} {}",
        positive="a {} bottom {}",
        negative="a {} top {}",
        attributes=among("small {}|on dark", "large {}|on dark", "small {}|on light", "large {}|on light"),
    ),
}
ENDS = {"radius": ("a small {}", "a large {}"), "x": ("a {} left", "a {} right"), "y": ("a {} top", "a {} bottom")}
# a factor's whole range, as the world draws it: 1 is from one extreme to the other
SPAN = {
    "radius": facts.RADIUS[1] - facts.RADIUS[0],
    "x": 2 * facts.PLACE,
    "y": 2 * facts.PLACE,
    "angle": 2 * facts.TILT,
    "light": facts.LIGHT[1] - facts.DARK[0],
}


@dataclass
class Lab:
    """The frozen world and one bank for every slider of a run of the benchmark."""

    world: demo.World = field(default_factory=lambda: demo.World.load(torch.device("cpu")))

    def __post_init__(self) -> None:
        self.layers = families.detect(self.world.net).targets(WORDS.layers)
        self.bank = AdapterBank(self.world.net, self.layers)
        self.teacher = Adapted(self.world.teacher, self.bank)
        self.bank.load("student", load_lora(shapes.WEIGHTS / "shapes_student_4.safetensors", self.bank))
        self.student = replace(self.teacher, scales={"student": 1.0})
        self.empty = self.world.encode([""])
        self.words = {f: p.encode(self.world.encode) for f, p in PROMPTS.items()}
        self.plain = self.world.encode([f"a {thing}" for thing in THINGS])
        own = ["joint_blocks.1.x_block.mlp"]  # the node's choice: the middle of the layers that the family is judged in
        self.embed = own_features(self.teacher, self.world.net, own, self.empty, LEVEL)

    def sampling(self, steps: int) -> Sampling:
        levels = demo.levels(steps)[:-1]
        return Sampling(shape=demo.LATENT, sigmas=levels, guidance=WORDS.cfg, negative=self.empty, batch=32)

    @property
    def few(self) -> Sampling:
        return Sampling(shape=demo.LATENT, sigmas=demo.levels(4)[:-1], gamma=1.0, batch=FOUND.at_once)

    def bench(self, steps: int = WORDS.sample_steps, factor: str = "", **changes: float) -> Bench:
        """Pictures of the prompts that the slider `factor` learns from; none: of things and nothing else said."""
        cond = self.words[factor].neutral if factor else self.plain
        return Bench(self.teacher, self.sampling(steps), cond, self.embed, **changes)

    def read(self, latents: Tensor) -> dict[str, Tensor]:
        """Continuous factors in shares of their span. [n] each"""
        seen = demo.continuous(demo.read(self.world, self.world.pictures(latents)))
        return {k: seen[k] / SPAN[k] for k in SPAN}

    # --- from words ---

    def pool(self, factor: str) -> Pool:
        bench = self.bench(factor=factor)
        return Pool.join(list(draw_pool(bench.model, bench.sampling, bench.cond, WORDS.pool)))

    def axis(self, factor: str, pool: Pool) -> Axis:
        """As Train Slider finds it: half as many pairs of the ends as there are pictures in the pool."""
        seeds, sampling = range(WORDS.pool // 2), self.sampling(WORDS.sample_steps)
        words = self.words[factor]
        index = torch.arange(len(seeds)) % count(words.positive)
        ends = (pick(c, index) for c in (words.positive, words.negative))
        plus, minus = (embedded(self.embed, sampling(self.teacher, e, seeds), 32) for e in ends)
        return axis_between(plus, minus, embedded(self.embed, pool.latents, 32))

    def fit(self, name: str, words: Words, pool: Pool, seed: int) -> None:
        self.bank.new(name, WORDS.rank, torch.Generator().manual_seed(seed))
        objective = TextSlider(self.teacher, name, words, TextSliderConfig(lr=LR, eta=ETA))
        batches = PoolBatches(pool, WORDS.batch, seed)
        for _ in train(objective, batches, TrainConfig(steps=WORDS.steps, seed=seed, cooldown=COOLDOWN)):
            pass

    def made(self, factor: str, seed: int) -> tuple[Axis, Calibration]:
        """The slider `factor` of the bank: trained, calibrated and baked."""
        pool = self.pool(factor)
        self.fit(factor, self.words[factor], pool, seed)
        axis = self.axis(factor, pool)
        limits = CalibrationConfig(seeds=WORDS.seeds, held_out=WORDS.seeds)
        found = calibrate(self.bench(factor=factor), factor, axis, limits)
        bake(self.bank, factor, found.unit)
        return axis, found

    # --- discovered ---

    @cached_property
    def topic_pool(self) -> tuple[Pool, Tensor, Directions]:
        pool = Pool.join(list(draw_pool(self.student, self.few, self.world.encode([TOPIC]), FOUND.pool)))
        features = embedded(self.embed, pool.latents, FOUND.at_once)
        return pool, features, find_directions(features, FOUND.sliders, torch.Generator().manual_seed(0))

    def topic_bench(self) -> Bench:
        return Bench(self.student, self.few, self.world.encode([TOPIC]), self.embed)

    def discovered(self, seed: int) -> dict[str, tuple[Axis, Calibration]]:
        """The sliders d0, d1, ... of the bank, in the order of the directions."""
        pool, features, found = self.topic_pool
        named = {f"d{i}": (found.vectors[i], found.sds[i].item()) for i in range(FOUND.sliders)}
        for i, name in enumerate(named):
            self.bank.new(name, FOUND.rank, torch.Generator().manual_seed(100 * seed + i))
        config = SliderSpaceConfig(sigmas=self.few.sigmas)
        objective = SliderSpace(self.student, named, self.embed, self.world.encode([TOPIC]), config)
        loop = TrainConfig(steps=FOUND.steps * len(named), seed=seed, cooldown=COOLDOWN)
        for _ in train(objective, PoolBatches(pool, FOUND.batch, seed), loop):
            pass
        made, bench = {}, self.topic_bench()
        limits = CalibrationConfig(seeds=FOUND.seeds, held_out=FOUND.seeds, multiples=(0.5, 1.0, 2.0))
        for name, (vector, _) in named.items():
            axis = axis_along(vector, features)
            made[name] = axis, calibrate(bench, name, axis, limits)
            bake(self.bank, name, made[name][1].unit)
        return made

    # --- judging ---

    def sweep(self, name: str, usable: tuple[float, float], bench: Bench, seeds: Sequence[int] = HELD_OUT):
        """Factors read back at five strengths of the usable range. [strengths seeds] each"""
        strengths = torch.linspace(*usable, 5).tolist()
        reads = [self.read(bench.latents({name: s}, seeds)) for s in strengths]
        return strengths, {k: torch.stack([r[k] for r in reads]) for k in SPAN}

    def judged(
        self, name: str, factor: str, usable: tuple[float, float], bench: Bench, ranked: int | None = None
    ) -> dict[str, float]:
        """Range from end to end, how far the most moved other factor goes, and the rank correlation per picture,
        which takes five strengths and is as sure with a few pictures."""
        strengths, seen = self.sweep(name, usable, bench, HELD_OUT[:ranked])
        moved = {k: v[-1] - v[0] for k, v in seen.items()}
        if ranked is not None and HELD_OUT[ranked:]:
            low, high = (self.read(bench.latents({name: s}, HELD_OUT[ranked:])) for s in usable)
            moved = {k: torch.cat([v, high[k] - low[k]]) for k, v in moved.items()}
        others = [v.mean().abs().item() for k, v in moved.items() if k != factor]
        rank = per_seed_spearman(strengths, seen[factor])
        return {"rank": rank, "range": moved[factor].mean().item(), "drift": max(others)}

    def rank(self, usable: tuple[float, float], values: Tensor) -> float:
        return per_seed_spearman(torch.linspace(*usable, len(values)).tolist(), values)

    def between(self, factor: str) -> dict[str, Tensor]:
        """What goes along where the prompt changes from one end to the other, same seeds, no slider. [seeds] each"""
        sampling, index = self.sampling(WORDS.sample_steps), torch.tensor(HELD_OUT) % len(THINGS)
        ends = (self.world.encode([end.format(thing) for thing in THINGS]) for end in ENDS[factor])
        low, high = (self.read(sampling(self.teacher, pick(c, index), HELD_OUT)) for c in ends)
        return {k: high[k] - low[k] for k in SPAN}

    def random_like(self, name: str, other: str, seed: int = 6) -> None:
        """A set of random directions, in every layer as large as the one of `other`."""
        rng = torch.Generator().manual_seed(seed)
        self.bank.new(name, WORDS.rank, rng)
        for layer, adapter in self.bank.sets[name].items():
            like = self.bank.sets[other][layer]
            adapter.up.data = torch.randn(adapter.up.shape, generator=rng)
            adapter.up.data *= (like.up @ like.down).norm() / (adapter.up @ adapter.down).norm()


def cards(found: Mapping[str, tuple[Axis, Calibration]]) -> list[SimpleNamespace]:
    """What random_strengths reads of a card."""
    return [SimpleNamespace(name=name, usable=calibration.usable) for name, (_, calibration) in found.items()]
