"""The LoRA of a difference: a distilled MODEL minus its base, one layer at a time, on the GPU where there is one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from torch import Tensor

from ..dmd_core.families import detect
from ..dmd_core.weights.extract import ExtractConfig, Layer, Weights, extract, state
from ..dmd_core.weights.lora import save_lora
from ..dmd_core.weights.profiles import Match, recognise
from ..dmd_core.weights.recipe import Recipe
from .evidence import Graph, evidence


@dataclass(frozen=True)
class Side:
    """One of the two models, under the names that ComfyUI has for its layers, whatever its file calls them."""

    model: Any
    what: str

    def weights(self) -> Weights:
        if self.model.patches:
            raise ValueError(f"the {self.what} model has LoRAs on it; connect it straight from its loader")
        found: dict[str, Tensor] = self.model.model.diffusion_model.state_dict()
        return Weights.of(found)


def save_difference(
    base: Any, distilled: Any, name: str, config: ExtractConfig, dtype: str, graph: Graph, node: str
) -> tuple[Path, str]:
    """The file, and in words how much of the difference it holds."""
    comfy.model_management.unload_all_models()  # weights of a running model may have a LoRA of another branch in them
    ours, theirs = Side(base, "base").weights(), Side(distilled, "distilled").weights()
    net = base.model.diffusion_model
    family = detect(net)
    layers = list(found_layers(ours, theirs, config))
    match = recognise(*evidence(distilled, graph, node, "distilled"))
    path = save_lora(
        folder_paths.get_folder_paths("loras")[0],
        name,
        state(iter(layers)),
        [n for n, _ in net.named_modules()],
        family=family,
        recipe=recipe_of(match, family.name, config.rank),
        dtype=dtype,
    )
    return path, words(layers, match)


def found_layers(base: Weights, distilled: Weights, config: ExtractConfig) -> list[Layer]:
    bar, found = None, []
    for layer in extract(base, distilled, config):
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(layer.total)
        bar.update_absolute(layer.done)
        found.append(layer)
    return found


def recipe_of(match: Match, family: str, rank: int) -> Recipe | None:
    """How the distilled model is sampled, where that is known and a recipe can say it."""
    p = match.profile
    if p is None or p.space == "sigma" or p.keep != "time" or not isinstance(p.gamma, int | float):
        return None
    levels = p.trained()
    times = {"timesteps": tuple(int(t) for t in levels)} if p.space == "vp" else {"sigmas": (*levels, 0.0)}
    return Recipe(
        family=family,
        objective=p.id,
        steps=p.steps,
        gamma=float(p.gamma),
        cfg=p.cfg[0],
        shift=p.shift,
        prediction=p.prediction,
        rank=rank,
        trained_on=f"not trained: the difference of {match.source or p.title} and its base",
        **times,
    )


def words(layers: list[Layer], match: Match) -> str:
    held = [x for x in layers if x.down is not None]
    worst = min(held, key=lambda x: x.kept)
    mean = sum(x.kept for x in held) / len(held)
    lines = [
        f"{len(held)} of {len(layers)} layers, rank {min(x.rank for x in held)} to {max(x.rank for x in held)}.",
        f"Kept of the difference: {mean:.1%} on average, {worst.kept:.1%} in the worst layer ({worst.name}). A trained "
        "LoRA of the same rank is usually better; a higher rank keeps more.",
    ]
    lost = [x for x in layers if x.down is None and x.kept == 0]
    if lost:
        lines.append(f"{len(lost)} norms and biases changed too, which a LoRA cannot hold.")
    lines.append(
        f"Sampled as {match.profile.title}: {match.reason}." if match.profile else f"How to sample it: {match.reason}."
    )
    return "\n".join(lines)
