"""What lazy students share, whoever judges them: holes, prompts that get lost, first updates that only denoise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..conditioning import Cond
from ..data import Batch
from ..denoiser import Denoiser
from ..inpaint.partial import Filler, cells, grid, inside
from ..inpaint.strokes import MaskConfig, draw_holes
from ..processes import together
from .generation import SIGMA_FLOOR, denoising_weight, noise_levels, noised


@dataclass(frozen=True, kw_only=True)
class HoleConfig:
    adapt: int = 50  # first updates: plain denoising of the hole, to learn to read clean context
    text_dropout: float = 0.1  # share of samples without prompt, where the context has to say it all
    smallest: float = 0.01  # hole, as a share of the picture
    largest: float = 0.6
    whole: float = 0.12  # share of batches that are all hole: plain text-to-image, kept alive

    @property
    def masks(self) -> MaskConfig:
        shaped = MaskConfig()
        kinds = shaped.strokes + shaped.boxes + shaped.blobs + shaped.outpaint + shaped.crops
        return MaskConfig(least=self.smallest, most=self.largest, all=kinds * self.whole / (1 - self.whole))


class Holes:
    """To be mixed into an objective; batches need latents. filler(canvas, hole) is the student there, see OnCanvas."""

    negative: Any
    dtype: torch.dtype
    hole: Tensor

    def teach_holes(self, filler: Filler, config: HoleConfig, patch: int) -> None:
        check_holes(config)
        self.filler, self.lazy, self.patch = filler, config, patch
        self.adapting = config.adapt > 0

    def turns(self, step: int) -> Sequence[str]:
        self.adapting = step < self.lazy.adapt
        return ("student",) if self.adapting else super().turns(step)  # type: ignore[misc]

    def drawn(self, batch: Batch, rng: torch.Generator) -> tuple[Denoiser, Batch]:
        """The student on this batch's canvases, whose hole it sets, and the batch as it is told."""
        canvas = batch.clean("lazy inpainting").to(self.dtype)
        self.hole, student = self.task(batch, canvas, rng)
        return student, Batch(self.spoken(batch.cond, rng), batch.shape, canvas)

    def task(self, batch: Batch, canvas: Tensor, rng: torch.Generator) -> tuple[Tensor, Denoiser]:
        """A hole, and the student on canvases that have it. The hole is drawn on the CPU, wherever the run is."""
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        rows, columns = grid(canvas, self.patch)
        own = torch.Generator().manual_seed(seed)
        # of one size over all processes, as in a batch
        hole = together(lambda n: draw_holes(n, rows, columns, own, self.lazy.masks), len(canvas)).to(canvas.device)
        return hole, self.filler(canvas, hole)

    def spoken(self, cond: Any, rng: torch.Generator) -> Any:
        """Some samples lose their prompt, where the negative can stand for it."""
        negative = self.negative
        if not self.lazy.text_dropout or not isinstance(cond, Cond) or not isinstance(negative, Cond):
            return cond
        alike = set(cond.extras) == set(negative.extras) and (cond.pooled is None) == (negative.pooled is None)
        return cond.dropout(negative, self.lazy.text_dropout, rng) if alike else cond

    def cut(self, x: Tensor) -> Tensor:
        return inside(x, self.hole, self.patch)

    def on_canvas(self, x0: Tensor, batch: Batch) -> Tensor:
        """The judges see the canvas as it is, whatever the student was shown."""
        return torch.where(cells(self.hole, x0, self.patch), x0, batch.clean("lazy inpainting"))

    def adapt_terms(self, student: Denoiser, batch: Batch, rng: torch.Generator, kind: str, shift: float) -> Any:
        """Denoising of the canvas's own content in the hole, at every level."""
        canvas = batch.clean("lazy inpainting")
        sigma = noise_levels(student.schedule, len(canvas), rng, 0.0, 1.0, shift).to(canvas).clamp_min(SIGMA_FLOOR)
        x0 = student(noised(student.schedule, canvas, sigma, rng), sigma, batch.cond)
        return {"adapt": losses.denoising(self.cut(x0), self.cut(canvas), denoising_weight(kind, sigma))}


def check_holes(c: HoleConfig) -> None:
    if not 0 <= c.text_dropout <= 1 or not 0 <= c.whole < 1:
        raise ValueError(
            f"text_dropout is {c.text_dropout} and whole {c.whole}; both are shares, from 0 to 1 (whole below 1)"
        )
    if c.adapt < 0:
        raise ValueError(f"adapt is {c.adapt}; give the number of first updates that only denoise, 0 for none")
    if not 0 < c.smallest < c.largest <= 1:
        raise ValueError(
            f"holes from {c.smallest} to {c.largest} of the picture were asked for; they must rise and lie in 0 to 1"
        )
