"""Models, steps and slider strengths against seeds: one labelled picture, and what was measured."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.sd
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io, ui
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ..dmd_core.metrics import pairwise_distance
from ..dmd_core.sheet import sheet
from ..dmd_core.weights.profiles import ENDINGS
from .evidence import evidence, graph_of
from .few_step import Unrecognised, plan
from .sampler import guider_of, sample_latent
from .slider_files import NONE, Slider, SliderSet, choices, fitting, slider_of

MODELS = ("model", "model_2", "model_3", "model_4")
MAX_IMAGES = 400
SIDE = 32  # pixels at which images are compared


@dataclass(frozen=True)
class Row:
    label: str
    images: Tensor  # [n 3 h w] in -1..1
    seconds: float  # per image, without decoding
    why: str
    across: str = "seeds"  # what the columns are

    def measured(self) -> str:
        apart = ""
        if len(self.images) > 1:
            small = rearrange(functional.interpolate(self.images, (SIDE, SIDE), mode="area"), "b c h w -> b (c h w)")
            apart = f", {self.across} differ by {pairwise_distance(small):.3g}"
        return f"{self.label}: {self.seconds:.3g} s per image{apart} ({self.why})"


def numbers(text: str, what: str, whole: bool = True) -> list[float]:
    """`1, 2, 4` as numbers."""
    try:
        found = [int(p) if whole else float(p) for p in text.replace(";", ",").split(",") if p.strip()]
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"{what} is {text!r}; give numbers with commas, such as 1, 2, 4")
    return found


@dataclass(frozen=True)
class Sweep:
    """One slider and the strengths that it is tried at."""

    slider: Slider | None
    strengths: tuple[float, ...]

    @classmethod
    def of(cls, choice: str, strengths: str, sliders: Sequence[Slider] | None) -> "Sweep":
        if choice == NONE:
            return cls(None, (0.0,))
        return cls(slider_of(choice, sliders), tuple(numbers(strengths, "strengths", whole=False)))

    def at(self, model: Any, strength: float) -> Any:
        """The MODEL with it, as a stock loader would have it; 0 is the MODEL itself."""
        if self.slider is None or strength == 0:
            return model
        slider, _notes = fitting(model, self.slider)
        tensors, metadata = slider.tensors, slider.metadata
        return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0, lora_metadata=metadata)[0]

    def label(self, strength: float) -> str:
        if self.slider is None:
            return ""
        beyond = ", beyond its range" if self.slider.beyond(strength) else ""
        return f"{Path(self.slider.name).stem} {strength:+g}{beyond}"


def titles(models: dict[str, Any], graph: Any, node: str) -> dict[str, str]:
    """What the rows of each input are called: after its file; where two have one file, after the input as well."""
    files = {name: file_of(model, graph, node, name) for name, model in models.items()}
    shared = [file for file in files.values() if list(files.values()).count(file) > 1]
    inputs = {name: name.replace("_", " ") for name in models}
    return {k: f"{inputs[k]}, {f}" if f in shared and f else f or inputs[k] for k, f in files.items()}


def file_of(model: Any, graph: Any, node: str, name: str) -> str:
    """The LoRA that is nearest to the input, else the checkpoint; nothing where neither has a name."""
    base, loras = evidence(model, graph, node, name)
    named = [e.name for e in loras if e.strength and e.name and not e.name.startswith("a LoRA")]
    return ENDINGS.sub("", (*named, base.name)[0]).replace("_", " ")  # a label breaks at spaces


def settings(model: Any, latent: dict[str, Any], steps: int, cfg: float, graph: Any, node: str, name: str) -> tuple:
    """MODEL, SAMPLER, SIGMAS, cfg and why; a model that was never distilled gets Euler on `simple`."""
    try:
        found = plan(model, latent, steps=steps, graph=graph, node=node, name=name)
        return found.model, found.sampler, found.sigmas, found.cfg, found.profile.title
    except Unrecognised:
        if not steps:
            raise
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    return model, comfy.samplers.sampler_object("euler"), sigmas, cfg, f"not distilled: euler, simple, cfg {cfg:g}"


def picture_row(chosen: tuple, conds: tuple, latent: dict[str, Any], vae: Any, seeds: Sequence[int]) -> tuple:
    """Images of one row and the seconds each took, one seed at a time as they would be queued."""
    model, sampler, sigmas, cfg, _ = chosen
    images, seconds = [], 0.0
    for seed in seeds:
        began = time.perf_counter()
        out = sample_latent(model, guider_of(model, *conds, cfg), sampler, sigmas, latent, seed)["samples"]
        seconds += time.perf_counter() - began
        pixels = vae.decode(out)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])[:1]  # of a video, the first frame
        images.append(rearrange(pixels, "b h w c -> b c h w") * 2 - 1)
    return torch.cat(images).float().cpu(), seconds / len(seeds)


class Grid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        others = [io.Model.Input(name, optional=True, tooltip="Another model to compare with.") for name in MODELS[1:]]
        return io.Schema(
            node_id="DMD_Grid",
            display_name="Compare Grid",
            category="DMD/sample",
            description="Samples models x steps x slider strengths for the same seeds and prompt, each as it wants to "
            "be sampled, and shows them as one labelled picture with times and variety. With two sliders and one seed, "
            "one slider is the rows and the other the columns.",
            search_aliases=["xy plot", "compare", "grid", "sheet", "teacher against student", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="The model, or the first of several."),
                io.Conditioning.Input("positive", tooltip="The prompt of all images."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; counts where cfg is above 1."),
                io.Vae.Input("vae", tooltip="Turns latents into pictures."),
                io.Latent.Input("latent", tooltip="An empty LATENT: the size of one image."),
                io.String.Input(
                    "steps",
                    default="0",
                    tooltip="Numbers of steps with commas, such as 4, 40. 0 takes what a few-step model was made for. "
                    "Steps that a model has no levels for are left out, which the text says.",
                ),
                io.String.Input("seeds", default="0, 1, 2, 3", tooltip="Seeds with commas: the columns."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="For models that were never distilled; few-step models take their own.",
                ),
                io.Combo.Input(
                    "slider",
                    options=choices(),
                    default=NONE,
                    tooltip="A slider or other LoRA to try at several strengths, or an entry of the connected set.",
                    advanced=True,
                ),
                io.String.Input(
                    "strengths",
                    default="0",
                    tooltip="Strengths of the slider with commas, such as -1, 0, 1.",
                    advanced=True,
                ),
                io.Int.Input(
                    "cell",
                    default=256,
                    min=64,
                    max=1024,
                    step=32,
                    tooltip="Size of one image, in pixels.",
                    advanced=True,
                ),
                *others,
                io.Combo.Input(
                    "slider_2",
                    options=choices(),
                    default=NONE,
                    tooltip="A second slider: with a single seed its strengths are the columns.",
                    advanced=True,
                ),
                io.String.Input(
                    "strengths_2",
                    default="-1, 0, 1",
                    tooltip="Strengths of the second slider with commas.",
                    advanced=True,
                ),
                SliderSet.Input(
                    "sliders", optional=True, tooltip="From Train Slider or Discover Sliders: set 1, set 2, ..."
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The labelled picture."),
                io.String.Output("measured", display_name="measured", tooltip="Seconds and variety of each row."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        vae: Any,
        latent: dict[str, Any],
        steps: str = "0",
        seeds: str = "0, 1, 2, 3",
        cfg: float = 5.0,
        slider: str = NONE,
        strengths: str = "0",
        cell: int = 256,
        slider_2: str = NONE,
        strengths_2: str = "-1, 0, 1",
        sliders: Sequence[Slider] | None = None,
        **others: Any,
    ) -> io.NodeOutput:
        chosen = [int(s) for s in numbers(seeds, "seeds")]
        one, two = Sweep.of(slider, strengths, sliders), Sweep.of(slider_2, strengths_2, sliders)
        flat = two.slider is not None and len(chosen) == 1
        models = {"model": model} | {k: others[k] for k in MODELS[1:] if others.get(k) is not None}
        axes = [
            (name, m, int(n), s, t)
            for name, m in models.items()
            for n in numbers(steps, "steps")
            for s in one.strengths
            for t in ([two.strengths] if flat else [(t,) for t in two.strengths])
        ]
        heads = [two.label(t) for t in two.strengths] if flat else [f"seed {s}" for s in chosen]
        if len(axes) * len(heads) > MAX_IMAGES:
            raise ValueError(f"{len(axes) * len(heads)} images are asked for, {MAX_IMAGES} are accepted; use fewer")
        latent = {**latent, "samples": latent["samples"][:1]}
        rows, left = [], []
        at = graph_of(cls.hidden)
        called = titles(models, *at)
        for row in drawn(axes, called, (one, two), (positive, negative), vae, latent, chosen, cfg, at):
            (rows if isinstance(row, Row) else left).append(row)
        if not rows:
            raise ValueError("nothing could be sampled: " + "; ".join(left))
        page = sheet([r.images for r in rows], [r.label for r in rows], heads, cell)
        image = torch.from_numpy(np.array(page)).float().unsqueeze(0) / 255
        measured = "\n".join([*(r.measured() for r in rows), *left])
        return io.NodeOutput(image, measured, ui=ui.PreviewText(measured))


def drawn(
    axes: Sequence[tuple],
    called: dict[str, str],
    sweeps: tuple[Sweep, Sweep],
    conds: tuple,
    vae: Any,
    latent: dict,
    seeds: Sequence[int],
    cfg: float,
    at: tuple,
) -> Iterator[Row | str]:
    """A Row for each combination, or the sentence why there is none; columns are seeds, or strengths of the second."""
    bar, (one, two) = comfy.utils.ProgressBar(len(axes)), sweeps
    for name, model, steps, strength, others in axes:
        flat = len(others) > 1
        parts = [called[name], one.label(strength), "" if flat else two.label(others[0])]
        label = ", ".join(p for p in parts if p)
        made = []
        try:
            for other in others:
                with_both = two.at(one.at(model, strength), other)
                chosen = settings(with_both, latent, steps, cfg, *at, name)
                made.append((*picture_row(chosen, conds, latent, vae, seeds), chosen))
        except ValueError as error:
            yield f"{label}, {steps} steps left out: {error}"
        else:
            images, seconds, chosen = zip(*made, strict=True)
            count = len(chosen[0][2]) - 1
            yield Row(
                f"{label}, {count} step{'s' * (count != 1)}",
                torch.cat(images),
                sum(seconds) / len(seconds),
                chosen[0][4],
                "strengths" if flat else "seeds",
            )
        bar.update(1)
