"""The recipe that travels in a file's header, so that whoever loads it knows how to sample it."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..families import Family

RECIPE_KEY = "dmd.recipe"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student was made and how it is sampled; sigmas are ComfyUI's and end in 0."""

    family: str
    objective: str
    steps: int = 0  # 0: not a few-step student (a slider, say)
    sigmas: tuple[float, ...] = ()
    timesteps: tuple[int, ...] = ()
    gamma: float = 1.0  # 1: fresh noise at each step, 0: deterministic
    cfg: float = 1.0  # to sample with, as in KSampler
    trained_cfg: float | None = None  # the teacher's guidance during the distillation
    shift: float | None = None
    prediction: str = ""
    start_sigma: float | None = None  # where unit-variance noise enters, if that is not the usual start
    base: str = ""
    base_hash: str = ""
    rank: int = 0
    trained_on: str = ""
    strength_min: float = 0.0
    strength_max: float = 1.0
    notes: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.steps < 0 or (self.sigmas and len(self.sigmas) != self.steps + 1):
            raise ValueError(
                f"recipe: {self.steps} steps with {len(self.sigmas)} sigmas; give steps + 1 sigmas, the last one 0"
            )
        if self.timesteps and len(self.timesteps) != self.steps:
            raise ValueError(f"recipe: {self.steps} steps with {len(self.timesteps)} timesteps; give one for each step")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Keys of later versions are ignored; a broken recipe is a ValueError."""
        try:
            given = json.loads(text)
            known = {f.name for f in fields(cls)}
            values: dict[str, Any] = {k: v for k, v in given.items() if k in known}
            for k in ("sigmas", "timesteps"):
                values[k] = tuple(values.get(k, ()))
            return cls(**values)
        except (TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"the recipe in the file's header cannot be read ({error}); sample it by hand") from error

    def usage_hint(self) -> str:
        if not self.steps:
            return f"strength {self.strength_min:g} to {self.strength_max:g}"
        sampler = "lcm" if self.gamma == 1 else "euler" if self.gamma == 0 else f"DMD sampler, gamma {self.gamma:g}"
        shift = f", shift {self.shift:g}" if self.shift is not None else ""
        start = ", unit start noise" if self.start_sigma is not None else ""
        return f"{self.steps} step{'s' * (self.steps > 1)}, {sampler} + simple, cfg {self.cfg:g}{shift}{start}"


def read_recipe(metadata: Mapping[str, str]) -> Recipe | None:
    return Recipe.from_json(metadata[RECIPE_KEY]) if RECIPE_KEY in metadata else None


def header_metadata(
    title: str, family: Family, recipe: Recipe | None, kind: str = "", extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """modelspec.* and our recipe, all strings; kind is "lora" or empty for a whole model."""
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture + (f"/{kind}" if kind and family.architecture else ""),
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": title,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if recipe is not None:
        found |= {
            "modelspec.usage_hint": recipe.usage_hint(),
            "modelspec.prediction_type": {"eps": "epsilon"}.get(recipe.prediction, recipe.prediction),
            "modelspec.description": f"{recipe.objective}: {recipe.trained_on}".rstrip(": "),
            RECIPE_KEY: recipe.to_json(),
        }
        if recipe.timesteps:
            found["modelspec.timestep_range"] = f"{min(recipe.timesteps)},{max(recipe.timesteps)}"
        if recipe.base:
            found["modelspec.merged_from" if not kind else "ss_sd_model_name"] = recipe.base
    return {k: v for k, v in found.items() if v} | dict(extra or {})
