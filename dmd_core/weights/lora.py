"""LoRA files: ours out, ours and everybody else's in, and merging into weights.

Written: strength 1.0 is right everywhere (alpha = rank, any scale baked into up), keys that ComfyUI loads in full.
Read: kohya, PEFT, diffusers and native keys, fused or split q/k/v, into any bank; nothing is dropped without a word.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import AdapterBank
from ..families import GENERIC, Family, Names, by_name, detect, layer_path, spelled, split_key
from ..families.names import OTHERS
from ..trainstate import save_atomic
from .files import free_path, open_tensors, read_weights_header
from .header import Header
from .keys import Slot, lora_keys, part_rows, slots
from .recipe import Recipe, header_metadata, read_recipe

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# parts of a file that are more than up @ down
_UNSUPPORTED = {
    "hada": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT or BOFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "a LoCon with a middle tensor",
    "diff": "full differences beside the LoRA",
    "diff_b": "bias differences",
    "w_norm": "norm differences",
    "b_norm": "norm differences",
    "set_weight": "replaced weights",
    "reshape_weight": "reshaped weights",
    "lora_B": "biases of LoRA layers",
    "a1": "GLoRA",
    "a2": "GLoRA",
    "b1": "GLoRA",
    "b2": "GLoRA",
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoraFile:
    """What a file holds, in fp32 and with alpha / rank baked into up; layers in the common spelling."""

    path: Path
    modules: dict[str, tuple[Tensor, Tensor]]  # down [r in ...], up [out r ...]
    text_keys: tuple[str, ...]  # belong to text encoders
    metadata: dict[str, str]
    family: Family

    @property
    def recipe(self) -> Recipe | None:
        return read_recipe(self.metadata)


# --- out --------------------------------------------------------------------------------------------------------------


def lora_tensors(
    state: Mapping[str, Tensor],
    family: Family,
    names: Iterable[str] | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """The tensors of a LoRA file from what AdapterBank.state gives."""
    layers = _layers(state)
    found: dict[str, Tensor] = {}
    for layer, key in lora_keys(layers, family, names).items():
        down, up = state[f"{layer}.down"].float(), state[f"{layer}.up"].float() * scale
        if key.startswith("lora_unet_"):
            found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            found[f"{key}.alpha"] = torch.tensor(float(len(down)))
        else:  # no alpha: every reader then takes alpha = rank
            found |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    found = {k: found[k].detach().to("cpu", dtype).contiguous() for k in sorted(found)}
    bad = [k for k, v in found.items() if not v.isfinite().all()]
    if bad:
        raise ValueError(
            f"{len(bad)} tensors of the LoRA are not finite in {dtype}, such as {bad[0]}; nothing was saved. "
            "Save as fp32 or bf16, or go back to an earlier snapshot"
        )
    return found


def save_lora(
    folder: str | os.PathLike[str],
    name: str,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    *,
    family: Family | None = None,
    recipe: Recipe | None = None,
    scale: float = 1.0,
    dtype: str = "fp16",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes folder/name_00001.safetensors and returns its path; state as from AdapterBank.state.

    names: all layer names of the network (`[n for n, _ in net.named_modules()]`): a UNet's levels and the family are
    read from them.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    path = free_path(folder, name)
    names = list(names)
    family = family or detect(names)
    tensors = lora_tensors(state, family, names, scale, DTYPES[dtype])
    rank = max(len(v) for k, v in state.items() if k.endswith(".down"))
    kohya = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": family.base_version,
        "ss_output_name": path.stem,
        "ss_training_comment": recipe.usage_hint() if recipe else "",
    }
    extra = {k: v for k, v in kohya.items() if v} | dict(metadata or {})
    save_atomic(tensors, path, header_metadata(path.stem, family, recipe, "lora", extra))
    return path


def _layers(state: Mapping[str, Tensor]) -> list[str]:
    layers = sorted({k.rpartition(".")[0] for k in state})
    odd = [k for k in state if k.rpartition(".")[2] not in ("down", "up")]
    odd += [f"{n}.{part}" for n in layers for part in ("down", "up") if f"{n}.{part}" not in state and not odd]
    if odd or not layers:
        raise ValueError(
            f"a LoRA of {len(state)} tensors cannot be written{', see ' + odd[0] if odd else ''}; "
            "pass what AdapterBank.state gives: down and up of each layer"
        )
    return layers


# --- in ---------------------------------------------------------------------------------------------------------------


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Any LoRA file whose modules are up @ down; what it holds beyond that is refused by name."""
    path = Path(path)
    header = read_weights_header(path)
    with open_tensors(path) as get:
        return _lora_file(path, header, get)


def lora_of(tensors: Mapping[str, Tensor], name: str, metadata: Mapping[str, str] | None = None) -> LoraFile:
    """The same from tensors that somebody else has read, a pickle's say; name: of the file."""
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    header = Header(name=name, size=0, format="memory", shapes=shapes, metadata=dict(metadata or {}))
    return _lora_file(Path(name), header, lambda key: tensors[key])


def _lora_file(path: Path, header: Header, get: Callable[[str], Tensor]) -> LoraFile:
    halves, text = _sort_keys(header)
    modules: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, parts in halves.items():
        # copies: the tensors of an open file are the file, and would change or die with it
        down, up = (get(parts[half]).to(torch.float32, copy=True) for half in ("down", "up"))
        rank = down.shape[0] if down.ndim >= 2 else 0
        if up.ndim < 2 or up.shape[1] != rank or rank == 0:
            raise ValueError(
                f"{header.name}: the ranks of {layer} do not fit: down is {tuple(down.shape)}, up is "
                f"{tuple(up.shape)}; the file is damaged or no LoRA"
            )
        alpha = get(parts["alpha"]).float().reshape(-1)[0].item() if "alpha" in parts else rank
        if spelled(layer) in modules:
            raise ValueError(f"{header.name} holds the layer {layer} twice, in two spellings; remove one of them")
        modules[spelled(layer)] = (down, up * (alpha / rank))
    recipe = read_recipe(header.metadata)
    known = recipe is not None and recipe.family not in ("", GENERIC.name)
    family = by_name(recipe.family) if known and recipe else detect(Names(header.shapes))
    return LoraFile(path, modules, tuple(text), dict(header.metadata), family)


def _sort_keys(header: Header) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Layer -> part -> key, and the keys of text encoders."""
    halves: dict[str, dict[str, str]] = {}
    text, odd = [], []
    for key in header.shapes:
        layer, part = split_key(key)
        if OTHERS.match(key):
            text.append(key)
        elif part in ("down", "up", "alpha"):
            halves.setdefault(layer, {})[part] = key
        else:
            odd.append((key, part))
    kinds = {
        _UNSUPPORTED[p] for _, part in odd for p in (part, *part.replace(".", "_").split("_")) if p in _UNSUPPORTED
    }
    if kinds:
        raise ValueError(
            f"{header.name} holds {' and '.join(sorted(kinds))}, which is not supported; only plain LoRA (up @ down) "
            "can be continued or merged here. ComfyUI's own LoRA loader may still apply it for sampling"
        )
    broken = [n for n, parts in halves.items() if not {"down", "up"} <= parts.keys()]
    if not halves or odd or broken:
        examples = [k for k, _ in odd[:5]] or broken[:5] or list(header.shapes)[:5]
        what = "lacks one half of some layers" if broken and not odd else "is no LoRA, or holds more than one"
        raise ValueError(
            f"{header.name} {what}: {len(odd) + len(broken)} keys are not understood, such as {', '.join(examples)}; "
            "choose a LoRA file"
        )
    return halves, text


def load_lora(
    path: str | os.PathLike[str],
    bank: AdapterBank | Mapping[str, Shape],
    names: Iterable[str] | None = None,
    family: Family | None = None,
) -> dict[str, Tensor]:
    """A LoRA file as a state for AdapterBank.load; names: all layer names of the network, as for save_lora.

    Fused and split q/k/v translate exactly; ranks may then differ from the file's. A file that does not fit in full is
    a ValueError: half a student is no student.
    """
    return fit(read_lora(path), bank, names, family)


def fit(
    file: LoraFile,
    bank: AdapterBank | Mapping[str, Shape],
    names: Iterable[str] | None = None,
    family: Family | None = None,
) -> dict[str, Tensor]:
    shapes = {n: layer_shape(m) for n, m in bank.layers.items()} if isinstance(bank, AdapterBank) else dict(bank)
    names = list(names) if names is not None else list(shapes)
    wanted = family or _family_of(shapes, names)
    if wanted.name != file.family.name and GENERIC not in (wanted, file.family):
        raise ValueError(
            f"{file.path} is a LoRA for {file.family.title}, this model is {wanted.title}; "
            f"choose a LoRA for {wanted.title}"
        )
    if file.text_keys:
        raise ValueError(
            f"{file.path} holds {len(file.text_keys)} tensors for text encoders too, such as {file.text_keys[0]}; "
            "only LoRAs of the diffusion model alone can be continued"
        )
    table = slots(shapes, wanted, names)
    unknown = [n for n in file.modules if n not in table]
    if unknown:
        raise ValueError(
            f"{file.path}: {len(unknown)} of {len(file.modules)} layers have no place here: {', '.join(unknown[:8])}"
            f"{', ...' if len(unknown) > 8 else ''}; the chosen layer preset may be too narrow (try 'all'), or the "
            f"LoRA is for another model than {wanted.title}"
        )
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, (down, up) in file.modules.items():
        for slot in table[name]:
            pieces.setdefault(slot.layer, []).append(_place(file, name, down, up, slot, shapes[slot.layer]))
    return {k: v for layer, found in pieces.items() for k, v in _joined(layer, found).items()}


def _family_of(shapes: Mapping[str, Shape], names: Iterable[str]) -> Family:
    """By shapes where they tell, else by all names."""
    family = detect(shapes)
    return detect(names) if family is GENERIC else family


def _place(file: LoraFile, name: str, down: Tensor, up: Tensor, slot: Slot, shape: Shape) -> tuple[Tensor, Tensor]:
    """One module of the file in the layer's own shape: [r in ...] and [out r ...]."""
    height, width = shape[0], shape[1]
    rows = up.flatten(1)
    if slot.swap:  # the halves stand in the other order
        rows = rows.roll(len(rows) // 2, 0)
    if slot.take is not None:
        rows = rows[part_rows(slot.take, len(rows), width)]
    target = part_rows(slot.fill, height, width)
    if len(rows) != target.stop - target.start or down[0].numel() != torch.Size(shape[1:]).numel():
        raise ValueError(
            f"{file.path}: {name} is {tuple(up.shape)} @ {tuple(down.shape)} and does not fit {slot.layer}, which is "
            f"{tuple(shape)}; the LoRA is for a model of another size"
        )
    placed = rows.new_zeros(height, rows.shape[1])
    placed[target] = rows
    rank = len(down)
    return down.reshape(rank, *shape[1:]), placed.reshape(height, rank, *[1] * (len(shape) - 2))


def _joined(layer: str, pieces: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A sum of low-rank parts is one low-rank part of the summed rank."""
    downs, ups = zip(*pieces, strict=True)
    return {f"{layer}.down": torch.cat(downs, 0).contiguous(), f"{layer}.up": torch.cat(ups, 1).contiguous()}


def layer_shape(layer: nn.Module) -> Shape:
    """Of the weight as the layer means it; quantised storage may look different."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels, *layer.kernel_size)
    raise TypeError(f"adapters sit on Linear and Conv2d layers, not on {type(layer).__name__}")


# --- merging ----------------------------------------------------------------------------------------------------------


def delta(down: Tensor, up: Tensor) -> Tensor:
    """up @ down in the weight's shape, fp32."""
    return (up.float().flatten(1) @ down.float().flatten(1)).reshape(up.shape[0], *down.shape[1:])


def weight_keys(keys: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """Weight key -> layer, whatever prefix the keys have."""
    paths = {layer_path(k.removesuffix(".weight")): k for k in keys if k.endswith(".weight") and not OTHERS.match(k)}
    missing = [n for n in layers if layer_path(n) not in paths]
    if missing:
        raise ValueError(
            f"{len(missing)} layers of the LoRA have no weight in this model, such as {missing[0]}; "
            "merge into the model that the LoRA was fitted to"
        )
    return {paths[layer_path(n)]: n for n in layers}


def add_delta(key: str, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{key} is stored as {weight.dtype}; merge into an fp16, bf16 or fp32 file of the model")
    change = delta(down.to(weight.device), up.to(weight.device))
    if change.shape != weight.shape:
        raise ValueError(f"{key} is {tuple(weight.shape)}, the LoRA's change is {tuple(change.shape)}; other model")
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + scale * change).to(weight.dtype)


def merge(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """W + scale * up @ down in fp32, back in W's type; lora as from load_lora. The given tensors stay as they are."""
    found = weight_keys(weights, _layers(lora))
    merged = {k: add_delta(k, weights[k], lora[f"{n}.down"], lora[f"{n}.up"], scale) for k, n in found.items()}
    return {**weights, **merged}
