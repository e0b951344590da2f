"""Rectified flow: SD3's training objective, and reflow when the batches are noise-image pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..denoiser import Denoiser
from ..schedule import Flow, add_noise
from ..train import Player

SIGMA_FLOOR = 1e-3  # logit-normal times stay above it, so the weight below is SD3's to rounding


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowConfig:
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema: float | None = 0.999
    accumulate: int = 1
    logit_mean: float = 0.0  # SD3's best of 61 formulations: 0 and 1
    logit_std: float = 1.0


class RectifiedFlow:
    """Batches are (x0, cond), or (x0, cond, eps) for reflow: then the pair's own noise is kept."""

    def __init__(self, student: Denoiser, params: Mapping[str, nn.Parameter], config: RectifiedFlowConfig):
        self.student, self.config = student, config
        self.players = {
            "student": Player(params, config.lr, config.betas, config.weight_decay, config.ema, config.accumulate)
        }

    def turns(self, step: int) -> Sequence[str]:
        return ("student",)

    def terms(self, player: str, batch: Any, rng: torch.Generator) -> dict[str, Tensor]:
        x0, cond, *pair = batch
        schedule = self.student.schedule
        if isinstance(schedule, Flow):
            sigma = schedule.logit_normal(len(x0), rng, self.config.logit_mean, self.config.logit_std).to(x0)
        else:
            sigma = schedule.sample(len(x0), rng).to(x0)
        eps = pair[0] if pair else torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        pred = self.student(add_noise(schedule, x0, eps, sigma), sigma, cond)
        # |v - (eps - x0)|^2 = |x0_hat - x0|^2 / sigma^2, for eps models likewise |eps_hat - eps|^2
        return {"flow": losses.denoising(pred, x0, 1 / sigma.clamp_min(SIGMA_FLOOR) ** 2)}
