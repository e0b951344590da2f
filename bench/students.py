"""The embedded demo over three seeds: what it claims, and broken recipes that must not reach it."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dmd_core import demo
from dmd_core.objectives.dmd2 import DMD2

from .record import Table, holding

SEEDS = (0, 1, 2)
JUDGED = 1024
WRONG_UPDATES = 100  # of the control whose guidance pulls away: it fails at once
FOLDER = Path(__file__).parents[1] / "out" / "bench" / "students"
Figures = Mapping[str, Mapping[str, Any]]  # by row

# what is said of the students, its bound, and how it is read from the rows of one seed
CLAIMS: dict[str, tuple[str, float, Callable[[Figures], float]]] = {
    "teacher, 40 steps: accuracy": (">=", 0.95, lambda r: r["teacher_40"]["accuracy"]),
    "student, 4 steps: accuracy over teacher's 40": (">=", 0.98, lambda r: ratio(r, "accuracy", 4, 40)),
    "student, 4 steps: frechet over teacher's 40": ("<=", 1.1, lambda r: ratio(r, "frechet", 4, 40)),
    "student, 4 steps: frechet over teacher's 4": ("<=", 0.5, lambda r: ratio(r, "frechet", 4, 4)),
    "student, 1 step: accuracy over teacher's 40": (">=", 0.9, lambda r: ratio(r, "accuracy", 1, 40)),
    "student, 1 step: frechet over teacher's 1": ("<=", 0.4, lambda r: ratio(r, "frechet", 1, 1)),
    "student, 4 steps: coverage": (">=", 1.0, lambda r: r["student_4"]["coverage"]),
    "student, 1 step: coverage": (">=", 1.0, lambda r: r["student_1"]["coverage"]),
    "student, 4 steps: largest change of a spread": ("<=", 0.15, lambda r: change(r, "student_4")),
    "student, 1 step: largest change of a spread": ("<=", 0.15, lambda r: change(r, "student_1")),
}


class OwnCritic(DMD2):
    """Broken: the student is its own critic, and nobody learns the score of what it makes."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.critic = self.student

    def turns(self, step: int) -> tuple[str, ...]:
        super().turns(step)
        return ("student",)


def texts(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.3f}" if v < 10 else f"{v:.0f}" for v in values)


def ratio(rows: Figures, what: str, student: int, teacher: int) -> float:
    return rows[f"student_{student}"][what] / rows[f"teacher_{teacher}"][what]


def change(rows: Figures, name: str) -> float:
    """Of a continuous factor's spread, against the teacher at 40 steps."""
    teacher = rows["teacher_40"]["spread"]
    return max(abs(v / teacher[k] - 1) for k, v in rows[name]["spread"].items())


def on_cpu(seeds: tuple[int, ...] = SEEDS, judged: int = JUDGED) -> Table:
    table = Table(
        "students",
        "The embedded demo",
        "`python -m dmd_core demo` with several seeds: medians over them, and each seed's figure. Prompts and held-out "
        "renders are the demo's; frechet is extrapolated to many pictures",
        seed="0 to 2",
        settings={"pictures": judged},
        notes=[
            "Controls train the 4-step student and must miss what it reaches: one that is its own critic, for as many "
            f"updates, and one with the wrong sign of the guidance, for {WRONG_UPDATES}."
        ],
    )
    found = [measured(replace(demo.DemoConfig(seed=seed), num_judged=judged)) for seed in seeds]
    for name in found[0]:
        values = {k: [f[name][k] for f in found] for k in ("accuracy", "frechet")}
        row = {k: round(statistics.median(v), 4) for k, v in values.items()}
        table.rows.append({"what": name} | row | {f"{k}, seeds": texts(v) for k, v in values.items()})
    for claim, (sign, bound, read) in CLAIMS.items():
        values = [read(f) for f in found]
        middle = statistics.median(values)
        holds = middle >= bound if sign == ">=" else middle <= bound
        table.notes.append(f"{claim}: {middle:.3f} ({texts(values)}), {sign} {bound:g} asked: {holding(holds)}.")
    return table


def measured(config: demo.DemoConfig) -> dict[str, dict[str, Any]]:
    """The demo's rows and the controls'; what an earlier start measured is kept."""
    path = FOLDER / f"{config.seed}.json"
    marked = {"config": json.loads(json.dumps(asdict(config))), "wrong": WRONG_UPDATES}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["made with"] == marked:
            return kept["rows"]
    report = demo.run_demo(FOLDER / str(config.seed), config, torch.device("cpu"), lambda line: None)
    rows = report["rows"] | dict(controls(config))
    path.write_text(json.dumps({"made with": marked, "rows": rows}, indent=1), encoding="utf-8")
    return rows


def controls(config: demo.DemoConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    world = demo.World.load(torch.device("cpu"))
    prompts = demo.captions(config.num_judged, config.seed + 101)
    cond, reference = world.encode(prompts), demo.held_out_features(world)
    for name, run in broken(world, config):
        latents = demo.generate(world, run, demo.levels(config.four.steps), cond, config.seed + 7, True)
        yield name, demo.judge(world, world.pictures(latents), prompts, reference)


def broken(world: demo.World, config: demo.DemoConfig) -> Iterator[tuple[str, Any]]:
    yield "untrained", world.teacher
    yield "student as its own critic", demo.distil(world, config.four, config, kind=OwnCritic).student
    # 1 - (w - 1): the pull of the prompt with its sign turned
    wrong = replace(config, guidance=2 - config.guidance)
    short = replace(config.four, updates=WRONG_UPDATES)
    yield "wrong sign of the guidance", demo.distil(world, short, wrong).student
