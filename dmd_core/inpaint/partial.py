"""Trained lazy inpainting: one clean pass over the context, its keys and values for every step, only the hole computed.

The context is given at noise level 0 and never sees the hole, so it is computed once; the hole sees all of it from the
first step on, when a noised context would show nothing. Networks have to learn this: see objectives/lazy_inpaint.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..denoiser import Denoiser
from ..schedule import Schedule


class Partial(Protocol):
    """A transformer of which some image tokens can be computed alone."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def patch(self) -> int:
        """Latent cells per token, in rows and in columns."""

    @property
    def multiple(self) -> int:
        """A picture's tokens come in multiples of it; what is missing is padding behind them."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any, rows: Tensor, context: Any = None) -> tuple[Tensor, Any]:
        """x0, right at the tokens rows [b n] alone, and their keys and values, which a later call takes as context."""


Filler = Callable[[Tensor, Tensor], Denoiser]  # (canvas, hole) -> the denoiser of this batch


@dataclass
class OnCanvas:
    """A denoiser that fills the hole of a canvas; elsewhere its x0 is the canvas.

    canvas: clean latents [b c h w]; hole: tokens, bool [b n], as many in every sample.
    """

    net: Partial
    canvas: Tensor
    hole: Tensor
    _context: dict[tuple[int, bool], tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        places(self.hole)  # refuses holes of different sizes before anything is computed
        self.hole = self.hole.to(self.canvas.device)

    @property
    def schedule(self) -> Schedule:
        return self.net.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        x0, _ = self.net(x, sigma, cond, places(self.hole), self.context(cond))
        return torch.where(cells(self.hole, x, self.net.patch), x0, self.canvas.to(x0))

    def context(self, cond: Any) -> Any:
        """The same for all steps; made again where a gradient is wanted after steps without one."""
        if self.hole.all():
            return None
        key = (id(cond), torch.is_grad_enabled())
        if key not in self._context:
            clean = torch.zeros(len(self.canvas), device=self.canvas.device)
            _, kept = self.net(self.canvas, clean, cond, places(~self.hole))
            self._context[key] = (cond, kept)  # cond is kept too, or its id could be given to another
        return self._context[key][1]


def places(chosen: Tensor) -> Tensor:
    """bool [b n], as many in every row -> their indices [b k]."""
    counts = chosen.sum(1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"the holes have {counts.tolist()} tokens; one batch takes as many in every sample (see draw_holes)"
        )
    return chosen.nonzero()[:, 1].reshape(len(chosen), -1)


def grid(x: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of tokens; a cut patch is a whole token."""
    return -(-x.shape[-2] // patch), -(-x.shape[-1] // patch)


def cells(hole: Tensor, x: Tensor, patch: int) -> Tensor:
    """Tokens [b n] -> latent cells, bool [b 1 ... h w] for x."""
    rows, columns = grid(x, patch)
    mask = rearrange(hole, "b (h w) -> b h w", h=rows, w=columns)
    mask = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, : x.shape[-2], : x.shape[-1]]
    return mask.reshape(len(mask), *(1 for _ in range(x.ndim - 3)), *mask.shape[1:])


def inside(x: Tensor, hole: Tensor, patch: int) -> Tensor:
    """Only what lies in the hole, [b k]: losses of it are those of the hole alone. Its tokens must be whole."""
    mask = cells(hole, x, patch).expand_as(x)
    return x[mask].reshape(len(x), -1)
