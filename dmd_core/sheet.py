"""Labelled contact sheets: rows and columns of pictures as one picture."""

import textwrap
from collections.abc import Sequence

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK = (250, 250, 248), (40, 40, 44)
GAP = 4  # pixels between cells


def picture(image: Tensor) -> Image.Image:
    """[3 h w] in -1..1"""
    pixels = image.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy())


def sheet(
    rows: Sequence[Tensor],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 128,
    title: str = "",
) -> Image.Image:
    """One row per entry of rows, each [n 3 h w] in -1..1; labels are wrapped to fit."""
    if not rows or any(r.ndim != 4 or r.shape[1] != 3 for r in rows):
        raise ValueError(f"a sheet takes rows [n 3 h w], got {[list(r.shape) for r in rows]}; give at least one row")
    if row_labels and len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} row labels for {len(rows)} rows; give one per row or none")
    size = max(11, cell // 7)  # readable on a node, where a sheet is shown at a third of its size
    font, line = ImageFont.load_default(size=size), round(size * 1.25)
    columns = max(len(r) for r in rows)
    heads = [_wrap(label, font, cell) for label in column_labels[:columns]]
    sides = [_wrap(label, font, round(cell * 1.1)) for label in row_labels]
    left = round(cell * 1.1) + 2 * GAP if row_labels else GAP
    top = GAP + (2 * line if title else 0) + (max(map(len, heads)) * line + GAP if heads else 0)
    page = Image.new("RGB", (left + columns * (cell + GAP), top + len(rows) * (cell + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), title, INK, font)
    for i, head in enumerate(heads):
        _write(draw, head, (left + i * (cell + GAP), top - GAP - len(head) * line), line, font)
    for j, row in enumerate(rows):
        y = top + j * (cell + GAP)
        if row_labels:
            _write(draw, sides[j], (GAP, y + (cell - len(sides[j]) * line) // 2), line, font)
        for i, image in enumerate(row):
            page.paste(_fit(picture(image), cell), (left + i * (cell + GAP), y))
    return page


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """Scaled into a square cell, centred if it is not square itself."""
    scale = cell / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), PAPER)
    square.paste(small, ((cell - small.width) // 2, (cell - small.height) // 2))
    return square


def _wrap(text: str, font, width: int) -> list[str]:
    average = font.getlength("abcdefghij klmno") / 16
    return textwrap.wrap(text, max(4, int(width / average))) or [""]


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], line: int, font) -> None:
    for i, text in enumerate(lines):
        draw.text((at[0], at[1] + i * line), text, INK, font)
