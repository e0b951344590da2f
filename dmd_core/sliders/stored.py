"""What a slider's run keeps on disk beside its states: the pool, what was seen in it, and the finished sliders."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runs import Run
from ..trainstate import save_atomic
from .card import SliderCard, from_metadata
from .pool import Pool

STEP = "dmd_step"  # in a finished slider's header: the training step that it was measured at


def key_of(settings: Mapping[str, Any]) -> str:
    """A short name for whatever decides how something was made."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read(path: Path, key: str) -> dict[str, Tensor] | None:
    """None where there is no such file, it is damaged, or it was made otherwise."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError):
        return None


def kept(path: Path, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from disk, made where they are not there yet."""
    found = read(path, key)
    if found is None:
        found = {k: v.detach().cpu().contiguous() for k, v in make().items()}
        save_atomic(found, path, {"key": key})
    return found


def kept_pool(folder: Path, key: str, n: int, draw: Callable[[int], Iterator[Pool]]) -> Iterator[Pool]:
    """Parts of a pool of n, from disk as far as they lie there; draw(begin) makes the rest."""
    begin, number = 0, 0
    while begin < n and (part := read(folder / f"part_{number:05d}.safetensors", key)) is not None:
        pool = Pool(part["latents"][: n - begin], part["row"][: n - begin])
        begin, number = begin + len(pool), number + 1
        yield pool
    for pool in draw(begin):
        tensors = {"latents": pool.latents.cpu().contiguous(), "row": pool.row}
        save_atomic(tensors, folder / f"part_{number:05d}.safetensors", {"key": key})
        number += 1
        yield pool


@dataclass(frozen=True)
class Finished:
    """A slider as its run left it: weights with the unit in them, and what was measured."""

    state: dict[str, Tensor]
    card: SliderCard


def write_sliders(run: Run, sliders: list[Finished], step: int) -> None:
    """Replaces what was there; the last one is written last, so a torn set is seen as none."""
    folder = run.path / "sliders"
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for i, slider in enumerate(sliders):
        tensors = {k: v.detach().cpu().contiguous() for k, v in slider.state.items()}
        header = slider.card.metadata() | {STEP: str(step), "of": str(len(sliders))}
        save_atomic(tensors, folder / f"{i + 1:02d}.safetensors", header)


def read_sliders(run: Run, step: int | None = None) -> list[Finished]:
    """All sliders of a run; none where it has none yet, or where they were measured at another step."""
    found = []
    for path in sorted((run.path / "sliders").glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                state = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and queue the run again") from error
        card = from_metadata(header)
        if card is None or (step is not None and header.get(STEP) != str(step)):
            return []
        found.append((Finished(state, card), int(header["of"])))
    return [f for f, _ in found] if found and len(found) == found[0][1] else []
