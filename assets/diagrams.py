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


def few_step() -> str:
    """Where ComfyUI's schedulers put four steps, and where DMD2 was trained."""
    from dmd_core.families import SDXL
    from dmd_core.weights.profiles import stock_grids

    trained = list(SDXL.timesteps(4))
    shown = [n for n in ("simple", "sgm_uniform", "normal", "karras", "beta", "ddim_uniform") if n in stock_grids()]
    rows = [("trained on", trained), *((n, stock_grids()[n]) for n in shown)]
    left, right, gap = 130, 690, 34
    parts = [text(left, 24, "noise", colour=GREY), text(right, 24, "image", "end", GREY)]
    for i, (name, steps) in enumerate(rows):
        y = 52 + i * gap
        hit = all(min(abs(t - s) for s in trained) <= 2 for t in steps)
        colour = BLUE if i == 0 else GREEN if hit else ORANGE
        parts += [text(left - 14, y + 5, name, "end"), axis(y, left, right)]
        for t in steps:
            x = left + (999 - t) / 999 * (right - left)
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="7" fill="{colour}"/>')
    height = 52 + len(rows) * gap + 8
    words = "Timesteps of 4 steps on SDXL. Blue: DMD2's own. Green schedulers meet them, orange ones do not."
    return svg(720, height + 18, [*parts, text(20, height + 4, words, colour=GREY, size=12)])


def switch() -> str:
    """Who does which timesteps: a student alone, and behind two steps of its teacher."""
    from dmd_core.families import SDXL
    from dmd_core.stages import with_head

    schedule, alone = SDXL.schedule(), SDXL.sigmas(4)
    headed = with_head(schedule, alone, 2)
    left, right, parts = 190, 690, [text(190, 24, "noise", colour=GREY), text(690, 24, "image", "end", GREY)]
    for i, (name, sigmas, head) in enumerate([("student alone", alone, 0), ("2 teacher steps first", headed, 2)]):
        y = 56 + i * 44
        parts += [text(left - 14, y + 5, name, "end"), axis(y, left, right)]
        for k, t in enumerate(schedule.timestep(sigmas[:-1]).tolist()):
            x = left + (999 - t) / 999 * (right - left)
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="8" fill="{ORANGE if k < head else BLUE}"/>')
            parts.append(text(x, y + 24, f"{t:.0f}", "middle", GREY, 11))
    words = "Timesteps on SDXL. Orange: the teacher at its own cfg. Blue: the student at cfg 1."
    return svg(720, 160, [*parts, text(20, 148, words, colour=GREY, size=12)])


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
    parts = [box(20, 20, side * cell, side * cell, "#eef1f6")]
    for i, (computed, hole) in enumerate(zip(tokens.computed.tolist(), tokens.hole.tolist(), strict=True)):
        if computed:
            x, y = 20 + i % side * cell, 20 + i // side * cell
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{ORANGE if hole else BLUE}"/>'
            )
    chosen, total = int(tokens.computed.sum()), len(tokens.computed)
    cost = step_cost(tokens.share, total, text_tokens)
    words = [
        (INK, f"{total} tokens of a picture"),
        (ORANGE, f"{int(tokens.hole.sum())} of the hole"),
        (BLUE, "one ring around it, and up to a multiple of 64"),
        (INK, f"{chosen} are computed: {tokens.share:.1%}"),
        (INK, f"with {text_tokens} tokens of text"),
        (INK, f"a lazy step costs {cost:.2f}"),
        (INK, "of a whole one"),
    ]
    parts += [text(430, 120 + 30 * i, line, colour=colour) for i, (colour, line) in enumerate(words)]
    return svg(780, 424, parts)


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


def labelled(panels: list[Image.Image], words: list[str]) -> Image.Image:
    width, height = panels[0].size
    page = Image.new("RGB", ((width + 10) * len(panels) + 10, height + 44), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for i, (panel, line) in enumerate(zip(panels, words, strict=True)):
        x = 10 + i * (width + 10)
        page.paste(panel, (x, 10))
        draw.text((x, height + 16), line, fill=INK, font=font)
    return page


# --- the loop ---------------------------------------------------------------------------------------------------------


def distill() -> str:
    """DMD2 in boxes."""
    parts = [
        box(20, 80, 90, 44, GREY, "noise"),
        arrow(110, 102, 160, 102),
        box(160, 80, 110, 44, BLUE, "student"),
        arrow(270, 102, 320, 102),
        box(320, 80, 110, 44, GREEN, "picture"),
        arrow(430, 102, 500, 102, "add noise"),
        box(500, 80, 80, 44, GREY, "noised"),
        arrow(580, 92, 640, 92),
        box(640, 30, 150, 62, ORANGE, "teacher, with cfg"),
        box(640, 112, 150, 62, BLUE, "critic"),
        arrow(580, 112, 640, 112),
        text(812, 66, "what it should be"),
        text(812, 148, "what it is"),
        text(640, 210, "Their difference is the student's gradient."),
        text(640, 232, "The critic learns what the student draws."),
        text(20, 210, "Student and critic are two LoRA sets on the teacher's own weights:", colour=GREY, size=12),
        text(20, 228, "one copy of the model is in memory.", colour=GREY, size=12),
    ]
    return svg(960, 250, parts)


def main() -> None:
    load_engine()
    for name, draw in {"distill": distill, "few_step": few_step, "switch_models": switch, "lazy_inpaint": lazy}.items():
        (OUT / f"{name}.svg").write_text(draw(), encoding="utf-8")
    prepare().save(OUT / "prepare_inpaint.png", optimize=True)


if __name__ == "__main__":
    main()
