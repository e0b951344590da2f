"""Draws the pictures of the help pages from what the engine itself computes: levels, tokens, masks.

.venv/bin/python assets/diagrams.py        writes nodes/web/docs/*.svg and *.png
"""

import importlib.util
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "nodes" / "web" / "docs"
PAPER, INK, FAINT = "#ffffff", "#222222", "#c9ced8"
BLUE, ORANGE, GREEN, GREY = "#1f5fbf", "#e07b1a", "#2f9e55", "#8a93a3"
WIDE = 400  # pixels; the panel that shows them is narrow


def load_engine() -> None:
    """dmd_core without the pack's root on sys.path."""
    spec = importlib.util.spec_from_file_location("dmd_core", ROOT / "dmd_core" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dmd_core"] = module
    spec.loader.exec_module(module)


# --- plain SVG --------------------------------------------------------------------------------------------------------


def svg(width: float, height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="sans-serif" font-size="14">'
        f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>{"".join(parts)}</svg>\n'
    )


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = INK, size: int = 14) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{words}</text>'


def box(x: float, y: float, w: float, h: float, fill: str, words: str = "", colour: str = "#ffffff") -> str:
    label = text(x + w / 2, y + h / 2 + 5, words, "middle", colour) if words else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}"/>{label}'


def arrow(x0: float, y0: float, x1: float, y1: float, words: str = "") -> str:
    head = f"M{x1:g} {y1:g} l-9 -5 l0 10 z" if y0 == y1 else f"M{x1:g} {y1:g} l-5 {'-9' if y1 > y0 else '9'} l10 0 z"
    label = (
        text((x0 + x1) / 2, min(y0, y1) - 6 if y0 == y1 else (y0 + y1) / 2, words, "middle", GREY, 12) if words else ""
    )
    return (
        f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{GREY}" stroke-width="2"/>'
        f'<path d="{head}" fill="{GREY}"/>{label}'
    )


# --- levels -----------------------------------------------------------------------------------------------------------


def axis(y: float, left: float, right: float) -> str:
    return f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="{FAINT}" stroke-width="2"/>'


def levels_row(y: float, steps: list[float], left: float, right: float, colours: list[str]) -> list[str]:
    places = [left + (999 - t) / 999 * (right - left) for t in steps]
    dots = [f'<circle cx="{x:.1f}" cy="{y}" r="7" fill="{c}"/>' for x, c in zip(places, colours, strict=True)]
    return [axis(y, left, right), *dots]


def few_step() -> str:
    """Where ComfyUI's schedulers put four steps, and where DMD2 was trained."""
    from dmd_core.families import SDXL
    from dmd_core.weights.profiles import stock_grids

    trained = list(SDXL.timesteps(4))
    shown = [n for n in ("simple", "sgm_uniform", "normal", "karras", "beta", "ddim_uniform") if n in stock_grids()]
    left, right, gap = 120, WIDE - 20, 32
    parts = [text(left, 24, "noise", colour=GREY), text(right, 24, "image", "end", GREY)]
    for i, (name, steps) in enumerate([("trained on", trained), *((n, stock_grids()[n]) for n in shown)]):
        y = 50 + i * gap
        hit = all(min(abs(t - s) for s in trained) <= 2 for t in steps)
        colour = BLUE if i == 0 else GREEN if hit else ORANGE
        parts += [text(left - 14, y + 5, name, "end"), *levels_row(y, steps, left, right, [colour] * len(steps))]
    y = 50 + (len(shown) + 1) * gap
    parts.append(text(10, y, "Timesteps of 4 steps on SDXL. Blue: DMD2's own.", colour=GREY))
    parts.append(text(10, y + 20, "Green schedulers meet them, orange ones do not.", colour=GREY))
    return svg(WIDE, y + 34, parts)


def switch() -> str:
    """Who does which timesteps: a student alone, and behind two steps of its teacher."""
    from dmd_core.families import SDXL
    from dmd_core.stages import with_head

    schedule, alone = SDXL.schedule(), SDXL.sigmas(4)
    headed = with_head(schedule, alone, 2)
    left, right, parts = 30, WIDE - 30, []
    for i, (name, sigmas, head) in enumerate([("student alone", alone, 0), ("2 teacher steps first", headed, 2)]):
        y = 52 + i * 86
        steps = schedule.timestep(sigmas[:-1]).tolist()
        colours = [ORANGE if k < head else BLUE for k in range(len(steps))]
        parts += [text(20, y - 24, name), *levels_row(y, steps, left, right, colours)]
        for t in steps:
            parts.append(text(left + (999 - t) / 999 * (right - left), y + 25, f"{t:.0f}", "middle", GREY))
    parts.append(text(10, 206, "Timesteps on SDXL. Orange: the teacher at its cfg.", colour=GREY))
    parts.append(text(10, 226, "Blue: the student at cfg 1.", colour=GREY))
    return svg(WIDE, 240, parts)


# --- tokens -----------------------------------------------------------------------------------------------------------


def lazy() -> str:
    """The computed tokens of a small hole in a picture of 1024 x 1024."""
    from dmd_core.inpaint import select, step_cost, token_mask

    side, cell, text_tokens = 64, 6, 256
    mask = torch.zeros(1, 1, 2 * side, 2 * side)
    rows, columns = torch.meshgrid(torch.arange(2 * side), torch.arange(2 * side), indexing="ij")
    mask[0, 0] = (((rows - 76) / 17) ** 2 + ((columns - 84) / 24) ** 2 < 1).float()
    touched = token_mask(mask, (1, 2, 2))
    tokens = select(touched)
    parts = [box(8, 8, side * cell, side * cell, "#eef1f6")]
    for i, (computed, hole) in enumerate(zip(tokens.computed.tolist(), tokens.hole.tolist(), strict=True)):
        if computed:
            x, y = 8 + i % side * cell, 8 + i // side * cell
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{ORANGE if hole else BLUE}"/>'
            )
    chosen, total = int(tokens.computed.sum()), len(tokens.computed)
    cost = step_cost(tokens.share, total, text_tokens)
    hole = int(tokens.hole.sum())
    words = [
        (INK, f"{total} tokens of a picture of 1024 x 1024"),
        (ORANGE, f"{hole} of the hole"),
        (BLUE, f"{chosen - hole} around it: a ring, and up to a multiple of 64"),
        (INK, f"{tokens.share:.1%} are computed. With {text_tokens} tokens of text"),
        (INK, f"a lazy step costs {cost:.2f} of a whole one."),
    ]
    parts += [text(10, 418 + 22 * i, line, colour=colour) for i, (colour, line) in enumerate(words)]
    return svg(WIDE, 516, parts)


# --- masks ------------------------------------------------------------------------------------------------------------


def prepare() -> Image.Image:
    """A drawn outline through the mask repair, and the picture with its prefill: all by the engine's functions."""
    from dmd_core.inpaint import dilate, fill_holes, prefill, soften, stabilise

    size = 220
    drawn = Image.new("L", (size, size), 0)
    ImageDraw.Draw(drawn).ellipse((70, 60, 150, 150), outline=255, width=5)
    mask = values(drawn)[0]
    filled = fill_holes(stabilise(mask))
    repaired = soften(dilate(filled, 8), 8)
    picture = Image.new("RGB", (size, size))
    for y in range(size):
        for x in range(size):
            picture.putpixel((x, y), (60 + y // 2, 120 + x // 3, 220 - y // 2))
    ImageDraw.Draw(picture).rectangle((85, 80, 135, 132), fill="#7a2e1d")
    image = values(picture)
    grey = [as_picture(m.expand(3, -1, -1)) for m in (mask, filled, repaired)]
    panels = [picture, *grey, as_picture(prefill(image, repaired, "push-pull")[0])]
    return labelled(panels, ["picture", "drawn mask", "fill_holes", "grow 8, soften 8", "prefill push-pull"])


def values(picture: Image.Image) -> torch.Tensor:
    """[1 c h w] in 0..1"""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    return flat.reshape(1, picture.height, picture.width, -1).movedim(-1, 1)


def as_picture(image: torch.Tensor) -> Image.Image:
    """[3 h w] in 0..1"""
    rows = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous()
    return Image.frombytes("RGB", (rows.shape[1], rows.shape[0]), rows.numpy().tobytes())


def labelled(panels: list[Image.Image], words: list[str], columns: int = 2) -> Image.Image:
    width, height = (side + gap for side, gap in zip(panels[0].size, (10, 40), strict=True))
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (width * columns + 10, height * rows + 10), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    for i, (panel, line) in enumerate(zip(panels, words, strict=True)):
        x, y = 10 + i % columns * width, 10 + i // columns * height
        page.paste(panel, (x, y))
        draw.text((x, y + panel.height + 6), line, fill=INK, font=font)
    return page


# --- the loop ---------------------------------------------------------------------------------------------------------


def distill() -> str:
    """DMD2 in boxes."""
    parts = [
        *(
            box(120, y, 160, 36, c, w)
            for y, c, w in ((10, GREY, "noise"), (80, BLUE, "student"), (150, GREEN, "picture"))
        ),
        *(arrow(200, y, 200, y + 34) for y in (46, 116, 186)),
        box(120, 220, 160, 36, GREY, "noise added again"),
        arrow(150, 256, 150, 290),
        arrow(250, 256, 250, 290),
        box(20, 290, 170, 40, ORANGE, "teacher, with cfg"),
        box(210, 290, 170, 40, BLUE, "critic"),
        text(105, 352, "what it should be", "middle"),
        text(295, 352, "what it is", "middle"),
        text(10, 386, "Their difference is the student's gradient."),
        text(10, 408, "The critic learns what the student draws."),
        text(10, 436, "Student and critic are two LoRA sets on the", colour=GREY),
        text(10, 456, "teacher's weights: one model is in memory.", colour=GREY),
    ]
    return svg(WIDE, 470, parts)


def main() -> None:
    load_engine()
    for name, draw in {"distill": distill, "few_step": few_step, "switch_models": switch, "lazy_inpaint": lazy}.items():
        (OUT / f"{name}.svg").write_text(draw(), encoding="utf-8")
    prepare().save(OUT / "prepare_inpaint.png", optimize=True)


if __name__ == "__main__":
    main()
