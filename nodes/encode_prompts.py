"""Prompts, encoded once and kept on disk, as conditioning for training."""

import hashlib
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..dmd_core.conditioning import Cond, cat
from ..dmd_core.prompts import MASK, PromptCache, parse_prompts, read_prompts
from .comfy_conds import conditioning_from, conds_from
from .comfy_source import TEXT, pool_of
from .students import root

NONE = "none"
PROBES = ("", "a photo of a red fox, 35mm, soft light")  # their encoding names the text encoder


def files() -> list[str]:
    """Text files in ComfyUI's input folder."""
    folder = Path(folder_paths.get_input_directory())
    return [NONE, *sorted(p.name for p in folder.glob("*.txt") if p.is_file())]


def gather(text: str, file: str) -> list[str]:
    """All prompts of both sources, each once."""
    found = read_prompts(Path(folder_paths.get_input_directory()) / Path(file).name) if file != NONE else []
    if text.strip() or not found:
        found = [*parse_prompts(text), *found]
    return list(dict.fromkeys(found))


def encode_one(clip: Any, prompt: str) -> Cond:
    (first, *more) = conds_from(clip.encode_from_tokens_scheduled(clip.tokenize(prompt)))
    if more:
        raise ValueError("this CLIP encodes a prompt in several time ranges (hooks); connect it without hooks")
    # the mask keeps the cache from taking rows of zeros for padding: to some families they are tokens
    return Cond(first.cross, first.pooled, {**first.extras, MASK: torch.ones(first.cross.shape[:2])})


def encoder_of(clip: Any) -> str:
    """A name for the text encoder with everything on it (LoRAs, clip skip): what it makes of two prompts."""
    sha = hashlib.sha256()
    for prompt in PROBES:
        cond = encode_one(clip, prompt)
        for value in (cond.cross, cond.pooled):
            sha.update(b"none" if value is None else value.float().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def encoded(clip: Any, prompts: list[str]) -> list[list[Any]]:
    """One CONDITIONING entry per prompt, each with its text; what is on disk is not encoded again."""
    cache = PromptCache(root() / ".prompts", encoder_of(clip))
    bar = comfy.utils.ProgressBar(len(prompts))
    for prompt in cache.missing(prompts):
        mm.throw_exception_if_processing_interrupted()
        cache.fill([prompt], lambda given: cat([encode_one(clip, p) for p in given]))
        bar.update(1)
    return [entry(cache, p) for p in prompts]


def entry(cache: PromptCache, prompt: str) -> list[Any]:
    cond = cache.encode([prompt])
    extras = {k: v for k, v in cond.extras.items() if k != MASK}
    ((cross, options),) = conditioning_from(Cond(cond.cross, cond.pooled, extras))
    return [cross, {**options, TEXT: prompt}]


class EncodePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_EncodePrompts",
            display_name="Encode Prompts (for training)",
            category="DMD/train",
            description="Encodes many prompts once and keeps them on disk, so that a training run starts at once and "
            "the text encoder can leave the device. A few hundred prompts like those you will use are good.",
            search_aliases=["prompts", "dataset", "captions", "text file", "distill", "dmd"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model that will be trained."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line. Empty lines and lines that begin with # do not count.",
                ),
                io.Combo.Input(
                    "file",
                    options=files(),
                    default=NONE,
                    tooltip="A text file in ComfyUI's input folder, one prompt per line; added to those above.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    tooltip="What the teacher's guidance steps away from; usually empty.",
                    advanced=True,
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Prompts that are encoded already (several: Conditioning Combine); added to the others.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "prompts_out", display_name="prompts", tooltip="For Distill. One entry per prompt."
                ),
                io.Conditioning.Output("negative_out", display_name="negative", tooltip="For Distill."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = NONE, **_inputs: Any) -> str:
        path = Path(folder_paths.get_input_directory()) / Path(file or NONE).name
        return str(path.stat().st_mtime_ns) if path.is_file() else ""

    @classmethod
    def execute(
        cls,
        clip: Any,
        prompts: str,
        file: str = NONE,
        negative: str = "",
        conditioning: list[Any] | None = None,
    ) -> io.NodeOutput:
        wanted = gather(prompts, file) if prompts.strip() or file != NONE or not conditioning else []
        given = list(conditioning or [])
        with torch.no_grad():
            found = encoded(clip, [*wanted, negative])
            pool_of([*found[:-1], *given])  # says now what would not fit together
        text = f"{len(wanted) + len(given)} prompts, encoded"
        return io.NodeOutput([*found[:-1], *given], found[-1:], ui=ui.PreviewText(text))
