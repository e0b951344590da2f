"""DMD2 (Yin et al. 2024): match the student's distribution to the teacher's; a critic learns the student's score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..conditioning import fit
from ..data import Batch
from ..denoiser import Denoiser
from ..discriminators import Discriminator, verdict
from ..samplers import renoise
from ..train import Player
from .generation import (
    SIGMA_FLOOR,
    Probe,
    check_sigmas,
    noise_levels,
    noised,
    probe,
    probe_above,
    student_input,
    working_dtype,
)

# f-distill (Xu et al. 2025): the matching gradient times h(r), r = p_teacher / p_student as the discriminator sees it
DIVERGENCES = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "hellinger": torch.sqrt,
}


@dataclass(frozen=True, kw_only=True)
class DMD2Config:
    sigmas: tuple[float, ...]  # levels at which the student is called, falling, without the final 0
    guidance: float = 4.0  # teacher's CFG as in KSampler; 1: no unconditional pass
    critic_updates: int = 5  # before every student update
    backward_simulation: bool = True  # False: noised latents of the batch
    gamma: float = 1.0  # stochasticity of the student's own re-noising, as in sample_restart
    low: float = 0.02  # matching times, as fractions of the schedule
    high: float = 0.98
    shift: float = 0.0  # of the matching and critic times of flow models; 0: the schedule's own
    floor: float = 0.05  # of the per-sample normaliser
    critic_weight: str = "native"  # native | v | edm | min_snr | x0
    student_lr: float = 2e-5
    critic_lr: float = 2e-5
    student_betas: tuple[float, float] = (0.9, 0.999)
    critic_betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.0
    ema: float | None = 0.99
    student_accumulate: int = 1
    critic_accumulate: int = 1
    # GAN: needs a discriminator and latents in the batches
    gan_weight: float = 0.0  # in the student's loss; 0: no GAN at all. Published: 5e-3 SDXL, 1e-3 SD1.5
    gan_critic_weight: float = 1e-2
    gan_loss: str = "softplus"  # softplus | hinge
    gan_features: str = "teacher"  # teacher (frozen) | critic (published: its backbone learns from the GAN too)
    r1_weight: float = 0.0  # approximate R1 on real latents
    # research options, off by default
    guidance_weight: float = 1.0  # of the teacher's guidance part (decoupled DMD)
    matching_weight: float = 1.0  # of the part that matches the unguided teacher
    synchronise: float = 0.0  # share of the student in the critic's weights after each student update; 0.03 is usual
    divergence: str = "rkl"  # rkl | kl | js | softened_rkl | hellinger; all but rkl need the GAN
    one_sample: bool = False  # the updates of a step share one generated sample: a quarter fewer passes at 4 steps
    trajectory: bool = False  # deterministic student, matched segment by segment (TDM): sample it with Euler


@dataclass(frozen=True)
class Sample:
    """What the student was given and what it made of it."""

    batch: Batch
    x: Tensor
    k: int  # of its level
    x0: Tensor


class DMD2:
    """Batches are `Batch`; prompts alone suffice without a GAN.

    One step is `critic_updates` critic updates, then one student update. The published code counts differently: it
    updates the critic in every iteration and the student in every fifth, on the same sample; per student update both
    make five critic updates, so 19k published iterations are 3.8k steps here.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        critic: Denoiser,
        negative: Any,
        student_params: Mapping[str, nn.Parameter],
        critic_params: Mapping[str, nn.Parameter],
        config: DMD2Config,
        discriminator: Discriminator | None = None,
    ):
        check_sigmas(config.sigmas, student.schedule)
        check_options(config, negative, discriminator, student_params, critic_params)
        self.teacher, self.student, self.critic, self.negative = teacher, student, critic, negative
        self.config, self.dtype = config, working_dtype(student_params)
        self.sample: Sample | None = None
        self.discriminator = discriminator if config.gan_weight else None
        # the heads learn with the critic, as published: with features of the critic, its backbone learns from both
        heads = {f"head.{k}": p for k, p in self.discriminator.parameters.items()} if self.discriminator else {}
        learning = {**critic_params, **heads}
        c = config
        self.players = {
            "critic": Player(learning, c.critic_lr, c.critic_betas, c.weight_decay, None, c.critic_accumulate),
            "student": Player(
                student_params, c.student_lr, c.student_betas, c.weight_decay, c.ema, c.student_accumulate
            ),
        }

    def turns(self, step: int) -> Sequence[str]:
        self.sample = None
        return ("critic",) * self.config.critic_updates + ("student",)

    def updated(self, player: str) -> None:
        """After a student update the critic may take a share of it (SenseFlow's implicit alignment)."""
        if player == "student" and self.config.synchronise:
            with torch.no_grad():
                for key, p in self.players["student"].params.items():
                    self.players["critic"].params[key].lerp_(p, self.config.synchronise)

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        learns, s = player == "student", self.sample
        if s is None or learns:
            with torch.set_grad_enabled(learns):
                x, k = (s.x, s.k) if s else self.input(batch, rng)
                batch = s.batch if s else batch
                s = Sample(batch, x, k, self.student(x, self.level(k, x), batch.cond))
        self.sample = s if self.config.one_sample and not learns else None
        return (self.student_terms if learns else self.critic_terms)(s.x0, s.batch, rng, s.x, s.k)

    def input(self, batch: Batch, rng: torch.Generator) -> tuple[Tensor, int]:
        c = self.config
        gamma = 0.0 if c.trajectory else c.gamma
        return student_input(self.student, c.sigmas, batch, rng, self.dtype, c.backward_simulation, gamma)

    def level(self, k: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.config.sigmas[k], dtype=x.dtype, device=x.device)

    def critic_terms(
        self, x0: Tensor, batch: Batch, rng: torch.Generator, x: Tensor | None = None, k: int = 0
    ) -> dict[str, Tensor]:
        """x0: generated latents, no gradient; x, k: where the student made them from."""
        at = self.probe(x0, rng, 0.0, 1.0, x, k)
        terms = {"denoise": losses.denoising(self.critic(at.x, at.sigma, batch.cond), at.target, at.weight)}
        return terms | self.gan_critic_terms(x0, batch, rng) if self.discriminator else terms

    def student_terms(
        self, x0: Tensor, batch: Batch, rng: torch.Generator, x: Tensor | None = None, k: int = 0
    ) -> dict[str, Tensor]:
        c = self.config
        with torch.no_grad():
            at = self.probe(x0, rng, c.low, c.high, x, k)
            real, fake = self.scores(at, batch.cond)
        terms = {"dmd": losses.distribution_matching(x0, real, fake, c.floor)}
        if self.discriminator is not None:
            logits = self.discriminator(*self.gan_state(x0, rng), batch.cond)
            terms["gan"] = c.gan_weight * losses.gan_student(logits, c.gan_loss)
        return terms

    def probe(self, x0: Tensor, rng: torch.Generator, low: float, high: float, x: Tensor | None, k: int) -> Probe:
        schedule, c = self.teacher.schedule, self.config
        if not c.trajectory or x is None:
            sigma = noise_levels(schedule, len(x0), rng, low, high, c.shift).to(x0).clamp_min(SIGMA_FLOOR)
            return probe(schedule, x0, sigma, rng, c.critic_weight)
        ends = torch.tensor([*c.sigmas[k : k + 2], 0.0][:2]).to(x0)
        after = renoise(schedule, x, x0, ends[0], ends[1], None, 0.0) if ends[1] > 0 else x0
        return probe_above(schedule, after, float(ends[1]), float(ends[0]), rng, c.critic_weight)

    def scores(self, at: Probe, cond: Any) -> tuple[Tensor, Tensor]:
        """Teacher's guided x0 and the critic's, whose difference is the gradient; guidance 1 costs one teacher pass."""
        c = self.config
        positive = self.teacher(at.x, at.sigma, cond)
        pull = torch.zeros_like(positive)
        if c.guidance != 1:
            pull = (c.guidance - 1) * (positive - self.teacher(at.x, at.sigma, fit(self.negative, len(at.x))))
        real, fake = positive + pull, self.critic(at.x, at.sigma, cond)
        if (c.guidance_weight, c.matching_weight, c.divergence) == (1, 1, "rkl"):
            return real, fake
        direction = c.matching_weight * (fake - positive) - c.guidance_weight * pull
        if self.discriminator is not None and c.divergence != "rkl":
            direction = direction * self.density_weight(at, cond)
        return real, real + direction

    def density_weight(self, at: Probe, cond: Any) -> Tensor:
        """h(r) per sample, of mean 1 over the batch (so it takes a batch of more than one). [b 1 ...]"""
        assert self.discriminator is not None
        logit = torch.stack([d.mean(1) for d in self.discriminator(at.x, at.sigma, cond)]).mean(0)
        h = DIVERGENCES[self.config.divergence](logit.clamp(-5, 5).exp())
        return (h / h.mean()).reshape(-1, *(1,) * (at.x.ndim - 1))

    def gan_state(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        schedule = self.teacher.schedule
        sigma = noise_levels(schedule, len(latents), rng, 0.0, 1.0, self.config.shift).to(latents)
        sigma = sigma.clamp_min(SIGMA_FLOOR)
        return noised(schedule, latents, sigma, rng), sigma

    def gan_critic_terms(self, x0: Tensor, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        assert self.discriminator is not None
        c, discriminator = self.config, self.discriminator
        latents, sigma = self.gan_state(batch.clean("the GAN of DMD2").to(x0), rng)
        real = discriminator(latents, sigma, batch.cond)
        fake = discriminator(*self.gan_state(x0, rng), batch.cond)
        terms = {"gan": c.gan_critic_weight * losses.gan_critic(real, fake, c.gan_loss)}
        if c.r1_weight:
            penalty = losses.approximate_r1(lambda u: discriminator(u, sigma, batch.cond), latents, rng)
            terms["r1"] = c.gan_critic_weight * c.r1_weight * penalty
        return terms | verdict(real, fake)


def check_options(
    c: DMD2Config,
    negative: Any,
    discriminator: Discriminator | None,
    student: Mapping[str, nn.Parameter],
    critic: Mapping[str, nn.Parameter],
) -> None:
    if c.guidance != 1 and negative is None:
        raise ValueError(f"guidance {c.guidance} needs a negative (empty-prompt) conditioning; give one, or guidance 1")
    if c.critic_updates < 1:
        raise ValueError(f"critic_updates is {c.critic_updates}; the matching gradient needs a critic, give 1 to 10")
    if c.gan_weight and discriminator is None:
        raise ValueError(f"gan_weight {c.gan_weight} needs a discriminator; give one, or gan_weight 0")
    if c.divergence not in DIVERGENCES:
        raise ValueError(f"divergence {c.divergence!r} is not known; use one of {', '.join(map(repr, DIVERGENCES))}")
    if c.divergence != "rkl" and not c.gan_weight:
        raise ValueError(f"divergence {c.divergence!r} reads a discriminator; turn the GAN on, or use 'rkl'")
    if c.gan_features not in ("teacher", "critic"):
        raise ValueError(f"gan_features is {c.gan_features!r}; use 'teacher' or 'critic'")
    if c.one_sample and max(c.student_accumulate, c.critic_accumulate) > 1:
        raise ValueError("one_sample leaves nothing new to accumulate; turn it off, or accumulate 1 batch")
    if c.trajectory and not c.backward_simulation:
        raise ValueError("a trajectory student walks its own path; turn backward_simulation on")
    shapes = [{k: p.shape for k, p in params.items()} for params in (student, critic)]
    if c.synchronise and shapes[0] != shapes[1]:
        raise ValueError("synchronise mixes the student into the critic; give both LoRA sets the same layers and rank")
