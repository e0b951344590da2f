"""docs/images/inpainting_cost.png, from bench/results/inpainting.cpu.json and nothing else. `python -m bench chart`."""

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


def draw(results: Path = RESULTS) -> Image.Image:
    rows = json.loads((results / "inpainting.cpu.json").read_text(encoding="utf-8"))["rows"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    picture = Image.new("RGB", (WIDE * len(networks), HIGH), "white")
    for i, network in enumerate(networks):
        panel(picture, i * WIDE, network, [{**row, "dense": 1.0} for row in rows if row["network"] == network])
    return picture


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
