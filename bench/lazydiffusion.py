"""LazyDiffusion, small: does its decoder, blind but for what the encoder said, complete half-hidden objects; its cost.

On the scenes, holes and noise of inpainting_quality.py, with the embedded teacher whole and without context beside it.
"""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmd_core import demo
from dmd_core.conditioning import Cond
from dmd_core.inpaint import MaskConfig, draw_holes, step_cost
from dmd_core.inpaint.lazydiffusion import PATCH, LazyDiffusion, kept, patches
from dmd_core.objectives.hole_flow import HoleFlow
from dmd_core.objectives.rectified_flow import RectifiedFlowConfig
from dmd_core.samplers import Masked, sample_euler
from dmd_core.shapes import captions, teacher, world
from dmd_core.train import TrainConfig, mix, train
from dmd_core.trainstate import TrainState

from . import half_hidden
from .half_hidden import CELL, SIDE, Group, cells, judged
from .record import Table, Work, all_compared, verdict

STEPS, SEEDS, PICTURES = (1, 2, 4, 20), (0, 1, 2), 16  # pictures per place of the object, of which there are four
TRAIN: dict[str, Any] = {"updates": 1500, "batch": 32, "lr": 5e-4, "scenes": 4096}
TRAIN |= {"updates, prefilled": 250, "batches, prefilled": 96}
NOISE = 0.05  # two standard errors of a share near 0.15 of 192 pictures
SCENE = 4  # tokens across the scene, in the middle of the canvas: what holes are drawn in
SHARES, ACROSS, TEXT = (0.1, 0.25, 0.5, 1.0), 32, 12  # of the cost: 1024 tokens

Fill = Callable[[Group, Tensor, int], Tensor]  # pictures, noise, steps -> latents


# --- training


@dataclass
class Renders:
    """Batches (canvas, mask, cond): scenes encoded once, half of the captions cut to `a thing`, a tenth to nothing."""

    place: demo.World
    scenes: int
    batch: int
    seed: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Cond]]:
        rng = torch.Generator().manual_seed(self.seed)
        scene = world.sample(self.scenes, rng, pairs=0.0)
        canvas = torch.cat([encoded(self.place, half_hidden.framed(scene.take(i))) for i in demo.split(self.scenes)])
        for cursor in range(2**62):
            rng.manual_seed(mix(self.seed, cursor))
            index = torch.randint(self.scenes, (self.batch,), generator=rng)
            prompts = spoken(scene.take(index), rng)
            yield canvas[index].float(), holes(self.batch, rng), self.place.encode(prompts)


def prefilled(place: demo.World, count: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Cond, Tensor]]:
    """From so many batches whose holes were filled from around before encoding: no known cell tells what was there."""
    rng, pool = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        scene, mask = world.sample(batch, rng, pairs=0.0), holes(batch, rng)
        pixels = mask.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
        picture = half_hidden.framed(scene)
        pool.append((scene, encoded(place, half_hidden.prefilled(picture, pixels)), mask, encoded(place, picture)))
    while True:
        scene, canvas, mask, whole = pool[int(torch.randint(count, (), generator=rng))]
        yield canvas.float(), mask, place.encode(spoken(scene, rng)), whole.float()


def spoken(scene: world.Scene, rng: torch.Generator) -> list[str]:
    said, cut = captions.describe(scene, rng), torch.rand(len(scene), generator=rng).tolist()
    return ["" if c < 0.1 else half_hidden.PROMPT if c < 0.6 else s for c, s in zip(cut, said, strict=True)]


@torch.no_grad()
def encoded(place: demo.World, pictures: Tensor) -> Tensor:
    return place.autoencoder.encode(pictures).half()


def holes(n: int, rng: torch.Generator) -> Tensor:
    """Masks of latent cells [n h w] over the scene; half of them leave a strip of some tokens known."""
    tokens = draw_holes(n, SCENE, SCENE, rng, MaskConfig(least=0.15, most=0.75, all=0.0)).float()
    mask = tokens.reshape(n, SCENE, SCENE).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    edge = (SIDE // CELL - SCENE * PATCH) // 2
    mask = torch.nn.functional.pad(mask, (edge, edge, edge, edge))
    # a hole and the same moved by a cell: every token is touched still, those at two of its sides in part
    for dim in (1, 2):
        way = int(torch.randint(-1, 2, (), generator=rng))
        mask = mask * mask.roll(way, dim)
    return mask


def trained(place: demo.World, seed: int, say: Callable[[str], None]) -> LazyDiffusion:
    """Mostly on canvases that are encoded once and serve any hole; then on those that fit theirs, see `prefilled`."""
    t = TRAIN
    model = LazyDiffusion(place.net, place.encode([""]))
    model = learned(place, model, Renders(place, t["scenes"], t["batch"], seed + 1), t["updates"], seed, say)
    batches = prefilled(place, t["batches, prefilled"], t["batch"], seed + 2)
    return learned(place, model, batches, t["updates, prefilled"], seed + 2, say).requires_grad_(False)


def learned(
    place: demo.World, model: LazyDiffusion, batches: Any, updates: int, seed: int, say: Callable[[str], None]
) -> LazyDiffusion:
    config = RectifiedFlowConfig(lr=TRAIN["lr"], betas=(0.9, 0.99), ema=0.995, logit_mean=-0.7)
    loop = TrainConfig(steps=updates, seed=seed, warmup=50, cooldown=0.5, precision=demo.precision(place.device))
    objective = HoleFlow(model, config)
    state, average = TrainState(objective, loop), 0.0
    for report in train(objective, batches, loop, state):
        keep = min(0.98, 1 - 1 / report.step)
        average = keep * average + (1 - keep) * report.losses["student/flow"]
        if report.step % 50 == 0:
            say(f"{report.step}/{updates}: {average:.4f}, {report.seconds:.2f} s")
    with state.averaged("student"):
        return deepcopy(model)


# --- quality


def on_cpu() -> Table:
    place = demo.World.load(torch.device("cpu"))
    began = time.process_time()
    model = trained(place, 0, lambda line: print(line, flush=True))
    minutes = (time.process_time() - began) / 60
    return table(quality(place, model), minutes)


def table(rows: list[dict[str, Any]], minutes: float) -> Table:
    settings = {"canvas": f"{SIDE} x {SIDE}", "image tokens": 64, "tokens of the hole": 6, "cfg": 1, **TRAIN}
    return Table(
        "lazydiffusion",
        "LazyDiffusion, small",
        "share of pictures whose half-hidden object was completed right; pictures, holes, noise and judge are those of "
        '"Inpainting quality", where crops are. LazyDiffusion: an encoder reads the canvas once, a decoder computes '
        "the hole's tokens alone, each joined with what the encoder said there. untrained: the same before training. "
        "blank canvas: trained, but the encoder is shown nothing. dense, no context: the embedded teacher on the whole "
        "canvas, and from the prompt alone. range: of three seeds",
        seed="0 to 2",
        settings=settings | {"pictures per figure": 4 * PICTURES * len(SEEDS)},
        rows=rows,
        notes=[
            "A small reconstruction: encoder and decoder began as the embedded teacher (3.8 million parameters each) "
            f"and were fine-tuned on single objects for {minutes:.0f} minutes of one core, not distilled: "
            f"{TRAIN['updates']} updates on canvases encoded once for any hole, {TRAIN['updates, prefilled']} on ones "
            "whose hole was filled before encoding. The teacher beside it was never taught to inpaint.",
            "The hole is filled from around it before the canvas is encoded, for all columns: an autoencoder carries "
            "what was there into known cells beside it, and the first updates teach the encoder to read that.",
            "Known cells of a token that the hole cuts are pinned at every step, as in dense; the hole has such a "
            "strip at one side. That strip is all that the untrained decoder sees (compare tight crop).",
            verdict(
                "Control, blank canvas less no context", [r["blank canvas"] - r["no context"] for r in rows], NOISE
            ),
            verdict("LazyDiffusion less untrained", [r["LazyDiffusion"] - r["untrained"] for r in rows], NOISE, True),
        ],
    )


def quality(place: demo.World, model: LazyDiffusion) -> list[dict[str, Any]]:
    draws = {s: half_hidden.groups(PICTURES, s) for s in SEEDS}
    rows = []
    for steps in STEPS:
        row: dict[str, Any] = {"steps": steps}
        for name, fill in ways(place, model).items():
            found = [judged(place, drawn, filled(place, fill, s, steps)) for s, drawn in draws.items()]
            row[name] = round(sum(found) / len(found), 3)
            if name == "LazyDiffusion":
                row[f"{name}, range"] = [round(v, 3) for v in (min(found), max(found))]
        rows.append(row)
        print(row, flush=True)
    return rows


def filled(place: demo.World, fill: Fill, seed: int, steps: int) -> Callable[[Group], Tensor]:
    def pictures(group: Group) -> Tensor:
        shape = (len(group.picture), demo.LATENT[0], SIDE // CELL, SIDE // CELL)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))
        return place.pictures(fill(group, noise, steps))

    return pictures


def ways(place: demo.World, model: LazyDiffusion) -> dict[str, Fill]:
    cond = place.encode([half_hidden.PROMPT])

    def canvas(group: Group) -> Tensor:
        with torch.no_grad():
            return place.autoencoder.encode(half_hidden.prefilled(group.picture, group.mask))

    def lazy(group: Group, noise: Tensor, steps: int, seen: float = 1.0, model: LazyDiffusion = model) -> Tensor:
        sigmas = torch.tensor(demo.levels(steps))
        return model.fill(seen * canvas(group), cells(group.mask), cond, sigmas, noise)

    def whole(group: Group, noise: Tensor, steps: int, context: bool = True) -> Tensor:
        sigmas, mask = torch.tensor(demo.levels(steps)), cells(group.mask)[:, None]
        denoiser = Masked(place.teacher, canvas(group), mask if context else torch.ones_like(mask))
        return sample_euler(denoiser, denoiser.enter(noise, noise, sigmas[0]), sigmas, cond)

    return {
        "LazyDiffusion": lazy,
        "untrained": partial(lazy, model=LazyDiffusion(place.net, place.encode([""]))),
        "blank canvas": partial(lazy, seen=0.0),
        "dense": whole,
        "no context": partial(whole, context=False),
    }


# --- cost


def cost(rounds: int = 15) -> Table:
    """Random weights: time does not depend on what was learned."""
    rng = torch.Generator().manual_seed(0)
    net = teacher.Teacher().eval().requires_grad_(False)
    net.pos_embed = teacher.positions(net.pos_embed.shape[-1], ACROSS)
    cond = Cond(torch.randn(1, TEXT, teacher.TEXT, generator=rng), torch.randn(1, teacher.POOLED, generator=rng))
    model = LazyDiffusion(net, cond).eval().requires_grad_(False)
    canvas, sigma = torch.randn(1, teacher.CHANNELS, 2 * ACROSS, 2 * ACROSS, generator=rng), torch.tensor([0.7])
    works: dict[str, Work] = {"encoder": partial(model.encoder, canvas, torch.zeros_like(canvas[:, 0]))}
    rows = []
    for share in SHARES:
        tokens = round(share * ACROSS**2)
        mask = (torch.arange(ACROSS**2) < tokens).float().reshape(1, ACROSS, ACROSS)
        mask = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        asked, x = model.read(canvas, mask, cond), kept(patches(canvas), mask)
        works[str(share)] = partial(model.denoiser(), x, sigma, asked)
        rows.append({"m": share, "tokens": tokens, "law": round(step_cost(tokens / ACROSS**2, ACROSS**2, TEXT), 3)})
    found = all_compared(works, partial(teacher.denoiser(net), canvas, sigma, cond), rounds)
    once = found["encoder"]["ratio"]
    for row in rows:
        step = found[str(row["m"])]
        row |= {"decoder step": step["ratio"], "low": step["low"], "high": step["high"]}
        row |= {"over the law": round(step["ratio"] / row["law"], 2)}
        row |= {f"{n} step{'s' * (n > 1)} with the encoder": round(step["ratio"] + once / n, 3) for n in (1, 4, 20)}
    return Table(
        "lazydiffusion_cost",
        "LazyDiffusion's cost",
        "time of one step of the decoder over that of the dense teacher, against the share m of tokens in the hole; "
        "steps with the encoder: mean of a run, the encoder's one pass included, over a dense step",
        settings={"image tokens": ACROSS**2, "text tokens": TEXT, "encoder over a dense step": once, "rounds": rounds},
        rows=rows,
        notes=[
            "law = (m N + T) / (N + T), what a step costs where the hole also reads keys of the rest; the decoder has "
            "none, so its attention is m x m and it falls below the law.",
        ],
    )
