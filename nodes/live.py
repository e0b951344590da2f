"""What a training node shows on itself: samples over curves while it runs, its result once it has ended.

The picture goes the way of ComfyUI's own sampling previews. The frontend keeps the last of those on the node, above
what the node returns, so a result is sent as a last preview too. Texts of a result are shown by nodes/web/report.js.
"""

from typing import Any

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


def picture(progress: Progress, run: Run) -> Preview | None:
    """After a step that came with samples or a snapshot: how far the run is, the samples if any, its curves."""
    samples = progress.preview
    if progress.snapshot is not None and (progress.snapshot / "sheet.png").is_file():
        samples = Image.open(progress.snapshot / "sheet.png")
    if samples is None and progress.snapshot is None:
        return None
    series = dict(list(loss_series(run.history()).items())[:PANELS])
    width = PANEL[0] * 2 if samples is None else samples.width
    columns = max(1, min(round(width / PANEL[0]), len(series)))
    return preview(stacked(caption(progress), *([samples] if samples else []), curves(series, columns)))


def preview(page: Image.Image) -> Preview:
    return "JPEG", page.convert("RGB"), WIDTH


def caption(progress: Progress) -> Image.Image:
    left = f"about {duration(progress.seconds_left)} left" if progress.step < progress.total else "done"
    text, font = f"update {progress.step} of {progress.total}, {left}", ImageFont.load_default(TEXT)
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
