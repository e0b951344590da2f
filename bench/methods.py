"""Every method on the embedded shapes world: fidelity, coverage and spread of its students, beside their teacher.

A row trains in one to three minutes of one core, from the teacher and through the same code as any other run. What is
done is kept in out/bench at once, and a second start goes on from there.
"""

import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_core import demo, methods, metrics, shapes
from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.data import Latents, Prompts
from dmd_core.denoiser import Denoiser, Guided
from dmd_core.headless import Tuples
from dmd_core.objectives.dmd2 import DMD2, DMD2Config
from dmd_core.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from dmd_core.pairs import Pairs, make_pairs
from dmd_core.runfile import DataSettings, LoraSettings, MethodSettings, ModelSettings, RunFile, RunSettings
from dmd_core.sources import Source, shapes_source
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import TrainState, config_hash

from .record import Table, holding, versions

SEEDS = (0, 1, 2)
BATCH, RANK, GUIDANCE = 32, 16, 2.0
NUM_PAIRS, PAIR_STEPS = 64, 12  # batches of teacher pairs, of Heun steps
NUM_REAL = 2048  # renders, for the GAN of DMD2
CACHE = Path(__file__).parents[1] / "out" / "bench"
PROGRESS = CACHE / "methods.runs.json"

CALM = {"betas": (0.0, 0.99), "ema": 0.95}
MATCHING: dict[str, Any] = {
    "guidance": GUIDANCE,
    "student_betas": (0.0, 0.99),
    "critic_betas": (0.0, 0.99),
    "ema": 0.95,
}
FEW = MATCHING | {"critic_updates": 2, "student_lr": 1e-3, "critic_lr": 1e-3, "synchronise": 0.03}
# in four steps more updates are worth more than a better critic
LONG = FEW | {"critic_updates": 1, "one_sample": True}
ONE = MATCHING | {"critic_updates": 3, "student_lr": 2e-3, "critic_lr": 2e-3, "shift": 2.0}
GAN = {"gan_weight": 0.02, "gan_critic_weight": 1.0}
LADD = CALM | {"student_lr": 5e-4, "discriminator_lr": 5e-3, "early_steps": 50, "noise_mean": 0.0}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One student: what it is called, how it is trained."""

    name: str
    steps: int
    method: str = ""  # empty: the teacher itself
    updates: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    full: str = ""  # the player that is a whole copy of the network instead of a LoRA set
    style: bool = False  # a style LoRA of the base on top

    @property
    def key(self) -> str:
        return f"{self.name}, {self.steps}"


def taught(name: str, method: str, steps: int, updates: int, **options: Any) -> Row:
    return Row(name=name, method=method, steps=steps, updates=updates, options=options)


FOUR = taught("DMD2", "dmd2", 4, 240, **LONG)
PLAIN = taught("DMD2 without synchronising", "dmd2", 4, 150, **LONG | {"synchronise": 0.0})
ROWS = (
    *(Row(name="teacher", steps=n) for n in (1, 2, 4, 40)),
    taught("DMD", "dmd", 1, 110, **ONE | {"critic_updates": 1, "regression_weight": 0.25}),
    taught("Diffusion2GAN", "diffusion2gan", 1, 60, **CALM | {"student_lr": 1e-3, "discriminator_lr": 1e-3}),
    taught("reflow", "reflow", 1, 250, **CALM | {"lr": 2e-3}),
    taught("DMD2", "dmd2", 1, 100, **ONE),
    taught("DMD2", "dmd2", 2, 100, **FEW),
    FOUR,
    taught("DMD2 + GAN", "dmd2", 1, 60, **ONE | GAN),
    taught("DMD2 + GAN", "dmd2", 2, 60, **FEW | GAN),
    taught("DMD2 + GAN", "dmd2", 4, 150, **LONG | GAN),
    *(taught("LADD", "ladd", n, 250, **LADD) for n in (1, 2, 4)),
    PLAIN,
    replace(PLAIN, name="DMD2, full student", options={**PLAIN.options, "student_lr": 2e-4}, full="student"),
    replace(PLAIN, name="DMD2, full critic", options={**PLAIN.options, "critic_lr": 2e-4}, full="critic"),
    Row(name="teacher, style LoRA", steps=4, style=True),
    replace(FOUR, name="DMD2, style LoRA", style=True),
)


@dataclass
class Methods(Table):
    """Medians in `rows`; every run with its seed and commit in `runs`."""

    runs: list[dict[str, Any]] = field(default_factory=list)


def on_cpu(rows: tuple[Row, ...] = ROWS, seeds: tuple[int, ...] = SEEDS) -> Methods:
    """All rows of one seed, then those of the next; what a start that was stopped has measured is kept."""
    table = Methods(
        "methods",
        "Methods",
        "students of the shapes teacher, medians over seeds. frechet: distance of recogniser features to held-out "
        "renders, extrapolated to many pictures. accuracy: share of prompts read back right. coverage: of 42 kinds of "
        "object. spread: the narrowest of five factors over the renders'",
        seed="0 to 2",
        settings={"pictures": 1024, "batch": BATCH, "rank": RANK, "teacher's cfg": GUIDANCE, "clock": "processor"},
    )
    table.runs = [run for run in kept() if run["settings"] in {marked(r) for r in rows}]
    world = demo.World.load(torch.device("cpu"))
    for seed in seeds:
        for row in rows:
            if not any((run["settings"], run["seed"]) == (marked(row), seed) for run in table.runs):
                table.runs.append(measured(world, row, seed))
                PROGRESS.parent.mkdir(parents=True, exist_ok=True)
                PROGRESS.write_text(json.dumps({"runs": table.runs}, indent=1) + "\n", encoding="utf-8")
    PROGRESS.unlink(missing_ok=True)  # the next start measures anew
    return summarise(table, rows)


def kept() -> list[dict[str, Any]]:
    """Runs of a start that was stopped on this machine; those of the results were measured on another one."""
    return json.loads(PROGRESS.read_text(encoding="utf-8"))["runs"] if PROGRESS.is_file() else []


def marked(row: Row) -> str:
    """Changes with everything that a row's figures depend on, but for the code."""
    return config_hash(trained_as(row), row.style)[:12]


def trained_as(row: Row) -> str:
    shared = BATCH, RANK, GUIDANCE, NUM_PAIRS, PAIR_STEPS, NUM_REAL
    return config_hash(row.method, row.steps, row.updates, dict(row.options), row.full, *shared)[:12]


# --- one run


def measured(world: demo.World, row: Row, seed: int, judged: int = 1024) -> dict[str, Any]:
    """Trains, samples and judges one row of one seed."""
    if row.method:
        denoiser, sigmas, fresh, minutes = student(world, row, seed)
    else:
        denoiser, sigmas, fresh, minutes = teacher(world, row, seed), None, False, None
    prompts = demo.captions(judged, seed + 101)
    if row.style:
        prompts = [unlit(p) for p in prompts]
    levels = (*(sigmas or demo.levels(row.steps)[:-1]), 0.0)
    pictures = world.pictures(demo.generate(world, denoiser, levels, world.encode(prompts), seed + 7, fresh))
    found = demo.judge(world, pictures, prompts, reference(world, row.style))
    scene = demo.read(world, pictures)
    truth = demo.continuous(shapes.world.sample(8192, torch.Generator().manual_seed(1)))
    spread = metrics.spread(demo.continuous(scene), truth)
    narrow = min(v for k, v in spread.items() if not (row.style and k == "light"))
    figures = {"frechet": found["frechet"], "accuracy": found["accuracy"], "coverage": found["coverage"]}
    figures |= {"spread": narrow, "dark": (scene.light < shapes.world.LIGHT_SPLIT).float().mean().item()}
    figures |= {} if minutes is None else {"minutes": minutes}
    about = {"row": row.key, "seed": seed, "settings": marked(row), "commit": versions()["commit"]}
    return about | {k: round(v, 4) for k, v in figures.items()}


def student(world: demo.World, row: Row, seed: int) -> tuple[Denoiser, tuple[float, ...], bool, float | None]:
    """Trained, or read back where this row's LoRA set is there already. The last one: minutes of training."""
    source = shapes_source(ModelSettings(path="shapes"), world.device)
    bank = AdapterBank(source.net, source.family.targets())
    loop = TrainConfig(steps=row.updates, seed=seed, warmup=5, cooldown=0.3)
    pool, negative = world.encode(demo.captions(4096, seed + 1)), world.encode([""])
    made = built(row, source, bank, pool, negative, loop)
    path = CACHE / "students" / f"{trained_as(row)}_{seed}.safetensors"
    state = TrainState(made.objective, loop)
    params, minutes = made.objective.players["student"].params, None
    if path.is_file():
        trained = load_file(path)
    else:
        data, began = batches(world, made, pool, seed), time.process_time()
        for _ in train(made.objective, data, loop, state):
            pass
        minutes = (time.process_time() - began) / 60
        with state.averaged("student"):
            trained = {k: p.detach().clone() for k, p in params.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(trained, path)
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(trained[k])
    found: Denoiser = made.student
    if row.style:
        bank.load("style", style(world, seed))
        found = Adapted(source.denoiser, bank, {"student": 1.0, "style": 1.0})
    return found, made.sigmas, made.gamma is not None, minutes


def built(row: Row, source: Source, bank: AdapterBank, pool: Any, negative: Any, loop: TrainConfig) -> methods.Made:
    file = RunFile(
        run=RunSettings(name="bench"),
        model=ModelSettings(path="shapes"),
        data=DataSettings(prompts=()),
        method=MethodSettings(name=row.method, steps=row.steps, options=dict(row.options)),
        lora=LoraSettings(rank=RANK),
        train=loop,
    )
    made = methods.build(file, source, bank, pool, negative)
    if not row.full:
        return made
    views: dict[str, Any] = {"student": made.student, "critic": made.objective.critic}  # type: ignore[attr-defined]
    params = {k: bank.parameters(k) for k in views}
    copied = copy.deepcopy(shapes.load_teacher()).requires_grad_(True)
    views[row.full], params[row.full] = shapes.teacher.denoiser(copied), dict(copied.named_parameters())
    config = DMD2Config(sigmas=made.sigmas, **row.options)
    bare = Adapted(source.denoiser, bank, {})
    objective = DMD2(bare, views["student"], views["critic"], negative, params["student"], params["critic"], config)
    return replace(made, objective=objective, student=views["student"])


def batches(world: demo.World, made: methods.Made, pool: Any, seed: int) -> Any:
    """The GAN of DMD2 looks at renders; what learns from the teacher's pictures gets its pairs."""
    config = getattr(made.objective, "config", None)
    if getattr(config, "gan_weight", 0.0) and isinstance(config, DMD2Config):
        return renders(world, NUM_REAL, seed)
    if not made.needs_latents:
        return Prompts(pool, demo.LATENT, BATCH, seed)
    found = Pairs(teacher_pairs(world), world.device, seed)
    return Tuples(found) if made.tuples else found


def teacher_pairs(world: demo.World) -> Path:
    """The same ones for all rows and seeds."""
    pool = world.encode(demo.captions(4096, 11))
    guided = Guided(world.teacher, GUIDANCE, world.encode([""]))
    prompts = islice(Prompts(pool, demo.LATENT, BATCH, 0), NUM_PAIRS)
    for _ in make_pairs(guided, prompts, demo.levels(PAIR_STEPS), CACHE / "pairs", 0, f"shapes {GUIDANCE}"):
        pass
    return CACHE / "pairs"


@torch.no_grad()
def renders(world: demo.World, n: int, seed: int, dark: bool = False) -> Latents:
    """Encoded pictures with their captions."""
    rng = torch.Generator().manual_seed(seed + 31)
    scene = shapes.world.sample(n, rng)
    captions = shapes.captions.describe(scene, rng)
    if dark:
        scene, captions = night(scene), [unlit(c) for c in captions]
    parts = [world.autoencoder.encode(shapes.world.render(scene.take(i)).to(world.device)) for i in demo.split(n)]
    return Latents(world.encode(captions), list(torch.cat(parts)), BATCH, seed)


# --- the style: everything at night


def night(scene: shapes.world.Scene) -> shapes.world.Scene:
    return replace(scene, light=torch.where(scene.light > shapes.world.LIGHT_SPLIT, 1 - scene.light, scene.light))


def unlit(caption: str) -> str:
    """Without the words about the background."""
    return caption.partition(" on ")[0]


def style(world: demo.World, seed: int, updates: int = 80) -> dict[str, Tensor]:
    """A LoRA set of the base that draws every picture on a dark background, trained as styles usually are."""
    path = CACHE / "styles" / f"{updates}_{seed}.safetensors"
    if not path.is_file():
        source = shapes_source(ModelSettings(path="shapes"), world.device)
        bank = AdapterBank(source.net, source.family.targets())
        bank.new("style", 4, torch.Generator().manual_seed(seed))
        config = RectifiedFlowConfig(lr=1e-3, ema=None)
        objective = RectifiedFlow(Adapted(source.denoiser, bank, {"style": 1.0}), bank.parameters("style"), config)
        pictures = ((b.latents, b.cond) for b in renders(world, 512, seed, dark=True))
        for _ in train(objective, pictures, TrainConfig(steps=updates, seed=seed, warmup=5, cooldown=0.3)):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(bank.state("style"), path)
    return load_file(path)


def teacher(world: demo.World, row: Row, seed: int) -> Denoiser:
    negative = world.encode([""])
    if not row.style:
        return Guided(world.teacher, GUIDANCE, negative)
    source = shapes_source(ModelSettings(path="shapes"), world.device)
    bank = AdapterBank(source.net, source.family.targets())
    bank.load("style", style(world, seed))
    return Guided(Adapted(source.denoiser, bank, {"style": 1.0}), GUIDANCE, negative)


REFERENCES: dict[bool, Tensor] = {}


def reference(world: demo.World, dark: bool) -> Tensor:
    """Features of renders that no training has seen; of dark ones for the style."""
    if dark not in REFERENCES:
        scene = shapes.world.sample(8192, torch.Generator().manual_seed(987_654))
        scene = night(scene) if dark else scene
        with torch.no_grad():
            parts = [world.recogniser.features(shapes.world.render(scene.take(i))) for i in demo.split(8192)]
        REFERENCES[dark] = torch.cat(parts)
    return REFERENCES[dark]


# --- the table


def summarise(table: Methods, rows: tuple[Row, ...]) -> Methods:
    """Medians, and what holds: below the teacher in as many steps; the best of 4 steps against its 40."""
    found = {row.key: medians([r for r in table.runs if r["row"] == row.key]) for row in rows}
    found = {k: v for k, v in found.items() if v}
    table.rows = []
    for row in rows:
        if row.key in found:
            line = {"method": row.name, "steps": row.steps, **found[row.key]}
            same = found.get(f"teacher, {row.steps}")
            plain = row.method and not row.style and same
            line["below the teacher"] = ("yes" if line["frechet"] < same["frechet"] else "no") if plain else ""
            table.rows.append(line)
    table.notes = [*NOTES, commits(table.runs), *verdicts(rows, found)]
    return table


def commits(runs: list[dict[str, Any]]) -> str:
    counted = Counter(run["commit"] for run in runs)
    return "Runs by commit: " + ", ".join(f"{commit} {n}" for commit, n in counted.most_common()) + "."


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("frechet", "accuracy", "coverage", "spread", "dark", "minutes")
    if not runs:
        return {}
    found = {n: [r[n] for r in runs if n in r] for n in names}
    return {n: round(statistics.median(v), 4) if v else "" for n, v in found.items()} | {"seeds": len(runs)}


def verdicts(rows: tuple[Row, ...], found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    four = {r.key: found[r.key] for r in rows if r.steps == 4 and r.method and not r.style and r.key in found}
    if four and "teacher, 40" in found:
        goal, best = found["teacher, 40"], min(four, key=lambda k: four[k]["frechet"])
        near = four[best]["frechet"] <= 1.1 * goal["frechet"]
        right = four[best]["accuracy"] >= 0.98 * goal["accuracy"]
        yield (
            f"Best 4-step row, {best}: frechet {four[best]['frechet']:.3g} against 1.1 x {goal['frechet']:.3g} of the "
            f"40-step teacher ({holding(near)}); accuracy {four[best]['accuracy']:.3g} against "
            f"0.98 x {goal['accuracy']:.3g} ({holding(right)})."
        )


NOTES = [
    "All students begin as the teacher. Budgets are half a minute to two minutes of one core, so rows tell how far a "
    "method gets in them, not how far it could get.",
    "minutes: of the processor, training alone. In the runs committed here they hold the data of the row too, where it "
    "was made for the first time: about two minutes of teacher's pairs in two of DMD's three.",
    "DMD2 + GAN sees 2048 encoded renders; DMD, Diffusion2GAN, reflow and LADD see 2048 pictures of the teacher.",
    "Why some rows are not below their teacher: this one is good in 4 steps already, and two minutes are too short. "
    "DMD2 is below it with two seeds of three here, with all three after the demo's 600 updates (The embedded demo). "
    "LADD has no score to follow, only heads that begin untaught: with 4 steps it ends about where an untrained "
    "student begins.",
    "The style LoRA (rank 4, trained on the base) turns every background dark; its rows are compared with dark "
    "renders, and captions say nothing of the background. dark: share of dark pictures.",
]
