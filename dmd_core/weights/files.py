"""safetensors files in and out: nothing is read unchecked, nothing overwritten, nothing left half-written."""

import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import cancel
from .header import Header, read_header

MAX_NAME = 120  # letters; Windows allows 260 for a whole path
SUFFIX = ".safetensors"
DTYPE_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {v: k for k, v in DTYPE_NAMES.items()}
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[:*?"<>|\x00-\x1f]')


def read_weights_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of a safetensors file. Pickles are refused: they run code when they are opened."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file at {path}; choose an existing {SUFFIX} file")
    with open(path, "rb") as file:
        start = file.read(9)
    # a header of 128 bytes begins like a pickle, one of 19280 like a zip: its bracket tells them apart
    if (start[:2] == b"PK" or start[:1] == b"\x80") and start[4:] != b"\0\0\0\0{":
        raise ValueError(
            f"{path} is a PyTorch pickle; only {SUFFIX} files are accepted here. Load it in ComfyUI and save it again "
            f"as {SUFFIX}, or look for the {SUFFIX} version of the download"
        )
    return read_header(path)


@contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Inside, a function that reads one tensor at a time."""
    try:
        with safe_open(path, "pt") as file:
            yield file.get_tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download or copy it again") from error


# --- writing ----------------------------------------------------------------------------------------------------------


def free_path(folder: str | os.PathLike[str], name: str, suffix: str = SUFFIX) -> Path:
    """folder/name_00001.safetensors, or the next number: nothing is ever overwritten, because loaders cache by path.

    The name may hold subfolders (`sliders/age`); it never leads out of the folder.
    """
    root = Path(folder)
    parts = str(name).removesuffix(suffix).replace("\\", "/").split("/")
    for part in parts:
        if not part.strip() or part in (".", "..") or part != part.strip(" ") or part.endswith("."):
            raise ValueError(
                f"{name!r} is no file name; give one such as 'my_model' or 'subfolder/my_model', inside the folder"
            )
        if _FORBIDDEN.search(part):
            raise ValueError(f'{name!r} holds one of : * ? " < > | or a control letter, which Windows forbids; rename')
        if _RESERVED.fullmatch(part):
            raise ValueError(f"{part!r} in {name!r} is a reserved name on Windows; choose another one")
        if len(part) > MAX_NAME:
            raise ValueError(f"the name {part[:20]!r}... has {len(part)} letters; {MAX_NAME} are accepted")
    target = root.joinpath(*parts)
    if not target.resolve().is_relative_to(root.resolve()):  # a link inside may lead out
        raise ValueError(f"{name!r} leads out of {root}; choose a name inside that folder")
    pattern = re.compile(re.escape(target.name) + r"_(\d+)" + re.escape(suffix))
    present = os.listdir(target.parent) if target.parent.is_dir() else []
    taken = [int(m[1]) for p in present if (m := pattern.fullmatch(p))]
    return target.with_name(f"{target.name}_{max(taken, default=0) + 1:05d}{suffix}")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to; renamed to `path` when all went well, gone when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


Spec = tuple[torch.dtype, tuple[int, ...]]


def write_streaming(
    path: Path, specs: Mapping[str, Spec], get: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """A safetensors file whose tensors are asked for one after another: only one is in memory at a time."""
    # widest types first keeps every tensor aligned, as the reference implementation does
    order = sorted(specs, key=lambda k: (-specs[k][0].itemsize, k))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key in order:
        dtype, shape = specs[key]
        if dtype not in _NAMES:
            raise ValueError(f"{key} is of type {dtype}, which cannot be saved; convert it to float16 or float32")
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        table[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with aside(path) as part, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(raw)))
        file.write(raw)
        for key in order:
            cancel.ask()
            dtype, shape = specs[key]
            tensor = get(key).detach().to("cpu", dtype).contiguous()
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{key} is {tuple(tensor.shape)}, announced was {shape}; the model changed meanwhile")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
