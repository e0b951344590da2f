"""What Seed Variety does for the shapes student: how far seeds of one prompt differ, and whether prompts still hold."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dmd_core import demo, metrics, shapes
from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.conditioning import Cond
from dmd_core.denoiser import Denoiser, Guided
from dmd_core.samplers import sample_euler, sample_restart
from dmd_core.variety import jitter_image, jitter_prompt
from dmd_core.weights.lora import load_lora

from .record import Table, holding

SEEDS = (0, 1, 2)
STEPS, TEACHER_STEPS, GUIDANCE = 4, 40, 2.0
STRENGTHS = {"jitter the prompt": (0.3, 1.0, 2.0), "jitter the first image": (0.3, 0.6, 1.0)}
DEFAULT = ("jitter the prompt", 1.0)  # of the node
HEAD = 2  # guided steps of the teacher before the student's second level


@dataclass(frozen=True)
class First:
    """A student whose first call is made by another denoiser: what Seed Variety does to a run."""

    inner: Denoiser
    first: Callable[[Tensor, Tensor, Any], Tensor]

    @property
    def schedule(self) -> Any:
        return self.inner.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        call = self.first if float(sigma[0]) >= self.inner.schedule.sigma_max else self.inner
        return call(x, sigma, cond)


@dataclass(frozen=True)
class Sides:
    """Teacher and shipped student on one network, and prompts with several seeds each."""

    world: demo.World
    teacher: Denoiser
    student: Denoiser

    @classmethod
    def load(cls) -> "Sides":
        world = demo.World.load(torch.device("cpu"))
        bank = AdapterBank(world.net, demo.FAMILY.targets())
        bank.load("student", load_lora(shapes.WEIGHTS / f"shapes_student_{STEPS}.safetensors", bank))
        guided = Guided(world.teacher, GUIDANCE, world.encode([""]))
        return cls(world, guided, Adapted(world.teacher, bank, {"student": 1.0}))

    def ways(self, seed: int) -> Iterator[tuple[str, float, Callable[[Tensor, Cond, torch.Generator], Tensor]]]:
        """name, strength, and how noise becomes latents."""
        levels = torch.tensor(demo.levels(STEPS))

        def restart(model: Denoiser) -> Callable[..., Tensor]:
            return lambda x, cond, rng: sample_restart(model, x, levels, cond, rng)

        def head(x: Tensor, cond: Cond, rng: torch.Generator) -> Tensor:
            x = sample_euler(self.teacher, x, torch.linspace(1.0, float(levels[1]), HEAD + 1), cond)
            return sample_restart(self.student, x, levels[1:], cond, rng)

        def by_prompt(strength: float) -> Denoiser:
            def first(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
                return self.student(x, sigma, replace(cond, cross=jitter_prompt(cond.cross, strength, seed)))

            return First(self.student, first)

        def by_image(strength: float) -> Denoiser:
            return First(self.student, lambda x, s, cond: jitter_image(self.student(x, s, cond), strength, seed))

        yield "student", 0.0, restart(self.student)
        for (name, strengths), make in zip(STRENGTHS.items(), (by_prompt, by_image), strict=True):
            for strength in strengths:
                yield name, strength, restart(make(strength))
        yield f"{HEAD} guided steps of the teacher first", 0.0, head
        many = torch.tensor(demo.levels(TEACHER_STEPS))
        yield "teacher", 0.0, lambda x, cond, rng: sample_euler(self.teacher, x, many, cond)


@cache
def sides() -> Sides:
    return Sides.load()


@torch.no_grad()
def measured(seed: int, prompts: int, each: int, wanted: Callable[[str], bool] = bool) -> dict[tuple[str, float], dict]:
    """Mean distance between seeds of a prompt, and the share of pictures that show what their prompt says."""
    found, texts = {}, demo.captions(prompts, 5000 + seed)
    cond = sides().world.encode(texts)
    index = torch.arange(prompts).repeat_interleave(each)
    noise = torch.randn(len(index), *demo.LATENT, generator=torch.Generator().manual_seed(seed))
    # one batch: its samples differ in their jitter as runs with the seeds seed, seed + 1, ... do
    for name, strength, sample in sides().ways(1000 * seed):
        if not wanted(name):
            continue
        latents = sample(noise, cond.take(index), torch.Generator().manual_seed(seed + 1))
        images = sides().world.pictures(latents)
        features = sides().world.recogniser.features(images).reshape(prompts, each, -1)
        apart = [metrics.pairwise_distance(f) for f in features]
        right = shapes.captions.accuracy([texts[i] for i in index.tolist()], demo.read(sides().world, images))
        found[name, strength] = {"distance": sum(apart) / prompts, "right": right}
    return found


def on_cpu(prompts: int = 64, each: int = 8) -> Table:
    table = Table(
        "variety",
        "Seed variety",
        "mean distance between the recogniser's features of pictures with one prompt and different seeds, over the "
        "teacher's; and the share of pictures that show what their prompt says",
        seed="0 to 2",
        settings={"prompts per seed": prompts, "pictures per prompt": each, "student's steps": STEPS},
        notes=[
            f"Teacher: {TEACHER_STEPS} steps, guidance {GUIDANCE:g}. Every row of a seed has its prompts and noise.",
            "range: the lowest and the highest of the three seeds.",
        ],
    )
    with ProcessPoolExecutor(len(SEEDS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        runs = list(pool.map(partial(measured, prompts=prompts, each=each), SEEDS))
    for key in runs[0]:
        shares = [r[key]["distance"] / r["teacher", 0.0]["distance"] for r in runs]
        right = [r[key]["right"] for r in runs]
        row: dict[str, Any] = {"what": key[0], "strength": key[1] or ""}
        for label, values in (("distance over the teacher's", shares), ("prompts right", right)):
            row[label] = round(sum(values) / len(values), 3)
            row[f"{label}, range"] = [round(min(values), 3), round(max(values), 3)]
        table.rows.append(row)
    table.notes.append(verdict(table.rows))
    return table


def verdict(rows: list[dict[str, Any]], chosen: tuple[str, float] = DEFAULT) -> str:
    """Is the node's default nearer to the teacher's variety than the student alone, with as many prompts right?"""
    found = {(r["what"], r["strength"]): (r["distance over the teacher's"], r["prompts right"]) for r in rows}
    (alone, right), (with_it, still_right) = found["student", ""], found[chosen]
    back = (abs(1 - alone) - abs(1 - with_it)) / abs(1 - alone)
    how, strength = chosen
    return (
        f"asked: the default of Seed Variety ({how}, {strength:g}) brings the student's distance nearer to the "
        f"teacher's ({alone:.3f} to {with_it:.3f}, {back:.0%} of what it lacks; see the ranges) with as many prompts "
        f"right ({right:.3f} to {still_right:.3f}, 0.005 less is as many): "
        f"{holding(back > 0 and still_right >= right - 0.005)}."
    )
