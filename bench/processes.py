"""Two processes against one, on the same work; and the formula for more of them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from dmd_core.adapters import AdapterBank
from dmd_core.data import Batch
from dmd_core.processes import ALONE, Accelerated, Shared, SharedBatches
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import TrainState

from .models import REAL, SMALL
from .record import NOT_RUN, Table, spread
from .training import RATIO, Ours

BATCH, STEPS = 4, 3
ROOT = Path(__file__).parents[1]


def work() -> None:
    """In each process: seconds per step, after one step to warm up. Prints a line of JSON."""
    torch.set_num_threads(1)
    processes = ALONE
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator

        processes = Accelerated(Accelerator(cpu=True))
    own = Ours(SMALL["flux"], BATCH // processes.count)
    size = SMALL["flux"]
    cond = size.cond(BATCH)
    batches = iter(lambda: Batch(cond, (BATCH, *size.shape)), None)
    objective, config = own.objective, TrainConfig(steps=STEPS + 1)
    state = TrainState(objective, config)
    if processes.count > 1:
        objective, batches = Shared(objective, processes), SharedBatches(batches, processes)
    steps = train(objective, batches, config, state, processes.mean if processes.count > 1 else None)
    next(steps)
    began = time.perf_counter()
    for _ in steps:
        pass
    if processes.rank == 0:
        print(json.dumps((time.perf_counter() - began) / STEPS))


def launch(count: int) -> float:
    command = [sys.executable, "-m", "bench", "work"]
    if count > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        many = ["--nproc_per_node", str(count), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *many, "-m", "bench", "work"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    return float(out.stdout.strip().splitlines()[-1])


def on_cpu(rounds: int = 3) -> Table:
    table = Table(
        "processes",
        "Several processes",
        "wall time of a DMD2 step (batch of 4 in all) in one process over that in two of one thread each; 2 is ideal",
        settings={"network": "flux, scaled down", "batch": BATCH, "steps per launch": STEPS, "backend": "gloo"},
        notes=["Wall time, unlike the other tables: other work on the machine counts against both sides."],
    )
    pairs = []
    for i in range(rounds):
        found = {count: launch(count) for count in ((1, 2) if i % 2 else (2, 1))}
        pairs.append(found[1] / found[2])
    table.rows.append({"processes": 2} | {k: round(v, 3) for k, v in spread(pairs).items()} | {"rounds": rounds})
    return table


# --- on paper ---------------------------------------------------------------------------------------------------------

COUNTS = (1, 2, 8, 16, 64)
WITHIN, BETWEEN = 300e9, 40e9  # bytes a second that a ring gets: NVLink inside of 8, 400 Gbit/s between machines
PEAK, UTILISATION = 989e12, 0.4  # dense bf16 operations a second of an H100 or H200, and what a training loop gets
FLOPS = {"sd15": 0.803e12, "sdxl": 6.761e12}  # of one pass (512 and 1024 pixels), as counted in the literature
PASSES = RATIO * (1 + 3) + (3 + 2 + 1)  # forward passes per student update; a backward counts as two


def on_paper() -> Table:
    table = Table(
        "scaling",
        "Scaling on paper",
        "speed of n GPUs over one at a fixed batch per GPU: 1 / (1 + t_sync / t_compute)",
        settings={"batch per GPU": 8, "GB/s within a machine": WITHIN / 1e9, "GB/s between": BETWEEN / 1e9},
        notes=[
            "t_compute = passes x batch x FLOPs of a pass / (peak x utilisation); passes = "
            f"{RATIO} x (1 + 3) + 6 = {PASSES}; peak x utilisation = {PEAK / 1e12:.0f} x {UTILISATION} TFLOP/s.",
            f"t_sync = {RATIO + 1} updates x 2 (n - 1) / n x gradient bytes / bandwidth: a ring all-reduce of fp32 "
            "gradients that overlaps with nothing. LoRA sets of rank 64 are sent, not the network.",
            "A calculation, not a measurement.",
        ],
    )
    for name, flops in FLOPS.items():
        size = REAL[name]
        net = size.net("meta", torch.bfloat16)
        bank = AdapterBank(net, size.kind.targets("all"))
        with torch.device("meta"):
            bank.new("one", 64)
        lora = 4 * sum(p.numel() for p in bank.parameters("one").values())
        full = 4 * sum(p.numel() for p in net.parameters())
        compute = PASSES * 8 * flops / (PEAK * UTILISATION)
        for n in COUNTS[1:]:
            row = {"network": name, "GPUs": n}
            for what, sent in (("LoRA sets", lora), ("whole networks", full)):
                sync = (RATIO + 1) * 2 * (n - 1) / n * sent / (WITHIN if n <= 8 else BETWEEN)
                row |= {f"speed, {what}": round(n / (1 + sync / compute), 1)}
                row |= {f"efficiency, {what}": round(1 / (1 + sync / compute), 3)}
            table.rows.append(row | {"measured": NOT_RUN})
    return table
