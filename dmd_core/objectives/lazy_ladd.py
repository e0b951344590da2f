"""LADD on the hole: as lazy_inpaint.py, but the student plays against heads on features of the teacher at the hole.

Around the hole real and generated are the same, so their tokens would teach the heads nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch
from ..denoiser import Denoiser
from ..discriminators import Discriminator, FeatureReader
from ..inpaint.partial import Filler, places
from .holes import HoleConfig, Holes
from .ladd import EARLY_MOST, LADD, LADDConfig


@dataclass(frozen=True, kw_only=True)
class LazyLADDConfig(LADDConfig, HoleConfig):
    pass


class InHole(Discriminator):
    """The same heads, which hear the tokens of the hole alone. multiple: as of inpaint.partial.Partial."""

    hole: Tensor

    def __init__(self, reader: FeatureReader, heads: nn.ModuleList, multiple: int = 1):
        super().__init__(reader, heads)
        self.multiple = multiple

    def heard(self, x: Tensor, sigma: Tensor, cond: Any) -> list[Tensor]:
        found = super().heard(x, sigma, cond)
        return [self.at_hole(f, name) for f, name in zip(found, self.reader.layers, strict=True)]

    def at_hole(self, feature: Tensor, name: str) -> Tensor:
        """Where one stream has both, as in Flux and Z-Image, text stands before the picture and padding behind it."""
        tokens = self.hole.shape[1]
        text = feature.shape[1] - math.ceil(tokens / self.multiple) * self.multiple
        if feature.ndim != 3 or text < 0:
            raise ValueError(
                f"the feature layer {name} gives {list(feature.shape)}, which does not hold the {tokens} tokens of the "
                "picture, of which LADD hears those of the hole; use lazy inpainting without LADD"
            )
        return feature.take_along_dim(text + places(self.hole)[..., None], 1)


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
        multiple: int = 1,
    ):
        self.teach_holes(filler, config, patch)
        self.negative, self.judge = negative, InHole(discriminator.reader, discriminator.heads, multiple)
        # the student of a batch is made for its canvases; the teacher stands in for what all of them share
        super().__init__(teacher, student_params, self.judge, config, steps)
        if self.early:  # the first updates of LADD come after those that only denoise
            late = self.early + config.adapt
            self.early = late if config.early_steps >= 0 else min(late, EARLY_MOST)

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        student, batch = self.drawn(batch, rng)
        if self.adapting:
            return self.adapt_terms(student, batch, rng, "native", 0.0)
        self.student, self.judge.hole = student, self.hole
        return super().terms(player, batch, rng)

    def made(self, latents: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
        return self.on_canvas(super().made(latents, batch, rng), batch)
