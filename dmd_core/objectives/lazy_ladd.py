"""LADD on the hole: as lazy_inpaint.py, but the student plays against heads on features of the teacher at the hole.

Around the hole real and generated are the same, so their tokens would teach the heads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..denoiser import Denoiser
from ..discriminators import Discriminator
from ..inpaint.partial import Filler, places
from .holes import HoleConfig, Holes
from .ladd import LADD, LADDConfig


@dataclass(frozen=True, kw_only=True)
class LazyLADDConfig(LADDConfig, HoleConfig):
    pass


class InHole(Discriminator):
    """The same heads, heard at the tokens of the hole alone."""

    hole: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> list[Tensor]:
        tokens = self.hole.shape[1]
        # layers whose tokens are not the picture's alone (text, padding) are heard whole
        found = super().__call__(x, sigma, cond)
        return [d.take_along_dim(places(self.hole), 1) if d.shape[1] == tokens else d for d in found]


class LazyLADD(Holes, LADD):
    def __init__(
        self,
        teacher: Denoiser,
        filler: Filler,
        negative: Any,
        student_params: Mapping[str, nn.Parameter],
        discriminator: Discriminator,
        config: LazyLADDConfig,
        steps: int = 0,
        patch: int = 2,
    ):
        self.teach_holes(filler, config, patch)
        self.negative, self.judge = negative, InHole(discriminator.reader, discriminator.heads)
        # the student of a batch is made for its canvases; the teacher stands in for what all of them share
        super().__init__(teacher, student_params, self.judge, config, steps)
        if self.early:
            self.early += config.adapt  # the first updates of LADD come after those that only denoise

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        student, batch = self.drawn(batch, rng)
        if self.adapting:
            return self.adapt_terms(student, batch, rng, "native", 0.0)
        self.student, self.judge.hole = student, self.hole
        return super().terms(player, batch, rng)

    def made(self, latents: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
        return self.on_canvas(super().made(latents, batch, rng), batch)
