"""A student of a run as a file: a LoRA that says how it is sampled, or a whole model with it merged in."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.model_management import get_torch_device
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..dmd_core.runs import Run
from ..dmd_core.sheet import sheet
from ..dmd_core.sliders.card import words
from ..dmd_core.weights.checkpoint import merge_file
from ..dmd_core.weights.extract import ExtractConfig
from ..dmd_core.weights.lora import DTYPES, save_lora
from ..dmd_core.weights.stock_graph import stock_graph
from .comfy_denoiser import schedule_of
from .comfy_source import file_of, student_sigmas, usual_size, without_text
from .difference import save_difference
from .evidence import graph_of
from .grid import picture_row
from .sampler import RestartSampler
from .slider_run import Written, written
from .students import BEST, Student, find_run, find_snapshot, image_of, mark_of, sheet_of

LORA, MERGED, DIFFERENCE, ALL = "LoRA", "merged model", "LoRA of a difference", "all"
STRENGTHS, CELL = (0.5, 0.75, 1.0, 1.25), 256  # of the grid; pixels of a cell
FOLDERS = {LORA: "loras", MERGED: "diffusion_models", DIFFERENCE: "loras"}


def card(student: Student, path: Path, snapshot: Path) -> str:
    """Model-card text: what it is, how it is sampled, how it was made."""
    r = student.recipe
    levels = ", ".join(f"{s:.4g}" for s in r.sigmas)
    cfg = f", guidance {r.trained_cfg:g} of the teacher inside" if r.trained_cfg else ""
    lines = [
        f"# {path.stem}",
        "",
        f"A {r.steps}-step student of {r.base or 'its base model'} ({student.family.title}), by {r.objective}{cfg}.",
        "",
        f"- Sample it with: {r.usage_hint()}. Few-Step Settings reads this from the file by itself.",
        f"- Noise levels: {levels}.",
        f"- LoRA rank {r.rank}; trained on {r.trained_on}, {snapshot.name} of the run {student.name!r}.",
    ]
    return "\n".join(lines) + "\n"


def save_graph(student: Student, path: Path, merged: bool) -> str:
    """For people without this pack: the graph beside the file, or why there is none; a line of the card."""
    r, folders = student.recipe, folder_paths.get_folder_paths
    kinds = ("checkpoints", "diffusion_models")
    try:
        if merged:
            whole = any(path.is_relative_to(f) for f in folders("checkpoints"))
            graph = stock_graph(r, student.family, below(path, kinds), whole=whole)
        else:
            listed = {k: f for k in kinds for f in folder_paths.get_filename_list(k) if Path(f).name == r.base}
            kind, base = next(iter(listed.items()), (None, r.base or "the base.safetensors"))
            whole = None if kind is None else kind == "checkpoints"
            graph = stock_graph(r, student.family, base, below(path, ("loras",)), whole)
    except ValueError as why:
        return f"- Without ComfyUI-DMD: {why}."
    path.with_suffix(".json").write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"- Without ComfyUI-DMD: open {path.with_suffix('.json').name} in ComfyUI, a graph of stock nodes."


def below(path: Path, kinds: Sequence[str]) -> str:
    """As loaders list it."""
    inside = [f for kind in kinds for f in folder_paths.get_folder_paths(kind) if path.is_relative_to(f)]
    return str(path.relative_to(inside[0])) if inside else path.name


def save_merged(model: Any, name: str, lora: Path) -> Path:
    base = file_of(model)
    if model.patches:
        raise ValueError(
            "this MODEL has LoRAs on it, which a merged file would lose; connect its loader alone, or save a LoRA"
        )
    if not base:
        raise ValueError(
            "the file of this MODEL is not known; connect one from Load Checkpoint or Load Diffusion Model itself, "
            "without nodes that load it otherwise, or save a LoRA"
        )
    folder = folder_paths.get_folder_paths(FOLDERS[MERGED])[0]
    if "checkpoints" in Path(base).parts:  # the merged file keeps text encoders and VAE, so it belongs beside others
        folder = folder_paths.get_folder_paths("checkpoints")[0]
    return merge_file(folder, name, base, lora)


def steps_by_strengths(student: Student, model: Any, prompts: list[Any], vae: Any) -> Image.Image:
    """The first prompt with one seed: rows are steps around those that it was made for, columns strengths."""
    r, conds = student.recipe, [without_text(prompts[0])]
    if r.cfg != 1:
        raise ValueError("steps and strengths are drawn of few-step students, and this one needs cfg; unplug prompts")
    schedule = schedule_of(model.get_model_object("model_sampling"))
    side = usual_size(model, student.family) // 8
    latent = {"samples": torch.zeros(1, 4, side, side), "downscale_ratio_spacial": 8}
    models, rows = [student.on(model, s) for s in STRENGTHS], {}
    for n in sorted({max(1, r.steps // 2), r.steps, 2 * r.steps}):
        levels = r.sigmas if n == r.steps else (*student_sigmas(schedule, student.family, n), 0.0)
        sampler = RestartSampler(levels[:-1], [r.gamma] * n, top=levels[0])
        chosen = [(m, sampler, torch.tensor(levels), 1.0, "") for m in models]
        images = [picture_row(c, (conds, conds), latent, vae, [0])[0] for c in chosen]
        rows[f"{n} step{'s' * (n > 1)}"] = torch.cat(images)
    return sheet(list(rows.values()), list(rows), [f"strength {s:g}" for s in STRENGTHS], CELL)


def chosen_sliders(found: Sequence[Written], which: str) -> list[tuple[int, Written]]:
    """all: those that do something; numbers: exactly these. Counted from 1."""
    numbered = list(enumerate(found, 1))
    if which.strip().lower() == ALL:
        working = [(i, w) for i, w in numbered if w.finished.card.verdict != "nothing"]
        if not working:
            raise ValueError(
                "no slider of this run moves what it should, so none was saved; train longer or on more layers, or "
                "give its number under sliders to save it nevertheless"
            )
        return working
    parts = [p.strip() for p in which.replace(";", ",").split(",") if p.strip()]
    if not parts or not all(p.isdigit() and 1 <= int(p) <= len(found) for p in parts):
        raise ValueError(f"sliders is {which!r}; use {ALL!r} or numbers from 1 to {len(found)} with commas")
    return [numbered[int(p) - 1] for p in parts]


def save_sliders(run: Run, found: Sequence[Written], name: str, which: str, dtype: str) -> tuple[list[Path], str]:
    """One ordinary LoRA file each, in a folder of that name if there are several."""
    target, paths, texts = folder_paths.get_folder_paths("loras")[0], [], []
    for i, w in chosen_sliders(found, which):
        card, file = w.finished.card, name
        if len(found) > 1:
            file = f"{name}/{i:02d} " + re.sub(r"[^\w +-]", "", card.name).strip()
        path = save_lora(
            target,
            file,
            w.finished.state,
            w.names,
            family=w.family,
            recipe=w.recipe,
            dtype=dtype,
            metadata=card.metadata(),
        )
        run.write_text(f"lora/{path.stem}.md", f"# {path.stem}\n\n{words(card)}\n")
        paths.append(path)
        texts.append(words(card))
    return paths, "\n".join(texts)


class Save(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_Save",
            display_name="Save Student",
            category="DMD/train",
            description="Writes a student of a run as a LoRA, or as a whole model with the LoRA merged in. The file "
            "says how it wants to be sampled; a contact sheet and a model card land in the run's folder. Sliders of a "
            "run become one ordinary LoRA each. Without a run: the LoRA of the difference of two models.",
            search_aliases=["save lora", "export", "merge", "checkpoint", "model card", "dmd"],
            inputs=[
                io.String.Input("run", default="my student", tooltip="The run's name, from Distill."),
                io.String.Input("snapshot", default=BEST, tooltip="best, last, or the update of a snapshot."),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="File name, with subfolders if you like; counted up, never overwritten. Empty: the run's.",
                ),
                io.Combo.Input(
                    "what",
                    options=list(FOLDERS),
                    default=LORA,
                    tooltip="A LoRA works on models of the same family, also finetuned ones. Merged needs the model. A "
                    "difference needs no run: it is what distilled has and model has not.",
                ),
                io.Combo.Input(
                    "dtype", options=list(DTYPES), default="fp16", tooltip="Of the LoRA file.", advanced=True
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="For merged and difference: the base, straight from its loader."
                ),
                io.String.Input(
                    "sliders",
                    default=ALL,
                    tooltip="For a run of Train Slider or Discover Sliders: all that do something, or numbers such as "
                    "1, 3. Each becomes a LoRA of its own.",
                    advanced=True,
                ),
                io.Conditioning.Input(
                    "prompts",
                    optional=True,
                    tooltip="With the base model and a VAE: the first prompt is drawn in several steps and strengths.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For that picture."),
                io.Model.Input(
                    "distilled",
                    optional=True,
                    tooltip="For difference: the distilled model, straight from its loader.",
                ),
                io.Int.Input(
                    "rank",
                    default=ExtractConfig.rank,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="For difference: the most that a layer gets. 64 to 256 are usual.",
                    advanced=True,
                ),
                io.Float.Input(
                    "energy",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="For difference: each layer gets the lowest rank that keeps this share of it, such as "
                    "0.95. 0 gives every layer the whole rank.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.String.Output("path", display_name="path", tooltip="Of the file that was written."),
                io.String.Output("card", display_name="card", tooltip="Model-card text."),
                io.Image.Output(
                    "sheet",
                    display_name="sheet",
                    tooltip="Steps x strengths where prompts, model and VAE are connected, else the contact sheet.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, run: Any = None, **_inputs: Any) -> str:
        return mark_of(run)

    @classmethod
    def execute(
        cls,
        run: str,
        snapshot: str = BEST,
        name: str = "",
        what: str = LORA,
        dtype: str = "fp16",
        model: Any = None,
        sliders: str = ALL,
        prompts: list[Any] | None = None,
        vae: Any = None,
        distilled: Any = None,
        rank: int = ExtractConfig.rank,
        energy: float = 0.0,
    ) -> io.NodeOutput:
        if what == DIFFERENCE:
            if model is None or distilled is None:
                raise ValueError("a difference needs two models; connect the base to model, the other to distilled")
            config = ExtractConfig(rank=rank, energy=energy or None, device=str(get_torch_device()))
            path, text = save_difference(
                model, distilled, name or "difference", config, dtype, *graph_of(cls.hidden)
            )  # fmt: skip
            return io.NodeOutput(str(path), text, ExecutionBlocker(None), ui=ui.PreviewText(f"{path}\n\n{text}"))
        if prompts is not None and (model is None or vae is None):
            raise ValueError("a picture of steps and strengths needs prompts, model and vae; connect all three or none")
        if what == MERGED and model is None:
            raise ValueError("a merged model needs its base; connect the MODEL of its loader, or save a LoRA")
        folder = find_run(run)
        if found := written(folder):
            if what == MERGED:
                raise ValueError("sliders are made to be turned, so they are saved as LoRAs; set what to LoRA")
            paths, text = save_sliders(folder, found, name or run, sliders, dtype)
            listed = "\n".join(map(str, paths))
            return io.NodeOutput(listed, text, ExecutionBlocker(None), ui=ui.PreviewText(f"{listed}\n\n{text}"))
        if "slider" in folder.settings():
            raise ValueError(f"the slider of run {run!r} is not measured yet; queue its node again to finish it")
        chosen = find_snapshot(folder, snapshot)
        student = Student.at(folder, chosen)
        target = folder_paths.get_folder_paths("loras")[0] if what == LORA else folder.path / "lora"
        path = save_lora(
            target,
            name or run,
            student.state,
            student.names,
            family=student.family,
            recipe=student.recipe,
            dtype=dtype if what == LORA else "fp32",
        )
        if what == MERGED:
            path = save_merged(model, name or run, path)
        text = card(student, path, chosen) + save_graph(student, path, what == MERGED) + "\n"
        folder.write_text(f"lora/{path.stem}.md", text)
        page = sheet_of(folder, chosen) if prompts is None else steps_by_strengths(student, model, prompts, vae)
        page.save(folder.path / "lora" / f"{path.stem}.png")
        return io.NodeOutput(str(path), text, image_of(page), ui=ui.PreviewText(f"{path}\n\n{text}"))
