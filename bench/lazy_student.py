"""Does the trained lazy student complete half-hidden objects better than the lazy patch, and than itself untrained?

On the embedded teacher's own canvas of 16 tokens, where training takes minutes of one core.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmd_core import demo, shapes
from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.conditioning import Cond
from dmd_core.data import Batch
from dmd_core.denoiser import Denoiser
from dmd_core.families.joint import SHAPES as FAMILY
from dmd_core.inpaint import Filler, OnCanvas
from dmd_core.inpaint.partial import cells, places
from dmd_core.objectives.lazy_inpaint import LazyInpaint, LazyInpaintConfig
from dmd_core.samplers import Masked, sampled
from dmd_core.schedule import add_noise
from dmd_core.shapes import captions, world
from dmd_core.shapes.teacher import Partial
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import TrainState

from .record import Table

SEEDS = (0, 1, 2)
PICTURES = 512
TRAIN: dict[str, Any] = {"updates": 600, "adapt": 400, "batch": 32, "rank": 16, "lr": 1e-3}
NEAR = (0.10, 0.08)  # of place and radius, half canvases


@dataclass
class Patch:
    """The lazy patch in a session: the context at the hole's own noise level, blind to the hole."""

    net: Partial
    canvas: Tensor
    hole: Tensor
    noise: Tensor

    @property
    def schedule(self) -> Any:
        return self.net.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        known = add_noise(self.schedule, self.canvas, self.noise, sigma)
        _, kept = self.net(known, sigma, cond, places(~self.hole))
        x0, _ = self.net(x, sigma, cond, places(self.hole), kept)
        return torch.where(cells(self.hole, x, self.net.patch), x0, self.canvas)


@dataclass
class Task:
    """Single objects, one half of the canvas a hole; the prompt is empty, so that only the context can tell."""

    scene: world.Scene
    canvas: Tensor
    hole: Tensor
    noise: Tensor
    cond: Cond

    @classmethod
    def of(cls, place: demo.World, n: int, seed: int) -> "Task":
        rng = torch.Generator().manual_seed(seed)
        scene = world.sample(n, rng, pairs=0.0)
        with torch.no_grad():
            canvas = torch.cat([place.autoencoder.encode(p) for p in world.render(scene).split(64)])
        first = torch.arange(4) < 2
        halves = [first[:, None], ~first[:, None], first[None], ~first[None]]
        kinds = torch.stack([h.expand(4, 4).flatten() for h in halves])
        hole = kinds[torch.randint(4, (n,), generator=rng)]
        noise = torch.randn(canvas.shape, generator=rng)
        return cls(scene, canvas, hole, noise, place.encode([""]).expand(n))

    @torch.no_grad()
    def completed(self, place: demo.World, make: Callable[["Task"], Denoiser], steps: int, fresh: bool) -> float:
        """Share of objects that are what they were: one, shape, colour, place, size."""
        levels, parts = torch.tensor(demo.levels(steps)), []
        for index in torch.arange(len(self.canvas)).split(64):
            part = self.take(index)
            rng = torch.Generator().manual_seed(9)
            made = sampled(make(part), part.noise, levels, part.cond, rng, 1.0 if fresh else None)
            parts.append(torch.where(cells(part.hole, made, 2), made, part.canvas))
        seen, meant = demo.read(place, place.pictures(torch.cat(parts))), self.scene
        right = (seen.count == 1) & (seen.shape[:, 0] == meant.shape[:, 0]) & (seen.colour[:, 0] == meant.colour[:, 0])
        right &= ((seen.x - meant.x)[:, 0].abs() < NEAR[0]) & ((seen.y - meant.y)[:, 0].abs() < NEAR[0])
        return (right & ((seen.radius - meant.radius)[:, 0].abs() < NEAR[1])).float().mean().item()

    def take(self, index: Tensor) -> "Task":
        rows = self.canvas[index], self.hole[index], self.noise[index], self.cond.take(index)
        return Task(self.scene.take(index), *rows)


def student(place: demo.World, steps: int, seed: int) -> Filler:
    """Trained on renders with captions, a third of them without."""
    net, t = Partial(place.net), TRAIN
    bank, rng = AdapterBank(place.net, FAMILY.targets()), torch.Generator().manual_seed(seed)
    for name in ("student", "critic"):
        bank.new(name, t["rank"], rng)

    def filler(canvas: Tensor, hole: Tensor) -> Denoiser:
        return Adapted(OnCanvas(net, canvas, hole), bank, {"student": 1.0})

    calm = {"student_betas": (0.0, 0.99), "critic_betas": (0.0, 0.99), "ema": 0.95}
    holes = {"smallest": 0.1, "largest": 0.7, "text_dropout": 0.3}
    config = LazyInpaintConfig(
        **{"sigmas": demo.levels(steps)[:-1], "guidance": 2.0, "critic_updates": 2, "synchronise": 0.03},
        **{"student_lr": t["lr"], "critic_lr": t["lr"], "adapt": t["adapt"], **calm, **holes},
    )
    bare, critic = (Adapted(place.teacher, bank, mix) for mix in ({}, {"critic": 1.0}))
    players = bank.parameters("student"), bank.parameters("critic")
    objective = LazyInpaint(bare, filler, critic, place.encode([""]), *players, config)
    loop = TrainConfig(steps=t["updates"], seed=seed, warmup=5, cooldown=0.3)
    state = TrainState(objective, loop)
    for _ in train(objective, renders(place, seed + 1), loop, state):
        pass
    with state.averaged("student"):
        bank.load("student", bank.state("student"))
    return filler


def renders(place: demo.World, seed: int) -> Iterator[Batch]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        scene = world.sample(TRAIN["batch"], rng)
        with torch.no_grad():
            latents = place.autoencoder.encode(world.render(scene))
        yield Batch(place.encode(captions.describe(scene, rng)), tuple(latents.shape), latents)


def on_cpu(pictures: int = PICTURES, seeds: tuple[int, ...] = SEEDS) -> Table:
    place = demo.World.load(torch.device("cpu"))
    net, task = Partial(place.net), Task.of(place, pictures, 77)

    def dense(t: Task) -> Denoiser:
        return Masked(place.teacher, t.canvas, cells(t.hole, t.canvas, 2).float())

    def untrained(t: Task) -> Denoiser:
        return OnCanvas(net, t.canvas, t.hole)

    def patch(t: Task) -> Denoiser:
        return Patch(net, t.canvas, t.hole, t.noise)

    rows = []
    for steps in (20, 4, 1):
        row: dict[str, Any] = {"steps": steps, "dense": task.completed(place, dense, steps, False)}
        if steps <= 4:
            row |= {"session": task.completed(place, patch, steps, True)}
            row |= {"trained, without its LoRA": task.completed(place, untrained, steps, True)}
            found = []
            for seed in seeds:
                filler = student(place, steps, seed)
                found.append(task.completed(place, lambda t, f=filler: f(t.canvas, t.hole), steps, True))
            row |= {"trained": sorted(found)[len(found) // 2], "trained, range": [min(found), max(found)]}
        rows.append(row)
    return Table(
        "lazy_student",
        "Trained lazy student",
        "share of pictures whose half-hidden object was completed as it was: one object, shape, colour, place within "
        f"{NEAR[0]:g}, radius within {NEAR[1]:g}; the prompt is empty. dense: Euler on the whole canvas, known part "
        "under noise. session: the lazy patch. trained: clean context read once, without and with its LoRA "
        "(median of the seeds)",
        settings={"canvas": f"{world.CANVAS} x {world.CANVAS}", "pictures": pictures, "seeds": len(seeds), **TRAIN},
        rows=rows,
        notes=[f"Teacher and recogniser are the embedded ones ({shapes.WEIGHTS.name})."],
    )
