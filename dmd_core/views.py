"""What is looked at while a run goes on: the student's pictures, and what teacher and critic make of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from .conditioning import Cond
from .denoiser import Denoiser, Guided
from .inpaint import MaskConfig, draw_holes
from .inpaint.partial import grid
from .samplers import sampled
from .schedule import add_noise
from .sheet import sheet

if TYPE_CHECKING:
    from .headless import Job

SHOWN = 4  # prompts of a preview
SHOWN_HOLES = MaskConfig(least=0.2, most=0.5, all=0.0, crops=0.0)
Rows = Callable[[torch.Generator], list[Tensor]]


def preview_of(job: "Job") -> Callable[[], Image.Image] | None:
    """A row of the student's pictures, and under noise how the teacher and, where there is one, the critic see them."""
    decode = job.source.pictures
    if decode is None:
        return None
    rows = rows_of(job)

    @torch.no_grad()
    def look() -> Image.Image:
        made = rows(torch.Generator(job.source.device).manual_seed(job.file.samples.seed))
        labels = ["student", "the teacher sees", "the critic sees"]
        return sheet([decode(v).float().cpu() for v in made], labels[: len(made)])

    return look


def rows_of(job: "Job") -> Rows:
    """The student's own steps from fixed noise; the others look at the result under noise of half of its first time."""
    made, device = job.method, job.source.device
    sigmas = torch.tensor([*made.sigmas, 0.0], device=device)
    student, shape, cond = subject(job)
    critic = getattr(made.objective, "critic", None)
    teacher = job.teacher(made.guidance if made.guidance != 1 else job.file.data.pair_guidance)
    schedule = teacher.schedule

    def rows(rng: torch.Generator) -> list[Tensor]:
        noise = torch.randn(shape, generator=rng, device=device)
        x0 = sampled(student(), noise, sigmas, cond, rng, made.gamma)
        sigma = schedule.sigma(schedule.timestep(sigmas[:1]) / 2).to(x0).expand(len(x0))
        x = add_noise(schedule, x0, torch.randn(shape, generator=rng, device=device), sigma)
        return [x0, *(view(x, sigma, cond) for view in (teacher, critic) if view is not None)]

    return rows


def subject(job: "Job") -> tuple[Callable[[], Denoiser], tuple[int, ...], Cond]:
    """Who draws, the shape of what, for which prompts. One that fills holes gets pictures of the data with holes.

    It is made anew for each look: what a student that fills holes keeps of its context is as old as itself.
    """
    made = job.method
    if made.filler is None:
        cond = job.pool.take(slice(0, SHOWN))
        guided = Guided(made.student, made.cfg, job.negative)
        return lambda: guided, (len(cond), *job.source.shape), cond
    filler, batch = made.filler, next(job.batches().seek(0))
    canvas, cond = batch.latents[:SHOWN].to(job.source.device), batch.cond.take(slice(0, SHOWN))
    rows, columns = grid(canvas, job.source.partial.patch if job.source.partial else 1)
    own = torch.Generator().manual_seed(job.file.samples.seed)
    hole = draw_holes(len(canvas), rows, columns, own, SHOWN_HOLES).to(canvas.device)
    return lambda: filler(canvas, hole), tuple(canvas.shape), cond
