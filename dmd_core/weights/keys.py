"""Translation between layer names of a network and keys of a LoRA file, both ways, by names alone.

Three spellings meet: native (ComfyUI's module paths), diffusers, and kohya (either of the two with underscores). What
ComfyUI loads in full decides what is written: PEFT keys lose the attention layers of UNets there, hence kohya.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..families import Family, Same, layer_path, naming, spelled

Part = tuple[int, int]  # which of how many; see families.Same


@dataclass(frozen=True)
class Twin:
    """The other layout's name of a layer: the layer is its part `take`, or it is the part `fill` of the layer."""

    name: str
    take: Part | None = None
    fill: Part | None = None
    swap: bool = False


@dataclass(frozen=True)
class Slot:
    """Where a module of a file goes: a layer of the network, with parts of rows where one side is fused."""

    layer: str
    take: Part | None = None
    fill: Part | None = None
    swap: bool = False


@dataclass(frozen=True)
class UNetLayout:
    """How a UNet's flat native blocks are grouped into levels; attention depth does not matter."""

    levels: int
    resnets: int  # per level on the way down; one more on the way up


def part_rows(part: Part | None, height: int, width: int) -> slice:
    """The rows of a fused layer [height, width] that one part takes."""
    if part is None:
        return slice(0, height)
    index, count = part
    if count == 4:  # q, k, v as high as the layer is wide, then the feed-forward rows
        return slice(index * width, height if index == 3 else (index + 1) * width)
    return slice(index * height // count, (index + 1) * height // count)


# --- UNets ------------------------------------------------------------------------------------------------------------

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": ("conv_in",),
    "out.0": ("conv_norm_out",),
    "out.2": ("conv_out",),
    "time_embed.0": ("time_embedding.linear_1",),
    "time_embed.2": ("time_embedding.linear_2",),
    "label_emb.0.0": ("add_embedding.linear_1", "class_embedding.linear_1"),
    "label_emb.0.2": ("add_embedding.linear_2", "class_embedding.linear_2"),
}


def unet_layout(names: Iterable[str]) -> UNetLayout | None:
    """From all layer names of a UNet; None where they do not tell (no downsampling layer among them, say)."""
    paths = [layer_path(n) for n in names]
    resnets = [m for p in paths if (m := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)", p))]
    if resnets:
        return UNetLayout(max(int(m[1]) for m in resnets) + 1, max(int(m[2]) for m in resnets) + 1)
    downs = sorted({int(m[1]) for p in paths if (m := re.match(r"input_blocks\.(\d+)\.0\.op\b", p))})
    if not downs:
        return None
    layout = UNetLayout(len(downs) + 1, downs[0] - 1)
    even = downs == [(layout.resnets + 1) * (i + 1) for i in range(len(downs))]
    return layout if even else None  # ComfyUI's own translation assumes equal levels too


@lru_cache(maxsize=16)
def _unet_blocks(layout: UNetLayout) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Native block -> diffusers block, and diffusers block -> its possible native blocks."""
    pairs = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0")]
    pairs.append(("middle_block.2", "mid_block.resnets.1"))
    for level in range(layout.levels):
        n = 1 + (layout.resnets + 1) * level
        for i in range(layout.resnets):
            pairs.append((f"input_blocks.{n + i}.0", f"down_blocks.{level}.resnets.{i}"))
            pairs.append((f"input_blocks.{n + i}.1", f"down_blocks.{level}.attentions.{i}"))
        pairs.append((f"input_blocks.{n + layout.resnets}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
        n = (layout.resnets + 1) * level
        for i in range(layout.resnets + 1):
            pairs.append((f"output_blocks.{n + i}.0", f"up_blocks.{level}.resnets.{i}"))
            pairs.append((f"output_blocks.{n + i}.1", f"up_blocks.{level}.attentions.{i}"))
        for place in (1, 2):  # after the resnet, and after the attention where the level has one
            pairs.append((f"output_blocks.{n + layout.resnets}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    pairs += [(native, d) for native, ds in _ENDS.items() for d in reversed(ds)]
    back: dict[str, tuple[str, ...]] = {}
    for native, diffusers in pairs:
        back[diffusers] = (*back.get(diffusers, ()), native)
    return dict(pairs), back


def _unet_twins(path: str, layout: UNetLayout) -> list[str]:
    forward, back = _unet_blocks(layout)
    if path in forward:
        return [forward[path], *_ENDS.get(path, ())[1:]]
    if path in back:
        return list(back[path])
    head, tail = _unet_head(path)
    if head in forward:
        return [f"{forward[head]}.{_RESNET.get(tail, tail)}"]
    names = {v: k for k, v in _RESNET.items()}
    return [f"{n}.{names.get(tail, tail)}" for n in back.get(head, ())]


def _unet_head(path: str) -> tuple[str, str]:
    """The resnet or attention a layer belongs to, and its path inside."""
    pattern = r"((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+|.*?\.(?:resnets|attentions)\.\d+)\.(.*)"
    match = re.fullmatch(pattern, path)
    return (match[1], match[2]) if match else (path, "")


# --- transformers -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _patterns(family: Family) -> tuple[tuple[Same, re.Pattern[str], tuple[re.Pattern[str], ...]], ...]:
    def pattern(template: str) -> re.Pattern[str]:
        return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))

    return tuple((s, pattern(s.native), tuple(pattern(d) for d in s.diffusers)) for s in family.same)


def _transformer_twins(path: str, family: Family) -> list[Twin]:
    for same, native, diffusers in _patterns(family):
        count = len(same.diffusers)
        if match := native.fullmatch(path):
            return [
                Twin(d.format(*match.groups()), fill=(i, count) if count > 1 else None, swap=same.swap)
                for i, d in enumerate(same.diffusers)
            ]
        for i, pattern in enumerate(diffusers):
            if match := pattern.fullmatch(path):
                return [
                    Twin(same.native.format(*match.groups()), take=(i, count) if count > 1 else None, swap=same.swap)
                ]
    return []


# --- what the rest of the engine calls --------------------------------------------------------------------------------


def twins(name: str, family: Family, layout: UNetLayout | None = None) -> list[Twin]:
    """Names of a layer in the other layout: none where it has no counterpart, several where one side is fused."""
    path = layer_path(name)
    if family.lora == "kohya":
        return [Twin(n) for n in _unet_twins(path, layout)] if layout else []
    return _transformer_twins(path, family)


def lora_key(name: str, family: Family, native: bool, layout: UNetLayout | None = None) -> str:
    """The key, less its ending, under which our LoRA files hold a layer; ComfyUI loads every one of them.

    UNets: lora_unet_ and diffusers' block names, which ComfyUI, diffusers, A1111 and InvokeAI all read. Transformers:
    `transformer.` where the names are diffusers' and ComfyUI knows them, else `diffusion_model.` and native names.
    """
    path = layer_path(name)
    if family.lora == "kohya":
        if native and layout is None:
            raise ValueError(
                f"the levels of this UNet cannot be told from the layers of the LoRA (such as {name!r}); "
                "pass the names of all layers of the network"
            )
        other = twins(path, family, layout) if native else []
        return "lora_unet_" + spelled(other[0].name if other else path)
    if family.lora == "transformer" and not family.same:  # ComfyUI keeps diffusers' names
        return f"transformer.{path}"
    if native:
        return f"diffusion_model.{path}"
    other = twins(path, family)
    if not other:
        raise ValueError(f"ComfyUI's {family.title} has no layer for {name!r}; leave it out of the LoRA targets")
    return f"transformer.{path}" if family.lora == "transformer" else f"diffusion_model.{other[0].name}"


def lora_keys(layers: Iterable[str], family: Family, names: Iterable[str] | None = None) -> dict[str, str]:
    """Layer -> key for all layers of a LoRA; names: all layers of the network, which tell a UNet's levels."""
    layers = list(layers)
    known = list(names) if names is not None else layers
    native, layout = naming(known, family) == "native", unet_layout(known)
    keys = {n: lora_key(n, family, native, layout) for n in layers}
    if len(set(keys.values())) < len(keys):
        twice = next(k for k in keys.values() if list(keys.values()).count(k) > 1)
        raise ValueError(f"two layers of the LoRA would share the key {twice!r}; give each layer once")
    return keys


def slots(layers: Iterable[str], family: Family, names: Iterable[str] | None = None) -> dict[str, list[Slot]]:
    """For every spelling in which a file may name them: the layers that a module of that name goes to."""
    layers = list(layers)
    layout = unet_layout(names if names is not None else layers)
    table: dict[str, list[Slot]] = {}
    for layer in layers:
        path = layer_path(layer)
        found = {spelled(path): Slot(layer)}
        for t in twins(path, family, layout):
            found.setdefault(spelled(t.name), Slot(layer, t.take, t.fill, t.swap))
        for key, slot in found.items():
            table.setdefault(key, []).append(slot)
    return table
