"""Finding what a model can vary in, and a calibrated slider for each direction (SliderSpace)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..dmd_core.begun import refuse_other
from ..dmd_core.conditioning import Cond
from ..dmd_core.objectives.slider_space import LOSSES, SliderSpace, SliderSpaceConfig, start_orthonormal
from ..dmd_core.runs import Run, open_run
from ..dmd_core.sheet import sheet
from ..dmd_core.sliders import (
    VARIATIONS,
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
from ..dmd_core.sliders.stored import Finished, kept, read, read_sliders, write_sliders
from ..dmd_core.train import TrainConfig
from ..dmd_core.trainstate import save_atomic
from .comfy_denoiser import refuse_untrainable
from .config_inputs import run_folder_inputs
from .distill import say_to
from .evidence import graph_of
from .slider_eyes import OWN, eyes_of
from .slider_files import MOST, SliderSet, identity
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

MULTIPLES = (0.5, 1.0, 2.0)  # of the unit, at which each slider is measured
SEEDS = range(2_000_000, 2_000_002)  # of the contact sheet
ENDS = {"high": 1.0, "low": -1.0}
SEEN, THUMBS = "pool/ends.safetensors", "pool/thumbnails.safetensors"  # of the run; names change, these do not
CELL = 128  # pixels of a thumbnail
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


# --- names ------------------------------------------------------------------------------------------------------------


def names_of(given: Mapping[str, Any]) -> list[str]:
    """The words that ends may be named by; the pack's own list where none are given."""
    words = [w.strip() for w in given["names"].replace("\n", ",").split(",") if w.strip()]
    return words or [w for group in VARIATIONS for w in group]


def embedder(clip: Any, width: int) -> Any:
    """Words as the CLIP_VISION sees pictures; refuses a text encoder of another width."""

    def embed(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            rows = [clip.encode_from_tokens(clip.tokenize(t), return_pooled=True)[1] for t in texts]
        return torch.cat(rows).float().cpu()

    found = embed(["a"]).shape[-1]
    if found != width:
        raise ValueError(
            f"name_clip gives {found} numbers per text, what looks at the pictures {width}; connect the CLIP "
            "text encoder that belongs to the CLIP_VISION (clip_l for CLIP-ViT-L/14), or unplug it"
        )
    return embed


def labelled(cards: Sequence[SliderCard], ends: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[SliderCard]:
    """Named by the words nearest to their ends, where a text encoder of the CLIP_VISION is wired; else numbered."""
    words, table = names_of(given), None
    if given["name_clip"] is not None:
        table = embedder(given["name_clip"], ends["0 high"].shape[-1])(words)
    out: list[SliderCard] = []
    for i, made in enumerate(cards):
        found = None if table is None else poles(ends[f"{i} high"], ends[f"{i} low"], words, table)
        title = name_of(i, found)
        taken = any(c.name == title for c in out)
        out.append(replace(made, name=f"{title} {i + 1}" if taken else title, ends=found))
    return out


def relabel(run: Run, given: Mapping[str, Any]) -> list[str]:
    """A finished run takes other names without being trained or measured again."""
    if given["name_clip"] is None:
        return []
    found = read_sliders(run)
    before = [f.card for f in found]
    seen = read(run.path / SEEN, SEEN)
    if seen is None:
        return ["what the ends look like was not kept by this run, so their names stay; set resume to new"]
    cards = labelled(before, seen, given)
    if cards != before:
        with run.locked():
            steps = int(before[0].training["steps"])
            write_sliders(run, [Finished(f.state, c) for f, c in zip(found, cards, strict=True)], steps)
            draw_sheet(run, read(run.path / THUMBS, THUMBS), cards)
    return said_of_names(given)


def said_of_names(given: Mapping[str, Any]) -> list[str]:
    if given["name_clip"] is None or given["names"].strip(" ,\n"):
        return []
    return ["names is empty: the ends are named from the pack's own word list"]


def measured(
    here: Lab,
    cond: Cond,
    names: Sequence[str],
    seen: Tensor,
    found: Directions,
    settings: DiscoverySettings,
    facts: Mapping[str, Any],
) -> tuple[list[SliderCard], dict[str, Tensor]]:
    """Each slider by itself, then all together. Besides, what their ends look like to a CLIP_VISION."""
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
    cards, ends = [], {}
    for i, name in enumerate(names):
        if not here.eyes.name.startswith(OWN):
            ends |= {f"{i} {end}": measure({name: s}, seeds) for end, s in ENDS.items()}
        own = {"explained": found.explained[i].item(), "stability": found.stability[i].item()}
        own |= {"additivity": together[name], "rank": settings.rank, "layers": settings.layers}
        cards.append(card(calibrations[name], kind="discovered", name=name, encoder=here.eyes.name, **own, **facts))
    return cards, ends


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
        say(found_how.words)
        pool, seen, found = look_at(here, run, here.key(about=about), cond, settings)
        if given["name_clip"] is not None:
            embedder(given["name_clip"], seen.shape[-1])  # before hours of training
        names = [f"direction {i + 1}" for i in range(settings.sliders)]
        objective = objective_of(here, names, found, cond, settings, given)
        config = TrainConfig(steps=settings.steps * len(names), seed=settings.seed, cooldown=COOLDOWN)
        turns = cycle(names)
        look = looking(here, here.bench(cond), lambda: next(turns), SEEDS)
        batches = PoolBatches(pool, settings.batch, settings.seed)
        network = network_of(here, model, settings.rank, "what the model varies in by itself")
        if not train(objective, batches, config, run, kept_as(names[0], settings, given), about, network, look, say):
            return False
        facts = {"prompts": about["prompts"], "training": {"steps": settings.steps}, **base_of(model)}
        plain, ends = measured(here, cond, names, seen, found, settings, facts)
        cards = labelled(plain, ends, given)
        if ends:
            save_atomic(ends, run.path / SEEN, {"key": SEEN})
        states = [teacher.bank.state(n) for n in names]
        write_sliders(run, [Finished(s, c) for s, c in zip(states, cards, strict=True)], settings.steps)
        thumbs = draw_rows(here, cond, names)
        if thumbs:
            save_atomic(thumbs, run.path / THUMBS, {"key": THUMBS})
        draw_sheet(run, thumbs, cards)
    return True


def draw_rows(here: Lab, cond: Cond, names: Sequence[str]) -> dict[str, Tensor]:
    """Thumbnails of each direction at -1, 0 and +1; none where nothing can be shown."""
    if here.draw is None:
        return {}
    bench, rows = here.bench(cond), {}
    (plain,) = strip(here, bench, names[0], (0.0,), SEEDS)
    for i, name in enumerate(names):
        low, high = strip(here, bench, name, (-1.0, 1.0), SEEDS)
        row = torch.stack([low, plain, high], 1).flatten(0, 1)
        scale = min(1.0, CELL / max(row.shape[-2:]))
        size = [round(scale * s) for s in row.shape[-2:]]
        rows[f"{i:02d}"] = F.interpolate(row, size, mode="bicubic", antialias=True) if scale < 1 else row
    return rows


def draw_sheet(run: Run, rows: Mapping[str, Tensor] | None, cards: Sequence[SliderCard]) -> None:
    if not rows:
        return
    sides = [f"{i + 1}. {c.name}, {c.explained or 0:.0%}, stable {c.stability or 0:.2f}" for i, c in enumerate(cards)]
    heads = ["-1", "0", "+1"] * len(SEEDS)
    show(run, sheet([rows[k] for k in sorted(rows)], sides, heads, CELL, f"{run.name}: discovered directions"))


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
                    "names",
                    **text,
                    tooltip="Words that ends may be named by, with commas. Empty takes the pack's own list.",
                    advanced=True,
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
        if given["name_clip"] is not None and given["clip_vision"] is None:
            raise ValueError(
                "name_clip is connected, but no CLIP_VISION that it belongs to; connect that and the VAE, or unplug it"
            )
        learned = ("sliders", "batch", "pool", "rank", "layers", "seed", "sample_steps", "cfg", "seeds")
        about = {"prompts": {"prompts": prompts}, "model": identity(model)} | {k: getattr(settings, k) for k in learned}
        about |= {k: given[k] for k in ("loss", "lr", "size")} | {"clip_vision": eyes_of(given["clip_vision"])}
        refuse_other(run, about, noted=NOTED)
        said: list[str] = []
        if done(run, settings.steps):
            said += relabel(run, given)
        else:
            cond, empty = conds(clip, prompts), conds(clip, [""])
            if not carry_out(model, cond, empty, settings, given, run, about, said, graph_of(cls.hidden)):
                return unfinished(run, said)
            said += said_of_names(given)
        return outcome(run, [PROMISE, *said], many=True)
