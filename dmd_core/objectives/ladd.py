"""LADD (Sauer et al. 2024): the student plays against heads on features of the frozen teacher; no score networks.

No official code exists; where the paper is silent this follows public re-implementations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import losses
from ..data import Batch
from ..denoiser import Denoiser
from ..discriminators import Discriminator, verdict
from ..processes import samples
from ..samplers import start
from ..schedule import Schedule, add_noise, expand
from ..train import Player
from .generation import check_sigmas, gaussian, noised, working_dtype

# A fifth of the run; from 500 steps on the cap. It is the shortest preset's length, so that a run which has done any
# preset and goes on with more steps does not fall back into the beginning; one that was shorter than 100 can.
EARLY_SHARE, EARLY_MOST = 0.2, 100


@dataclass(frozen=True, kw_only=True)
class LADDConfig:
    sigmas: tuple[float, ...]  # levels at which the student is called, falling, without the final 0
    shares: tuple[float, ...] = ()  # how often each level is trained; (): 0.7 for the first, the rest evenly
    early_shares: tuple[float, ...] = ()  # the same during the first `early_steps`; (): the cleaner half only
    early_steps: int = -1  # -1: a fifth of the run, at most EARLY_MOST
    noise_mean: float = 1.0  # discriminator's logit-normal times: higher judges structure, lower texture
    noise_std: float = 1.0
    loss: str = "hinge"  # hinge | softplus
    r1_weight: float = 0.0  # approximate R1 on real latents
    r1_amount: float = 0.1
    discriminator_updates: int = 1  # before every student update
    student_lr: float = 5e-6
    discriminator_lr: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    ema: float | None = 0.99
    student_accumulate: int = 1
    discriminator_accumulate: int = 1

    def __post_init__(self) -> None:
        for name, shares in (("shares", self.shares), ("early_shares", self.early_shares)):
            if shares and (len(shares) != len(self.sigmas) or min(shares) < 0 or sum(shares) <= 0):
                raise ValueError(
                    f"{name} are {shares} for {len(self.sigmas)} sigmas; give one number for each, none negative"
                )


class LADD:
    """Batches carry latents that the teacher made with guidance: that is how its guidance reaches the student."""

    def __init__(
        self,
        student: Denoiser,
        student_params: Mapping[str, nn.Parameter],
        discriminator: Discriminator,
        config: LADDConfig,
        steps: int = 0,
    ):
        """steps: of the whole run, for `early_steps` of -1."""
        check_sigmas(config.sigmas, student.schedule)
        self.student, self.discriminator, self.config = student, discriminator, config
        self.dtype, self.step = working_dtype(student_params), 0
        c = config
        self.early = min(int(EARLY_SHARE * steps), EARLY_MOST) if c.early_steps < 0 else c.early_steps
        self.players = {
            "discriminator": Player(
                discriminator.parameters,
                c.discriminator_lr,
                c.betas,
                c.weight_decay,
                None,
                c.discriminator_accumulate,
            ),
            "student": Player(student_params, c.student_lr, c.betas, c.weight_decay, c.ema, c.student_accumulate),
        }

    def turns(self, step: int) -> Sequence[str]:
        self.step = step  # the curriculum reads it
        return ("discriminator",) * self.config.discriminator_updates + ("student",)

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        latents = batch.clean("LADD").to(self.dtype)
        with torch.set_grad_enabled(player == "student"):
            x0 = self.made(latents, batch, rng)
        if player == "student":
            logits = self.discriminator(*self.judged(x0, rng), batch.cond)
            return {"gan": losses.gan_student(logits, self.config.loss)}
        return self.discriminator_terms(x0, latents, batch, rng)

    def made(self, latents: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
        """What the student makes, as the judges see it."""
        return self.student(*self.student_input(latents, rng), batch.cond)

    def discriminator_terms(self, x0: Tensor, latents: Tensor, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        c = self.config
        if samples(len(latents)) * c.discriminator_accumulate < 2:
            raise ValueError(
                "LADD's discriminator sees one sample per update, which saturates it within a few hundred updates; "
                "use a batch of 2 or more over all processes, or accumulate"
            )
        x, sigma = self.judged(latents, rng)
        real = self.discriminator(x, sigma, batch.cond)
        fake = self.discriminator(*self.judged(x0, rng), batch.cond)
        terms = {"gan": losses.gan_critic(real, fake, c.loss)}
        if c.r1_weight:
            penalty = losses.approximate_r1(lambda u: self.discriminator(u, sigma, batch.cond), x, rng, c.r1_amount)
            terms["r1"] = c.r1_weight * penalty
        return terms | verdict(real, fake)

    def student_input(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noised latents at levels drawn per sample; pure noise at the first, so that no signal leaks in."""
        schedule, levels = self.student.schedule, torch.tensor(self.config.sigmas).to(latents)
        k = torch.multinomial(self.shares().to(rng.device), len(latents), replacement=True, generator=rng)
        eps = gaussian(latents.shape, rng, self.dtype)
        pure = expand(k == 0, latents)
        return torch.where(pure, start(schedule, eps, levels[0]), add_noise(schedule, latents, eps, levels[k])), levels[
            k
        ]

    def shares(self) -> Tensor:
        c, n = self.config, len(self.config.sigmas)
        if self.step < self.early:
            return torch.tensor(c.early_shares or [float(i >= n // 2) for i in range(n)])
        return torch.tensor(c.shares or [0.7, *[0.3 / max(1, n - 1)] * (n - 1)])

    def judged(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the discriminator looks at: latents at its own noise levels."""
        schedule, c = self.student.schedule, self.config
        sigma = logit_normal(schedule, len(latents), rng, c.noise_mean, c.noise_std).to(latents)
        return noised(schedule, latents, sigma, rng), sigma


def logit_normal(schedule: Schedule, n: int, rng: torch.Generator, mean: float, std: float) -> Tensor:
    """Levels whose flow time b / (a + b) is logit-normal, for flow and VP models alike. [n]"""
    t = (torch.randn(n, generator=rng, device=rng.device) * std + mean).sigmoid().clamp(1e-3, 1 - 1e-3)
    # a = 1: b / (a + b) = t gives sigma = t / (1 - t); a = 1 - sigma: sigma = t
    ratio = t / (1 - t)
    a, _ = schedule.coeffs(torch.full_like(t, 0.5))
    return torch.where(a == 1, ratio, t).clamp_max(schedule.sigma_max)
