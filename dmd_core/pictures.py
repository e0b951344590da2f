"""A folder of pictures with captions, each at one of a few sizes of about the same area."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NARROWEST = 0.5  # of width / height or height / width: beyond it models draw things twice


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str  # of the text file of the same name; empty where there is none


def listed(folder: Path) -> list[Picture]:
    """The pictures right in the folder, by name."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no pictures; put some there ({', '.join(ENDINGS)})")
    return [Picture(p, caption(p.with_suffix(".txt"))) for p in paths]


def encoded(folder: Path, side: int, encode: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The latents of the pictures `listed` there, each of its bucket's size. encode: [1 3 h w] in -1..1 -> latents"""
    return [encode(read(p.path, side).movedim(-1, 1) * 2 - 1)[0].cpu() for p in listed(folder)]


def caption(path: Path) -> str:
    try:
        return " ".join(path.read_bytes().decode("utf-8-sig").split()) if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def sizes(side: int) -> Iterator[tuple[int, int]]:
    """(width, height) of every bucket: multiples of 64 (of 16 below 512) with about side x side pixels."""
    step = 64 if side >= 512 else 16
    for width in range(step, 2 * side + step, step):
        height = max(step, round(side * side / width / step) * step)
        if NARROWEST <= width / height <= 1 / NARROWEST:
            yield width, height


def bucket(width: int, height: int, side: int) -> tuple[int, int]:
    """The size that a picture loses least by; narrower ones than any bucket are cut to the narrowest."""
    if side < 16 or side % 16:
        raise ValueError(f"the picture size is {side}; give a multiple of 16, such as 512 or 1024")
    return min(sizes(side), key=lambda size: abs(math.log(size[0] / size[1] * height / width)))


def read(path: Path, side: int) -> Tensor:
    """IMAGE [1 h w 3] in 0..1 at its bucket's size: scaled to cover it, cut evenly on both sides."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {path} cannot be read ({error}); replace it or take it out") from error
    size = bucket(*picture.size, side)
    fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return values.reshape(1, fitted.height, fitted.width, 3).float() / 255
