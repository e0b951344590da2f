"""A network's tensors under diffusers' names -> under its own (ComfyUI's, its authors'), for whole files.

keys.py names layers, which is all that a LoRA needs; here every tensor must have its place: one that has none, or a
fused layer of which a part is missing, is refused, for a network with a hole in it would still load.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ..families import Family, Same, layer_path
from .files import Spec
from .header import Shape
from .keys import Twin, twins, unet_layout

# families of which ComfyUI's own loader reads diffusers' names (comfy/sd.py, load_diffusion_model_state_dict)
READ_BY_COMFYUI = ("sd15", "sd2", "sdxl", "sd3", "flux", "z_image", "pixart")


@dataclass(frozen=True)
class Piece:
    """The tensors whose rows, one after another, are a tensor of the network; swap: its two halves change places."""

    keys: tuple[str, ...]
    swap: bool = False

    def spec(self, specs: Mapping[str, Spec]) -> Spec:
        parts = [specs[k] for k in self.keys]
        dtype = reduce(torch.promote_types, (d for d, _ in parts))
        first = parts[0][1]
        return dtype, first if len(parts) == 1 else (sum(s[0] for _, s in parts), *first[1:])

    def join(self, tensors: list[Tensor]) -> Tensor:
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return torch.cat(whole.chunk(2)[::-1]) if self.swap else whole


def convertible(family: Family) -> bool:
    return family.lora == "kohya" or bool(family.whole)


def native_pieces(shapes: Mapping[str, Shape], family: Family) -> dict[str, Piece]:
    """Own name -> what it is made of, of all tensors of a network under diffusers' names."""
    if not convertible(family):
        raise ValueError(
            f"only the layers of {family.title} that LoRAs carry have known names here, not all of its tensors; "
            "the file cannot be translated"
        )
    place = _placer(shapes, family)
    found: dict[str, dict[int, str]] = {}
    counts, swapped = {}, set()
    for key in shapes:
        target, twin = place(layer_path(key))
        if twin is None:
            raise ValueError(f"{family.title} has no place for {key!r} under its own names; it cannot be translated")
        part, counts[target] = twin.take or (0, 1)
        if part in found.setdefault(target, {}):
            raise ValueError(
                f"{found[target][part]!r} and {key!r} are the same tensor of {family.title}; one is enough"
            )
        found[target][part] = key
        if twin.swap:
            swapped.add(target)
    if short := next((t for t, parts in found.items() if len(parts) < counts[t]), None):
        there = ", ".join(found[short].values())
        raise ValueError(f"{short!r} has {counts[short]} parts, only {there} is in the file; download it again")
    return {t: Piece(tuple(parts[i] for i in sorted(parts)), t in swapped) for t, parts in found.items()}


def _placer(shapes: Mapping[str, Shape], family: Family) -> Callable[[str], tuple[str, Twin | None]]:
    """A function: path of a tensor -> its own name, and the twin that says which part of it this is."""
    paths = [layer_path(k) for k in shapes]
    if family.lora == "kohya":
        layout = unet_layout(paths)
        attentive = {m[1] for p in paths if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", p))}

        def unet(path: str) -> tuple[str, Twin | None]:
            layer, ending = _split(path)
            found = twins(layer, family, layout)
            level = re.match(r"up_blocks\.(\d+)\.upsamplers\.", path)
            # an upsampler stands behind the attention where its level has one
            twin = found[-1 if level and level[1] in attentive else 0] if found else None
            return (twin.name if twin else "") + ending, twin

        return unet
    last = max((int(m[1]) for p in paths if (m := re.match(r"transformer_blocks\.(\d+)\.", p))), default=0)
    full = replace(family, same=tuple(_numbered(s, last) for s in family.whole) + family.same)

    def transformer(path: str) -> tuple[str, Twin | None]:
        for layer, ending in (_split(path), (path, "")):  # tables, and norms whose ending differs, by their whole name
            if found := [t for t in twins(layer, full) if t.fill is None]:
                return found[0].name + ending, found[0]
        return "", None

    return transformer


def _split(path: str) -> tuple[str, str]:
    ending = next((e for e in (".weight", ".bias") if path.endswith(e)), "")
    return path.removesuffix(ending), ending


def _numbered(same: Same, last: int) -> Same:
    """{last} stands for the number of the last block."""
    names = tuple(d.replace("{last}", str(last)) for d in same.diffusers)
    return replace(same, native=same.native.replace("{last}", str(last)), diffusers=names)
