"""How each network of the shapes world is trained; build.py runs these in order."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import Cond
from ..objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from ..train import TrainConfig, train
from ..trainstate import TrainState
from . import captions, teacher, world
from .autoencoder import Autoencoder
from .recogniser import Recogniser
from .text import Probe, TextEncoder

log = logging.getLogger(__name__)


def fit(
    params: Iterable[nn.Parameter], loss: Callable[[int], Tensor], steps: int, lr: float, name: str, weight_decay=0.0
) -> None:
    """Plain supervised training: AdamW, short warm-up, cosine to zero, bf16 where autocast finds it worth while."""
    params = list(params)
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    began, average = time.perf_counter(), math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        average = value.item() if step == 0 else 0.98 * average + 0.02 * value.item()
        if (step + 1) % 100 == 0:
            log.info("%s step %d loss %.5f (%.0f s)", name, step + 1, average, time.perf_counter() - began)


def views(n: int, rng: torch.Generator, textured: float) -> Tensor:
    """Mostly whole pictures; a quarter are pieces of ones twice as large that show some of an object. [n 3 64 64]"""
    scene, size = world.sample_wide(n // 4, rng, textured=textured), world.CANVAS
    images = world.render(scene, 2 * size)
    slot = (torch.rand(len(scene), generator=rng) * scene.count).long()
    rows = torch.arange(len(scene))

    def start(centre: Tensor) -> list[int]:
        middle = (centre[rows, slot] + 1) * size
        jitter = torch.randint(-size // 2, size // 2 + 1, (len(scene),), generator=rng)
        return (middle - size / 2 + jitter).round().clamp(0, size).long().tolist()

    corners = zip(images, start(scene.y), start(scene.x), strict=True)
    pieces = [image[:, top : top + size, left : left + size] for image, top, left in corners]
    return torch.cat([world.render(world.sample_wide(n - n // 4, rng, textured=textured)), torch.stack(pieces)])


def train_autoencoder(steps: int, seed: int) -> Autoencoder:
    torch.manual_seed(seed)  # initial weights only; every draw below has its generator
    rng = torch.Generator().manual_seed(seed)
    model = Autoencoder()
    noise = 0.08

    def loss(step: int) -> Tensor:
        images = views(32, rng, textured=0.5 if noise < 0.1 else 0.2)
        latents = model.encode(images).float()
        # noise spreads what an edge is over neighbouring latents, so that a decoder forgives what a model gets slightly
        # wrong, and a small diffusion model learns them sooner
        amount = noise * (1 if noise < 0.1 else torch.rand(len(latents), 1, 1, 1, generator=rng))
        error = model.decode(latents + amount * torch.randn(latents.shape, generator=rng)).float() - images
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        return error.abs().mean() + 4 * error.square().mean() + 0.02 * (mean.square() + (std - 1).square()).mean()

    fit(model.parameters(), loss, steps // 2, 2e-3, "autoencoder")
    fit(model.parameters(), loss, steps * 3 // 10, 1.5e-3, "autoencoder, sharper")
    noise = 0.4
    fit(model.parameters(), loss, steps * 2 // 10, 1.2e-3, "autoencoder, under noise")
    return model.eval().requires_grad_(False)


def train_recogniser(autoencoder: Autoencoder, steps: int, seed: int) -> Recogniser:
    """On clean pictures and on ones that went through the autoencoder, each with mild noise and blur."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = Recogniser()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pool = world.sample_wide(8192, rng, textured=0.3)
    passed = torch.cat([_round_trip(autoencoder, pool.take(part)) for part in torch.arange(len(pool)).split(64)])
    log.info("recogniser: %d pictures went through the autoencoder", len(pool))

    def loss(step: int) -> Tensor:
        if step % 2:
            scene = world.sample_wide(64, rng, textured=0.3)
            images = world.render(scene)
        else:
            index = torch.randint(len(pool), (64,), generator=rng)
            scene, images = pool.take(index), passed[index].float() / 127.5 - 1
        return model.loss(worsen(images, rng), scene)

    fit(model.parameters(), loss, steps * 5 // 8, 2e-3, "recogniser", weight_decay=0.01)
    fit(model.parameters(), loss, steps - steps * 5 // 8, 1.2e-3, "recogniser, again", weight_decay=0.01)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _round_trip(autoencoder: Autoencoder, scene: world.Scene) -> Tensor:
    images = autoencoder.decode(autoencoder.encode(world.render(scene)))
    return images.clamp(-1, 1).add(1).mul(127.5).round().byte()


def worsen(images: Tensor, rng: torch.Generator) -> Tensor:
    """Noise of up to 3 % on every picture, a light blur on one in eight."""
    amount = 0.06 * torch.rand(len(images), 1, 1, 1, generator=rng)
    blur = torch.rand(len(images), generator=rng) < 0.125
    images = images.clone()
    images[blur] = (images[blur] + F.avg_pool2d(images[blur], 3, 1, 1, count_include_pad=False)) / 2
    return images + amount * torch.randn(images.shape, generator=rng)


def train_text_encoder(steps: int, seed: int) -> TextEncoder:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model, probe = TextEncoder(), Probe()

    def loss(step: int) -> Tensor:
        prompts = captions.describe(world.sample(128, rng), rng)
        return probe.loss(model, ["" if step % 16 == i else p for i, p in enumerate(prompts)])

    fit([*model.parameters(), *probe.parameters()], loss, steps, 2e-3, "text encoder")
    return model.eval().requires_grad_(False)


class Latents:
    """Batches (x0, Cond) of encoded scenes, in chunks that are drawn anew; captions lose everything now and then."""

    def __init__(self, autoencoder: Autoencoder, encoder: TextEncoder, batch: int, seed: int, chunk: int, reuse: int):
        self.autoencoder, self.encoder, self.batch, self.seed = autoencoder, encoder, batch, seed
        self.chunk, self.reuse = chunk, reuse  # scenes drawn at once; how often each is trained on
        self.dropout = 0.1

    def seek(self, cursor: int) -> Iterator[tuple[Tensor, Cond]]:
        per_chunk = self.chunk * self.reuse // self.batch
        while True:
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + cursor // per_chunk)
            scene = world.sample(self.chunk, rng)
            latents = self._encode(scene)
            for i in range(per_chunk):
                index = torch.randint(self.chunk, (self.batch,), generator=rng)
                drop = (torch.rand(self.batch, generator=rng) < self.dropout).tolist()
                prompts = captions.describe(scene.take(index), rng)
                if i >= cursor % per_chunk:
                    tokens, pooled = self.encoder.encode(["" if d else p for p, d in zip(prompts, drop, strict=True)])
                    yield latents[index].float(), Cond(tokens, pooled)
            cursor = (cursor // per_chunk + 1) * per_chunk

    @torch.no_grad()
    def _encode(self, scene: world.Scene) -> Tensor:
        parts = torch.arange(len(scene)).split(64)
        with torch.autocast("cpu", torch.bfloat16):
            latents = [self.autoencoder.encode(world.render(scene.take(p))) for p in parts]
        return torch.cat(latents).half()


def train_teacher(
    autoencoder: Autoencoder,
    encoder: TextEncoder,
    steps: int,
    seed: int,
    keep: Callable[[TrainState], None],
    saved: Path,
    rank: int = 0,
) -> TrainState:
    """Our own rectified flow: logit-normal times, caption dropout, EMA. Goes on from `saved`.

    `keep` sees the state every 500 steps. Where torch.distributed runs, gradients are averaged over its processes.
    """
    torch.manual_seed(seed)
    model = teacher.initialise(teacher.Teacher())
    # against the schedule's shift of 3: most of a small picture's geometry is decided around sigma 0.6
    config = RectifiedFlowConfig(lr=1.5e-3, betas=(0.9, 0.99), ema=0.999, logit_mean=-0.7)
    objective = RectifiedFlow(teacher.denoiser(model), dict(model.named_parameters()), config)
    loop = TrainConfig(steps=steps, seed=seed + rank, warmup=300, cooldown=0.6, precision="bf16")
    state = TrainState(objective, loop)
    if saved.exists():
        # every process but the first has another seed, hence another hash
        state.load(saved, allow_other_config=True)
    batches = Latents(autoencoder, encoder, batch=32, seed=seed + 100 * rank, chunk=4096, reuse=8)
    average = 1.0
    reduce = average_gradients if dist.is_initialized() else None
    for report in train(objective, batches, loop, state, reduce):
        average = 0.99 * average + 0.01 * report.losses["student/flow"]
        if report.step % 100 == 0:
            log.info("teacher step %d loss %.4f (%.3f s per step)", report.step, average, report.seconds)
        if rank == 0 and (report.step % 500 == 0 or report.step == steps):
            keep(state)
    return state


def average_gradients(grads: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in grads])
    for g, part in zip(grads, parts, strict=True):
        g.copy_(part.reshape(g.shape))
