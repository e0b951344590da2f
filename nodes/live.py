"""What a training node shows on itself: samples over curves while it runs, its result once it has ended.

The picture goes the way of ComfyUI's own sampling previews. The frontend keeps the last of those on the node, above
what the node returns, so a result is sent as a last preview too. Texts of a result are shown by nodes/web/report.js.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import ui
from PIL import Image, ImageDraw, ImageFont

from ..dmd_core.curves import PANEL, curves
from ..dmd_core.drive import Progress, loss_series
from ..dmd_core.plan import duration
from ..dmd_core.runs import Run
from .students import image_of

WIDTH = 1024  # pixels of a preview at most
PANELS = 4
TEXT, PAPER, INK = 20, "white", "#222222"

Preview = tuple[str, Image.Image, int]  # as ComfyUI's progress bar takes it


@contextmanager
def bar_of(run: Run, total: int) -> Iterator[comfy.utils.ProgressBar]:
    """The node's bar. Where the run is cancelled, the node says so instead of how long it would have taken."""
    bar = comfy.utils.ProgressBar(total)
    try:
        yield bar
    except mm.InterruptProcessingException:
        step = max((record["step"] for record in run.history()), default=0)
        bar.update_absolute(step, total, stopped(run, step, total))
        raise


def stopped(run: Run, step: int, total: int) -> Preview:
    page = caption(f"cancelled at update {step} of {total}: queue again to go on")
    return preview(stacked(page, curves(first_losses(run), 2)) if step else page)


def picture(progress: Progress, run: Run) -> Preview | None:
    """After a step that came with samples or a snapshot: how far the run is, the samples if any, its curves."""
    samples = progress.preview
    if progress.snapshot is not None and (progress.snapshot / "sheet.png").is_file():
        samples = Image.open(progress.snapshot / "sheet.png")
    if samples is None and progress.snapshot is None:
        return None
    series = first_losses(run)
    width = PANEL[0] * 2 if samples is None else samples.width
    columns = max(1, min(round(width / PANEL[0]), len(series)))
    left = f"about {duration(progress.seconds_left)} left" if progress.step < progress.total else "done"
    title = caption(f"update {progress.step} of {progress.total}, {left}")
    return preview(stacked(title, *([samples] if samples else []), curves(series, columns)))


def first_losses(run: Run) -> dict[str, list[float]]:
    return dict(list(loss_series(run.history()).items())[:PANELS])


def preview(page: Image.Image) -> Preview:
    return "JPEG", page.convert("RGB"), WIDTH


def caption(text: str) -> Image.Image:
    font = ImageFont.load_default(TEXT)
    page = Image.new("RGB", (round(font.getlength(text)) + TEXT, 2 * TEXT), PAPER)
    ImageDraw.Draw(page).text((TEXT / 2, TEXT), text, INK, font, anchor="lm")
    return page


def stacked(*parts: Image.Image) -> Image.Image:
    page = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), PAPER)
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def result(page: Image.Image, text: str) -> tuple[Any, dict[str, Any]]:
    """IMAGE and `ui` of a run's end."""
    comfy.utils.ProgressBar(1).update_absolute(1, 1, preview(page))
    image = image_of(page)
    return image, {**ui.PreviewImage(image).as_dict(), **ui.PreviewText(text).as_dict()}
