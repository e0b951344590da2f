"""The demo's 4-step student on one GPU, with a large batch in bf16. `python -m bench gpu_training`.

A real training from the trained teacher of the shapes world, judged as the demo judges it. `--dry` makes a handful of
updates on the CPU and keeps nothing.
"""

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dmd_core import demo

from .record import Table, verdict
from .students import Figures, change, ratio

CONFIG = replace(demo.DemoConfig(), batch=256, num_judged=4096)
DRY = replace(CONFIG, four=replace(CONFIG.four, updates=2), batch=4, num_judged=8)


def table(config: demo.DemoConfig, device: torch.device) -> Table:
    """Teacher and student, and whether the student in 4 steps is as near to held-out renders as the teacher in 4."""
    began = time.perf_counter()
    world = demo.World.load(device)
    start = time.perf_counter()
    run = demo.distil(world, config.four, config)
    took = time.perf_counter() - start
    rows, _ = demo.measure(world, {4: run}, config, demo.captions(config.num_judged, config.seed + 101))
    made = Table(
        "students",
        "The embedded demo",
        f"its 4-step student from a batch of {config.batch}, trained and judged on one GPU; the teacher is the "
        "embedded one. frechet: of the recogniser's features, to held-out renders, extrapolated to many pictures; not "
        "comparable with published ones. coverage: of 42 kinds of object. spread: the largest change of a factor's, "
        "against the teacher's 40 steps",
        seed=config.seed,
        settings={"batch": config.batch, "precision": demo.precision(device), "pictures": config.num_judged}
        | {k: v for k, v in asdict(config.four).items() if k in ("updates", "critic_updates", "lr")},
    )
    for name, found in rows.items():
        row = {"what": name} | {k: round(found[k], 4) for k in ("frechet", "accuracy", "coverage")}
        row |= {"spread": round(change(rows, name), 4), "ms per image": found["ms_per_image"]}
        row |= {"s per update": round(took / config.four.updates, 4) if name == "student_4" else ""}
        made.rows.append(row)
    made.notes += [claim(rows), verdict("minutes, all of it", [(time.perf_counter() - began) / 60], 10.0)]
    return made


def claim(rows: Figures) -> str:
    return verdict("student, 4 steps: frechet over teacher's 4", [ratio(rows, "frechet", 4, 4)], 1.0)


def main(dry: bool = False) -> None:
    if not dry and not torch.cuda.is_available():
        raise SystemExit("not run: there is no CUDA device here; nothing was written")
    made = table(DRY, torch.device("cpu")) if dry else table(CONFIG, torch.device("cuda"))
    with tempfile.TemporaryDirectory() as aside:
        path = made.write("cpu" if dry else "cuda", "python -m bench gpu_training", Path(aside) if dry else None)
        print(path.name, *made.rows, *made.notes, sep="\n")
