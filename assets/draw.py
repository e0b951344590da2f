"""Draws icon.svg and banner.svg: dots that become a star in four steps.

python assets/draw.py
"""

import math
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOTS, STEPS = 150, 4
NIGHT, INK, FAINT = "#14182b", "#ffd166", "#8d99c6"


def star(t: float, radius: float) -> tuple[float, float]:
    """The point at share t of a star's outline."""
    corners = [
        (radius * (1 if i % 2 == 0 else 0.42) * math.sin(a), -radius * (1 if i % 2 == 0 else 0.42) * math.cos(a))
        for i, a in ((i, math.pi * i / 5) for i in range(11))
    ]
    i, rest = divmod(t * 10, 1)
    (x0, y0), (x1, y1) = corners[int(i) % 10], corners[int(i) % 10 + 1]
    return x0 + rest * (x1 - x0), y0 + rest * (y1 - y0)


def frame(x: float, y: float, radius: float, noise: float, seed: int) -> str:
    """Dots of the star, each moved by as much noise as its step still has."""
    rng, dots = random.Random(seed), []
    for k in range(DOTS):
        sx, sy = star(k / DOTS, radius)
        nx, ny = rng.gauss(0, 0.75 * radius), rng.gauss(0, 0.75 * radius)
        px, py = x + (1 - noise) * sx + noise * nx, y + (1 - noise) * sy + noise * ny
        colour = INK if noise < 0.3 else FAINT
        dots.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius / 28:.1f}" fill="{colour}"/>')
    return "".join(dots)


def picture(width: int, height: int, frames: list[tuple[float, float, float]], words: str = "") -> str:
    """frames: centre and radius of each step, the last one without noise."""
    body = "".join(
        frame(x, y, r, 1 - i / (len(frames) - 1) if len(frames) > 1 else 0.0, seed=7)
        for i, (x, y, r) in enumerate(frames)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<rect width="{width}" height="{height}" rx="{height / 10:.0f}" fill="{NIGHT}"/>{body}{words}</svg>\n'
    )


def main() -> None:
    quarter = [(110, 110, 70), (290, 110, 70), (110, 290, 70), (290, 290, 80)]
    (HERE / "icon.svg").write_text(picture(400, 400, quarter), encoding="utf-8")
    row = [(170 + 290 * i, 190, 110) for i in range(STEPS)]
    text = "font-family:sans-serif;text-anchor:middle"
    words = (
        f'<text x="630" y="420" style="{text};font-size:64px;font-weight:bold" fill="{INK}">ComfyUI-DMD</text>'
        f'<text x="630" y="480" style="{text};font-size:32px" fill="{FAINT}">'
        "distil, sample in few steps, sliders, lazy inpainting</text>"
    )
    (HERE / "banner.svg").write_text(picture(1260, 540, row, words), encoding="utf-8")


if __name__ == "__main__":
    main()
