"""Curves of a run as one picture: a small panel per quantity, drawn with Pillow."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

PANEL = (360, 200)
MARGIN = (52, 28, 12, 22)  # left, top, right, bottom
INK, FAINT, LINE, SMOOTH = "#222222", "#dddddd", "#b9cbe6", "#1f5fbf"


def curves(series: Mapping[str, Sequence[float]], columns: int = 3) -> Image.Image:
    """One panel per series, raw values faint and their running mean on top; x is the update."""
    names = list(series)
    columns = max(1, min(columns, len(names)))
    rows = -(-len(names) // columns)
    picture = Image.new("RGB", (PANEL[0] * columns, PANEL[1] * max(rows, 1)), "white")
    for i, name in enumerate(names):
        panel = _panel(name, list(series[name]))
        picture.paste(panel, (i % columns * PANEL[0], i // columns * PANEL[1]))
    return picture


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential mean without the bias of its start."""
    mean, weight, out = 0.0, 0.0, []
    for v in values:
        mean, weight = decay * mean + (1 - decay) * v, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out


def _panel(name: str, values: list[float]) -> Image.Image:
    image = Image.new("RGB", PANEL, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    left, top, right, bottom = MARGIN
    box = (left, top, PANEL[0] - right, PANEL[1] - bottom)
    draw.text((left, 8), name, fill=INK, font=font)
    draw.rectangle(box, outline=FAINT)
    if not values:
        return image
    low, high = _range(values)
    for value in (low, (low + high) / 2, high):
        y = box[3] - (value - low) / (high - low) * (box[3] - box[1])
        draw.line([(box[0], y), (box[2], y)], fill=FAINT)
        draw.text((left - 6, y), f"{value:.3g}", fill=INK, font=font, anchor="rm")
    draw.text((box[2], PANEL[1] - bottom + 4), str(len(values)), fill=INK, font=font, anchor="ra")
    for line, colour, width in ((values, LINE, 1), (running_mean(values), SMOOTH, 2)):
        points = _points(line, low, high, box)
        if len(points) > 1:
            draw.line(points, fill=colour, width=width)
    return image


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Without the rarest outliers, so that one spike does not flatten the curve."""
    ordered = sorted(values)
    cut = len(ordered) // 50
    low, high = ordered[cut], ordered[-1 - cut]
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _points(
    values: Sequence[float], low: float, high: float, box: tuple[int, int, int, int]
) -> list[tuple[float, float]]:
    span = max(len(values) - 1, 1)
    return [
        (
            box[0] + i / span * (box[2] - box[0]),
            box[3] - min(max((v - low) / (high - low), 0), 1) * (box[3] - box[1]),
        )
        for i, v in enumerate(values)
    ]
