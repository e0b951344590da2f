"""DMD (Yin et al. 2023), the first version: the matching gradient beside a regression on the teacher's own pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..data import Batch
from ..samplers import start
from .dmd2 import DMD2, DMD2Config

# distance(generated, target, batch, rng)
Distance = Callable[[Tensor, Tensor, Batch, torch.Generator], Tensor]


def mean_square(generated: Tensor, target: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
    return losses.denoising(generated, target)


@dataclass(frozen=True, kw_only=True)
class DMDConfig(DMD2Config):
    critic_updates: int = 1  # the regression keeps the student in place: one time scale suffices
    regression_weight: float = 0.25
    regression: str = "mse"  # mse | perceptual (on the frozen teacher's features; the paper's is LPIPS of pictures)
    warm_up: int = 0  # first updates, of the student alone, on the regression alone (DMD2's one-step SDXL recipe)

    def __post_init__(self) -> None:
        if self.warm_up < 0 or (self.warm_up and not self.regression_weight):
            raise ValueError(
                f"warm_up is {self.warm_up} with regression_weight {self.regression_weight:g}; give updates and a "
                "weight above 0, or warm_up 0"
            )
        if self.regression not in ("mse", "perceptual"):
            raise ValueError(f"regression is {self.regression!r}; use 'mse' or 'perceptual'")


class DMD(DMD2):
    """One step, no GAN. Batches carry the teacher's noise-latent pairs; the matching gradient takes fresh noise.

    `distance` compares the student's latents with the pair's. The paper decodes both and uses LPIPS, a network of its
    own; for `regression` perceptual give `Perceptual` (diffusion2gan.py), a metric on the teacher's own features.
    """

    def __init__(self, *args: object, distance: Distance = mean_square, **named: object):
        super().__init__(*args, **named)  # type: ignore[arg-type]
        if len(self.config.sigmas) != 1:
            count = len(self.config.sigmas)
            raise ValueError(f"DMD is a one-step method, and {count} student sigmas were given; give one, or use DMD2")
        self.distance, self.warming = distance, False

    def turns(self, step: int) -> Sequence[str]:
        assert isinstance(self.config, DMDConfig)
        turns = super().turns(step)
        self.warming = step < self.config.warm_up
        return ("student",) if self.warming else turns

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        return self.regression(batch, rng) if self.warming else super().terms(player, batch, rng)

    def student_terms(
        self, x0: Tensor, batch: Batch, rng: torch.Generator, x: Tensor | None = None, k: int = 0
    ) -> dict[str, Tensor]:
        matching = self.config.matching_weight or self.config.guidance_weight
        terms = super().student_terms(x0, batch, rng, x, k) if matching else {}
        return terms | self.regression(batch, rng)

    def regression(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        assert isinstance(self.config, DMDConfig)
        noise, latents = (v.to(self.dtype) for v in batch.pair("DMD's regression"))
        x = start(self.student.schedule, noise, self.config.sigmas[0])
        made = self.student(x, self.level(0, x), batch.cond)
        return {"regression": self.config.regression_weight * self.distance(made, latents, batch, rng)}
