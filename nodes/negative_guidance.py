"""Negative prompts at cfg 1: normalized attention guidance on any MODEL with text attention.

UNets: cross-attention alone is asked a second time, with the negative prompt, which costs less than CFG. Transformers:
text and image change together, so the negative prompt's rows go through the network beside the others, as with CFG, at
about its cost; after each attention both get the same image tokens, so only their texts differ. Measured:
docs/benchmarks.md.
Nothing outlives a run: the prepared prompt travels in the run's own options.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..dmd_core.attention_guidance import guided_attention, per_sample, tiled
from ..dmd_core.families import by_name, detect
from .comfy_denoiser import latent_shapes

KEY = "dmd_negative"
JOINT = ("flux", "flux2", "sd3", "qwen_image", "z_image")  # text tokens first, then the image's, in one attention
CROSS = ("WAN21", "WAN22", "Anima", "LTXV", "CosmosPredict2", "PixArt")  # model classes with text in cross-attention


@dataclass(frozen=True, kw_only=True)
class Guidance:
    scale: float
    limit: float
    blend: float
    first: float  # sigmas between which it works
    last: float
    kind: str  # unet, joint, cross
    multiple: int = 1  # text tokens are padded to a multiple of this

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        return guided_attention(positive, negative, self.scale, self.limit, self.blend)

    def works(self, options: dict[str, Any]) -> bool:
        sigma = float(options["sigmas"].max())
        return KEY in options and self.last <= sigma <= self.first


def guide(model: Any, negative: Any, settings: Guidance) -> Any:
    """A clone of the MODEL that runs with the negative prompt; ComfyUI's conditioning, as wired."""
    model = model.clone()
    model.set_attachments(KEY, settings)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, with_prompt(negative, settings))
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = attention(options.get("optimized_attention_override"), settings)
    if settings.kind == "unet":
        model.set_model_attn2_patch(second_context(settings))
    else:
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, second_rows(settings))
    return model


def with_prompt(negative: Any, settings: Guidance) -> Callable[..., Tensor]:
    """Around a run: the negative prompt as the family takes it, for this size and batch."""

    def sample(executor, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar):
        options = extra_args["model_options"]["transformer_options"]
        if settings.kind == "unet" and options.get("patches_replace", {}).get("attn2"):
            raise ValueError(
                "negative guidance meets another node that replaces cross-attention (an IP-Adapter, say); "
                "use one of them, or a cfg above 1 with a negative prompt"
            )
        blank = torch.zeros_like(noise) if latent_image is None else latent_image
        prompt = {"negative": comfy.sampler_helpers.convert_cond(negative)}
        entries = comfy.samplers.process_conds(
            guider.inner_model, noise, prompt, noise.device, blank, denoise_mask, extra_args.get("seed"),
            **latent_shapes(noise),
        )["negative"]  # fmt: skip
        conds = entries[0]["model_conds"]
        options[KEY] = {k: v.cond for k, v in conds.items() if isinstance(getattr(v, "cond", None), Tensor)}
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)

    return sample


def prompt_rows(options: dict[str, Any], total: int) -> tuple[list[int], int]:
    """Rows of a batch that hold the prompt (not CFG's negative), and samples per chunk."""
    chunks = options["cond_or_uncond"]
    size = total // len(chunks)
    return [i * size + j for i, kind in enumerate(chunks) if kind == 0 for j in range(size)], size


def negative_rows(options: dict[str, Any], name: str, rows: list[int], size: int) -> Tensor:
    """A prepared condition of the negative prompt for each of the rows."""
    return per_sample(options[KEY][name], size).repeat(len(rows) // size, *[1] * (options[KEY][name].ndim - 1))


# --- UNets ------------------------------------------------------------------------------------------------------------


def second_context(settings: Guidance) -> Callable[..., Any]:
    """Keys and values also of the negative prompt, as further rows; `attention` takes them apart again."""

    def patch(n, context, value, options):
        if not settings.works(options):
            return n, context, value
        rows, size = prompt_rows(options, len(n))
        if not rows:
            return n, context, value
        extra = negative_rows(options, "c_crossattn", rows, size).to(context)
        # repeating all tokens alike does not change attention, so prompts of two lengths meet at the common multiple
        length = math.lcm(context.shape[1], extra.shape[1])
        joined = torch.cat([tiled(context, length), tiled(extra, length)])
        return n, joined, joined if value is context else torch.cat([tiled(value, length), tiled(extra, length)])

    return patch


def attention(inner: Any, settings: Guidance) -> Callable[..., Tensor]:
    """ComfyUI's attention with guidance where rows of the negative prompt are present."""

    def override(func, q, k, v, *args, **kwargs):
        call = func if inner is None else (lambda *a, **b: inner(func, *a, **b))
        options = kwargs.get("transformer_options") or {}
        if settings.kind == "unet" and len(k) > len(q):
            rows, _ = prompt_rows(options, len(q))
            out = call(q, k[: len(q)], v[: len(q)], *args, **kwargs)
            out[rows] = settings(out[rows], call(q[rows], k[len(q) :], v[len(q) :], *args, **kwargs))
            return out
        out = call(q, k, v, *args, **kwargs)
        pairs = options.get(f"{KEY}_rows")
        return out if pairs is None or len(out) != pairs["total"] else merged(out, pairs, settings, kwargs)

    return override


def merged(out: Tensor, pairs: dict[str, Any], settings: Guidance, kwargs: dict[str, Any]) -> Tensor:
    """The same guided image tokens in the rows of both prompts."""
    split = kwargs.get("skip_output_reshape", False)
    heads = out.shape[1] if split else 1
    tokens = rearrange(out, "b h n c -> b n (h c)") if split else out.clone()
    first, second, begin = pairs["rows"], pairs["negative"], pairs["text"] if settings.kind == "joint" else 0
    guided = settings(tokens[first, begin:], tokens[second, begin:])
    tokens[first, begin:] = guided
    tokens[second, begin:] = guided
    return rearrange(tokens, "b n (h c) -> b h n c", h=heads) if split else tokens


# --- transformers -----------------------------------------------------------------------------------------------------


def second_rows(settings: Guidance) -> Callable[..., Tensor]:
    """The network with further rows for the negative prompt; all but the text is the prompt's own."""

    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        rows, size = prompt_rows(options, len(x)) if settings.works(options) else ([], 1)
        if not rows:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        total, length = len(x), c_crossattn.shape[1]

        def more(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == total:
                return torch.cat([value, value[rows]])
            if isinstance(value, dict):
                return {k: more(v) for k, v in value.items()}
            return [more(v) for v in value] if isinstance(value, list) else value

        extra = {k: more(v) for k, v in kwargs.items()}
        for name in extra.keys() & {"attention_mask"} & options[KEY].keys():
            mask = tiled(negative_rows(options, name, rows, size).to(kwargs[name]), kwargs[name].shape[1])
            extra[name] = torch.cat([kwargs[name], mask])
        text = tiled(negative_rows(options, "c_crossattn", rows, size).to(c_crossattn), length)
        pairs = {"rows": rows, "negative": list(range(total, total + len(rows))), "total": total + len(rows)}
        pairs["text"] = -(-length // settings.multiple) * settings.multiple
        chunks = [*options["cond_or_uncond"], *[0] * (len(rows) // size)]
        inside = {**options, "cond_or_uncond": chunks, f"{KEY}_rows": pairs}
        both = torch.cat([c_crossattn, text])
        return executor(more(x), more(t), more(c_concat), both, more(control), inside, **extra)[:total]

    return apply


def kind_of(model: Any) -> tuple[str, int]:
    """How this network reads its text, and to what its text tokens are padded; refuses what is not known."""
    net = model.model.diffusion_model
    if any(isinstance(m, BasicTransformerBlock) for m in net.modules()):
        return "unet", 1
    names = {cls.__name__ for cls in type(model.model).__mro__}
    if names & set(CROSS):
        return "cross", 1
    family = detect(net).name
    if family in JOINT:
        return "joint", getattr(net, "pad_tokens_multiple", None) or 1
    known = ", ".join(by_name(n).title for n in ("sd15", "sdxl", *JOINT))
    raise ValueError(
        f"negative guidance does not know how {type(model.model).__name__} reads its text; it works on {known}, Wan, "
        "Anima, LTX and PixArt. Use a cfg above 1 with a negative prompt instead"
    )


class NegativeGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_NegativeGuidance",
            display_name="Negative Guidance (NAG)",
            category="DMD/sample",
            description="Makes a negative prompt count at cfg 1, where few-step models run and it is ignored "
            "otherwise. Works inside attention; cheap on SD and SDXL, about the cost of CFG on transformers.",
            search_aliases=["nag", "negative prompt", "normalized attention guidance", "cfg 1", "schnell", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="Put this after LoRAs and other patches, right before the sampler."),
                io.Conditioning.Input("negative", tooltip="What the image should not show."),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How hard to push away from the negative prompt; 0 is off. Other nodes count from 1: their "
                    "3 is 2 here.",
                ),
                io.Float.Input(
                    "limit",
                    default=2.5,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How much stronger than before the result may get (tau). Lower where colours burn.",
                    advanced=True,
                ),
                io.Float.Input(
                    "blend",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    tooltip="Share of the pushed result (alpha). 0.5 for SDXL, 0.25 for Flux are usual.",
                    advanced=True,
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which part of the sampling on it works.",
                    advanced=True,
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Up to which part of the sampling it works; ending early saves time.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the negative prompt built in.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        negative: Any,
        scale: float = 2.0,
        limit: float = 2.5,
        blend: float = 0.5,
        start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:
        if len(negative) != 1:
            raise ValueError(
                f"the negative prompt has {len(negative)} parts; negative guidance takes one, so remove Combine nodes"
            )
        if start >= end:
            raise ValueError(f"start {start:g} and end {end:g} leave nothing in between; start must be below end")
        if scale == 0 or blend == 0:
            return io.NodeOutput(model.clone())
        kind, multiple = kind_of(model)
        sampling = model.get_model_object("model_sampling")
        settings = Guidance(
            scale=scale, limit=limit, blend=blend, kind=kind, multiple=multiple,
            first=float(sampling.percent_to_sigma(start)), last=float(sampling.percent_to_sigma(end)),
        )  # fmt: skip
        return io.NodeOutput(guide(model, negative, settings))
