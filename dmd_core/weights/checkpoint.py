"""Whole models: their identity, and writing them in the layouts that ComfyUI's loaders read."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..families import Family, layer_path, naming
from ..families.names import OTHERS
from .files import DTYPE_NAMES, Spec, free_path, open_tensors, read_weights_header, write_streaming
from .header import Header
from .layouts import Piece, native_pieces
from .lora import DTYPES, add_delta, fit, read_lora, weight_keys
from .recipe import Recipe, header_metadata

SAMPLE = 64  # values hashed at each end of each tensor
CHECKPOINT_PREFIX = "model.diffusion_model."
LAYOUTS = ("diffusion_model", "checkpoint")


def base_hash(source: str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]) -> str:
    """A fast name for a diffusion model's content: 16 hex letters over names, shapes and both ends of every tensor.

    Prefixes, text encoders and VAE do not count; values are rounded to bf16 first, so a bf16 or fp16 file and the
    model loaded from it agree. Equal names mean equal models for our purposes; other names may still be the same model
    in another key layout. It is no protection against forgery.
    """
    if isinstance(source, str | os.PathLike):
        shapes = read_weights_header(source).shapes
        with open_tensors(Path(source)) as get:
            return _hash(shapes, get)
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    return _hash({k: tuple(v.shape) for k, v in tensors.items()}, lambda k: tensors[k])


def _hash(shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], Tensor]) -> str:
    sha = hashlib.sha256()
    for key in sorted(network_keys(shapes), key=layer_path):
        sha.update(f"{layer_path(key)} {list(shapes[key])}\n".encode())
        flat = get(key).detach().reshape(-1)
        ends = torch.cat([flat[:SAMPLE], flat[-SAMPLE:]]).float().bfloat16().cpu()
        sha.update(ends.view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def network_keys(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of a file's tensors those of the diffusion model."""
    return [k for k in shapes if k.startswith(CHECKPOINT_PREFIX)] or [k for k in shapes if not OTHERS.match(k)]


def save_model(
    folder: str | os.PathLike[str],
    name: str,
    weights: Mapping[str, Tensor],
    family: Family,
    *,
    recipe: Recipe | None = None,
    layout: str = "diffusion_model",
    dtype: str | None = "fp16",
    others: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A whole model as folder/name_00001.safetensors, tensor by tensor.

    layout 'diffusion_model': bare keys, for ComfyUI's Load Diffusion Model. 'checkpoint': one file for Load Checkpoint,
    with `others` (VAE and text encoders under their own keys) beside it. dtype None keeps each tensor's own.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known; choose one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    if layout == "checkpoint" and naming(weights, family) == "diffusers" and family.same:
        raise ValueError(f"these are diffusers' names of {family.title}; save them with the layout 'diffusion_model'")
    prefix = CHECKPOINT_PREFIX if layout == "checkpoint" else ""
    tensors = {prefix + layer_path(k): v for k, v in weights.items()}
    cast = {k: v.dtype if dtype is None or not v.is_floating_point() else DTYPES[dtype] for k, v in tensors.items()}
    tensors |= dict(others or {})
    specs: dict[str, Spec] = {k: (cast.get(k, v.dtype), tuple(v.shape)) for k, v in tensors.items()}
    path = free_path(folder, name)
    header = header_metadata(path.stem, family, recipe, extra=metadata)
    write_streaming(path, specs, lambda k: _finite(k, tensors[k], specs[k][0]), header)
    return path


def _finite(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.detach().to(dtype)
    if cast.is_floating_point() and not cast.float().isfinite().all():
        raise ValueError(f"{key} is not finite in {dtype}; nothing was saved. Save as bf16 or fp32")
    return cast


def merge_file(
    folder: str | os.PathLike[str],
    name: str,
    base: str | os.PathLike[str],
    lora: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """base with a LoRA merged in, written tensor by tensor: everything else in the file stays as it is."""
    header, file = read_weights_header(base), read_lora(lora)
    weights = _weights(header)
    names = [layer_path(n) for n in weights]
    state = fit(file, dict(zip(names, weights.values(), strict=True)), names)
    layers = weight_keys(header.shapes, {k.rpartition(".")[0] for k in state})

    def merged(key: str, own: Tensor) -> Tensor:
        n = layers.get(key)
        return own if n is None else add_delta(key, own, state[f"{n}.down"], state[f"{n}.up"], scale)

    return rewrite(free_path(folder, name), base, merged, file.family, file.recipe, metadata)


def rewritable(base: str | os.PathLike[str]) -> Header:
    """The header of a file of which every tensor can be written again."""
    header = read_weights_header(base)
    if unknown := set(header.dtypes.values()) - DTYPE_NAMES.keys():
        named = ", ".join(sorted(unknown))
        raise ValueError(f"{base} holds tensors of type {named}, which cannot be written; take an fp16 or bf16 file")
    return header


def rewrite(
    path: Path,
    base: str | os.PathLike[str],
    change: Callable[[str, Tensor], Tensor],
    family: Family,
    recipe: Recipe | None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """base with every tensor as change(key, tensor) gives it, one after another; what describes it is added."""
    header = rewritable(base)
    specs: dict[str, Spec] = {k: (DTYPE_NAMES[d], header.shapes[k]) for k, d in header.dtypes.items()}
    found = dict(header.metadata) | header_metadata(path.stem, family, recipe, extra=metadata)
    with open_tensors(Path(base)) as get:
        write_streaming(path, specs, lambda key: change(key, get(key)), found)
    return path


def replace_weights(
    folder: str | os.PathLike[str],
    name: str,
    base: str | os.PathLike[str],
    trained: Mapping[str, Tensor],
    family: Family,
    *,
    recipe: Recipe | None = None,
) -> Path:
    """base with these weights in the place of its own, under its names and in its types; all else stays as it is.

    trained may have diffusers' names where the file has the family's own; each of its tensors must find its place.
    """
    header, shapes = read_weights_header(base), {k: tuple(v.shape) for k, v in trained.items()}
    own = {layer_path(k): k for k in network_keys(header.shapes)}
    pieces = {layer_path(k): Piece((k,)) for k in trained}
    if not pieces.keys() <= own.keys():
        pieces = native_pieces(shapes, family)
    if lost := next((p for p in pieces if p not in own), None):
        raise ValueError(f"{base} has no place for {lost!r}; give the file that the training began with")
    made = {own[p]: piece for p, piece in pieces.items()}

    def replaced(key: str, own: Tensor) -> Tensor:
        if key not in made:
            return own
        tensor = made[key].join([trained[k] for k in made[key].keys])
        # a 1x1 convolution in one layout is a Linear in the other
        return _finite(key, tensor.reshape(own.shape), own.dtype)

    return rewrite(free_path(folder, name), base, replaced, family, recipe)


def _weights(header: Header) -> dict[str, tuple[int, ...]]:
    """Layer -> shape of every weight that a LoRA could change."""
    inner = any(k.startswith(CHECKPOINT_PREFIX) for k in header.shapes)
    return {
        k.removesuffix(".weight"): shape
        for k, shape in header.shapes.items()
        if k.endswith(".weight")
        and len(shape) >= 2
        and not OTHERS.match(k)
        and (k.startswith(CHECKPOINT_PREFIX) or not inner)
    }
