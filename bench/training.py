"""DMD2 on one base with LoRA sets, against the published algorithm on three copies of the network.

The other side is written here, with diffusers' networks and none of the engine: student, critic and teacher are three
networks, the first two learn in full, five critic updates to one of the student (DMD2's train_sd.py, one-step setting,
without the GAN). Both sides: same network, batch, size, AdamW, precision, clipping, prompts encoded beforehand.
"""

import copy
import json
import os
import resource
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.data import Batch
from dmd_core.objectives.dmd2 import DMD2, DMD2Config
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import TrainState

from .models import SMALL, Size
from .record import Table, all_compared, tensor_bytes, verdict

RATIO, GUIDANCE, LR, CLIP = 5, 4.0, 1e-5, 1.0
RANK = {"cpu": 8, "cuda": 64}


class Ours:
    """The engine as it is used: one frozen network, LoRA sets for student and critic."""

    def __init__(
        self,
        size: Size,
        batch: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        rank: int = 8,
        one_sample: bool = False,
    ):
        self.net, rng = size.net(device, dtype), torch.Generator(device).manual_seed(0)
        self.bank, model = AdapterBank(self.net, size.kind.targets("all")), size.denoiser(self.net)
        for name in ("student", "critic"):
            self.bank.new(name, rank, rng)
        sets = [Adapted(model, self.bank, scales) for scales in ({}, {"student": 1.0}, {"critic": 1.0})]
        params = [self.bank.parameters(n) for n in ("student", "critic")]
        top = model.schedule.sigma_max
        config = DMD2Config(
            sigmas=(top,), guidance=GUIDANCE, critic_updates=RATIO, student_lr=LR, critic_lr=LR, ema=None,
            critic_betas=(0.9, 0.999), weight_decay=0.01, one_sample=one_sample,
        )  # fmt: skip
        cond, negative = size.cond(batch, device), size.cond(1, device, seed=1)
        self.objective = DMD2(*sets, negative, *params, config)
        loop = TrainConfig(steps=10**9, clip=CLIP, precision="fp32" if dtype == torch.float32 else "bf16")
        self.state = TrainState(self.objective, loop)
        self.steps = train(self.objective, iter(lambda: Batch(cond, (batch, *size.shape)), None), loop, self.state)

    def update(self) -> None:
        next(self.steps)

    def kept(self) -> int:
        moments = [v for o in self.state.optimizers.values() for s in o.state.values() for v in s.values()]
        trained = [p for ps in self.state.params.values() for p in ps.values()]
        return tensor_bytes([*self.net.parameters(), *self.net.buffers(), *trained, *moments])


class ThreeCopies:
    """The published loop. adapters: its LoRA variant on both sides, still with three networks."""

    def __init__(self, size: Size, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32, rank: int = 0):
        self.size, self.cond, self.negative = size, size.cond(batch, device), size.cond(1, device, seed=1)
        self.negative = self.negative.expand(batch)
        self.teacher = size.net(device, dtype)
        self.student, self.critic = copy.deepcopy(self.teacher), copy.deepcopy(self.teacher)
        self.banks: list[AdapterBank] = []
        if rank:
            rng = torch.Generator(device).manual_seed(0)
            self.banks = [AdapterBank(n, size.kind.targets("all")) for n in (self.student, self.critic)]
            for bank in self.banks:
                bank.new("own", rank, rng)
                bank.active = {"own": 1.0}
            params = [list(b.parameters("own").values()) for b in self.banks]
        else:
            for net in (self.student, self.critic):
                net.float().requires_grad_(True)
            params = [list(n.parameters()) for n in (self.student, self.critic)]
        self.params = dict(zip(("student", "critic"), params, strict=True))
        self.optimizers = {k: torch.optim.AdamW(p, LR, (0.9, 0.999), weight_decay=0.01) for k, p in self.params.items()}
        self.schedule, self.low = size.kind.schedule(), dtype != torch.float32
        self.device, self.shape = device, (batch, *size.shape)
        self.rng = torch.Generator(device).manual_seed(0)

    def noise(self) -> Tensor:
        return torch.randn(self.shape, generator=self.rng, device=self.device)

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, its level, and the noise; the level is uniform in time, as published."""
        eps, sigma = self.noise(), self.schedule.sample(len(x0), self.rng, 0.02, 0.98).to(x0)
        s = sigma.reshape(-1, 1, 1, 1)
        return ((1 - s) * x0 + s * eps if self.size.flow else x0 + s * eps), sigma, eps

    def predict(self, net: nn.Module, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """(x0, what the network said)"""
        s = sigma.reshape(-1, 1, 1, 1)
        x_in = x if self.size.flow else x / (s**2 + 1).sqrt()
        with torch.autocast(torch.device(self.device).type, torch.bfloat16) if self.low else nullcontext():
            out = self.size.call(net, x_in, self.schedule.timestep(sigma), cond)
        return x - s * out.float(), out.float()

    def generate(self) -> Tensor:
        top = torch.full((self.shape[0],), float(self.schedule.sigma_max), device=self.device)
        return self.predict(self.student, self.noise() * (1 if self.size.flow else top[0]), top, self.cond)[0]

    def step(self, name: str, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.params[name], CLIP)
        for optimizer in self.optimizers.values():
            if optimizer is self.optimizers[name]:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Five iterations: the first moves the student too."""
        for i in range(RATIO):
            with torch.set_grad_enabled(i == 0):
                y = self.generate()
            if i == 0:
                with torch.no_grad():
                    x, sigma, _ = self.noised(y)
                    fake, _ = self.predict(self.critic, x, sigma, self.cond)
                    real, _ = self.predict(self.teacher, x, sigma, self.cond)
                    plain, _ = self.predict(self.teacher, x, sigma, self.negative)
                    real = plain + GUIDANCE * (real - plain)
                    scale = (y - real).abs().mean((1, 2, 3), keepdim=True)
                    target = y - (fake - real) / scale
                self.step("student", 0.5 * (y - target).square().mean())
            y = y.detach()
            x, sigma, eps = self.noised(y)
            _, out = self.predict(self.critic, x, sigma, self.cond)
            self.step("critic", (out - (eps - y if self.size.flow else eps)).square().mean())

    def kept(self) -> int:
        moments = [v for o in self.optimizers.values() for s in o.state.values() for v in s.values()]
        nets = [p for n in (self.teacher, self.student, self.critic) for p in (*n.parameters(), *n.buffers())]
        lora = [p for ps in self.params.values() for p in ps] if self.banks else []
        return tensor_bytes([*nets, *lora, *moments])


SIDES = {
    "ours": lambda size, batch: Ours(size, batch),
    "three copies": lambda size, batch: ThreeCopies(size, batch),
    "three copies, LoRA": lambda size, batch: ThreeCopies(size, batch, rank=RANK["cpu"]),
}


def peak(name: str, side: str, batch: int) -> dict[str, float]:
    """Bytes that two updates add to a fresh fork of this process at most, and what is kept between updates."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        made = SIDES[side](SMALL[name], batch)
        made.update()
        made.update()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writer, json.dumps({"peak": 1024.0 * grown, "kept": made.kept()}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = json.loads(file.read())
    os.waitpid(child, 0)
    return found


def on_cpu(rounds: int = 3, batch: int = 1, done: Callable[[Table], object] = lambda table: None) -> Table:
    table = Table(
        "training",
        "Training step",
        "one student update of DMD2 (five critic updates and one of the student): one base with LoRA sets, over the "
        "published loop on three copies of the network. speed above 1 means that ours is faster",
        settings={"rank": RANK["cpu"], "batch": batch, "precision": "fp32", "optimizer": "AdamW", "accumulate": 1}
        | {"checkpointing": False, "guidance": GUIDANCE, "student levels": 1, "latent": "16 x 16"},
        notes=[
            "Networks are scaled down (20 to 33 million parameters) and random.",
            "Ours draws a fresh sample for the student's own update, which the published loop shares with the critic: "
            "26 passes per student update against 25 (a backward counts as two). With one sample a step, an option "
            "that the embedded demo uses, all updates of a step share theirs: 22.",
            "peak memory: growth of a fresh fork over two updates, activations included. "
            "kept memory: weights and optimiser between updates, counted.",
        ],
    )
    for size in SMALL.values():
        size.net("meta")  # imports what it needs before the forks
    # all forks before the first update here: memory that this process has freed would be used again and not counted
    every = {name: {side: peak(name, side, batch) for side in SIDES} for name in SMALL}
    for name, size in SMALL.items():
        row: dict[str, Any] = {"network": name}
        peaks = every[name]
        made = {side: make(size, batch) for side, make in SIDES.items()}
        ours = made.pop("ours")
        sharing = Ours(size, batch, one_sample=True)
        works = {side: other.update for side, other in made.items()} | {"sharing": sharing.update}
        found = all_compared(works, ours.update, rounds)
        shared = found.pop("sharing")["ratio"]
        for other, speed in found.items():
            row |= {f"speed over {other}": speed["ratio"], f"quartiles, {other}": [speed["low"], speed["high"]]}
            row[f"one sample a step, speed over {other}"] = round(speed["ratio"] / shared, 3)
            for kind in ("peak", "kept"):
                row[f"{kind} memory over {other}"] = round(peaks["ours"][kind] / peaks[other][kind], 3)
        table.rows.append(row)
        done(table)
        del made, ours, sharing, works, found
    table.notes += verdicts(table.rows)
    return table


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    for other in ("three copies", "three copies, LoRA"):
        speed, memory = f"speed over {other}", f"peak memory over {other}"
        notes.append(verdict(memory, [r[memory] for r in rows], 1 / 3))
        notes.append(verdict(speed, [r[speed] for r in rows], 1, at_least=True))
        # the published loop has passes to spare against one sample a step; not against copies that are LoRA sets too
        wanted, once = (1.5 if other == "three copies" else 1), f"one sample a step, {speed}"
        notes.append(verdict(once, [r[once] for r in rows], wanted, at_least=True))
    return notes
