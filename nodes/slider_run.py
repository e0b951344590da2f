"""What training and discovering sliders share: a frozen MODEL that makes pictures, eyes on them, the run around it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image
from torch import Tensor

from ..dmd_core.adapters import Adapted
from ..dmd_core.conditioning import Cond
from ..dmd_core.drive import DriveConfig, drive
from ..dmd_core.families import Family, by_name, detect
from ..dmd_core.runs import Run
from ..dmd_core.sheet import sheet
from ..dmd_core.sliders import Bench, Pool, Sampling, SliderCard, draw_pool
from ..dmd_core.sliders.card import words
from ..dmd_core.sliders.settings import SLOW_STEPS, SliderSettings
from ..dmd_core.sliders.stored import Finished, kept_pool, key_of, read_sliders
from ..dmd_core.train import TrainConfig
from ..dmd_core.weights.lora import DTYPES, lora_tensors
from ..dmd_core.weights.recipe import Recipe, header_metadata
from . import live
from .comfy_source import NativeTeacher, file_of, pictures, pool_of, usual_size
from .distill import with_precision
from .encode_prompts import encoded
from .few_step import Unrecognised, plan
from .slider_eyes import Eyes, clip_eyes, own_eyes
from .slider_files import Slider, identity
from .students import curves_of, loss_map

NOTED = "slider"  # where run.json holds what a run was begun with
RESULT = "result.png"  # in the run folder: the strip, or the contact sheet
SHOWN = (-1.0, 0.0, 1.0)
COOLDOWN = 0.5  # share of the steps in which the learning rate falls to 0
FIRST_SEED = 0  # of the pool; calibration's seeds begin at a million
log = logging.getLogger(__name__)
Say = Callable[[str], None]
ShapeOf = Callable[[NativeTeacher, int], Sequence[int]]  # of one latent, from the size in pixels


def conds(clip: Any, prompts: Sequence[str]) -> Cond:
    """Prompts as the engine takes them, encoded once and kept on disk."""
    with torch.no_grad():
        return pool_of(encoded(clip, list(prompts)))[1]


# --- how this MODEL is sampled ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class How:
    model: Any
    sigmas: tuple[float, ...]
    gamma: tuple[float, ...]
    keep: str
    cfg: float
    few: bool
    words: str


def how(model: Any, shape: Sequence[int], settings: SliderSettings, family: Family, graph: Any, node: str) -> How:
    """A few-step model as it wants to be sampled, any other one in few Euler steps with CFG."""
    steps, latent = settings.sample_steps, {"samples": torch.zeros(1, *shape)}
    try:
        found = plan(model, latent, steps=steps, graph=graph, node=node)
    except Unrecognised:
        pass
    else:
        count = len(found.sigmas) - 1
        return How(
            model=found.model,
            sigmas=tuple(found.sigmas[:-1].tolist()),
            gamma=tuple(found.profile.gammas(count)),
            keep=found.profile.keep,
            cfg=settings.cfg or found.cfg,
            few=True,
            words=f"pictures in {count} steps, as {found.profile.title} is sampled",
        )
    steps, cfg = steps or SLOW_STEPS, settings.cfg or sum(family.cfg) / 2
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)[:-1]
    return How(
        model=model,
        sigmas=tuple(levels.tolist()),
        gamma=(0.0,) * steps,
        keep="time",
        cfg=cfg,
        few=False,
        words=f"pictures in {steps} Euler steps at cfg {cfg:g}; a few-step model would be faster",
    )


# --- the frozen model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A frozen MODEL, opened for training: it samples, and something looks at what it made."""

    teacher: NativeTeacher
    family: Family
    model: Adapted  # without any slider
    sampling: Sampling
    eyes: Eyes
    few: bool
    draw: Callable[[Tensor], Tensor] | None  # latents -> pictures in -1..1
    say: Say

    def bench(self, cond: Any) -> Bench:
        return Bench(self.model, self.sampling, cond, self.eyes.embed, device=self.teacher.device)

    @property
    def levels(self) -> tuple[float, ...]:
        """Where to train: a few-step model's own levels, any other model's all."""
        return self.sampling.sigmas if self.few else ()

    def key(self, **more: Any) -> str:
        s = self.sampling
        same = (s.shape, s.sigmas, list(s.gamma) if isinstance(s.gamma, Sequence) else s.gamma, s.keep, s.guidance)
        return key_of({"sampling": same, "eyes": self.eyes.name, **more})


def lab(
    teacher: NativeTeacher,
    found: How,
    shape: tuple[int, ...],
    settings: SliderSettings,
    empty: Cond,
    clip_vision: Any,
    vae: Any,
    say: Say,
) -> Lab:
    family = detect(teacher.net)
    model = Adapted(teacher, teacher.bank)
    eyes = own_eyes(teacher, model, family, empty) if clip_vision is None else clip_eyes(teacher, clip_vision, vae)
    draw = pictures(teacher, vae)

    def shown(latents: Tensor) -> Tensor:
        assert draw is not None
        images = draw(latents)
        teacher.load()  # decoding may have pushed it out
        return images

    sampling = Sampling(
        shape=shape,
        sigmas=found.sigmas,
        gamma=found.gamma,
        keep=found.keep,
        guidance=found.cfg,
        negative=empty,
        batch=settings.at_once,
    )
    return Lab(
        teacher=teacher,
        family=family,
        model=model,
        sampling=sampling,
        eyes=eyes,
        few=found.few,
        draw=shown if draw is not None else None,
        say=say,
    )


def opened(
    model: Any, settings: SliderSettings, given: Mapping[str, Any], shape_of: ShapeOf, at: tuple[Any, str]
) -> tuple[NativeTeacher, How, tuple[int, ...]]:
    """The MODEL as it will be trained on, how it is sampled, the shape of one latent. at: the graph and this node."""
    model = with_precision(model, given["precision"])
    family = detect(model.model.diffusion_model)
    targets, size = family.targets(settings.layers), given["size"] or usual_size(model, family)
    teacher = NativeTeacher(model, targets, given["checkpointing"])
    shape = tuple(shape_of(teacher, size))
    found = how(model, shape, settings, family, *at)
    if found.model is not model:  # with another parametrisation
        teacher = NativeTeacher(found.model, targets, given["checkpointing"])
    mm.unload_all_models()  # the text encoder above all
    return teacher, found, shape


def kept_as(player: str, settings: SliderSettings, given: Mapping[str, Any]) -> DriveConfig:
    return DriveConfig(
        player=player,
        snapshot_every=0,
        preview_every=settings.preview_every,
        save_every=given["save_every"],
        stop_minutes=given["stop_minutes"],
    )


def base_of(model: Any) -> dict[str, str]:
    return {"base": Path(file_of(model)).name, "base_hash": identity(model)}


def show(run: Run, page: Image.Image) -> None:
    """The result's picture, where Inspect Run looks for it too."""
    run.write_picture(RESULT, page)
    for snapshot in run.snapshots()[-1:]:
        run.write_picture(f"snapshots/{snapshot.name}/sheet.png", page)


def make_pool(lab: Lab, run: Run, key: str, cond: Any, n: int) -> Pool:
    """Samples of the frozen model; a run that was stopped goes on where it was."""
    bar, parts = comfy.utils.ProgressBar(n), []

    def draw(begin: int) -> Iterator[Pool]:
        if begin < n:
            lab.say(f"making {n - begin} pictures of the frozen model")
        return draw_pool(lab.model, lab.sampling, cond, n, FIRST_SEED, lab.teacher.device, begin)

    for part in kept_pool(run.path / "pool", key, n, draw):
        parts.append(Pool(part.latents.cpu(), part.row))
        bar.update(len(part))
        mm.throw_exception_if_processing_interrupted()
    return Pool.join(parts)


def watched(bench: Bench) -> Callable[[Mapping[str, float], Sequence[int]], Tensor]:
    """A Bench that can be cancelled between its pictures, and makes those of the frozen model once."""
    plain: dict[tuple[int, ...], Tensor] = {}

    def measure(strengths: Mapping[str, float], seeds: Sequence[int]) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        if any(strengths.values()):
            return bench(strengths, seeds)
        if tuple(seeds) not in plain:
            plain[tuple(seeds)] = bench({}, seeds)
        return plain[tuple(seeds)]

    return measure


# --- the run ----------------------------------------------------------------------------------------------------------


def train(
    objective: Any,
    batches: Any,
    config: TrainConfig,
    run: Run,
    kept: DriveConfig,
    about: Mapping[str, Any],
    network: Mapping[str, Any],
    preview: Callable[[], Image.Image] | None,
    say: Say,
) -> bool:
    """Bar, live strip, cancelling; False if the time was up before the last step."""
    whole, noted = True, {NOTED: about}
    driven = drive(
        objective, batches, config, run, kept, preview=preview, about=noted, beside={"network.json": network}, say=say
    )
    with live.bar_of(run, config.steps) as bar, closing(driven) as steps:
        for progress in steps:
            bar.update_absolute(progress.step, progress.total, live.picture(progress, run))
            if progress.stop:
                say(f"{progress.stop}, at step {progress.step} of {progress.total}: queue again to go on")
                whole = False
            mm.throw_exception_if_processing_interrupted()
    return whole


def strip(lab: Lab, bench: Bench, name: str, strengths: Sequence[float], seeds: Sequence[int]) -> list[Tensor]:
    """A row of pictures for each strength, one column per seed."""
    if lab.draw is None:
        return []
    return [lab.draw(bench.latents({name: s} if s else {}, seeds)).float().cpu() for s in strengths]


def looking(lab: Lab, bench: Bench, name: str | Callable[[], str], seeds: Sequence[int]) -> Any:
    """The strip at -1, 0 and +1 as it is now; None where nothing can be shown."""
    if lab.draw is None:
        return None
    base: list[Tensor] = []

    def look() -> Image.Image:
        now = name if isinstance(name, str) else name()
        base[:] = base or strip(lab, bench, now, (0.0,), seeds)
        low, high = strip(lab, bench, now, (-1.0, 1.0), seeds)
        rows = [low, base[0], high]
        return sheet(rows, [f"{s:+g}" if s else "0" for s in SHOWN], title=now)

    return look


# --- results ----------------------------------------------------------------------------------------------------------


def network_of(lab: Lab, model: Any, rank: int, prompts: str) -> dict[str, Any]:
    """What saving any of its sliders takes later, without the MODEL."""
    names = [n for n, _ in lab.teacher.net.named_modules() if n]
    recipe = Recipe(
        family=lab.family.name,
        objective="slider",
        prediction=lab.teacher.prediction.value,
        base=Path(file_of(model)).name,
        rank=rank,
        trained_on=prompts,
        strength_min=-1.0,
    )
    return {"names": names, "recipe": recipe.to_json()}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A finished slider with what its file says."""

    finished: Finished
    family: Family
    names: list[str]
    recipe: Recipe

    def slider(self) -> Slider:
        card = self.finished.card
        tensors = lora_tensors(self.finished.state, self.family, self.names, dtype=DTYPES["fp16"])
        metadata = header_metadata(card.name, self.family, self.recipe, "lora", card.metadata())
        return Slider(name=card.name, tensors=tensors, metadata=metadata, card=card)


def written(run: Run) -> list[Written]:
    """The finished sliders of a run; none if it is no slider's run, or not measured yet."""
    found = read_sliders(run)
    if not found:
        return []
    try:
        noted = json.loads((run.path / "network.json").read_text(encoding="utf-8"))
        recipe, names = Recipe.from_json(noted["recipe"]), list(noted["names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.path / 'network.json'} cannot be read ({error}); queue the run again") from error
    family = by_name(recipe.family)
    return [Written(finished=f, family=family, names=names, recipe=recipe_of(f.card, recipe)) for f in found]


def recipe_of(card: SliderCard, common: Recipe) -> Recipe:
    given = asdict(common) | {
        "objective": f"slider from {card.kind}" if card.kind != "discovered" else "discovered slider",
        "base_hash": card.base_hash,
        "rank": card.rank,
        "strength_min": card.usable[0],
        "strength_max": card.usable[1],
    }
    return Recipe(**given)


def blocked(n: int) -> list[Any]:
    """There is no slider yet: what hangs on it waits without an error."""
    return [ExecutionBlocker(None)] * n


def done(run: Run, steps: int) -> bool:
    """Is there a measured result of these steps or more?"""
    found = written(run)
    return bool(found) and found[0].finished.card.training.get("steps", 0) >= steps


def unfinished(run: Run, said: list[str]) -> io.NodeOutput:
    report = "\n".join(said)
    image, shown = blocked(1)[0], ui.PreviewText(report)
    if run.history():
        image, shown = live.result(curves_of(run), report)
    return io.NodeOutput(*blocked(2), loss_map(run), image, report, run.name, ui=shown)


def outcome(run: Run, said: list[str], many: bool = False) -> io.NodeOutput:
    found = [w.slider() for w in written(run)]
    report = "\n".join([*(words(s.card) for s in found if s.card is not None), *said])
    run.write_text("sliders.txt", report + "\n")
    path = run.path / RESULT
    image, shown = live.result(Image.open(path) if path.is_file() else curves_of(run), report)
    loras = [dict(s.tensors) for s in found]
    return io.NodeOutput(found, loras if many else loras[0], loss_map(run), image, report, run.name, ui=shown)
