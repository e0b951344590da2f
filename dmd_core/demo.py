"""The main job on the embedded world: distil the shapes teacher into 4-step and 1-step students and measure them."""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import metrics, shapes
from .adapters import Adapted, AdapterBank
from .conditioning import Cond
from .curves import curves
from .data import Prompts
from .denoiser import Denoiser, Guided
from .families.joint import SHAPES as FAMILY
from .objectives.dmd2 import DMD2, DMD2Config
from .samplers import sampled
from .sheet import sheet
from .train import Report, TrainConfig, train
from .trainstate import TrainState
from .weights.lora import save_lora
from .weights.recipe import Recipe

SIDE = shapes.world.CANVAS // shapes.autoencoder.FACTOR
LATENT = (shapes.autoencoder.CHANNELS, SIDE, SIDE)
# pictures for a Frechet distance: of 64 true renders it is -37 (deviation 30), of 256 0.3 (6.6)
ENOUGH = 256
FACTORS = ("radius", "x", "y", "angle", "light")  # continuous ones, of the first object


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How one student is trained; the best of a few runs each, on one seed."""

    steps: int
    updates: int
    lr: float  # of student and critic
    critic_updates: int
    synchronise: float = 0.0
    shift: float = 0.0  # of the matching times; 0: the schedule's own


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything the demo does; --quick for a look."""

    seed: int = 0
    four: Stage = Stage(steps=4, updates=600, lr=1e-3, critic_updates=2, synchronise=0.03)
    # begins as the 4-step student; more even matching times get more outlines right
    one: Stage = Stage(steps=1, updates=400, lr=2e-3, critic_updates=3, shift=2.0)
    batch: int = 32
    rank: int = 16
    guidance: float = 2.0
    num_judged: int = 1024  # pictures per row of the report
    num_shown: int = 8  # columns of the sheet


def quick(seed: int) -> DemoConfig:
    config = DemoConfig(seed=seed)
    return replace(config, four=replace(config.four, updates=20), one=replace(config.one, updates=15), num_judged=64)


@dataclass(frozen=True)
class World:
    """The frozen pieces, on one device."""

    net: torch.nn.Module
    teacher: Denoiser
    text: Any
    autoencoder: Any
    recogniser: Any
    device: torch.device

    @classmethod
    def load(cls, device: torch.device) -> "World":
        net = shapes.load_teacher().to(device)
        judges = [shapes.load_text_encoder(), shapes.load_autoencoder(), shapes.load_recogniser()]
        text, autoencoder, recogniser = (m.to(device) for m in judges)
        return cls(net, shapes.teacher.denoiser(net), text, autoencoder, recogniser, device)

    def encode(self, prompts: Sequence[str]) -> Cond:
        return Cond(*self.text.encode(prompts))

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        return torch.cat([self.autoencoder.decode(part) for part in latents.split(64)]).clamp(-1, 1)


@dataclass
class Run:
    """One distillation: what it made and how it went."""

    student: Denoiser
    state: dict[str, Tensor]
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def captions(n: int, seed: int) -> list[str]:
    rng = torch.Generator().manual_seed(seed)
    return shapes.captions.describe(shapes.world.sample(n, rng), rng)


def levels(steps: int) -> tuple[float, ...]:
    """The noise levels at which ComfyUI's simple scheduler calls this model, and the final 0."""
    return tuple(FAMILY.sigmas(steps).tolist())


def distil(
    world: World,
    stage: Stage,
    config: DemoConfig,
    begin: Mapping[str, Tensor] | None = None,
    on_report: Callable[[Report], None] = lambda report: None,
    kind: type[DMD2] = DMD2,
) -> Run:
    """DMD2 from prompts alone; student and critic are LoRA sets on the teacher's own network."""
    bank = AdapterBank(world.net, FAMILY.targets())
    rng = torch.Generator().manual_seed(config.seed)
    bank.new("student", config.rank, rng)
    bank.new("critic", config.rank, rng)
    if begin is not None:
        bank.load("student", begin)
    student, critic = (Adapted(world.teacher, bank, {k: 1.0}) for k in ("student", "critic"))
    dmd2 = DMD2Config(
        sigmas=levels(stage.steps)[:-1],
        guidance=config.guidance,
        critic_updates=stage.critic_updates,
        synchronise=stage.synchronise,
        shift=stage.shift,
        student_lr=stage.lr,
        critic_lr=stage.lr,
        student_betas=(0.0, 0.99),
        critic_betas=(0.0, 0.99),
        ema=0.95,
        one_sample=True,
    )
    negative = world.encode([""])
    objective = kind(
        world.teacher, student, critic, negative, bank.parameters("student"), bank.parameters("critic"), dmd2
    )
    loop = TrainConfig(steps=stage.updates, seed=config.seed, warmup=5, cooldown=0.3, precision=precision(world.device))
    state = TrainState(objective, loop)
    batches = Prompts(world.encode(captions(4096, config.seed + 1)), LATENT, config.batch, config.seed)
    run, began = Run(student, {}), time.perf_counter()
    for report in train(objective, batches, loop, state):
        for name, value in report.losses.items():
            run.losses.setdefault(name, []).append(value)
        on_report(report)
    with state.averaged("student"):
        run.state = bank.state("student")
    bank.load("student", run.state)
    run.seconds = time.perf_counter() - began
    return run


def precision(device: torch.device) -> str:
    """bf16 where it is fast: on GPUs and on CPUs with wide vectors."""
    fast = device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "bf16" if fast else "fp32"


@torch.no_grad()
def generate(
    world: World, denoiser: Denoiser, sigmas: Sequence[float], prompts: Cond, seed: int, fresh: bool
) -> Tensor:
    """Latents for the prompts; the same seed gives every row the same starting noise. fresh: restart, else Euler."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *LATENT, generator=rng).to(world.device)
    draw = torch.Generator(world.device).manual_seed(seed + 1)
    steps = torch.tensor(sigmas, device=world.device)
    parts = []
    for index in torch.arange(len(prompts)).split(64):
        own = noise[index.to(noise.device)]
        parts.append(sampled(denoiser, own, steps, prompts.take(index), draw, 1.0 if fresh else None))
    return torch.cat(parts)


def words(report: Mapping[str, Any]) -> str:
    """What the command prints of a report."""
    lines = [f"{'':12}{'accuracy':>10}{'frechet':>10}{'coverage':>10}{'ms/image':>10}"]
    for name, row in report["rows"].items():
        frechet = "-" if row["frechet"] is None else f"{row['frechet']:.2f}"
        lines.append(f"{name:12}{row['accuracy']:10.3f}{frechet:>10}{row['coverage']:10.2f}{row['ms_per_image']:10.1f}")
    config = report["config"]
    if config["num_judged"] < ENOUGH:
        updates = " and ".join(str(config[k]["updates"]) for k in ("four", "one"))
        lines.append(
            f"This was a look: {updates} updates are too few for a student as good as its teacher, and "
            f"{config['num_judged']} pictures too few to tell. Without --quick it is measured."
        )
    return "\n".join(lines)


def judge(world: World, images: Tensor, prompts: Sequence[str], reference: Tensor) -> dict[str, Any]:
    """What the frozen recogniser sees: it was never part of a loss."""
    parts = images.split(64)
    with torch.no_grad():
        features = torch.cat([world.recogniser.features(p) for p in parts]).cpu()
    scene = read(world, images)
    kinds = torch.stack([scene.shape[:, 0], scene.colour[:, 0]], 1)
    return {
        "accuracy": shapes.captions.accuracy(prompts, scene),
        "frechet": metrics.frechet_limit(features, reference, torch.Generator().manual_seed(0)),
        "coverage": metrics.coverage(kinds, len(shapes.world.SHAPES) * len(shapes.world.COLOURS)),
        "spread": {k: v.std().item() for k, v in continuous(scene).items()},
        "distance": metrics.pairwise_distance(features),
    }


def read(world: World, images: Tensor) -> Any:
    scenes = [world.recogniser.read(part) for part in images.split(64)]
    return type(scenes[0])(**{k: torch.cat([getattr(s, k) for s in scenes]).cpu() for k in vars(scenes[0])})


def continuous(scene: Any) -> dict[str, Tensor]:
    return {k: getattr(scene, k) if k == "light" else getattr(scene, k)[:, 0] for k in FACTORS}


def rows(
    config: DemoConfig, world: World, runs: Mapping[int, Run]
) -> Iterator[tuple[str, Denoiser, Sequence[float], bool]]:
    """name, denoiser, noise levels ending in 0, whether fresh noise is drawn between steps"""
    guided = Guided(world.teacher, config.guidance, world.encode([""]))
    for steps in (40, 4, 1):
        yield f"teacher_{steps}", guided, levels(steps), False
    for steps, run in runs.items():
        yield f"student_{steps}", run.student, levels(steps), True


def run_demo(out: Path, config: DemoConfig, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains, samples, judges; writes sheets, curves, LoRA states and report.json into out."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    world = World.load(device)
    runs: dict[int, Run] = {}
    begin = None
    for stage in (config.four, config.one):
        steps = stage.steps
        bar = ProgressLine(f"distilling to {steps} step{'s' * (steps > 1)}", stage.updates, say)
        runs[steps] = distil(world, stage, config, begin, bar.show)
        begin = runs[steps].state
        curves(runs[steps].losses, columns=2).save(out / f"curves_{steps}.png")
        export(world, out, steps, runs[steps].state, config)
    say("sampling and judging")
    prompts = captions(config.num_judged, config.seed + 101)
    table, pictures = measure(world, runs, config, prompts)
    shown = {k: v[: config.num_shown] for k, v in pictures.items()}
    sheet(list(shown.values()), list(shown), prompts[: config.num_shown]).save(out / "sheet.png")
    if config.num_judged < ENOUGH:
        for row in table.values():
            row["frechet"] = None
    report = {
        "rows": table,
        "config": asdict(config),
        "precision": precision(device),
        "training_seconds": {f"student_{k}": round(r.seconds, 1) for k, r in runs.items()},
        "wall_seconds": round(time.perf_counter() - began, 1),
        "versions": versions(device),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def export(world: World, folder: Path, steps: int, state: Mapping[str, Tensor], config: DemoConfig) -> Path:
    """An ordinary LoRA file that says how it wants to be sampled."""
    names = [n for n, _ in world.net.named_modules()]
    recipe = Recipe(
        family=FAMILY.name,
        objective="dmd2",
        steps=steps,
        sigmas=levels(steps),
        trained_cfg=config.guidance,
        prediction="flow",
        shift=FAMILY.shift,
        base="shapes teacher",
        rank=config.rank,
        trained_on="captions of the shapes world",
    )
    return save_lora(folder, f"shapes_student_{steps}", state, names, family=FAMILY, recipe=recipe)


def measure(
    world: World, runs: Mapping[int, Run], config: DemoConfig, prompts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cond, reference = world.encode(prompts), held_out_features(world)
    table, pictures = {}, {}
    for name, denoiser, sigmas, fresh in rows(config, world, runs):
        began = time.perf_counter()
        images = world.pictures(generate(world, denoiser, sigmas, cond, config.seed + 7, fresh))
        seconds = time.perf_counter() - began
        pictures[name] = images.cpu()
        table[name] = judge(world, images, prompts, reference)
        table[name]["ms_per_image"] = round(1000 * seconds / len(prompts), 2)
    return table, pictures


def held_out_features(world: World, n: int = 8192) -> Tensor:
    """Recogniser features of renders that no training has seen."""
    scene = shapes.world.sample(n, torch.Generator().manual_seed(987_654))
    with torch.no_grad():
        parts = [world.recogniser.features(shapes.world.render(scene.take(i)).to(world.device)) for i in split(n)]
    return torch.cat(parts).cpu()


def split(n: int) -> tuple[Tensor, ...]:
    return torch.arange(n).split(64)


@dataclass
class ProgressLine:
    """`label 34/150, 2:10 left`, said at most once a second."""

    label: str
    total: int
    say: Callable[[str], None]
    began: float = field(default_factory=time.perf_counter)
    last: float = 0.0

    def show(self, report: Report) -> None:
        now = time.perf_counter()
        if now - self.last < 1 and report.step < self.total:
            return
        self.last = now
        left = round((now - self.began) / report.step * (self.total - report.step))
        self.say(f"{self.label} {report.step}/{self.total}, {left // 60}:{left % 60:02} left")


def versions(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"python": sys.version.split()[0], "torch": torch.__version__, "device": f"{device} {name}".strip()}
