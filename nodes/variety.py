"""Seed variety for few-step students: the first part of the sampling differs from seed to seed, the rest repairs it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..dmd_core.variety import jitter_image, jitter_prompt

KEY = "dmd_variety"
PROMPT, IMAGE = "jitter the prompt", "jitter the first image"
STRENGTH = 1.0  # of the prompt's jitter: closes most of the shapes student's gap to its teacher (bench/variety.py)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    kind: str
    strength: float
    last: float  # the sigma at which it ends

    def works(self, options: dict[str, Any]) -> bool:
        return KEY in options and float(options["sigmas"].max()) > self.last * (1 + 1e-3)


def vary(model: Any, settings: Jitter) -> Any:
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, with_seed)
    if settings.kind == PROMPT:
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, prompt_jitter(settings))
    else:
        model.set_model_sampler_post_cfg_function(image_jitter(settings))
    return model


def with_seed(executor, guider, sigmas, extra_args, *rest):
    """The run's own seed and first level, kept in the run's own options."""
    # the prediction of a single step is the image itself: nothing would repair it
    first = float(sigmas[0]) if len(sigmas) > 2 else float("inf")
    extra_args["model_options"]["transformer_options"][KEY] = {"seed": int(extra_args.get("seed") or 0), "first": first}
    return executor(guider, sigmas, extra_args, *rest)


def prompt_jitter(settings: Jitter) -> Callable[..., Tensor]:
    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        if c_crossattn is not None and settings.works(options):
            chunks = options["cond_or_uncond"]
            parts = list(c_crossattn.chunk(len(chunks)))
            for i, kind in enumerate(chunks):
                if kind == 0:  # the prompt, not CFG's negative
                    parts[i] = jitter_prompt(parts[i], settings.strength, options[KEY]["seed"])
            c_crossattn = torch.cat(parts)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return apply


def image_jitter(settings: Jitter) -> Callable[..., Tensor]:
    """On the first prediction alone: later ones are what the student makes of it."""

    def after_cfg(args: dict[str, Any]) -> Tensor:
        options = args["model_options"]["transformer_options"]
        sigma = float(args["sigma"].max())
        if KEY not in options or sigma < options[KEY]["first"] * (1 - 1e-4):
            return args["denoised"]
        return jitter_image(args["denoised"], settings.strength, options[KEY]["seed"])

    return after_cfg


class Variety(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_Variety",
            display_name="Seed Variety",
            category="DMD/sample",
            description="Few-step models draw nearly the same image for every seed. This lets the first part of the "
            "sampling differ more from seed to seed, at no cost. Where that is not enough, give the first steps to the "
            "undistilled model with Switch Models.",
            search_aliases=["diversity", "seed variance", "same image", "variation", "few step", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="A few-step model."),
                io.Combo.Input(
                    "how",
                    options=[PROMPT, IMAGE],
                    default=PROMPT,
                    tooltip="Prompt: its tokens are moved at random while the composition forms. Image: smooth random "
                    "light and colour go into the first prediction; that needs two steps or more.",
                ),
                io.Float.Input(
                    "strength",
                    default=STRENGTH,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    round=0.001,
                    tooltip="0 is off. More differs more, and in the end ignores the prompt.",
                ),
                io.Float.Input(
                    "end",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Up to which part of the sampling the prompt is moved; 0.25 is the first of four steps.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with more variety; the seed is the sampler's.")],
        )

    @classmethod
    def execute(cls, model: Any, how: str = PROMPT, strength: float = STRENGTH, end: float = 0.25) -> io.NodeOutput:
        if how not in (PROMPT, IMAGE):
            raise ValueError(f"how is {how!r}; use {PROMPT!r} or {IMAGE!r}")
        if strength == 0:
            return io.NodeOutput(model.clone())
        last = float(model.get_model_object("model_sampling").percent_to_sigma(end))
        return io.NodeOutput(vary(model, Jitter(kind=how, strength=strength, last=last)))
