"""DMD2 (Yin et al. 2024): match the student's distribution to the teacher's; a critic learns the student's score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..data import Batch
from ..denoiser import Denoiser
from ..train import Player
from .generation import (
    check_sigmas,
    denoising_weight,
    fit,
    noise_levels,
    noised,
    student_input,
    working_dtype,
)


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


class DMD2:
    """Batches are `Batch`; prompts alone suffice.

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
    ):
        check_sigmas(config.sigmas, student.schedule)
        if config.guidance != 1 and negative is None:
            raise ValueError(
                f"guidance {config.guidance} needs a negative (empty-prompt) conditioning; give one, or guidance 1"
            )
        self.teacher, self.student, self.critic, self.negative = teacher, student, critic, negative
        self.config, self.dtype = config, working_dtype(student_params)
        c = config
        self.players = {
            "critic": Player(critic_params, c.critic_lr, c.critic_betas, c.weight_decay, None, c.critic_accumulate),
            "student": Player(
                student_params, c.student_lr, c.student_betas, c.weight_decay, c.ema, c.student_accumulate
            ),
        }

    def turns(self, step: int) -> Sequence[str]:
        return ("critic",) * self.config.critic_updates + ("student",)

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        with torch.set_grad_enabled(player == "student"):
            x0 = self.generate(batch, rng)
        return self.critic_terms(x0, batch, rng) if player == "critic" else self.student_terms(x0, batch, rng)

    def generate(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """The student's clean latents, from a state that it meets when it samples."""
        c = self.config
        x, k = student_input(self.student, c.sigmas, batch, rng, self.dtype, c.backward_simulation, c.gamma)
        return self.student(x, torch.full((len(x),), c.sigmas[k]).to(x), batch.cond)

    def critic_terms(self, x0: Tensor, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        schedule, c = self.critic.schedule, self.config
        sigma = noise_levels(schedule, len(x0), rng, 0.0, 1.0, c.shift).to(x0).clamp_min(1e-3)
        pred = self.critic(noised(schedule, x0, sigma, rng), sigma, batch.cond)
        return {"denoise": losses.denoising(pred, x0, denoising_weight(c.critic_weight, sigma))}

    def student_terms(self, x0: Tensor, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        schedule, c = self.teacher.schedule, self.config
        with torch.no_grad():
            sigma = noise_levels(schedule, len(x0), rng, c.low, c.high, c.shift).to(x0)
            x = noised(schedule, x0, sigma, rng)
            real, fake = self.real_score(x, sigma, batch.cond), self.critic(x, sigma, batch.cond)
        return {"dmd": losses.distribution_matching(x0, real, fake, c.floor)}

    def real_score(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The teacher's guided x0; guidance 1 costs one pass, not two."""
        positive = self.teacher(x, sigma, cond)
        if self.config.guidance == 1:
            return positive
        negative = self.teacher(x, sigma, fit(self.negative, len(x)))
        return negative + self.config.guidance * (positive - negative)
