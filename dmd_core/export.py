"""What a finished run leaves: a LoRA file, or a model where all of it was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from .drive import best_snapshot
from .weights.checkpoint import replace_weights, save_model
from .weights.lora import save_lora
from .weights.recipe import Recipe

if TYPE_CHECKING:
    from .headless import Job


def export(job: "Job") -> Path | None:
    """The best snapshot as a LoRA file that ComfyUI loads, or as a model where all of it was trained."""
    chosen = best_snapshot(job.run)
    if chosen is None or job.run.states() == []:
        return None
    recipe = job.recipe(f"{len(job.prompts)} prompts, {chosen.name}")
    names = [n for n, _ in job.source.net.named_modules()]
    state = load_file(chosen / "student.safetensors")
    family = job.source.family
    if job.file.model.full:
        path = export_copy(job, state, recipe)
    else:
        path = save_lora(job.run.path / "lora", job.run.name, state, names, family=family, recipe=recipe)
    job.say(f"the student of {chosen.name} is in {path}")
    return path


def export_copy(job: "Job", state: Mapping[str, Tensor], recipe: Recipe) -> Path:
    """As the base came: in its file's layout with all else that is in the file, or the network alone."""
    folder, name, base, family = job.run.path / "model", job.run.name, job.file.base_file, job.source.family
    if base is not None:
        return replace_weights(folder, name, base, state, family, recipe=recipe)
    whole = {k: state.get(k, v).to(v.dtype) for k, v in job.source.net.state_dict().items()}
    return save_model(folder, name, whole, family, recipe=recipe, dtype=None)
