"""Distillation in the graph: plan, train, continue; the engine does the work and the run folder keeps it."""

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..dmd_core import methods, shapes
from ..dmd_core.drive import DriveConfig
from ..dmd_core.families import Family, detect
from ..dmd_core.objectives.dmd2 import DMD2Config
from ..dmd_core.probe import complaints, probe
from ..dmd_core.processes import ALONE
from ..dmd_core.runfile import (
    CONFIGS,
    STEPS,
    DataSettings,
    LoraSettings,
    MethodSettings,
    ModelSettings,
    RunFile,
    RunSettings,
    SampleSettings,
    write_run_file,
)
from ..dmd_core.runs import Run, check_name, locate, open_run
from ..dmd_core.train import TrainConfig
from . import live
from .comfy_denoiser import refuse_untrainable
from .comfy_probe import check_trainable, is_tested
from .comfy_source import (
    LATENT,
    NativeJob,
    NativeTeacher,
    check_prompts,
    file_of,
    kept_free,
    native_source,
    one_prompt,
    pictures_of,
    pool_of,
    student_sigmas,
    usual_size,
)
from .config_inputs import run_folder_inputs, widgets
from .students import Student, curves_of, find_snapshot, loss_map, mark_of, root, sheet_of

PLAN, TRAIN, EXPORT = "plan", "train", "export run file"
PRECISIONS = ("automatic", "as loaded", "bf16")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "bf16"}  # of a run file; fp16 diverges
# fields of the engine's settings that are widgets of the same name
LORA = ("rank", "critic_rank", "layers")
LOOP = ("optimizer", "seed", "warmup", "cooldown", "clip")
PAIRS = ("pairs", "pair_steps")
SAMPLES = ("count", "teacher_steps")
KEPT = ("snapshot_every", "preview_every", "save_every", "keep")
PACK = Path(__file__).parents[1]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Length of a run; everything else is the same, so a run goes on when a longer one is chosen."""

    updates: int
    batch: int = 1
    accumulate: int = 8  # batches per update: one sample at a time is what a small card can hold


# published runs with LoRA are at their best after 250 to 700 updates and wear out later
PRESETS = {"Quick": Preset(updates=100), "Standard": Preset(updates=500), "Best": Preset(updates=1500)}

# label -> the engine's name, the fields of its config that are shown
METHODS: dict[str, tuple[str, str]] = {
    "DMD2": (
        "dmd2",
        "critic_updates student_lr critic_lr ema gamma backward_simulation trajectory gan_weight gan_loss r1_weight "
        "synchronise divergence critic_weight guidance_weight matching_weight gan_features",
    ),
    "LADD": (
        "ladd",
        "student_lr discriminator_lr discriminator_updates noise_mean noise_std early_steps loss r1_weight ema",
    ),
    "Lazy inpainting": (
        "lazy_inpaint",
        "adapt critic_updates student_lr critic_lr ema gamma text_dropout smallest largest whole synchronise",
    ),
    "Lazy inpainting with LADD": (
        "lazy_ladd",
        "adapt student_lr discriminator_lr discriminator_updates noise_mean ema text_dropout smallest largest whole",
    ),
    "Reflow": ("reflow", "lr ema logit_mean logit_std"),
    "Rectified flow (your pictures)": ("rectified_flow", "lr ema logit_mean logit_std"),
    "DMD v1 (research)": ("dmd", "student_lr critic_lr critic_updates regression_weight ema warm_up regression"),
    "Diffusion2GAN (research)": (
        "diffusion2gan",
        "student_lr discriminator_lr perceptual_weight l1_weight gan_weight r1_weight ema",
    ),
}


def method_input() -> io.DynamicCombo.Input:
    options = []
    for label, (name, shown) in METHODS.items():
        inputs: list[Any] = []
        if name not in STEPS:  # the others have a fixed number
            words = "How many steps the student takes: 4 is the usual choice, 1 and 2 are harder to learn."
            inputs.append(io.Int.Input("steps", default=4, min=1, max=16, tooltip=words))
        words = "The teacher's CFG, as in KSampler; it goes into the student. 0 takes what the family is usually given."
        inputs.append(io.Float.Input("guidance", default=0.0, min=0.0, max=30.0, step=0.1, tooltip=words))
        options.append(io.DynamicCombo.Option(label, [*inputs, *widgets(CONFIGS[name], shown.split())]))
    tooltip = (
        "DMD2 needs prompts alone and is the one to begin with. LADD and Reflow learn from images that the teacher "
        "makes first; LADD and a GAN from your own pictures, where Encode Prompts has some. Lazy inpainting makes a "
        "LoRA for Lazy Inpaint's mode trained, from either. Rectified flow is no "
        "distillation: it fine-tunes the model on your pictures. Those marked research are for comparison."
    )
    return io.DynamicCombo.Input("method", options=options, tooltip=tooltip)


def family_guidance(family: Family) -> float:
    """The method's own default, inside of what the family is distilled with."""
    low, high = family.cfg
    return min(max(DataSettings.pair_guidance, low), high)


def settings_of(model: Any, family: Family, method: Mapping[str, Any], given: Mapping[str, Any]) -> RunFile:
    """The node's inputs as a run file; given: all inputs but model, prompts and method."""
    preset = PRESETS[given["preset"]]
    name, shown = METHODS[method["method"]]
    config, guidance = CONFIGS[name], method["guidance"] or family_guidance(family)
    known = {f.name for f in fields(config)}
    options = {k: method[k] for k in shown.split() if k in method}
    if "ema" in options:
        options["ema"] = options["ema"] or None
    batches = given["accumulate"] or preset.accumulate
    judged = given.get("critic_accumulate") or batches  # graphs that are older than it have none
    of_critics = ("critic", "discriminator")
    options |= {k: judged if k.startswith(of_critics) else batches for k in known if k.endswith("accumulate")}
    steps = method.get("steps", STEPS.get(name, 4))
    if "guidance" in known:
        options["guidance"] = guidance
    if "one_sample" in known:
        options["one_sample"] = given.get("one_sample", DMD2Config.one_sample)  # graphs that are older than it

    def pick(*names: str) -> dict[str, Any]:
        return {k: given[k] for k in names}

    return RunFile(
        run=RunSettings(name=given["run_name"], root=str(root()), resume=given["resume"], plan=True),
        model=ModelSettings(
            path=file_of(model) or "unknown",
            dtype=DTYPES.get(model.model.get_dtype_inference(), "fp32"),
            size=given["size"] or usual_size(model, family),
            height=given.get("height", 0),  # graphs that are older than it
            checkpointing=given["checkpointing"],
            probe=given["check_teacher"],
        ),
        data=DataSettings(
            prompts="prompts.txt",
            batch=given["batch"] or preset.batch,
            seed=given["seed"],
            pair_guidance=guidance,
            **pick(*PAIRS),
        ),
        method=MethodSettings(name=name, steps=steps, options=options),
        lora=LoraSettings(**pick(*LORA)),
        train=TrainConfig(steps=given["updates"] or preset.updates, **pick(*LOOP)),
        drive=DriveConfig(stop_minutes=given["stop_minutes"], **pick(*KEPT)),
        samples=SampleSettings(**pick(*SAMPLES)),
    )


def with_precision(model: Any, precision: str) -> Any:
    """fp16 diverges in distillation: such a MODEL computes in bf16 while it trains."""
    low = precision == "bf16" or (precision == "automatic" and model.model.get_dtype_inference() == torch.float16)
    if not low:
        return model
    clone = model.clone()
    clone.set_model_compute_dtype(torch.bfloat16)
    return clone


def begin(teacher: NativeTeacher, family: Family, file: RunFile, prompts: Any, negative: Any, vae: Any, run: Run, say):
    """Inside of `with teacher`: everything that a run needs, and whether the MODEL can be trained at all."""
    texts, pool = pool_of(prompts)
    empty = one_prompt(negative)
    side = file.model.size, file.model.height or file.model.size
    source = native_source(teacher, family, side, texts, vae)
    check_prompts(source, pool.take(slice(0, 1)), empty)
    if not is_tested(teacher):
        check_trainable(teacher, (1, *source.shape), pool.take(slice(0, 1)))
    if "sigmas" in {f.name for f in fields(CONFIGS[file.method.name])}:
        levels = student_sigmas(teacher.schedule, family, file.method.steps)
        file = replace(file, method=replace(file.method, options={**file.method.options, "sigmas": levels}))
    made = methods.build(file, source, teacher.bank, pool, empty)
    pictures = pictures_of(prompts, teacher) if made.takes_pictures and made.needs_latents else []
    return NativeJob(file, source, teacher.bank, run, texts, pool, empty, made, ALONE, say, pictures)


def train(job: NativeJob) -> None:
    """Bar, previews, cancelling; a cancelled run has saved its state before this passes the exception on."""
    with live.bar_of(job.run, job.file.train.steps) as bar, closing(job.drive()) as steps:
        for progress in steps:
            bar.update_absolute(progress.step, progress.total, live.picture(progress, job.run))
            if progress.stop:
                job.say(f"{progress.stop}, at update {progress.step} of {progress.total}: queue again to go on")
            mm.throw_exception_if_processing_interrupted()


def plan_words(job: NativeJob) -> str:
    """Is this a teacher, and what would the run cost?"""
    lines, source = [], job.source
    with job.run.locked():
        if job.file.model.probe and len(job.pool) > 1:
            found = probe(job.teacher(1.0), job.pool.take(slice(0, 4)), job.negative, source.shape, source.device)
            against = complaints(found, job.method.guidance)
            lines = [f"teacher: {found.words()}", *(f"NOT a teacher for this run: {why}" for why in against)]
        job.make_pairs(2)
        lines.append(job.plan().words())
    levels = ", ".join(f"{s:.4g}" for s in (*job.method.sigmas, 0.0))
    return "\n".join([*lines, f"student levels: {levels}; {len(job.prompts)} prompts"])


def export(run: Run, file: RunFile, texts: list[str], pictured: bool = False) -> str:
    """run.toml and prompts.txt in the run folder, for `python -m dmd_core train`."""
    lost = [t for t in texts if "\n" in t]
    if lost:
        raise ValueError(f"the prompt {lost[0][:40]!r} has several lines, a prompts file has one each; shorten it")
    run.write_text("prompts.txt", "\n".join(texts) + "\n")
    low = file.model.dtype == "bf16"  # diffusers computes as it is told, ComfyUI as the model was loaded
    embedded = file.model.path == str(shapes.TEACHER)
    file = replace(
        file,
        run=replace(file.run, root=".", name=f"{file.run.name} headless", resume=""),
        model=replace(file.model, path="shapes") if embedded else file.model,
        train=replace(file.train, precision="bf16" if low else file.train.precision),
        drive=replace(file.drive, stop_minutes=0.0),
    )
    path = run.write_text("run.toml", write_run_file(file))
    lines = [str(path), f'run it with: python -m dmd_core train "{path}"', f"in {PACK}, which holds dmd_core"]
    lines += [f"it makes a run of its own beside run.toml: {file.run.name!r}"]
    if not embedded:
        lines += [of_model(file.model.path)]
    if pictured:
        lines += ["Pictures do not go with it: give their folder as [data] pictures instead of prompts."]
    return "\n".join(lines)


def of_model(path: str) -> str:
    if not Path(path).is_file():
        return "Set [model] path first: this MODEL's file is not known."
    return (
        "A file without text encoders (a diffusion model alone) needs [model] config too: a diffusers folder of its "
        "family, with text encoders and VAE. LoRAs on this MODEL do not go with it."
    )


class Distill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        zero = {"default": 0, "min": 0, "advanced": True}
        return io.Schema(
            node_id="DMD_Distill",
            display_name="Distill",
            category="DMD/train",
            description="Trains a few-step student of any model: a LoRA that draws in 1 to 8 steps what the model "
            "needs 20 to 50 for. Prompts are enough. Plan says first what it costs; a run that is cancelled or killed "
            "goes on from its folder in output/dmd when it is queued again.",
            search_aliases=["train", "turbo", "lightning", "few step", "dmd2", "ladd", "reflow", "lora", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="The teacher, with its LoRAs if it has some. It stays as it is."),
                io.Conditioning.Input("prompts", tooltip="From Encode Prompts, or any CONDITIONING: one prompt each."),
                io.Conditioning.Input("negative", tooltip="The empty prompt, from Encode Prompts."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="Standard",
                    tooltip="; ".join(f"{k}: {v.updates} updates" for k, v in PRESETS.items())
                    + f", of {PRESETS['Standard'].accumulate} samples each. A run goes on when a longer one is chosen. "
                    "Another number: updates, under the advanced inputs.",
                ),
                method_input(),
                io.Combo.Input(
                    "mode",
                    options=[PLAN, TRAIN, EXPORT],
                    default=PLAN,
                    tooltip="Plan measures two updates: time, memory, and whether this model can be a teacher. Export "
                    "writes the same run for the command line.",
                ),
                *run_folder_inputs("my student"),
                io.Float.Input(
                    "stop_minutes",
                    default=DriveConfig.stop_minutes,
                    min=0.0,
                    max=100000.0,
                    step=1.0,
                    tooltip="Hands the queue back after that many minutes; the next Queue goes on. 0 runs to the end.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For sharp previews and contact sheets."),
                io.Int.Input("updates", **zero, max=1000000, tooltip="Updates of the student; 0: as the preset says."),
                io.Int.Input(
                    "size", **zero, max=4096, step=16, tooltip="Pixels, each side. 0: what the family is usually given."
                ),
                io.Int.Input("batch", **zero, max=1024, tooltip="Samples at once. 0: as the preset says."),
                io.Int.Input("accumulate", **zero, max=1024, tooltip="Batches per update. 0: as the preset says."),
                *widgets(LoraSettings, LORA),
                *widgets(TrainConfig, LOOP),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PRECISIONS[0],
                    advanced=True,
                    tooltip="Automatic computes as the model was loaded, but fp16 models in bf16.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=ModelSettings.checkpointing,
                    advanced=True,
                    tooltip="Computes activations twice instead of keeping them: far less memory, a third slower.",
                ),
                *widgets(DataSettings, PAIRS),
                *widgets(SampleSettings, SAMPLES),
                *widgets(DriveConfig, KEPT),
                io.Boolean.Input(
                    "check_teacher",
                    default=ModelSettings.probe,
                    advanced=True,
                    tooltip="Refuses few-step and guidance-distilled models, which cannot be distilled again.",
                ),
                io.Int.Input(
                    "height",
                    **zero,
                    max=4096,
                    step=16,
                    optional=True,
                    tooltip="Pixels, for pictures that are not square: size is then their width. 0: as size. Your own "
                    "pictures keep their sizes.",
                ),
                io.Boolean.Input(
                    "one_sample",
                    default=DMD2Config.one_sample,
                    optional=True,
                    advanced=True,
                    tooltip="DMD2: all updates of a step learn from one sample of the student, which saves drawing the "
                    "others. Needs accumulate 1.",
                ),
                io.Int.Input(
                    "critic_accumulate",
                    **zero,
                    max=1024,
                    optional=True,
                    tooltip="Batches per update of the critic or discriminator. 0: as accumulate.",
                ),
            ],
            outputs=[
                io.Model.Output("student", display_name="student", tooltip="The model with the best snapshot on it."),
                io.LoraModel.Output("lora", display_name="lora", tooltip="The best snapshot, for Load LoRA Model."),
                io.LossMap.Output("loss", display_name="loss", tooltip="Every loss of the run, for Plot Loss Graph."),
                io.Image.Output("sheet", display_name="sheet", tooltip="Teacher and student on the same prompts."),
                io.String.Output("report", display_name="report", tooltip="What happened, in plain words."),
                io.String.Output("run", display_name="run", tooltip="For Save and Inspect Run."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: Any = None, mode: str = TRAIN, resume: str = "auto", **_inputs: Any) -> str:
        """A run that was stopped goes on when the same graph is queued again."""
        return mark_of(run_name) if (mode, resume) == (TRAIN, "auto") else ""

    @classmethod
    def execute(
        cls, model: Any, prompts: Any, negative: Any, method: Mapping[str, Any], vae: Any = None, **given: Any
    ) -> io.NodeOutput:
        refuse_untrainable(model)
        family = detect(model.model.diffusion_model)
        file = settings_of(model, family, method, given)
        if given["mode"] == EXPORT:
            run = Run(locate(root(), check_name(file.run.name)))
            pictured = any(LATENT in entry[1] for entry in prompts)
            return words_only(export(run, file, pool_of(prompts)[0], pictured))
        run = open_run(root(), file.run.name, file.run.resume)
        said = [preset_words(given)] if given["updates"] else []
        mm.unload_all_models()  # the text encoder above all
        teacher = NativeTeacher(
            with_precision(model, given["precision"]), family.targets(file.lora.layers), file.model.checkpointing
        )
        teacher.memory = kept_free(teacher, file, run)
        with teacher:
            job = begin(teacher, family, file, prompts, negative, vae, run, say_to(said))
            if given["mode"] == PLAN:
                return words_only(plan_words(job))
            train(job)
        return outcome(model, run, said)


def preset_words(given: Mapping[str, Any]) -> str:
    asked, preset = given["updates"], given["preset"]
    return f"updates is {asked}, so that preset {preset} ({PRESETS[preset].updates}) says nothing of the length"


def say_to(said: list[str]):
    def say(line: str) -> None:
        said.append(line)
        log.info("DMD: %s", line)

    return say


def words_only(text: str) -> io.NodeOutput:
    """There is no student: what hangs on it, Save and Inspect Run too, waits without an error."""
    blocked = ExecutionBlocker(None)
    return io.NodeOutput(*[blocked] * 4, text, blocked, ui=ui.PreviewText(text))


def outcome(model: Any, run: Run, said: list[str]) -> io.NodeOutput:
    report = "\n".join([(run.path / "report.txt").read_text(encoding="utf-8"), *said]).rstrip()
    if not run.snapshots():  # stopped before the first one
        image, words = live.result(curves_of(run), report)
        blocked = ExecutionBlocker(None)
        return io.NodeOutput(blocked, blocked, loss_map(run), image, report, blocked, ui=words)
    chosen = find_snapshot(run, "best")
    student = Student.at(run, chosen)
    image, words = live.result(sheet_of(run, chosen), report)
    return io.NodeOutput(student.on(model), student.lora(), loss_map(run), image, report, run.name, ui=words)
