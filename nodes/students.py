"""The run folders of this ComfyUI, and the students in them as LoRA and MODEL."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import numpy
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..dmd_core.curves import curves
from ..dmd_core.drive import best_snapshot, loss_series
from ..dmd_core.families import Family, by_name
from ..dmd_core.runs import Run, locate, step_of
from ..dmd_core.weights.lora import DTYPES, lora_tensors
from ..dmd_core.weights.recipe import Recipe, header_metadata

BEST, LAST = "best", "last"


def root() -> Path:
    return Path(folder_paths.get_output_directory()) / "dmd"


def find_run(name: str) -> Run:
    """A run that exists."""
    run = Run(locate(root(), name))
    if not (run.path / "run.json").is_file():
        raise ValueError(f"there is no run {name!r} in {root()}; give the name that Distill says, or train one first")
    return run


def find_snapshot(run: Run, choice: str) -> Path:
    """best, last, or the step in a snapshot's name."""
    found = run.snapshots()
    if not found:
        raise ValueError(
            f"the run {run.name!r} has no snapshot yet; train it further (one is made at the end of a run)"
        )
    if choice == BEST:
        return best_snapshot(run) or found[-1]
    if choice == LAST:
        return found[-1]
    match = [p for p in found if str(step_of(p)) == choice.strip()]
    if not match:
        steps = ", ".join(str(step_of(p)) for p in found)
        raise ValueError(f"the run {run.name!r} has no snapshot {choice!r}; use best, last, or one of {steps}")
    return match[0]


@dataclass(frozen=True, kw_only=True)
class Student:
    """One snapshot: what its LoRA holds and how it is sampled."""

    name: str
    state: dict[str, Tensor]
    names: list[str]  # of all layers of the network
    family: Family
    recipe: Recipe

    @classmethod
    def at(cls, run: Run, snapshot: Path) -> "Student":
        try:
            noted = json.loads((run.path / "network.json").read_text(encoding="utf-8"))
            recipe, names = Recipe.from_json(noted["recipe"]), list(noted["names"])
            state = load_file(snapshot / "student.safetensors")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the snapshot {snapshot.name} of run {run.name!r} cannot be read ({error}); choose another one, "
                "or queue its Distill node again"
            ) from error
        return cls(name=run.name, state=state, names=names, family=by_name(recipe.family), recipe=recipe)

    def lora(self, dtype: str = "fp16") -> dict[str, Tensor]:
        """As a file would hold it: LORA_MODEL."""
        return lora_tensors(self.state, self.family, self.names, dtype=DTYPES[dtype])

    def on(self, model: Any, strength: float = 1.0) -> Any:
        """The MODEL with this student; the one given stays as it is."""
        metadata = header_metadata(self.name, self.family, self.recipe, "lora")
        return comfy.sd.load_lora_for_models(model, None, self.lora(), strength, 0.0, lora_metadata=metadata)[0]


def loss_map(run: Run) -> dict[str, list[float]]:
    """ComfyUI's LOSS_MAP: `loss` is the student's (or all, without one), the others stand beside it by name."""
    history = run.history()
    found = loss_series(history)
    own = {k for k in found if k.startswith("student/")} or set(found)
    steps = [[v for k, v in r.get("losses", {}).items() if k in own and v is not None] for r in history]
    return {"loss": [sum(step) for step in steps if step], **found}


def curves_of(run: Run) -> Image.Image:
    history = run.history()
    if not history:
        raise ValueError(f"the run {run.name!r} has no finished step yet; there is nothing to show")
    return curves(loss_series(history))


def sheet_of(run: Run, snapshot: Path) -> Image.Image:
    """The contact sheet, or the curves where no samples could be drawn."""
    path = snapshot / "sheet.png"
    return Image.open(path) if path.is_file() else curves_of(run)


def image_of(picture: Image.Image) -> Tensor:
    """IMAGE. [1 h w 3]"""
    return torch.from_numpy(numpy.array(picture.convert("RGB"))).float()[None] / 255


def mark_of(name: Any) -> str:
    """Changes whenever a run does, so that ComfyUI does not answer from its cache."""
    try:
        run = find_run(name)
    except (ValueError, TypeError):
        return "none"
    sliders = sorted((run.path / "sliders").glob("*.safetensors"))[-1:]  # they are measured after the last state
    return " ".join(p.name for p in (*run.states()[:1], *run.snapshots()[-1:], *sliders))
