"""A slider from words or from image pairs: train, measure, say what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..dmd_core.begun import refuse_other
from ..dmd_core.conditioning import Cond
from ..dmd_core.objectives.image_slider import ImageSlider, ImageSliderConfig, Pairs
from ..dmd_core.objectives.sliding import count, pick
from ..dmd_core.objectives.text_slider import SliderPrompts, TextSlider, TextSliderConfig, Words, erasing
from ..dmd_core.runs import Run, open_run
from ..dmd_core.sheet import sheet
from ..dmd_core.sliders import (
    Axis,
    Bench,
    CalibrationConfig,
    PoolBatches,
    SliderCard,
    axis_between,
    bake,
    calibrate,
    card,
    embedded,
)
from ..dmd_core.sliders.settings import SliderSettings
from ..dmd_core.sliders.stored import Finished, kept, write_sliders
from ..dmd_core.train import TrainConfig
from .comfy_denoiser import refuse_untrainable
from .comfy_source import NativeTeacher
from .config_inputs import run_folder_inputs
from .distill import say_to
from .evidence import graph_of
from .slider_eyes import eyes_of
from .slider_files import SliderSet, identity
from .slider_inputs import run_inputs, settings_of
from .slider_run import (
    COOLDOWN,
    NOTED,
    Lab,
    base_of,
    conds,
    done,
    kept_as,
    lab,
    looking,
    make_pool,
    network_of,
    opened,
    outcome,
    show,
    strip,
    train,
    unfinished,
    watched,
)
from .students import mark_of, root

WORDS, PAIRS, ERASE = "words", "image pairs", "erase a concept"
NAME = "slider"
KINDS = {WORDS: "text", PAIRS: "image pairs", ERASE: "text"}
LEVELS = {"images_plus": 1.0, "images_plus_half": 0.5, "images_minus_half": -0.5, "images_minus": -1.0}
SEEDS = range(2_000_000, 2_000_004)  # of the strip: neither trained nor measured on


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the slider shall do, encoded."""

    cond: Cond  # what its pictures are made of
    words: Words | None = None
    pictures: Mapping[float, Tensor] | None = None  # level -> LATENT samples
    poles: tuple[float, ...] = (1.0, -1.0)


def lines(text: str) -> tuple[str, ...]:
    return tuple(t.strip() for t in text.replace(",", "\n").splitlines() if t.strip())


def whole_lines(text: str) -> tuple[str, ...]:
    return tuple(t.strip() for t in text.splitlines() if t.strip())


def task_of(made_from: Mapping[str, Any], clip: Any, vae: Any, images: Mapping[str, Any]) -> Task:
    kind = made_from["made_from"]
    if kind == PAIRS:
        pictures = latents_of(images, vae)
        prompts = whole_lines(made_from["prompt"]) or ("",)
        cond, pairs = conds(clip, prompts), len(next(iter(pictures.values())))
        if len(prompts) not in (1, pairs):
            raise ValueError(f"{len(prompts)} prompts for {pairs} image pairs; give one prompt, or one line per pair")
        return Task(cond=cond, pictures=pictures)
    if any(v is not None for v in images.values()):
        raise ValueError(f"images are connected, but the slider is made from {kind}; choose {PAIRS!r}, or unplug them")
    if kind == ERASE:
        prompts = erasing(made_from["concept"], whole_lines(made_from["keep"]))
        if not made_from["concept"].strip():
            raise ValueError("the concept to erase is empty; name it as a prompt would")
        encoded = prompts.encode(lambda texts: conds(clip, texts))
        return Task(cond=encoded.neutral, words=encoded, poles=(1.0,))
    prompts = SliderPrompts(
        neutral=made_from["neutral"],
        positive=made_from["positive"],
        negative=made_from["negative"],
        attributes=lines(made_from["attributes"]),
        keep=whole_lines(made_from["keep"]),
    )
    encoded = prompts.encode(lambda texts: conds(clip, texts))
    return Task(cond=encoded.neutral, words=encoded)


def latents_of(images: Mapping[str, Any], vae: Any) -> dict[float, Tensor]:
    """Level -> pictures as the VAE gives them; picture i of one level belongs to picture i of every other."""
    given = {level: images[name] for name, level in LEVELS.items() if images.get(name) is not None}
    if vae is None:
        raise ValueError("a slider from image pairs needs the VAE to read them; connect it")
    if not {1.0, -1.0} <= given.keys():
        raise ValueError("a slider from image pairs needs images_plus and images_minus; connect both")
    sizes = {f"{level:+g}": len(batch) for level, batch in given.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the levels hold different numbers of pictures ({sizes}); every picture needs a partner")
    shapes = {f"{level:+g}": tuple(batch.shape[1:3]) for level, batch in given.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the levels hold pictures of different sizes ({shapes}); bring all to one size")
    if next(iter(sizes.values())) < 2:
        raise ValueError(
            "one image pair is too few: the slider would learn those two pictures, not what differs; give 2 to 6"
        )
    if torch.equal(given[1.0], given[-1.0]):
        raise ValueError("the pictures of both ends are identical; give pictures that differ in one thing")
    with torch.inference_mode():
        found = {level: vae.encode(batch[..., :3]) for level, batch in given.items()}
    with torch.inference_mode(False):
        return {level: v.clone() for level, v in found.items()}


def image_input(name: str) -> Any:
    level = LEVELS[name]
    between = " Between the ends; may be left out." if abs(level) < 1 else ""
    words = f"Image pairs only: pictures at {level:+g}, in the order of the others.{between}"
    return io.Image.Input(name, optional=True, tooltip=words)


# --- the run ----------------------------------------------------------------------------------------------------------


def ends_of(here: Lab, task: Task, n: int) -> tuple[Tensor, Tensor]:
    """Features of the frozen model's pictures of both ends under the same seeds, or of the pairs themselves."""
    if task.pictures is not None:
        ends = [here.teacher.latent_in(task.pictures[s]) for s in (1.0, -1.0)]
    else:
        assert task.words is not None
        both = (task.words.positive, task.words.negative)
        index = torch.arange(n)
        ends = [here.sampling(here.model, pick(c, index % count(c)), range(n), here.teacher.device) for c in both]
    plus, minus = (embedded(here.eyes.embed, e.to(here.teacher.device), here.sampling.batch) for e in ends)
    return plus, minus


def pairs_of(settings: SliderSettings) -> int:
    """As many pictures of both ends as the pool has: few pairs differ in more than the words mean."""
    return max(settings.pool // 2, 4)


def axis_of(here: Lab, run: Run, key: str, task: Task, pool: Any, n: int) -> Axis:
    """Before anything is trained: can the two ends be told apart, and does the model vary between them by itself?"""

    def look() -> dict[str, Tensor]:
        latents = pool.latents.to(here.teacher.device)
        plus, minus = ends_of(here, task, n)
        return {"pool": embedded(here.eyes.embed, latents, here.sampling.batch), "plus": plus, "minus": minus}

    seen = kept(run.path / "pool" / "features.safetensors", f"{key} {len(pool)} {n}", look)
    return axis_between(seen["plus"], seen["minus"], seen["pool"])


def objective_of(here: Lab, task: Task, settings: SliderSettings, given: Mapping[str, Any], pool: Any) -> tuple:
    """The objective and its batches."""
    own: dict[str, Any] = {"lr": given["lr"]} if given["lr"] else {}
    if task.pictures is not None:
        latents = {level: here.teacher.latent_in(v).cpu() for level, v in task.pictures.items()}
        pairs = Pairs(latents, min(settings.batch, len(next(iter(latents.values())))), settings.seed)
        config = ImageSliderConfig(sigmas=here.levels, **own)
        return ImageSlider(here.model, NAME, task.cond, pairs.strengths, config), pairs
    assert task.words is not None
    if given["on_policy"]:
        own["on_policy"] = here.sampling.sigmas
    config = TextSliderConfig(sigmas=here.levels, eta=given["eta"], poles=task.poles, **own)
    return TextSlider(here.model, NAME, task.words, config), PoolBatches(pool, settings.batch, settings.seed)


def measured(
    here: Lab, task: Task, axis: Axis, settings: SliderSettings, name: str, facts: Mapping[str, Any]
) -> SliderCard:
    """Calibration, always: the unit is found and goes into the weights, the rest is measured on other seeds."""
    here.say("measuring: unit, range, side effects")
    config = CalibrationConfig(seeds=settings.seeds, held_out=settings.seeds)
    found = calibrate(watched(here.bench(task.cond)), NAME, axis, config)
    bake(here.teacher.bank, NAME, found.unit)
    return card(found, name=name, encoder=here.eyes.name, rank=settings.rank, layers=settings.layers, **facts)


def carry_out(
    model: Any,
    task: Task,
    empty: Cond,
    settings: SliderSettings,
    given: Mapping[str, Any],
    run: Run,
    about: Mapping[str, Any],
    said: list[str],
    at: tuple,
) -> bool:
    """Pool, axis, training, measuring, writing; False where the time was up before the end."""
    say = say_to(said)
    teacher, found, shape = opened(model, settings, given, lambda t, size: shape_of(t, task, size), at)
    with run.locked(), teacher:
        here = lab(teacher, found, shape, settings, empty, given["clip_vision"], given["vae"], say)
        say(found.words)
        key, bench = here.key(about=about), here.bench(task.cond)
        pool = make_pool(here, run, key, task.cond, settings.pool)
        axis = axis_of(here, run, key, task, pool, pairs_of(settings))
        teacher.bank.new(NAME, settings.rank, torch.Generator().manual_seed(settings.seed))
        objective, batches = objective_of(here, task, settings, given, pool)
        config = TrainConfig(steps=settings.steps, seed=settings.seed, cooldown=COOLDOWN)
        look = looking(here, bench, NAME, SEEDS[:3])
        network = network_of(here, model, settings.rank, about["made_from"])
        if not train(objective, batches, config, run, kept_as(NAME, settings, given), about, network, look, say):
            return False
        facts = {"kind": KINDS[about["made_from"]], "prompts": about["prompts"], **base_of(model)}
        facts["training"] = {"steps": settings.steps}
        made = measured(here, task, axis, settings, run.name, facts)
        write_sliders(run, [Finished(teacher.bank.state(NAME), made)], settings.steps)
        draw_strip(run, here, bench, made)
    return True


def shape_of(teacher: NativeTeacher, task: Task, size: int) -> tuple[int, ...]:
    """Of one latent: that of the image pairs, else of the wanted size."""
    if task.pictures is None:
        return teacher.latent_shape(size, size)
    return tuple(teacher.latent_in(task.pictures[1.0][:1]).shape[1:])


def draw_strip(run: Run, here: Lab, bench: Bench, made: SliderCard) -> None:
    """The ends of the usable range, -1, 0 and +1."""
    strengths = sorted({-1.0, 0.0, 1.0, *made.usable})
    rows = strip(here, bench, NAME, strengths, SEEDS)
    if rows:
        show(run, sheet(rows, [f"{s:+g}" if s else "0" for s in strengths], title=made.name))


class TrainSlider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        text = {"multiline": True, "default": ""}
        keep = io.String.Input("keep", **text, tooltip="Prompts that must not change, one per line. May be empty.")
        made_from = io.DynamicCombo.Input(
            "made_from",
            options=[
                io.DynamicCombo.Option(
                    WORDS,
                    [
                        io.String.Input(
                            "neutral",
                            default="a photo of a person",
                            tooltip="What the slider is for; it should leave open what the slider changes.",
                        ),
                        io.String.Input(
                            "positive", default="a photo of a very old person", tooltip="The end at +1, in words."
                        ),
                        io.String.Input(
                            "negative", default="a photo of a very young person", tooltip="The end at -1, in words."
                        ),
                        io.String.Input(
                            "attributes",
                            default="",
                            tooltip="Words with commas that shall not decide anything, such as male, female. Each "
                            "makes its own set of prompts: at {} where a prompt has it, else in front. Parts divided "
                            "by | fill several {} in turn.",
                        ),
                        keep,
                    ],
                ),
                io.DynamicCombo.Option(
                    PAIRS,
                    [
                        io.String.Input(
                            "prompt",
                            **text,
                            tooltip="What the pictures have in common, or one line per pair. Wire the pairs below.",
                        )
                    ],
                ),
                io.DynamicCombo.Option(
                    ERASE,
                    [
                        io.String.Input(
                            "concept", default="", tooltip="What shall disappear at +1, as a prompt would name it."
                        ),
                        keep,
                    ],
                ),
            ],
            tooltip="Words are enough. Image pairs show what words cannot say: 2 to 6 pairs that differ in one thing.",
        )
        return io.Schema(
            node_id="DMD_TrainSlider",
            display_name="Train Slider",
            category="DMD/sliders",
            description="Trains a slider: a small LoRA whose strength is a control, to both sides. Afterwards it is "
            "always measured, on pictures it was not trained on: 1 becomes one standard deviation, and the report says "
            "how far it works, what else it moves, and if it does nothing at all.",
            search_aliases=["concept slider", "lora", "train", "attribute", "image pairs", "erase", "leco", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="The model to steer, with its LoRAs. Few-step models are far quicker."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                made_from,
                *run_folder_inputs("my slider"),
                *run_inputs(SliderSettings),
                io.Float.Input(
                    "eta",
                    default=TextSliderConfig.eta,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Words only: size of the edit that is learned at 1. More goes further and breaks sooner.",
                    advanced=True,
                ),
                *(image_input(name) for name in LEVELS),
                io.Boolean.Input(
                    "on_policy",
                    default=False,
                    optional=True,
                    tooltip="Words only: every step walks from noise with the slider on, instead of noising pictures "
                    "of the pool. Slower, and no better where it was measured.",
                    advanced=True,
                ),
            ],
            outputs=[
                SliderSet.Output("sliders", display_name="sliders", tooltip="For Mix Sliders: set 1."),
                io.LoraModel.Output("lora", display_name="lora", tooltip="For Load LoRA Model; 1 is its unit."),
                io.LossMap.Output("loss", display_name="loss", tooltip="The loss of every step."),
                io.Image.Output("strip", display_name="strip", tooltip="The same seeds at several strengths."),
                io.String.Output("report", display_name="report", tooltip="What was measured, in plain words."),
                io.String.Output("run", display_name="run", tooltip="For Save and Inspect Run."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: Any = None, resume: str = "auto", **_inputs: Any) -> str:
        """A run that was stopped goes on when the same graph is queued again."""
        return mark_of(run_name) if resume == "auto" else ""

    @classmethod
    def execute(cls, model: Any, clip: Any, made_from: Mapping[str, Any], **given: Any) -> io.NodeOutput:
        refuse_untrainable(model)
        given = {"vae": None, "clip_vision": None, "on_policy": False, **given}
        settings = settings_of(SliderSettings, given)
        run = open_run(root(), given["run_name"], given["resume"])
        images = {name: given.get(name) for name in LEVELS}
        task, empty = task_of(made_from, clip, given["vae"], images), conds(clip, [""])
        about = about_of(model, made_from, settings, given, task)
        refuse_other(run, about, noted=NOTED)
        said: list[str] = []
        at = graph_of(cls.hidden)
        if done(run, settings.steps) or carry_out(model, task, empty, settings, given, run, about, said, at):
            return outcome(run, said)
        return unfinished(run, said)


def about_of(
    model: Any, made_from: Mapping[str, Any], settings: SliderSettings, given: Mapping[str, Any], task: Task
) -> dict[str, Any]:
    """All that decides what is learned and what is measured, but the number of steps."""
    prompts = {k: v for k, v in made_from.items() if k != "made_from"}
    decide = ("batch", "rank", "layers", "seed", "sample_steps", "cfg", "pool", "seeds")
    learned = {k: getattr(settings, k) for k in decide} | {"clip_vision": eyes_of(given["clip_vision"])}
    found = {"made_from": made_from["made_from"], "prompts": prompts, "model": identity(model), **learned}
    if task.pictures is not None:
        found["pictures"] = [round(float(v.double().abs().mean()), 6) for v in task.pictures.values()]
    return found | {k: given[k] for k in ("eta", "lr", "size", "on_policy")}
