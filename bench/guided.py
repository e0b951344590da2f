"""Files made up by atheris, which looks at what each byte makes our readers do: `python -m bench.guided -runs=N`.

Not among the pack's packages: `pip install atheris` (Linux). Anything but a ValueError ends it with a traceback.
"""

import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch
from safetensors.torch import save_file

with atheris.instrument_imports(include=["dmd_core.weights", "dmd_core.runfile", "dmd_core.prompts", "dmd_core.pairs"]):
    from dmd_core.pairs import read_pairs
    from dmd_core.prompts import parse_prompts
    from dmd_core.runfile import parse_run_file
    from dmd_core.weights.doctor import describe, diagnose
    from dmd_core.weights.header import read_header
    from dmd_core.weights.lora import read_lora

FILE = Path(tempfile.mkdtemp()) / "x.safetensors"


def taken_or_refused(read: Callable[[Any], object], given: Any) -> None:
    said = "read"
    try:
        read(given)
    except ValueError as error:
        said = str(error)
    assert said.strip(), "refused without a word"


def as_header(data: bytes) -> None:
    """Half of the files have a true length in front, or hardly any would get past it."""
    FILE.write_bytes(struct.pack("<Q", len(data) - 1) + data[1:] if data[:1] > b"\x7f" else data[1:])
    for read in (read_header, diagnose, describe, read_lora, read_pairs):
        taken_or_refused(read, FILE)


def as_text(data: bytes) -> None:
    text = data[1:].decode("utf-8", "replace")
    for read in (parse_run_file, parse_prompts):
        taken_or_refused(read, text)


def once(data: bytes) -> None:
    (as_text if data[:1] < b"\x40" else as_header)(data)
    assert [p.name for p in FILE.parent.iterdir()] in ([], [FILE.name]), "something else was written"


def seeds(folder: Path) -> None:
    """One sound file of each kind to begin with: from nothing, an hour does not find JSON."""
    lora = {f"base_model.model.a.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    native = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4, 1, 1)}
    for i, tensors in enumerate((lora, native)):
        save_file(tensors, FILE, {"modelspec.title": "a"})
        (folder / f"seed_{i}").write_bytes(b"\x80" + FILE.read_bytes()[8:])
        (folder / f"seed_{i}_whole").write_bytes(b"\x41" + FILE.read_bytes())
    run = '[model]\npath = "m"\n[method]\nname = "dmd2"\n[data]\nprompts = "p.txt"\n[train]\nsteps = 3\n'
    (folder / "seed_run").write_bytes(b"\x00" + run.encode())
    (folder / "seed_prompts").write_bytes(b"\x00a cat\n# no\n\na dog")
    FILE.unlink()


with tempfile.TemporaryDirectory() as corpus:
    seeds(Path(corpus))
    atheris.Setup([*sys.argv, corpus], once)
    atheris.Fuzz()
