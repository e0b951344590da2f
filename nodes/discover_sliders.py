"""Finding what a model can vary in, and a calibrated slider for each direction (SliderSpace)."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..dmd_core.conditioning import Cond
from ..dmd_core.objectives.slider_space import LOSSES, SliderSpace, SliderSpaceConfig, start_orthonormal
from ..dmd_core.runs import Run, open_run
from ..dmd_core.sheet import sheet
from ..dmd_core.sliders import (
    CalibrationConfig,
    Directions,
    PoolBatches,
    SliderCard,
    additivity,
    axis_along,
    bake,
    calibrate,
    card,
    embedded,
    find_directions,
    name_of,
    poles,
    variations,
)
from ..dmd_core.sliders.settings import DiscoverySettings
from ..dmd_core.sliders.stored import Finished, kept, write_sliders
from ..dmd_core.train import TrainConfig
from .comfy_denoiser import refuse_untrainable
from .config_inputs import run_folder_inputs
from .distill import say_to
from .evidence import graph_of
from .slider_files import MOST, SliderSet, identity
from .slider_inputs import run_inputs, settings_of
from .slider_run import (
    COOLDOWN,
    Lab,
    base_of,
    check_same,
    conds,
    done,
    kept_as,
    lab,
    looking,
    make_pool,
    note_network,
    opened,
    outcome,
    show,
    strip,
    train,
    unfinished,
    watched,
)
from .students import mark_of, root

MULTIPLES = (0.5, 1.0, 2.0)  # of the unit, at which each slider is measured
SEEDS = range(2_000_000, 2_000_002)  # of the contact sheet
PROMISE = (
    "These are directions that the model can move in, by variety x stability. One may mix several things, and its name "
    "is only the nearest word."
)


def prompts_of(prompt: str, words: str, settings: DiscoverySettings) -> list[str]:
    """One line is a topic, which the word list varies; several lines are the user's own list."""
    lines = [t.strip() for t in prompt.splitlines() if t.strip()]
    if not lines:
        raise ValueError("the prompt is empty; say what the sliders are for, such as 'a photo of a dog'")
    if len(lines) > 1:
        return lines
    groups = [[w.strip() for w in line.split(",") if w.strip()] for line in words.splitlines() if line.strip()]
    rng = torch.Generator().manual_seed(settings.seed)
    return variations(lines[0], settings.prompts, rng, *([groups] if groups else []))


def look_at(here: Lab, run: Run, key: str, cond: Cond, settings: DiscoverySettings) -> tuple[Any, Tensor, Directions]:
    """The pool, its features and what it varies in."""
    pool = make_pool(here, run, key, cond, settings.pool)

    def look() -> dict[str, Tensor]:
        latents = pool.latents.to(here.teacher.device)
        return {"pool": embedded(here.eyes.embed, latents, here.sampling.batch)}

    seen = kept(run.path / "pool" / "features.safetensors", f"{key} {len(pool)}", look)["pool"]
    rng = torch.Generator().manual_seed(settings.seed)
    return pool, seen, find_directions(seen, settings.sliders, rng)


def objective_of(
    here: Lab, names: Sequence[str], found: Directions, cond: Cond, settings: DiscoverySettings, given: Mapping
) -> SliderSpace:
    bank = here.teacher.bank
    for i, name in enumerate(names):
        rng = torch.Generator().manual_seed(settings.seed + i)
        bank.new(name, settings.rank, rng)
        if given["loss"] == "cosine":
            start_orthonormal(bank, name, torch.Generator(here.teacher.device).manual_seed(settings.seed + i))
    own = {"lr": given["lr"]} if given["lr"] else {}
    config = SliderSpaceConfig(loss=given["loss"], sigmas=here.levels, **own)
    named = {n: (found.vectors[i], found.sds[i].item()) for i, n in enumerate(names)}
    return SliderSpace(here.model, named, here.eyes.embed, cond, config)


def labels(measure: Any, name: str, given: Mapping[str, Any], seeds: Sequence[int]) -> tuple[str, str] | None:
    """The nearest words of the ends, where a text encoder of the CLIP_VISION is wired."""
    words = [w.strip() for w in given["names"].replace("\n", ",").split(",") if w.strip()]
    if given["name_clip"] is None or not words:
        return None
    clip = given["name_clip"]

    def embed(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            rows = [clip.encode_from_tokens(clip.tokenize(t), return_pooled=True)[1] for t in texts]
        return torch.cat(rows).float().cpu()

    high, low = (measure({name: s}, seeds) for s in (1.0, -1.0))
    width = embed(words[:1]).shape[-1]
    if width != high.shape[-1]:
        raise ValueError(
            f"name_clip gives {width} numbers per text, what looks at the pictures {high.shape[-1]}; connect the CLIP "
            "text encoder that belongs to the CLIP_VISION (clip_l for CLIP-ViT-L/14), or unplug it"
        )
    return poles(high, low, words, embed)


def measured(
    here: Lab,
    cond: Cond,
    names: Sequence[str],
    seen: Tensor,
    found: Directions,
    settings: DiscoverySettings,
    given: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> list[SliderCard]:
    """Each slider by itself, then all together."""
    config = CalibrationConfig(seeds=settings.seeds, held_out=settings.seeds, multiples=MULTIPLES)
    measure, bank = watched(here.bench(cond)), here.teacher.bank
    axes = {n: axis_along(found.vectors[i], seen) for i, n in enumerate(names)}
    calibrations = {}
    for i, name in enumerate(names):
        here.say(f"measuring slider {i + 1} of {len(names)}")
        calibrations[name] = calibrate(measure, name, axes[name], config)
        bake(bank, name, calibrations[name].unit)
    seeds = range(config.first_seed + settings.seeds, config.first_seed + 2 * settings.seeds)
    together = additivity(measure, axes, seeds)
    cards, taken = [], set()
    for i, name in enumerate(names):
        ends = labels(measure, name, given, seeds)
        title = name_of(i, ends)
        title = f"{title} {i + 1}" if title in taken else title
        taken.add(title)
        own = {"explained": found.explained[i].item(), "stability": found.stability[i].item()}
        own |= {"ends": ends, "additivity": together[name], "rank": settings.rank, "layers": settings.layers}
        cards.append(card(calibrations[name], kind="discovered", name=title, encoder=here.eyes.name, **own, **facts))
    return cards


def carry_out(
    model: Any,
    cond: Cond,
    empty: Cond,
    settings: DiscoverySettings,
    given: Mapping[str, Any],
    run: Run,
    about: Mapping[str, Any],
    said: list[str],
    at: tuple,
) -> bool:
    """Pool, directions, training, measuring, writing; False where the time was up before the end."""
    say = say_to(said)
    teacher, found_how, shape = opened(model, settings, given, lambda t, size: t.latent_shape(size, size), at)
    with run.locked(), teacher:
        here = lab(teacher, found_how, shape, settings, empty, given["clip_vision"], given["vae"], say)
        note_network(run, here, model, settings.rank, "what the model varies in by itself")
        say(found_how.words)
        pool, seen, found = look_at(here, run, here.key(about=about), cond, settings)
        names = [f"direction {i + 1}" for i in range(settings.sliders)]
        objective = objective_of(here, names, found, cond, settings, given)
        config = TrainConfig(steps=settings.steps * len(names), seed=settings.seed, cooldown=COOLDOWN)
        turns = cycle(names)
        look = looking(here, here.bench(cond), lambda: next(turns), SEEDS)
        batches = PoolBatches(pool, settings.batch, settings.seed)
        if not train(objective, batches, config, run, kept_as(names[0], settings, given), about, look, say):
            return False
        facts = {"prompts": about["prompts"], "training": {"steps": settings.steps}, **base_of(model)}
        cards = measured(here, cond, names, seen, found, settings, given, facts)
        states = [teacher.bank.state(n) for n in names]
        write_sliders(run, [Finished(s, c) for s, c in zip(states, cards, strict=True)], settings.steps)
        draw_sheet(run, here, cond, names, cards)
    return True


def draw_sheet(run: Run, here: Lab, cond: Cond, names: Sequence[str], cards: list[SliderCard]) -> None:
    if here.draw is None:
        return
    bench = here.bench(cond)
    (plain,) = strip(here, bench, names[0], (0.0,), SEEDS)
    rows = []
    for name in names:
        low, high = strip(here, bench, name, (-1.0, 1.0), SEEDS)
        rows.append(torch.stack([low, plain, high], 1).flatten(0, 1))
    sides = [f"{i + 1}. {c.name}, {c.explained or 0:.0%}, stable {c.stability or 0:.2f}" for i, c in enumerate(cards)]
    show(run, sheet(rows, sides, ["-1", "0", "+1"] * len(SEEDS), title=f"{run.name}: discovered directions"))


class DiscoverSliders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        text: dict[str, Any] = {"multiline": True, "default": ""}
        return io.Schema(
            node_id="DMD_DiscoverSliders",
            display_name="Discover Sliders",
            category="DMD/sliders",
            description="Finds what the model varies in for a prompt when only the seed changes, and trains a "
            "calibrated slider for each direction. Minutes on a few-step model. They are directions, not names: look "
            "at the contact sheet and keep the good ones.",
            search_aliases=["sliderspace", "find sliders", "pca", "variation", "concept slider", "diversity", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="The model to explore. Few-step models are far quicker."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of a person",
                    tooltip="What the sliders are for. One line: the topic, which is varied if prompts is above 1. "
                    "Several lines: your own list of prompts.",
                ),
                io.Int.Input(
                    "sliders",
                    default=DiscoverySettings.sliders,
                    min=1,
                    max=MOST,
                    tooltip="How many directions, the most telling first.",
                ),
                *run_folder_inputs("my directions"),
                *run_inputs(DiscoverySettings),
                io.Int.Input(
                    "prompts",
                    default=DiscoverySettings.prompts,
                    min=1,
                    max=1000,
                    tooltip="Variations of the topic that the pictures are made from; 1 is the topic alone.",
                    advanced=True,
                ),
                io.String.Input(
                    "words",
                    **text,
                    tooltip="Words for the variations: one group per line, with commas. {} in an entry is where the "
                    "topic goes. Empty takes the pack's own list.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "loss",
                    options=list(LOSSES),
                    default=SliderSpaceConfig.loss,
                    tooltip="Regression learns direction and size, the same to both sides. Cosine is the paper's: "
                    "direction alone.",
                    advanced=True,
                ),
                io.Clip.Input(
                    "name_clip",
                    optional=True,
                    tooltip="The CLIP text encoder that belongs to the CLIP_VISION (clip_l for CLIP-ViT-L/14): it "
                    "names the ends with words from names.",
                ),
                io.String.Input(
                    "names", **text, tooltip="Words that ends may be named by, with commas.", advanced=True
                ),
            ],
            outputs=[
                SliderSet.Output("sliders_out", display_name="sliders", tooltip="For Mix Sliders: set 1, set 2, ..."),
                io.LoraModel.Output(
                    "lora", display_name="lora", is_output_list=True, tooltip="All of them, for Load LoRA Model."
                ),
                io.LossMap.Output("loss_map", display_name="loss", tooltip="The loss of every step."),
                io.Image.Output("sheet", display_name="sheet", tooltip="Each direction at -1, 0 and +1."),
                io.String.Output("report", display_name="report", tooltip="What was found and measured."),
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
    def execute(cls, model: Any, clip: Any, prompt: str, words: str = "", **given: Any) -> io.NodeOutput:
        refuse_untrainable(model)
        given = {"vae": None, "clip_vision": None, "name_clip": None, **given}
        settings = settings_of(DiscoverySettings, given)
        run = open_run(root(), given["run_name"], given["resume"])
        prompts = prompts_of(prompt, words, settings)
        learned = ("sliders", "batch", "pool", "rank", "layers", "seed", "sample_steps", "cfg")
        about = {"prompts": {"prompts": prompts}, "model": identity(model)} | {k: getattr(settings, k) for k in learned}
        about |= {k: given[k] for k in ("loss", "lr", "size")}
        check_same(run, about)
        said: list[str] = []
        if not done(run, settings.steps):
            cond, empty = conds(clip, prompts), conds(clip, [""])
            if not carry_out(model, cond, empty, settings, given, run, about, said, graph_of(cls.hidden)):
                return unfinished(run, said)
        return outcome(run, [PROMISE, *said], many=True)
