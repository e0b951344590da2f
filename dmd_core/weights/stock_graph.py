"""A student in stock nodes alone: a graph in ComfyUI's API form, which opens where this pack is not installed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..families import Family
from ..schedule import shift_time
from .recipe import Recipe

Graph = dict[str, dict[str, Any]]
PROMPT = "a red fox in tall grass, morning light, 35mm photograph"
SIDE = {"sd15": 512, "sd2": 768}
CLOSE = 0.01  # of a level, which stock schedulers take from tables


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Of a model that comes without text encoder and VAE: how stock nodes load these."""

    clip: Mapping[str, str]
    vae: str
    dual: bool = False
    shift: str = "ModelSamplingAuraFlow"


PARTS = {
    "flux": Parts(
        clip={"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"},
        vae="ae.safetensors",
        dual=True,
        shift="ModelSamplingFlux",
    ),
    "z_image": Parts(clip={"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}, vae="ae.safetensors"),
    "qwen_image": Parts(
        clip={"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"},
        vae="qwen_image_vae.safetensors",
    ),
}
CHECKPOINTS = ("sd15", "sd2", "sdxl", "sd3")  # usually one file with everything


def obstacle(recipe: Recipe, family: Family) -> str:
    """Why stock nodes cannot sample this student; empty where they can."""
    if recipe.objective in ("lazy_inpaint", "lazy_ladd"):
        return "it fills holes, which takes Lazy Inpaint"
    if family.name not in (*CHECKPOINTS, *PARTS):
        return f"how stock nodes load {family.title} is not known here"
    if recipe.gamma not in (0.0, 1.0):
        return f"gamma {recipe.gamma:g} is between lcm (1) and euler (0)"
    levels = torch.tensor(recipe.sigmas, dtype=torch.float64)
    expected = simple(recipe, family)
    if not torch.allclose(levels[:1], expected[:1], rtol=CLOSE):
        return "it starts below the highest noise level, where KSampler's first noise is too weak"
    if not torch.allclose(levels, expected, rtol=CLOSE):
        return "its noise levels are not those of the scheduler simple"
    return ""


def simple(recipe: Recipe, family: Family) -> torch.Tensor:
    """The levels of ComfyUI's scheduler of that name, with the recipe's shift. [steps + 1]"""
    n = recipe.steps
    if family.betas is not None:
        times = torch.tensor([999 - int(i * 1000 / n) for i in range(n)])
        levels = family.schedule().sigma(times).double()
    else:
        levels = shift_time(1 - torch.arange(n, dtype=torch.float64) / n, recipe.shift or family.shift)
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def stock_graph(recipe: Recipe, family: Family, base: str, lora: str = "", whole: bool | None = None) -> Graph:
    """base: the file below its models folder; whole: a checkpoint with text encoder and VAE, else a diffusion model.

    Without a LoRA the base is the student itself.
    """
    if why := obstacle(recipe, family):
        raise ValueError(f"stock nodes cannot sample this student: {why}")
    whole = family.name in CHECKPOINTS if whole is None else whole
    found = loaders(family, base, whole)
    model, clip, vae = ["1", 0], ["1", 1] if whole else ["10", 0], ["1", 2] if whole else ["11", 0]
    if lora:
        settings = {"model": model, "lora_name": lora, "strength_model": 1.0}
        found["2"] = node("LoraLoaderModelOnly", "The distilled LoRA", **settings)
        model = ["2", 0]
    if recipe.shift is not None and abs(recipe.shift - family.shift) > 1e-3:
        found["9"] = shifted(family, recipe.shift, model)
        model = ["9", 0]
    side, sampler = SIDE.get(family.name, 1024), "lcm" if recipe.gamma == 1 else "euler"
    empty = "EmptyLatentImage" if family.latent_channels == 4 else "EmptySD3LatentImage"
    said = "Negative prompt" + (" (not used at cfg 1)" if recipe.cfg == 1 else "")
    sampling = {
        "steps": recipe.steps,
        "cfg": recipe.cfg,
        "sampler_name": sampler,
        "scheduler": "simple",
        "denoise": 1.0,
    }
    wired = {"model": model, "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
    return found | {
        "3": node("CLIPTextEncode", "Prompt", text=PROMPT, clip=clip),
        "4": node("CLIPTextEncode", said, text="", clip=clip),
        "5": node(empty, "Size", width=side, height=side, batch_size=1),
        "6": node("KSampler", recipe.usage_hint(), seed=0, **sampling, **wired),
        "7": node("VAEDecode", "Decode", samples=["6", 0], vae=vae),
        "8": node("SaveImage", "Picture", images=["7", 0], filename_prefix="few_steps"),
    }


def loaders(family: Family, base: str, whole: bool) -> Graph:
    if whole:
        return {"1": node("CheckpointLoaderSimple", "The base, or a checkpoint made of it", ckpt_name=base)}
    parts = PARTS.get(family.name)
    if parts is None:
        raise ValueError(f"the text encoder of {family.title} is not known here; wire a graph by hand")
    clip = "DualCLIPLoader" if parts.dual else "CLIPLoader"
    return {
        "1": node("UNETLoader", "The base, or a model made of it", unet_name=base, weight_dtype="default"),
        "10": node(clip, "Its text encoder", **parts.clip, device="default"),
        "11": node("VAELoader", "Its VAE", vae_name=parts.vae),
    }


def shifted(family: Family, shift: float, model: list[Any]) -> dict[str, Any]:
    kind = PARTS[family.name].shift if family.name in PARTS else "ModelSamplingSD3"
    if kind == "ModelSamplingFlux":  # one shift for all sizes
        same = round(math.log(shift), 4)
        return node(kind, "Shift", model=model, max_shift=same, base_shift=same, width=1024, height=1024)
    return node(kind, "Shift", model=model, shift=round(shift, 4))


def node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
