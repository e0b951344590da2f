"""Model families: how to tell them, and what to train, read, checkpoint and write in each."""

from .family import PRESETS, Family, Layers, Preset, Same
from .joint import FLUX, FLUX2, FLUX_SCHNELL, QWEN_IMAGE, SD3, SHAPES
from .names import Names, Source, layer_path, spelled, split_key
from .stream import GENERIC, PIXART, WAN, Z_IMAGE
from .unet import SD2, SD15, SDXL

# specific before broad: the first that recognises the names wins
_ORDER = (SDXL, SD15, SD2, SHAPES, SD3, FLUX2, FLUX_SCHNELL, FLUX, QWEN_IMAGE, Z_IMAGE, PIXART, WAN, GENERIC)
FAMILIES: dict[str, Family] = {f.name: f for f in _ORDER if f not in (FLUX_SCHNELL, SHAPES)}

__all__ = [
    "FAMILIES",
    "FLUX",
    "GENERIC",
    "PRESETS",
    "Family",
    "Layers",
    "Names",
    "Preset",
    "Same",
    "Source",
    "by_name",
    "detect",
    "layer_path",
    "naming",
    "spelled",
    "split_key",
]


def detect(source: Source | Names) -> Family:
    """The family of a network, or of its layer names, a checkpoint's keys, or a LoRA's keys.

    A mapping of names to shapes tells more than names alone. Where two families are possible, GENERIC is returned:
    nothing family-specific is then assumed.
    """
    seen = source if isinstance(source, Names) else Names(source)
    return next(f for f in _ORDER if f.recognises(seen))


def naming(source: Source | Names, family: Family) -> str:
    """'native' (ComfyUI's own module paths) or 'diffusers'."""
    seen = source if isinstance(source, Names) else Names(source)
    return "diffusers" if seen.has(family.diffusers_mark) else "native"


def by_name(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]
