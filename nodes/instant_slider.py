"""A slider without training, to see whether an idea works before paying for it: three forwards per step."""

from collections.abc import Callable
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from .comfy_denoiser import latent_shapes
from .slider_timing import LAST_STEP, Span

KEY = "dmd_instant"


def steered(model: Any, ends: tuple[Any, Any], strength: float, span: Span) -> Any:
    """A clone whose prediction is x0 + strength * (x0 of one end - x0 of the other); several nodes add up."""
    model = model.clone()
    key = f"{KEY}_{len(model.model_options.get('sampler_post_cfg_function', []))}"
    model.set_model_sampler_post_cfg_function(pull(ends, strength, span, key))
    return model


def pull(ends: tuple[Any, Any], strength: float, span: Span, key: str) -> Callable[[dict[str, Any]], Tensor]:
    def after_cfg(args: dict[str, Any]) -> Tensor:
        model, x, sigma = args["model"], args["input"], args["sigma"]
        options = args["model_options"]
        run = options["transformer_options"]
        here = {**run, "sigmas": sigma}
        if not span.works(model.model_sampling, here):
            return args["denoised"]
        if key not in run or run[key][0] != x.shape:
            run[key] = (x.shape, [prepared(model, end, x) for end in ends])
        # one at a time: in one call the second would count as CFG's negative
        plus, minus = (comfy.samplers.calc_cond_batch(model, [c], x, sigma, options)[0] for c in run[key][1])
        return args["denoised"] + strength * (plus - minus)

    return after_cfg


def prepared(model: Any, conditioning: Any, x: Tensor) -> Any:
    """What the family makes of a prompt, for this size and batch."""
    converted = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
    blank = torch.zeros_like(x)
    found = comfy.samplers.process_conds(
        model, blank, converted, x.device, latent_image=blank, seed=0, **latent_shapes(x)
    )
    return found["positive"]


def encode(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def same(a: Any, b: Any) -> bool:
    """Do two prompts mean the same to this text encoder?"""
    pairs = [(a[0][0], b[0][0]), (a[0][1].get("pooled_output"), b[0][1].get("pooled_output"))]
    return all(
        x is y or (x is not None and y is not None and x.shape == y.shape and torch.equal(x, y)) for x, y in pairs
    )


class InstantSlider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        share: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001, "advanced": True}
        step: dict[str, Any] = {"min": 0, "max": LAST_STEP, "advanced": True}
        return io.Schema(
            node_id="DMD_InstantSlider",
            display_name="Instant Slider",
            category="DMD/sliders",
            description="A slider from words at once, without training, to try an idea. Every step where it works "
            "costs three forwards of the model instead of one (four with CFG); strength 0 costs nothing. If it does "
            "what you want, train it with the same words.",
            search_aliases=["slider", "freesliders", "training free", "prompt direction", "preview slider", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="Any model. The prompt itself stays in the sampler."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input("positive", default="a photo of a very old person", tooltip="The end at +1, in words."),
                io.String.Input(
                    "negative", default="a photo of a very young person", tooltip="The end at -1, in words."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-3.0,
                    max=3.0,
                    step=0.05,
                    round=0.001,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="0 is off, negative is the other way. Nobody measured what 1 means here.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    tooltip="Share of the sampling before which it is off. 0.3 leaves the composition alone, and saves "
                    "the time.",
                    **share,
                ),
                io.Float.Input(
                    "end", default=1.0, tooltip="Share of the sampling from which on it is off again.", **share
                ),
                io.Int.Input("start_step", default=0, tooltip="First step at which it works, counted from 0.", **step),
                io.Int.Input(
                    "end_step", default=LAST_STEP, tooltip="First step at which it does not work any more.", **step
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the slider; unchanged at strength 0.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        positive: str,
        negative: str,
        strength: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        start_step: int = 0,
        end_step: int = LAST_STEP,
    ) -> io.NodeOutput:
        span = Span(start=start, end=end, first=start_step, last=end_step)
        if span.empty:
            raise ValueError(
                f"it starts at {start:g} (step {start_step}) and ends at {end:g} (step {end_step}); let it end later"
            )
        if strength == 0:
            return io.NodeOutput(model)
        ends = encode(clip, positive), encode(clip, negative)
        if same(*ends):
            raise ValueError(
                f"the positive prompt {positive!r} and the negative prompt {negative!r} mean the same to this model; "
                "a slider needs two different ends, in words that the text encoder knows"
            )
        return io.NodeOutput(steered(model, ends, strength, span))
