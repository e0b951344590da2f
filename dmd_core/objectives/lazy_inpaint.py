"""A few-step student that fills holes lazily: the context is one clean pass, only the hole is computed and learned.

DMD2 on the hole. The student sees the context at noise level 0 from its first step on (inpaint/partial.py). Teacher and
critic judge whole pictures, the known part under the same noise as the hole; their difference counts in the hole alone.
Nothing is learned outside, so no loss for the known part is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..data import Batch
from ..denoiser import Denoiser
from ..discriminators import Discriminator
from ..inpaint.partial import Filler
from .dmd2 import DMD2, DMD2Config
from .generation import student_input
from .holes import HoleConfig, Holes


@dataclass(frozen=True, kw_only=True)
class LazyInpaintConfig(DMD2Config, HoleConfig):
    pass


class LazyInpaint(Holes, DMD2):
    def __init__(
        self,
        teacher: Denoiser,
        filler: Filler,
        critic: Denoiser,
        negative: Any,
        student_params: Mapping[str, nn.Parameter],
        critic_params: Mapping[str, nn.Parameter],
        config: LazyInpaintConfig,
        discriminator: Discriminator | None = None,
        patch: int = 2,
    ):
        if config.one_sample:
            raise ValueError(
                "one_sample is not for lazy inpainting, where every update draws its own holes; turn it off"
            )
        self.teach_holes(filler, config, patch)
        # the student of a batch is made for its canvases; the teacher stands in for what all of them share
        super().__init__(teacher, teacher, critic, negative, student_params, critic_params, config, discriminator)

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        c = self.config
        student, batch = self.drawn(batch, rng)
        if self.adapting:
            return self.adapt_terms(student, batch, rng, c.critic_weight, c.shift)
        with torch.set_grad_enabled(player == "student"):
            gamma = 0.0 if c.trajectory else c.gamma
            x, k = student_input(student, c.sigmas, batch, rng, self.dtype, c.backward_simulation, gamma)
            x0 = self.on_canvas(student(x, self.level(k, x), batch.cond), batch)
        return (self.critic_terms if player == "critic" else self.student_terms)(x0, batch, rng, x, k)

    def critic_terms(
        self, x0: Tensor, batch: Batch, rng: torch.Generator, x: Tensor | None = None, k: int = 0
    ) -> dict[str, Tensor]:
        at = self.probe(x0, rng, 0.0, 1.0, x, k)
        found = self.critic(at.x, at.sigma, batch.cond)
        terms = {"denoise": losses.denoising(self.cut(found), self.cut(at.target), at.weight)}
        return terms | self.gan_critic_terms(x0, batch, rng) if self.discriminator else terms

    def student_terms(
        self, x0: Tensor, batch: Batch, rng: torch.Generator, x: Tensor | None = None, k: int = 0
    ) -> dict[str, Tensor]:
        c = self.config
        with torch.no_grad():
            at = self.probe(x0, rng, c.low, c.high, x, k)
            real, fake = self.scores(at, batch.cond)
        found, real, fake = self.cut(x0), self.cut(real), self.cut(fake)
        terms = {"dmd": losses.distribution_matching(found, real, fake, c.floor)}
        if self.discriminator is not None:
            logits = self.discriminator(*self.gan_state(x0, rng), batch.cond)
            terms["gan"] = c.gan_weight * losses.gan_student(logits, c.gan_loss)
        return terms
