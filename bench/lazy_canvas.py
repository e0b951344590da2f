"""The trained lazy student on the canvases of inpainting_quality: trained here, judged in ComfyUI by mode `trained`."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmd_core import demo
from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.data import Batch
from dmd_core.denoiser import Denoiser
from dmd_core.families.joint import SHAPES as FAMILY
from dmd_core.inpaint import OnCanvas
from dmd_core.objectives.lazy_inpaint import LazyInpaint, LazyInpaintConfig
from dmd_core.samplers import Masked
from dmd_core.shapes import captions, world
from dmd_core.shapes.teacher import Partial
from dmd_core.train import TrainConfig, mix, train
from dmd_core.trainstate import TrainState
from dmd_core.weights.lora import save_lora

from . import half_hidden
from .half_hidden import CELL, SIDE
from .inpainting_quality import TEACHER, in_comfy
from .lazydiffusion import NOISE, encoded, holes
from .record import NOT_RUN, Table, verdict

STEPS = (1, 2, 4)
SHOWN, WHOLE = "student", "whole student"  # what their canvases were in training

TRAIN: dict[str, Any] = {"batch": 32, "rank": 32, "lr": 1e-3, "batches": 24, "without a prompt": 0.5}
TRAIN |= {"updates, denoising": 120, "updates, 4 steps": 25, "updates, 1 step": 15}

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shown(Batch):
    """What a user's graph would encode: the hole filled from around it. latents are the whole picture's."""

    canvas: Tensor
    mask: Tensor  # of its cells [b h w]


class OnShown(LazyInpaint):
    """The student is shown canvases that carry no trace of what the hole hides; targets and judges know it."""

    def task(self, batch: Batch, canvas: Tensor, rng: torch.Generator) -> tuple[Tensor, Denoiser]:
        assert isinstance(batch, Shown)
        shown, mask = batch.canvas.to(canvas), batch.mask[:, None].to(canvas)
        hole = F.max_pool2d(mask, self.patch).flatten(1) > 0
        return hole, Masked(self.filler(shown, hole), shown, mask)


@dataclass
class Renders:
    """So many batches in turn: scenes with captions, and holes, none of them among those judged."""

    place: demo.World
    seed: int
    kind: str = SHOWN

    def __iter__(self) -> Iterator[Batch]:
        pool = [self.drawn(torch.Generator().manual_seed(mix(self.seed, i))) for i in range(TRAIN["batches"])]
        for cursor in range(2**62):
            prompts, whole, shown, mask = pool[cursor % len(pool)]
            whole, cond = whole.float(), self.place.encode(prompts)
            if self.kind == SHOWN:
                yield Shown(cond, tuple(whole.shape), whole, canvas=shown.float(), mask=mask)
            else:
                yield Batch(cond, tuple(whole.shape), whole)

    def drawn(self, rng: torch.Generator) -> tuple[list[str], Tensor, Tensor, Tensor]:
        scene = world.sample(TRAIN["batch"], rng, pairs=0.0)
        picture, mask = half_hidden.framed(scene), holes(TRAIN["batch"], rng)
        pixels = mask.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
        shown = half_hidden.prefilled(picture, pixels)
        return captions.describe(scene, rng), encoded(self.place, picture), encoded(self.place, shown), mask


@dataclass
class Lesson:
    """One training of the student from where it is. kind whole: as Distill trains, holes and canvases are its own."""

    place: demo.World
    bank: AdapterBank
    seed: int
    kind: str
    say: Callable[[str], None]

    def learn(self, steps: int, adapt: int, updates: int, **options: Any) -> State:
        """Plain denoising first, then DMD2 at the levels of so many steps."""
        place, bank, net, lr = self.place, self.bank, Partial(self.place.net), TRAIN["lr"]

        def filler(canvas: Tensor, hole: Tensor) -> Denoiser:
            return Adapted(OnCanvas(net, canvas, hole), bank, {"student": 1.0})

        calm = {"student_betas": (0.0, 0.99), "critic_betas": (0.0, 0.99), "ema": 0.95, "student_lr": lr}
        settings = {"sigmas": demo.levels(steps)[:-1], "guidance": 2.0, "adapt": adapt, "critic_lr": lr, **options}
        config = LazyInpaintConfig(text_dropout=TRAIN["without a prompt"], synchronise=0.03, **calm, **settings)
        bare, critic = (Adapted(place.teacher, bank, on) for on in ({}, {"critic": 1.0}))
        players = bank.parameters("student"), bank.parameters("critic")
        made = OnShown if self.kind == SHOWN else LazyInpaint
        objective = made(bare, filler, critic, place.encode([""]), *players, config)
        precision = demo.precision(place.device)
        loop = TrainConfig(steps=adapt + updates, seed=self.seed, warmup=5, cooldown=0.3, precision=precision)
        state, began = TrainState(objective, loop), time.process_time()
        for report in train(objective, Renders(place, self.seed + 1, self.kind), loop, state):
            if report.step % 50 == 0:
                losses = {k: round(v, 4) for k, v in report.losses.items()}
                self.say(f"{report.step}/{loop.steps}: {losses}, {time.process_time() - began:.0f} s")
        with state.averaged("student"):
            found = bank.state("student")
        bank.load("student", found)
        return found


def students(place: demo.World, seed: int, kind: str, say: Callable[[str], None]) -> dict[int, State]:
    """By their number of steps; the one for one step begins as the one for four."""
    bank, rng = AdapterBank(place.net, FAMILY.targets()), torch.Generator().manual_seed(seed)
    for name in ("student", "critic"):
        bank.new(name, TRAIN["rank"], rng)
    lesson = Lesson(place, bank, seed, kind, say)
    four = lesson.learn(4, TRAIN["updates, denoising"], TRAIN["updates, 4 steps"], critic_updates=2)
    one = lesson.learn(1, 0, TRAIN["updates, 1 step"], critic_updates=3, shift=2.0)
    bank.detach()
    return {4: four, 1: one}


def written(place: demo.World, folder: str, seed: int, kind: str, say: Callable[[str], None]) -> dict[int, str]:
    """LoRA files of one seed's students, as Save writes them."""
    names = [n for n, _ in place.net.named_modules()]
    found = students(place, seed, kind, say)
    return {n: str(save_lora(folder, f"{kind} {n} {seed}", state, names, family=FAMILY)) for n, state in found.items()}


def on_cpu(pictures: int = 16, seeds: int = 3, trainings: int = 3) -> Table:
    """pictures: per place of the object; seeds: of pictures and noise; trainings: seeds of the students."""
    place = demo.World.load(torch.device("cpu"))
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        files = {
            f"{kind} {seed}": written(place, folder, seed, kind, lambda line: print(line, flush=True))
            for kind in (SHOWN, WHOLE)
            for seed in range(trainings)
        }
        minutes = (time.process_time() - began) / 60 / len(files)
        found = in_comfy(rows_of(files), pictures, seeds)
    return table(found, minutes, trainings)


def rows_of(files: Mapping[str, dict[int, str]]) -> list[dict[str, Any]]:
    """The teacher, whole and by clean context without a LoRA, then every student; the one for four steps takes two."""
    rows: list[dict[str, Any]] = [{**TEACHER, "steps": n, "ways": ["dense"]} for n in (*STEPS, 20)]
    for name, file in {"teacher": None, **files}.items():
        for n in STEPS:
            lora = file and file[1 if n == 1 else 4]
            rows.append({"model": name, "lora": lora, "few": True, "steps": n, "ways": ["trained"]})
    return rows


def table(found: dict[str, Any] | None, minutes: float, trainings: int) -> Table:
    settings = {"canvas": f"{SIDE} x {SIDE}", "image tokens": 64, "cfg": 1, **TRAIN, "students": trainings}
    made = Table(
        "lazy_canvas",
        "Lazy student, on the canvas of Inpainting quality",
        "share of pictures whose half-hidden object was completed right; pictures, holes, prompt, noise and judge are "
        'those of "Inpainting quality", sampled by ComfyUI. dense: the embedded teacher on the whole canvas, Euler. '
        "trained: mode trained of Lazy Inpaint with the students' LoRA files (median of the students), and the same "
        "without a LoRA",
        seed="0 to 2",
        settings=settings,
        notes=[
            f"A student learnt for {minutes:.0f} minutes of one core, on scenes in the middle of such a canvas, with "
            "captions or without, and holes of many shapes; never with the prompt that is judged.",
            "It is shown canvases whose hole was filled from around it before they were encoded, as users' graphs do. "
            "The 4-step student does the 2 steps; the 1-step student began as it.",
            "as Distill trains: on canvases encoded whole, with the holes that Distill draws. What it learns to read "
            "beside a hole carries a trace of what the hole hid; it is judged as the others, without that trace.",
        ],
    )
    if found is None:
        made.rows = [{"steps": n, "dense": NOT_RUN, "trained": NOT_RUN} for n in (*STEPS, 20)]
        return made
    made.rows, made.notes = merged(found["rows"]), made.notes + found["notes"]
    made.settings |= {k: v for k, v in found["settings"].items() if k != "computed tokens"}  # exactly the hole
    made.notes += verdicts(made.rows)
    return made


def merged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per number of steps."""
    rows = []
    for n in (*STEPS, 20):
        at = {r["model"] + (", lazy" if "trained" in r else ""): r for r in found if r["steps"] == n}
        row: dict[str, Any] = {"steps": n, "dense": at["teacher"]["dense"]}
        for kind, column in ((SHOWN, "trained"), (WHOLE, "as Distill trains")):
            made = sorted(r["trained"] for name, r in at.items() if name.startswith(kind))
            if made:
                row |= {"trained, without its LoRA": at["teacher, lazy"]["trained"], column: made[len(made) // 2]}
                row |= {f"{column}, range": [made[0], made[-1]]}
        rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What was asked of it, and whether it was the training."""
    at, found = {r["steps"]: r for r in rows}, []
    for what in ("trained", "as Distill trains"):
        ratios = [v / at[20]["dense"] for v in at[4][f"{what}, range"]]
        gains = [v - at[1]["dense"] for v in at[1][f"{what}, range"]]
        taught = [v - at[n]["trained, without its LoRA"] for n in STEPS for v in at[n][f"{what}, range"]]
        found += [
            verdict(f"{what}, in 4 steps over dense in 20", ratios, 0.95, True),
            verdict(f"{what}, in 1 step less dense in 1 step", gains, NOISE, True),
            verdict(f"{what}, less the same without its LoRA", taught, NOISE, True),
        ]
    return found
