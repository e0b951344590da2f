"""docs/images/inpainting_cost.png, from the committed results of two tables and nothing else. `python -m bench chart`.

A step by masked share, of inpainting.cpu.json; below it whole runs and their autoencoder, of inpainting_whole.cpu.json.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .record import RESULTS

PATH = Path(__file__).parents[1] / "docs" / "images" / "inpainting_cost.png"
WIDE, HIGH, LEFT, TOP, BOTTOM = 560, 400, 64, 56, 76
LINES = {
    "dense": ("#222222", "all of the picture"),
    "later edit": ("#0b62c4", "session, a later edit"),
    "law": ("#8fb8e8", "law (mN+T)/(N+T)"),
    "crop 1.5x": ("#d9822b", "crop 1.5x"),
    "tight crop": ("#c23b3b", "tight crop (blind)"),
}
BARS = {
    "dense": ("#222222", "all of the picture"),
    "refresh": ("#7a5ca8", "refresh"),
    "session, first edit": ("#8fb8e8", "session, first edit"),
    "session, later edit": ("#0b62c4", "session, a later edit"),
    "crop 1.5x": ("#d9822b", "crop 1.5x"),
    "tight crop": ("#c23b3b", "tight crop (blind)"),
}


def draw(results: Path = RESULTS) -> Image.Image:
    rows, whole = (rows_of(results, name) for name in ("inpainting", "inpainting_whole"))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    picture = Image.new("RGB", (WIDE * len(networks), HIGH * (1 + bool(whole))), "white")
    for i, network in enumerate(networks):
        panel(picture, i * WIDE, network, [{**row, "dense": 1.0} for row in rows if row["network"] == network])
    if whole:
        bars(picture, whole)
    return picture


def rows_of(results: Path, name: str) -> list[dict[str, Any]]:
    path = results / f"{name}.cpu.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return found


def bars(picture: Image.Image, rows: list[dict[str, Any]]) -> None:
    """Time of a whole run over the dense one: a group of bars for each number of steps."""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    width, height = picture.width - LEFT - 24, HIGH - TOP - BOTTOM
    floor = 2 * HIGH - BOTTOM
    pen.text((LEFT, HIGH + 8), "End to end: nodes, autoencoder and sampling", "black", ImageFont.load_default(16))
    pen.text((LEFT, HIGH + 30), "time of a run over a dense one, a tenth masked (CPU, one thread)", "#555555", font)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        pen.line([(LEFT, floor - height * tick), (LEFT + width, floor - height * tick)], "#e4e4e4")
        pen.text((LEFT - 38, floor - height * tick - 8), f"{tick:g}", "#555555", font)
    group = width / len(rows)
    bar = 0.8 * group / len(BARS)
    for i, row in enumerate(rows):
        steps = f"{row['steps']} step{'s' * (row['steps'] > 1)}"
        pen.text((LEFT + group * (i + 0.4), floor + 4), steps, "#555555", font, anchor="ma")
        for j, (name, (colour, _)) in enumerate(BARS.items()):
            x = LEFT + group * i + bar * j
            pen.rectangle([x, floor - height * row[name], x + bar - 3, floor], fill=colour)
    for j, (colour, label) in enumerate(BARS.values()):
        x = LEFT + 174 * j
        pen.rectangle([x, 2 * HIGH - 36, x + 12, 2 * HIGH - 24], fill=colour)
        pen.text((x + 18, 2 * HIGH - 38), label, "black", font)


def panel(picture: Image.Image, start: int, title: str, rows: list[dict[str, Any]]) -> None:
    """Share of the mask to the right, time over the dense pass upwards; both from 0."""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    top = max(1.1, *(row[name] for row in rows for name in LINES))
    width, height = WIDE - LEFT - 24, HIGH - TOP - BOTTOM

    def place(m: float, value: float) -> tuple[float, float]:
        return start + LEFT + width * m, TOP + height * (1 - value / top)

    pen.text((start + LEFT, 8), title, "black", ImageFont.load_default(16))
    pen.text((start + LEFT, 30), "time of a step over a whole one, by masked share (CPU, one thread)", "#555555", font)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        pen.line([place(0, tick), place(1, tick)], "#e4e4e4")
        pen.text((start + LEFT - 38, place(0, tick)[1] - 8), f"{tick:g}", "#555555", font)
        pen.text((place(tick, 0)[0] - 12, HIGH - BOTTOM + 4), f"{tick:.0%}", "#555555", font)
    for i, (name, (colour, label)) in enumerate(LINES.items()):
        points = [place(row["m"], row[name]) for row in rows]
        pen.line(points, colour, 2 if name != "law" else 1)
        if name not in ("dense", "law"):
            for x, y in points:
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        x, y = start + LEFT + 160 * (i % 3), HIGH - 46 + 20 * (i // 3)
        pen.line([(x, y + 9), (x + 18, y + 9)], colour, 3)
        pen.text((x + 24, y), label, "black", font)


def write() -> Path:
    draw().save(PATH, optimize=True)
    return PATH
