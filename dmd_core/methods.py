"""The methods, put together on one frozen network: which LoRA sets, which heads, which data each of them needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import Adapted, AdapterBank
from .conditioning import Cond
from .denoiser import Denoiser
from .discriminators import Discriminator, FeatureReader
from .inpaint import Filler, OnCanvas
from .objectives.diffusion2gan import Diffusion2GAN, Perceptual, noise_input
from .objectives.dmd import DMD
from .objectives.dmd2 import DMD2
from .objectives.ladd import LADD
from .objectives.lazy_inpaint import LazyInpaint
from .objectives.rectified_flow import RectifiedFlow
from .runfile import CONFIGS, RunFile
from .train import Objective

if TYPE_CHECKING:
    from .sources import Source


@dataclass(frozen=True, kw_only=True)
class Made:
    """An objective, and what the run around it has to know."""

    objective: Objective
    student: Adapted
    sigmas: tuple[float, ...]  # that the student is sampled at, without the final 0
    gamma: float | None = 1.0  # stochasticity of its sampling; None: plain Euler
    guidance: float = 1.0  # of the teacher
    needs_latents: bool = False  # the teacher's noise-latent pairs
    takes_pictures: bool = False  # latents of the user's own pictures do as well
    needs_pictures: bool = False  # nothing else does
    cfg: float = 1.0  # that the student is sampled with
    tuples: bool = False  # batches are (x0, cond, eps)
    filler: Filler | None = None  # a student that fills holes in canvases
    settled: int = 0  # the update from which on all cost the same


@dataclass
class Bench:
    """What the methods are built from."""

    source: "Source"
    bank: AdapterBank
    file: RunFile
    pool: Cond
    negative: Cond
    rng: torch.Generator

    @property
    def teacher(self) -> Adapted:
        return Adapted(self.source.denoiser, self.bank, {})

    @property
    def sigmas(self) -> tuple[float, ...]:
        given = self.file.method.options.get("sigmas")
        if given:
            return tuple(given)
        # VP families have their own trained list; flow families are shifted as the student is sampled
        return tuple(float(s) for s in self.source.family.sigmas(self.file.method.steps)[:-1])

    def config(self) -> Any:
        options = dict(self.file.method.options)
        cls = CONFIGS[self.file.method.name]
        return cls(**(options | {"sigmas": self.sigmas} if "sigmas" in cls.__dataclass_fields__ else options))  # type: ignore[attr-defined]

    def lora(self, name: str, rank: int = 0) -> tuple[Adapted, Mapping[str, nn.Parameter]]:
        self.bank.new(name, rank or self.file.lora.rank, self.rng)
        return Adapted(self.source.denoiser, self.bank, {name: 1.0}), self.bank.parameters(name)

    def reader(self, view: Adapted) -> FeatureReader:
        names = [n for n, _ in self.source.net.named_modules()]
        return FeatureReader(view, self.source.net, self.source.family.feature_layers(names, self.file.method.features))

    def discriminator(self, view: Adapted) -> Discriminator:
        x = torch.zeros((2, *self.source.shape), device=self.source.device)
        sigma = torch.full((2,), self.sigmas[0] / 2, device=self.source.device)
        cond = self.pool.take(torch.zeros(2, dtype=torch.long))
        return Discriminator.on(self.reader(view), x, sigma, cond, self.rng, self.file.method.head_width)


def build(file: RunFile, source: "Source", bank: AdapterBank, pool: Cond, negative: Cond) -> Made:
    rng = torch.Generator().manual_seed(file.train.seed)
    return BUILDERS[file.method.name](Bench(source, bank, file, pool, negative, rng))


def dmd2(bench: Bench, cls: type[DMD2] = DMD2) -> Made:
    config = bench.config()
    student, student_params = bench.lora("student")
    critic, critic_params = bench.lora("critic", bench.file.lora.critic_rank)
    discriminator = gan(bench, config, critic)
    objective = cls(
        bench.teacher, student, critic, bench.negative, student_params, critic_params, config, discriminator
    )
    return Made(
        objective=objective,
        student=student,
        sigmas=config.sigmas,
        gamma=None if config.trajectory else config.gamma,
        guidance=config.guidance,
        needs_latents=cls is DMD or bool(config.gan_weight) or not config.backward_simulation,
        takes_pictures=cls is DMD2,
        settled=getattr(config, "warm_up", 0),
    )


def gan(bench: Bench, config: Any, critic: Adapted) -> Discriminator | None:
    if not config.gan_weight:
        return None
    return bench.discriminator(critic if config.gan_features == "critic" else bench.teacher)


def lazy_inpaint(bench: Bench) -> Made:
    net, config = bench.source.partial, bench.config()
    if net is None:
        raise ValueError(
            "lazy inpainting computes some of a transformer's tokens, which this model cannot do here; train Flux, "
            "SD3, Qwen-Image or Z-Image in ComfyUI, or the embedded shapes. UNets are cropped instead (Prepare Inpaint)"
        )
    student, student_params = bench.lora("student")
    critic, critic_params = bench.lora("critic", bench.file.lora.critic_rank)

    def filler(canvas: Tensor, hole: Tensor) -> Denoiser:
        return Adapted(OnCanvas(net, canvas, hole), bench.bank, {"student": 1.0})

    objective = LazyInpaint(
        bench.teacher,
        filler,
        critic,
        bench.negative,
        student_params,
        critic_params,
        config,
        gan(bench, config, critic),
        net.patch,
    )
    return Made(
        objective=objective,
        student=student,
        sigmas=config.sigmas,
        gamma=None if config.trajectory else config.gamma,
        guidance=config.guidance,
        needs_latents=True,
        takes_pictures=True,
        filler=filler,
        settled=config.adapt,
    )


def ladd(bench: Bench) -> Made:
    config = bench.config()
    student, params = bench.lora("student")
    objective = LADD(student, params, bench.discriminator(bench.teacher), config, bench.file.train.steps)
    return Made(objective=objective, student=student, sigmas=config.sigmas, needs_latents=True, takes_pictures=True)


def diffusion2gan(bench: Bench) -> Made:
    config = bench.config()
    student, params = bench.lora("student")
    trunk, trunk_params = bench.lora("discriminator", bench.file.lora.critic_rank)
    side = bench.source.shape[1:]
    if min(side) < 8:
        raise ValueError(f"Diffusion2GAN judges at half size too, and latents are {side}; use a larger picture size")
    heads = [bench.discriminator(trunk) for _ in range(2)]  # full and half size
    noise = noise_input(bench.source.shape[0]).to(bench.source.device)
    objective = Diffusion2GAN(
        student, params, Perceptual(bench.reader(bench.teacher)), heads, trunk_params, noise, config
    )
    return Made(objective=objective, student=student, sigmas=config.sigmas, needs_latents=True)


def reflow(bench: Bench) -> Made:
    student, params = bench.lora("student")
    objective = RectifiedFlow(student, params, bench.config())
    return Made(objective=objective, student=student, sigmas=bench.sigmas, gamma=None, needs_latents=True, tuples=True)


def rectified_flow(bench: Bench) -> Made:
    """The base, fine-tuned on pictures: it keeps its steps and its guidance."""
    made = reflow(bench)
    return replace(made, takes_pictures=True, needs_pictures=True, cfg=bench.file.data.pair_guidance)


BUILDERS: dict[str, Callable[[Bench], Made]] = {
    "dmd2": dmd2,
    "dmd": lambda bench: dmd2(bench, DMD),
    "ladd": ladd,
    "diffusion2gan": diffusion2gan,
    "reflow": reflow,
    "lazy_inpaint": lazy_inpaint,
    "rectified_flow": rectified_flow,
}
