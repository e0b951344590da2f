"""A few-step student that fills holes lazily: the context is one clean pass, only the hole is computed and learned.

DMD2 on the hole. The student sees the context at noise level 0 from its first step on (inpaint/partial.py). Teacher and
critic judge whole pictures, the known part under the same noise as the hole; their difference counts in the hole alone.
Nothing is learned outside, so no loss for the known part is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..conditioning import Cond
from ..data import Batch
from ..denoiser import Denoiser
from ..discriminators import Discriminator
from ..inpaint.partial import Filler, cells, grid, inside
from ..inpaint.strokes import MaskConfig, draw_holes
from .dmd2 import DMD2, DMD2Config
from .generation import SIGMA_FLOOR, denoising_weight, noise_levels, noised, student_input


@dataclass(frozen=True, kw_only=True)
class LazyInpaintConfig(DMD2Config):
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


class LazyInpaint(DMD2):
    """Batches need latents. filler(canvas, hole) is the student on these canvases, see OnCanvas."""

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
        check_lazy(config)
        # the student of a batch is made for its canvases; the teacher stands in for what all of them share
        super().__init__(teacher, teacher, critic, negative, student_params, critic_params, config, discriminator)
        self.filler, self.lazy, self.patch = filler, config, patch
        self.adapting = config.adapt > 0

    def turns(self, step: int) -> Sequence[str]:
        self.adapting = step < self.lazy.adapt
        return ("student",) if self.adapting else super().turns(step)

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        canvas = batch.clean("lazy inpainting").to(self.dtype)
        self.hole, student = self.task(batch, canvas, rng)
        batch = Batch(self.spoken(batch.cond, rng), batch.shape, canvas)
        if self.adapting:
            return self.adapt_terms(student, batch, rng)
        c = self.config
        with torch.set_grad_enabled(player == "student"):
            gamma = 0.0 if c.trajectory else c.gamma
            x, k = student_input(student, c.sigmas, batch, rng, self.dtype, c.backward_simulation, gamma)
            x0 = student(x, self.level(k, x), batch.cond)
            # the judges see the canvas as it is, whatever the student was shown
            x0 = torch.where(cells(self.hole, x0, self.patch), x0, canvas)
        return (self.critic_terms if player == "critic" else self.student_terms)(x0, batch, rng, x, k)

    def task(self, batch: Batch, canvas: Tensor, rng: torch.Generator) -> tuple[Tensor, Denoiser]:
        """A hole, and the student on canvases that have it."""
        hole = self.holes(canvas, rng)
        return hole, self.filler(canvas, hole)

    def holes(self, canvas: Tensor, rng: torch.Generator) -> Tensor:
        """Drawn on the CPU, whatever device the run is on."""
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        rows, columns = grid(canvas, self.patch)
        own = torch.Generator().manual_seed(seed)
        return draw_holes(len(canvas), rows, columns, own, self.lazy.masks).to(canvas.device)

    def spoken(self, cond: Any, rng: torch.Generator) -> Any:
        """Some samples lose their prompt, where the negative can stand for it."""
        negative = self.negative
        if not self.lazy.text_dropout or not isinstance(cond, Cond) or not isinstance(negative, Cond):
            return cond
        alike = set(cond.extras) == set(negative.extras) and (cond.pooled is None) == (negative.pooled is None)
        return cond.dropout(negative, self.lazy.text_dropout, rng) if alike else cond

    def cut(self, x: Tensor) -> Tensor:
        return inside(x, self.hole, self.patch)

    def adapt_terms(self, student: Denoiser, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Denoising of the canvas's own content in the hole, at every level."""
        c, canvas = self.config, batch.clean("lazy inpainting")
        sigma = noise_levels(student.schedule, len(canvas), rng, 0.0, 1.0, c.shift).to(canvas).clamp_min(SIGMA_FLOOR)
        x0 = student(noised(student.schedule, canvas, sigma, rng), sigma, batch.cond)
        weight = denoising_weight(c.critic_weight, sigma)
        return {"adapt": losses.denoising(self.cut(x0), self.cut(canvas), weight)}

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


def check_lazy(c: LazyInpaintConfig) -> None:
    if not 0 <= c.text_dropout <= 1 or not 0 <= c.whole < 1:
        raise ValueError(
            f"text_dropout is {c.text_dropout} and whole {c.whole}; both are shares, from 0 to 1 (whole below 1)"
        )
    if c.one_sample:
        raise ValueError("one_sample is not for lazy inpainting, where every update draws its own holes; turn it off")
    if c.adapt < 0:
        raise ValueError(f"adapt is {c.adapt}; give the number of first updates that only denoise, 0 for none")
    if not 0 < c.smallest < c.largest <= 1:
        raise ValueError(
            f"holes from {c.smallest} to {c.largest} of the picture were asked for; they must rise and lie in 0 to 1"
        )
