"""Prompts, encoded once and kept on disk, as conditioning for training; with pictures, if there are some."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..dmd_core import pictures
from ..dmd_core.conditioning import Cond, cat
from ..dmd_core.prompts import MASK, PromptCache, parse_prompts, read_prompts
from .comfy_conds import conditioning_from, conds_from
from .comfy_source import LATENT, TEXT, pool_of
from .students import root

NONE = "none"
# Their encoding names the text encoder. Words that the shapes world knows: it would tell the user of any other.
PROBES = ("", "a small red circle left of a large blue square on dark")


def files() -> list[str]:
    """Text files in ComfyUI's input folder."""
    folder = Path(folder_paths.get_input_directory())
    return [NONE, *sorted(p.name for p in folder.glob("*.txt") if p.is_file())]


def folders() -> list[str]:
    return [NONE, *sorted(folder_paths.get_input_subfolders())]


def folder_at(name: str) -> Path:
    """A folder inside of ComfyUI's input folder, wherever a graph says it is."""
    top = Path(folder_paths.get_input_directory()).resolve()
    path = (top / name).resolve()
    if not path.is_relative_to(top) or not path.is_dir():
        raise ValueError(f"{name!r} is no folder in ComfyUI's input folder {top}; put the pictures into one there")
    return path


def encoded_pictures(vae: Any, name: str, size: int) -> tuple[list[str], list[Any]]:
    """Captions and latents of a folder of pictures."""
    if vae is None:
        raise ValueError("pictures need the VAE of the model to become latents; connect it")
    found = pictures.listed(folder_at(name))
    bar, latents = comfy.utils.ProgressBar(len(found)), []
    for picture in found:
        mm.throw_exception_if_processing_interrupted()
        latents.append(vae.encode(pictures.read(picture.path, size)).cpu())
        bar.update(1)
    return [p.caption for p in found], latents


def refuse_besides(text: str, file: str, *others: list[Any]) -> None:
    if text.strip() or file != NONE or any(others):
        raise ValueError(
            "a folder of pictures brings its own prompts, the captions; empty prompts and file, and connect neither "
            "conditioning nor latents, or set folder to none"
        )


def with_pictures(entries: list[Any], latents: list[Any]) -> list[Any]:
    if latents and len(entries) != len(latents):
        raise ValueError(
            f"{len(latents)} latents came with {len(entries)} prompts; give one prompt for each, in their order"
        )
    return (
        [[cross, {**more, LATENT: x}] for (cross, more), x in zip(entries, latents, strict=True)]
        if latents
        else entries
    )


def buckets(latents: list[Any]) -> str:
    counted = Counter(f"{x.shape[-1]} x {x.shape[-2]}" for x in latents)
    return ", ".join(f"{n} of {size}" for size, n in counted.most_common())


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
                io.Combo.Input(
                    "folder",
                    options=folders(),
                    default=NONE,
                    optional=True,
                    tooltip="Your own pictures: a folder in ComfyUI's input folder, captions in text files of the same "
                    "names. For LADD, a GAN, or fine-tuning. They are put into buckets by their shape.",
                ),
                io.Int.Input(
                    "size",
                    default=1024,
                    min=64,
                    max=4096,
                    step=16,
                    optional=True,
                    advanced=True,
                    tooltip="Of these pictures, in pixels: the side of a square of the same area.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For the pictures of the folder: the VAE of the model."),
                io.Latent.Input(
                    "latents",
                    optional=True,
                    tooltip="Pictures that are encoded already, a batch or a list; with one prompt for each, in order.",
                ),
            ],
            is_input_list=True,
            outputs=[
                io.Conditioning.Output(
                    "prompts_out", display_name="prompts", tooltip="For Distill. One entry per prompt."
                ),
                io.Conditioning.Output("negative_out", display_name="negative", tooltip="For Distill."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: Any = None, folder: Any = None, **_inputs: Any) -> str:
        top = Path(folder_paths.get_input_directory())
        name, place = ((v or [NONE])[0] for v in (file, folder))
        inside = sorted(folder_at(place).iterdir()) if place != NONE else []
        read = [p for p in (top / Path(name).name, *inside) if p.is_file()]
        return " ".join(f"{p.name} {p.stat().st_mtime_ns}" for p in read)

    @classmethod
    def execute(
        cls,
        clip: list[Any],
        prompts: list[str],
        file: Sequence[str] = (NONE,),
        negative: Sequence[str] = ("",),
        conditioning: Sequence[list[Any]] = (),
        folder: Sequence[str] = (NONE,),
        size: Sequence[int] = (1024,),
        vae: Sequence[Any] = (None,),
        latents: Sequence[Mapping[str, Any]] = (),
    ) -> io.NodeOutput:
        """Every input is a list, so that nodes which give lists (training sets) can be connected."""
        given = [entry for one in conditioning for entry in one]
        shown = [row[None].cpu() for one in latents for row in one["samples"]]
        text, (file_name,), (folder_name,) = "\n".join(prompts), file, folder
        if folder_name != NONE:
            refuse_besides(text, file_name, given, shown)
            wanted, shown = encoded_pictures(vae[0], folder_name, size[0])
        else:
            some = text.strip() or file_name != NONE or not given
            wanted = gather(text, file_name) if some else []
        with torch.no_grad():
            found = encoded(clip[0], [*wanted, negative[0]])
            entries = with_pictures([*found[:-1], *given], shown)
            pool_of(entries)  # says now what would not fit together
        text = f"{len(entries)} prompts, encoded" + (f", with {len(shown)} pictures: {buckets(shown)}" if shown else "")
        return io.NodeOutput(entries, found[-1:], ui=ui.PreviewText(text))
