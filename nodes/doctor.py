"""What a weight file is, what will go wrong with it, and a repaired copy. Nothing in a file is executed."""

import logging
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui
from torch import nn

from ..dmd_core.sliders.card import from_metadata, words
from ..dmd_core.weights.doctor import coverage, describe, diagnose, repair
from ..dmd_core.weights.header import read_header
from ..dmd_core.weights.lora import layer_shape

FOLDERS = ("loras", "diffusion_models", "checkpoints")
REPORT, COPY = "report", "report and write a repaired copy"
SHOWN = 6
log = logging.getLogger(__name__)


def files() -> list[str]:
    """folder/name of every weight file that ComfyUI sees."""
    return [f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder)]


def resolve(choice: str) -> tuple[str, Path]:
    """The folder's name and the path of a choice, which must lie in one of ComfyUI's folders."""
    folder, _, name = choice.partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in FOLDERS and name else None
    inside = path is not None and any(
        Path(path).absolute().is_relative_to(Path(root).absolute()) and ".." not in Path(name).parts
        for root in folder_paths.get_folder_paths(folder)
    )
    if not inside:
        raise ValueError(f"{choice!r} is no file in {', '.join(FOLDERS)}; choose one of the list, after a refresh")
    return folder, Path(path)


def network_of(model: Any) -> dict[str, tuple[int, ...]]:
    net = model.model.diffusion_model
    return {n: layer_shape(m) for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def reach(path: Path, model: Any) -> str:
    """How much of a LoRA file finds a place on this MODEL."""
    found = coverage(path, network_of(model))
    total = len(found.reached) + len(found.dropped)
    text = f"On this {type(model.model).__name__}: {len(found.reached)} of {total} layers load."
    if not found.dropped:
        return text
    more = f" and {len(found.dropped) - SHOWN} more" if len(found.dropped) > SHOWN else ""
    return f"{text} {found.reason}. Left out: {', '.join(found.dropped[:SHOWN])}{more}."


def slider(path: Path) -> list[str]:
    """What was measured of a slider of this pack; its file says it."""
    card = from_metadata(read_header(path).metadata)
    return [words(card)] if card is not None else []


class Doctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_Doctor",
            display_name="Model Doctor",
            category="DMD/files",
            description="Says what a LoRA, diffusion model or checkpoint is, how to sample it, what is wrong with it "
            "and which of its layers will silently not load on your model. Writes a repaired copy; the file stays.",
            search_aliases=["inspect", "what is this file", "lora key not loaded", "repair", "convert", "peft", "dmd"],
            inputs=[
                io.Combo.Input("file", options=files(), tooltip="A weight file in one of ComfyUI's model folders."),
                io.Combo.Input(
                    "action",
                    options=[REPORT, COPY],
                    default=REPORT,
                    tooltip="A repaired copy gets keys that load everywhere, its scale baked in, plain names, and the "
                    "ending .safetensors. It lands beside the original under a new, counted name.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the copy; empty takes the file's own with _repaired.",
                    advanced=True,
                ),
                io.Float.Input(
                    "scale",
                    default=0.0,
                    min=-10.0,
                    max=10.0,
                    step=0.005,
                    round=0.001,
                    tooltip="Baked into the copy of a LoRA, so that strength 1 is right. 0 takes what the file is "
                    "known to need, else 1.",
                    advanced=True,
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that a LoRA is for: tells which layers reach it, and is needed to repair "
                    "transformer LoRAs with underscored names.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="What it is and what is wrong with it."),
                io.String.Output("path", display_name="path", tooltip="Of the copy, or of the file itself."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_inputs: Any) -> str:
        """Files change on disk under the same name."""
        try:
            stat = resolve(file)[1].stat()
        except (ValueError, OSError):
            return file
        return f"{file} {stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    def execute(
        cls, file: str, action: str = REPORT, name: str = "", scale: float = 0.0, model: Any = None
    ) -> io.NodeOutput:
        folder, path = resolve(file)
        lines, copy = [], path
        try:
            lines += [describe(path), *slider(path)]
            if model is not None and diagnose(path).structure.kind == "lora":
                lines.append(reach(path, model))
            if action == COPY:
                network = network_of(model) if model is not None else None
                target = folder_paths.get_folder_paths(folder)[0]
                copy = repair(path, target, name or f"{path.stem}_repaired", scale=scale or None, network=network)
                lines.append(f"Repaired copy: {copy.name}, {describe(copy)}")
        except ValueError as refusal:  # a file that must not be opened, or that cannot be repaired: said, not raised
            log.warning("%s", refusal)
            lines.append(f"Refused: {refusal}.")
        report = "\n".join(lines)
        return io.NodeOutput(report, str(copy), ui=ui.PreviewText(report))
