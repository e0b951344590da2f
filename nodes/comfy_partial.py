"""A part of a MODEL's image tokens at a time, with gradients: what the lazy student is trained through.

The same hooks as the lazy patch (lazy_blocks.py), so training and inference compute one function.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dmd_core.schedule import Schedule
from .comfy_denoiser import ComfyDenoiser
from .lazy_blocks import NotLazy, Pass, patch_of, sites_of

Rows = dict[Any, tuple[Tensor, Tensor]]  # attention call -> keys, values


@dataclass(frozen=True)
class NativePartial:
    denoiser: ComfyDenoiser

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def patch(self) -> int:
        return patch_of(self.denoiser.net)[-1]

    @property
    def multiple(self) -> int:
        return getattr(self.denoiser.net, "pad_tokens_multiple", None) or 1  # Z-Image: 32

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Any, rows: Tensor, context: list[Rows] | None = None
    ) -> tuple[Tensor, list[Rows]]:
        kept: list[Rows] = []
        height, width = (-(-side // self.patch) for side in x.shape[-2:])

        def ask(x: Tensor, sigma: Tensor, prepared: Any, index: list[int]) -> Tensor:
            given = None if context is None else context[len(kept)]
            kept.append({})
            step = part(rows[index], height * width, given, kept[-1])
            return self.denoiser.x0(x, sigma, prepared, step)

        return self.denoiser.each(x, sigma, cond, ask), kept


def part(rows: Tensor, tokens: int, given: Rows | None, kept: Rows) -> Pass:
    def plan(total: int, device: torch.device) -> Tensor:
        # what the network pads the picture with (Z-Image) belongs to the context
        padding = torch.arange(tokens, total if given is None else tokens)
        return torch.cat([rows.to(device), padding.expand(len(rows), -1).to(device)], 1)

    def keep(slot: Any, k: Tensor, v: Tensor) -> None:
        kept[slot] = (k, v)

    return Pass(plan, lambda slot: None if given is None else given[slot], keep)


def partial_of(denoiser: ComfyDenoiser) -> NativePartial | None:
    """None where a network cannot be computed in parts."""
    try:
        sites_of(denoiser.net)
    except NotLazy:
        return None
    return NativePartial(denoiser)
