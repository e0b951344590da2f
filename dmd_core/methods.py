"""The methods, put together on one frozen network: which LoRA sets (or copies), heads and data each of them needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import Adapted, AdapterBank
from .conditioning import Cond
from .copies import copied, refuse_copies
from .denoiser import Denoiser
from .discriminators import Discriminator, FeatureReader
from .inpaint import Filler, OnCanvas
from .inpaint.partial import Partial
from .objectives.diffusion2gan import Diffusion2GAN, Perceptual, noise_input
from .objectives.dmd import DMD
from .objectives.dmd2 import DMD2
from .objectives.ladd import LADD
from .objectives.lazy_inpaint import LazyInpaint
from .objectives.lazy_ladd import LazyLADD
from .objectives.rectified_flow import RectifiedFlow
from .processes import ALONE, Processes
from .runfile import CONFIGS, RunFile
from .train import Objective

if TYPE_CHECKING:
    from .sources import Source


@dataclass(frozen=True, kw_only=True)
class Made:
    """An objective, and what the run around it has to know."""

    objective: Objective
    student: Denoiser
    sigmas: tuple[float, ...]  # that the student is sampled at, without the final 0
    gamma: float | None = 1.0  # stochasticity of its sampling; None: plain Euler
    guidance: float = 1.0  # of the teacher
    needs_latents: bool = False  # the teacher's noise-latent pairs
    takes_pictures: bool = False  # latents of the user's own pictures do as well
    needs_pictures: bool = False  # nothing else does
    cfg: float = 1.0  # that the student is sampled with
    tuples: bool = False  # batches are (x0, cond, eps)
    filler: Filler | None = None  # a student that fills holes in canvases
    copies: int = 0  # of the whole network, that learn
    settled: int = 0  # the update from which on all cost the same


class Learner(NamedTuple):
    """A player: its view of the network, what of it learns, and the network whose layers can be read."""

    view: Denoiser
    params: Mapping[str, nn.Parameter]
    net: nn.Module


@dataclass
class Bench:
    """What the methods are built from."""

    source: "Source"
    bank: AdapterBank
    file: RunFile
    pool: Cond
    negative: Cond
    rng: torch.Generator
    processes: Processes = ALONE
    copies: int = 0

    @property
    def teacher(self) -> Learner:
        """Who learns nothing."""
        return Learner(Adapted(self.source.denoiser, self.bank, {}), {}, self.source.net)

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

    def learner(self, name: str, rank: int = 0) -> Learner:
        """A LoRA set on the frozen network, or a copy of all of it."""
        if self.file.model.full:
            self.copies += 1
            return Learner(*copied(self.source, self.bank, self.file.model.checkpointing, self.processes))
        self.bank.new(name, rank or self.file.lora.rank, self.rng)
        view = Adapted(self.source.denoiser, self.bank, {name: 1.0})
        return Learner(view, self.bank.parameters(name), self.source.net)

    def reader(self, who: Learner) -> FeatureReader:
        names = [n for n, _ in who.net.named_modules()]
        return FeatureReader(who.view, who.net, self.source.family.feature_layers(names, self.file.method.features))

    def discriminator(self, who: Learner) -> Discriminator:
        x = torch.zeros((2, *self.source.shape), device=self.source.device)
        sigma = torch.full((2,), self.sigmas[0] / 2, device=self.source.device)
        cond = self.pool.take(torch.zeros(2, dtype=torch.long))
        return Discriminator.on(self.reader(who), x, sigma, cond, self.rng, self.file.method.head_width)


def build(
    file: RunFile, source: "Source", bank: AdapterBank, pool: Cond, negative: Cond, processes: Processes = ALONE
) -> Made:
    rng = torch.Generator().manual_seed(file.train.seed)
    if file.model.full:
        refuse_copies(file, source, processes)
    bench = Bench(source, bank, file, pool, negative, rng, processes)
    return replace(BUILDERS[file.method.name](bench), copies=bench.copies)


def dmd2(bench: Bench, cls: type[DMD2] = DMD2) -> Made:
    config = bench.config()
    student, critic = bench.learner("student"), bench.learner("critic", bench.file.lora.critic_rank)
    views = bench.teacher.view, student.view, critic.view
    discriminator = gan(bench, config, critic)
    objective = cls(*views, bench.negative, student.params, critic.params, config, discriminator)
    return Made(
        objective=objective,
        student=student.view,
        sigmas=config.sigmas,
        gamma=None if config.trajectory else config.gamma,
        guidance=config.guidance,
        needs_latents=cls is DMD or bool(config.gan_weight) or not config.backward_simulation,
        takes_pictures=cls is DMD2,
        settled=getattr(config, "warm_up", 0),
    )


def dmd(bench: Bench) -> Made:
    made = dmd2(bench, DMD)
    if bench.config().regression == "perceptual":
        assert isinstance(made.objective, DMD)
        made.objective.distance = Perceptual(bench.reader(bench.teacher))
    return made


def gan(bench: Bench, config: Any, critic: Learner) -> Discriminator | None:
    if not config.gan_weight:
        return None
    return bench.discriminator(critic if config.gan_features == "critic" else bench.teacher)


def fills(bench: Bench) -> tuple[Filler, Partial]:
    """The student on canvases with a hole, and the network in parts."""
    net = bench.source.partial
    if net is None:
        raise ValueError(
            "lazy inpainting computes some of a transformer's tokens, which this model cannot do here; train Flux, "
            "SD3, Qwen-Image or Z-Image in ComfyUI, or the embedded shapes. UNets are cropped instead (Prepare Inpaint)"
        )

    def filler(canvas: Tensor, hole: Tensor) -> Denoiser:
        return Adapted(OnCanvas(net, canvas, hole), bench.bank, {"student": 1.0})

    return filler, net


def lazy_inpaint(bench: Bench) -> Made:
    (filler, net), config = fills(bench), bench.config()
    student, critic = bench.learner("student"), bench.learner("critic", bench.file.lora.critic_rank)
    objective = LazyInpaint(
        bench.teacher.view,
        filler,
        critic.view,
        bench.negative,
        student.params,
        critic.params,
        config,
        gan(bench, config, critic),
        net.patch,
    )
    return Made(
        objective=objective,
        student=student.view,
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
    student, params, _ = bench.learner("student")
    objective = LADD(student, params, bench.discriminator(bench.teacher), config, bench.file.train.steps)
    return Made(objective=objective, student=student, sigmas=config.sigmas, needs_latents=True, takes_pictures=True)


def lazy_ladd(bench: Bench) -> Made:
    (filler, net), config, teacher = fills(bench), bench.config(), bench.teacher
    student, params, _ = bench.learner("student")
    heads, steps = bench.discriminator(teacher), bench.file.train.steps
    objective = LazyLADD(teacher.view, filler, bench.negative, params, heads, config, steps, net.patch, net.multiple)
    made = Made(objective=objective, student=student, sigmas=config.sigmas, needs_latents=True, takes_pictures=True)
    return replace(made, filler=filler, settled=config.adapt)


def diffusion2gan(bench: Bench) -> Made:
    config = bench.config()
    student, params, _ = bench.learner("student")
    trunk = bench.learner("discriminator", bench.file.lora.critic_rank)
    side = bench.source.shape[1:]
    if min(side) < 8:
        raise ValueError(f"Diffusion2GAN judges at half size too, and latents are {side}; use a larger picture size")
    heads = [bench.discriminator(trunk) for _ in range(2)]  # full and half size
    noise = noise_input(bench.source.shape[0]).to(bench.source.device)
    objective = Diffusion2GAN(
        student, params, Perceptual(bench.reader(bench.teacher)), heads, trunk.params, noise, config
    )
    return Made(objective=objective, student=student, sigmas=config.sigmas, needs_latents=True)


def reflow(bench: Bench) -> Made:
    student, params, _ = bench.learner("student")
    objective = RectifiedFlow(student, params, bench.config())
    return Made(objective=objective, student=student, sigmas=bench.sigmas, gamma=None, needs_latents=True, tuples=True)


def rectified_flow(bench: Bench) -> Made:
    """The base, fine-tuned on pictures: it keeps its steps and its guidance."""
    made = reflow(bench)
    return replace(made, takes_pictures=True, needs_pictures=True, cfg=bench.file.data.pair_guidance)


BUILDERS: dict[str, Callable[[Bench], Made]] = {
    "dmd2": dmd2,
    "dmd": dmd,
    "ladd": ladd,
    "diffusion2gan": diffusion2gan,
    "reflow": reflow,
    "lazy_inpaint": lazy_inpaint,
    "lazy_ladd": lazy_ladd,
    "rectified_flow": rectified_flow,
}
