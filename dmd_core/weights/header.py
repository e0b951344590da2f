"""What a weight file says about itself, read without loading a tensor and without running anything in it."""

import hashlib
import json
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import cancel

Shape = tuple[int, ...]

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
MAX_PICKLE = 64_000_000  # bytes of the index inside a .bin; a 12B model's is under 1 MB
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
WRAPPERS = ("state_dict", "generator", "ema", "model", "params_ema", "params", "module")
HARMLESS = re.compile(
    r"(collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter|tensor)|torch Size"
    r"|torch (\w+Storage|b?float\d*|half|double|u?int\d+|bool|long|float8_\w+)|torch\.storage \w+Storage"
    r"|_codecs encode|numpy\.core\.multiarray _reconstruct|numpy dtype)$"
)


class Refused(ValueError):
    """A file that is not opened, with the reason and what to do."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """Names, shapes and metadata of a file. sha256 is of the header's bytes: cheap, and different for every file."""

    name: str  # file name with its ending, no folder
    size: int  # bytes
    format: str  # "safetensors" or "pickle"
    sha256: str = ""
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    wrapper: str = ""  # the key a pickled dict was found under


def content_hash(path: Path) -> str:
    """sha256 of a whole file, taken once while it stays as it is: a second or two for each gigabyte."""
    about = path.stat()
    return _content_hash(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=256)
def _content_hash(path: Path, _changed: int, _size: int) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            cancel.ask()
            sha.update(chunk)
    return sha.hexdigest()


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a .safetensors, .bin, .pt, .pth or .ckpt file, told apart by content and not by name."""
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not a file"
        raise Refused(f"{path.name} is {what}; give the path of a .safetensors, .bin, .pt or .ckpt file")
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(16)
    if head[4:9] == b"\0\0\0\0{":  # a length of 128 or 640 bytes begins like a pickle, one of 19280 like a zip
        return _safetensors_header(path, size)
    if head[:2] == b"PK":
        return _pickle_header(path, size)
    if head[:4] == b"GGUF":
        raise Refused(f"{path.name} is a GGUF file; it has no header this can read, use the GGUF loader's own tools")
    if head[:1] == b"\x80":
        raise Refused(
            f"{path.name} is a bare pickle, which may run code when it is loaded; nothing was executed. "
            "Ask for a .safetensors file, or re-save it with a current torch from a source you trust"
        )
    if head[:1] in (b"<", b"{") or head[:7] == b"version":
        kind = "a web page" if head[:1] == b"<" else "a text file (a Git LFS pointer or an error message)"
        raise Refused(f"{path.name} holds {kind} instead of weights; download it again")
    if head and all(32 <= b < 127 or b in b"\t\r\n" for b in head):  # a length has zeros among its eight bytes
        raise Refused(
            f"{path.name} holds text, no weights; give the path of a .safetensors, .bin, .pt or .ckpt file, "
            "or download it again if it was to be one"
        )
    return _safetensors_header(path, size)


def _safetensors_header(path: Path, size: int) -> Header:
    if size < 10:
        raise Refused(f"{path.name} has {size} bytes, too few for any weights; download it again")
    with path.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        if length > MAX_HEADER or length > size - 8:
            raise Refused(
                f"{path.name} is not a safetensors file or is cut off: it announces a header of {length} bytes, "
                f"the file has {size}; download it again"
            )
        raw = f.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path.name} has a broken safetensors header ({error}); download it again") from None
    if not isinstance(entries, dict):
        raise Refused(f"{path.name} has a safetensors header that is no table; download it again")
    metadata = entries.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused(f"{path.name} has metadata that is no table of text; re-save the file")
    shapes, dtypes, spans = {}, {}, []
    for name, entry in entries.items():
        check_name(name, path.name)
        shape, dtype, (start, end) = _entry(name, entry, path.name)
        shapes[name], dtypes[name] = shape, dtype
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise Refused(
                f"{path.name}: the data of {name!r} overlaps another tensor or leaves a gap; download it again"
            )
        position = end
    if position != size - 8 - length:
        missing = position - (size - 8 - length)
        state = f"is cut off, {missing} bytes are missing" if missing > 0 else f"has {-missing} bytes too many"
        raise Refused(f"{path.name} {state}; download it again")
    digest = hashlib.sha256(raw).hexdigest()
    return Header(
        name=path.name,
        size=size,
        format="safetensors",
        sha256=digest,
        shapes=shapes,
        dtypes=dtypes,
        metadata=metadata,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _entry(name: str, entry: Any, file: str) -> tuple[Shape, str, tuple[int, int]]:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, end)
        whole = all(type(n) is int and 0 <= n < 2**62 for n in numbers)
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise Refused(f"{file}: the entry of {name!r} is broken; download it again")
    if dtype not in BITS:
        raise Refused(
            f"{file}: {name!r} has the number format {dtype!r}, which is not known; known are {', '.join(BITS)}"
        )
    bits = BITS[dtype]
    for n in shape:
        bits *= n
    if end < start or bits != (end - start) * 8:
        raise Refused(f"{file}: {name!r} claims shape {shape} in {dtype} but {end - start} bytes; download it again")
    return shape, dtype, (start, end)


def check_name(name: str, file: str) -> None:
    """Tensor names become keys and file names elsewhere: a path or control character in one is an attack or damage."""
    if not name or len(name) > 500 or not name.isprintable() or ".." in name or re.match(r"[/\\~]|\w:[/\\]", name):
        raise Refused(f"{file}: the tensor name {name[:80]!r} looks like a path or is damaged; do not use this file")


def _pickle_header(path: Path, size: int) -> Header:
    """First the list of what the pickle would call; only if that is harmless, shapes by torch's restricted loader."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            for info in infos:
                if info.filename.startswith(("/", "\\")) or ".." in Path(info.filename.replace("\\", "/")).parts:
                    raise Refused(
                        f"{path.name} contains the path {info.filename!r}, which leaves its folder; do not use it"
                    )
                if info.compress_type != zipfile.ZIP_STORED:
                    raise Refused(
                        f"{path.name} is a compressed archive, not a torch file; unpack it and give the file inside"
                    )
            indexes = [i for i in infos if i.filename.endswith("/data.pkl") or i.filename == "data.pkl"]
            if len(indexes) != 1:
                raise Refused(f"{path.name} is an archive without a torch index; give the weight file inside it")
            if indexes[0].file_size > MAX_PICKLE:
                raise Refused(f"{path.name} has an index of {indexes[0].file_size} bytes; do not use it")
            raw = archive.read(indexes[0])
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
        raise Refused(f"{path.name} is cut off or damaged ({error}); download it again") from None
    dangerous = sorted(called(raw) - {c for c in called(raw) if HARMLESS.match(c)})
    if dangerous:
        raise Refused(
            f"{path.name} would call {', '.join(dangerous[:4])} when it is loaded; nothing was executed. "
            "Weights need no such call: do not use this file, ask for a .safetensors"
        )
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise Refused(f"{path.name} cannot be read as weights ({type(error).__name__}); download it again") from None
    wrapper, tensors = unwrapped(loaded)
    if not tensors:
        raise Refused(f"{path.name} holds no table of tensors; give a file of weights")
    for name in tensors:
        check_name(name, path.name)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    return Header(
        name=path.name,
        size=size,
        format="pickle",
        sha256=hashlib.sha256(raw).hexdigest(),
        shapes={k: tuple(v.shape) for k, v in tensors.items()},
        dtypes={k: names.get(v.dtype, str(v.dtype).removeprefix("torch.")) for k, v in tensors.items()},
        wrapper=wrapper,
    )


def called(raw: bytes) -> set[str]:
    """Every function a pickle names, "module name", found by walking its opcodes without running them."""
    found: set[str] = set()
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument))
            elif opcode.name == "STACK_GLOBAL":
                found.add(" ".join(strings[-2:]) if len(strings) > 1 else "something unnamed")
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                found.add("a registered extension")
            if isinstance(argument, str) and "UNICODE" in opcode.name:
                strings.append(argument)
            elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                strings.append("?")  # a memoised string could name anything
    except Exception:
        found.add("a damaged instruction list")
    return found


def unwrapped(loaded: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """The tensors of a loaded pickle, and the key they were wrapped in ("" if none)."""
    if not isinstance(loaded, Mapping):
        return "", {}
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if tensors:
        return "", tensors
    for key in WRAPPERS:
        inner = loaded.get(key)
        if isinstance(inner, Mapping):
            deeper, tensors = unwrapped(inner)
            if tensors:
                return f"{key}.{deeper}".rstrip("."), tensors
    return "", {}
