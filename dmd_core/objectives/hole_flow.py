"""Rectified flow of the hole alone: encoder and decoder of LazyDiffusion learn together."""

from typing import Any

import torch
from torch import Tensor

from ..inpaint.lazydiffusion import LazyDiffusion, kept, patches
from .rectified_flow import RectifiedFlow, RectifiedFlowConfig


class HoleFlow(RectifiedFlow):
    """Batches are (canvas [b c h w], mask [b h w], cond), the holes of a batch all of one size.

    A fourth is what the hole shall hold, where the canvas was encoded with something else in it.
    """

    def __init__(self, model: LazyDiffusion, config: RectifiedFlowConfig):
        super().__init__(model.denoiser(), dict(model.named_parameters()), config)
        self.model = model

    def terms(self, player: str, batch: Any, rng: torch.Generator) -> dict[str, Tensor]:
        canvas, mask, cond, *whole = batch
        x0 = kept(patches(whole[0] if whole else canvas), mask)
        return super().terms(player, (x0, self.model.read(canvas, mask, cond)), rng)
