"""Our samplers and adapters around a network, timed from within the run: what is spent outside of it.

Two runs on a busy machine differ by more than the two percent that are in question. So the network keeps its own clock,
and what is left of the same run is ours. Guidance in one batch is another computation, so that is two runs in turn.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.denoiser import Denoiser
from dmd_core.samplers import sample_euler, sample_heun, sample_restart, start

from .models import REAL, SMALL, Size
from .record import Table, compared, verdict

STEPS = 4
SIZES = (
    ("sd15, real size", replace(REAL["sd15"], shape=(4, 8, 8)), 3),
    ("flux, scaled down", replace(SMALL["flux"], shape=(16, 16, 16)), 7),
)


def bare(size: Size, net: nn.Module, levels: Tensor, cond: object, noise: Tensor) -> Callable[[], Tensor]:
    """The network alone, once per level, on inputs that are ready."""
    schedule = size.kind.schedule()
    times = [schedule.timestep(s.expand(len(noise))) for s in levels[:-1]]

    @torch.no_grad()
    def run() -> Tensor:
        out = noise
        for t in times:
            out = size.call(net, noise, t, cond)
        return out

    return run


def levels_of(size: Size, device: str, steps: int = STEPS) -> Tensor:
    schedule = size.kind.schedule()
    times = torch.linspace(1.0, 0.25, steps) * schedule.timestep(torch.tensor([schedule.sigma_max]))
    return torch.cat([schedule.sigma(times.round() if size.kind.betas else times), torch.zeros(1)]).float().to(device)


def samplers(size: Size, model: Denoiser, levels: Tensor, cond: object, noise: Tensor) -> dict[str, Callable]:
    x = start(model.schedule, noise, levels[0])
    rng = torch.Generator(noise.device).manual_seed(0)
    return {
        "sample_restart, fresh noise": lambda: sample_restart(model, x, levels, cond, rng),
        "sample_restart, gamma 0.3": lambda: sample_restart(model, x, levels, cond, rng, 0.3),
        "sample_euler": lambda: sample_euler(model, x, levels, cond),
        "sample_heun": lambda: sample_heun(model, x, levels, cond),
    }


@dataclass
class Clock:
    """Processor time spent inside of what it is put around."""

    total: float = 0.0
    began: float = 0.0

    def go(self, *_: object) -> None:
        self.began = time.process_time()

    def stop(self, *_: object) -> None:
        self.total += time.process_time() - self.began

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self.go()
            try:
                return call(*args)
            finally:
                self.stop()

        return timed


@contextmanager
def clock_on(net: nn.Module) -> Iterator[Clock]:
    clock = Clock()
    handles = [net.register_forward_pre_hook(clock.go), net.register_forward_hook(clock.stop)]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


def outside(work: Callable[[], object], clock: Clock, rounds: int, ours: bool = False) -> dict[str, Any]:
    """Percent that a run takes beyond the network; with `ours` the clock is on our part instead of the network's."""
    work()
    found = []
    for _ in range(rounds):
        clock.total, began = 0.0, time.process_time()
        work()
        taken = time.process_time() - began
        part = clock.total if ours else taken - clock.total
        found.append(100 * part / (taken - part))
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"overhead, %": round(middle, 3), "low": round(low, 3), "high": round(high, 3), "rounds": rounds}


def on_cpu(done: Callable[[Table], object] = lambda table: None) -> Table:
    table = Table(
        "sampling",
        "Sampling",
        "what our samplers and adapters spend outside of the network's own calls in a run of 4 steps, in percent of "
        "those calls, both taken by processor time within the same run",
        settings={"steps": STEPS, "batch": 1, "precision": "fp32", "LoRA rank": 8}
        | {name: f"latent {size.shape[1]} x {size.shape[2]}" for name, size, _ in SIZES},
        notes=[
            "The small latent of sd15 leaves the network 1/64 of its usual work; our part hardly depends on it.",
            "A LoRA set awake is computed beside every layer, as training needs it. ComfyUI's stock loader merges a "
            "student into the weights, where it costs nothing.",
        ],
    )
    for name, size, rounds in SIZES:
        for row in rows_of(size, rounds):
            table.rows.append({"network": name} | row)
            done(table)
    table.notes += verdicts(table.rows)
    return table


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    ours = [r["overhead, %"] for r in rows if r["network"] == SIZES[0][0] and r["what"].startswith("sample_")]
    return [verdict("our samplers over the bare calls at SD1.5's size, %", ours, 2)]


def rows_of(size: Size, rounds: int) -> Iterator[dict[str, Any]]:
    net, cond, levels = size.net(), size.cond(1), levels_of(size, "cpu")
    noise = torch.randn(1, *size.shape, generator=torch.Generator().manual_seed(0))
    model = size.denoiser(net)
    for what, work in samplers(size, model, levels, cond, noise).items():
        with clock_on(net) as clock:
            yield {"what": what} | outside(work, clock, rounds)
    yield from adapters(size, net, rounds)
    yield guided(size, net, rounds)


def adapters(size: Size, net: nn.Module, rounds: int) -> Iterator[dict[str, Any]]:
    """What attached sets cost: asleep (the teacher's pass) and awake (the student's)."""
    bank, rng, clock = AdapterBank(net, size.kind.targets("all")), torch.Generator().manual_seed(0), Clock()
    for key in ("student", "critic", "slider"):
        bank.new(key, 8, rng)
    bank.detach()
    # the bank's own hooks, each with the clock around it
    handles = [m.register_forward_hook(clock.around(bank._hook(n))) for n, m in bank.layers.items()]
    cond, levels = size.cond(1), levels_of(size, "cpu")
    x = torch.randn(1, *size.shape, generator=torch.Generator().manual_seed(0))
    for what, mix in (("three LoRA sets asleep", {}), ("one LoRA set awake", {"student": 1.0})):
        model = Adapted(size.denoiser(net), bank, mix)
        run = partial(sample_euler, model, x, levels, cond)
        yield {"what": what} | outside(run, clock, rounds, ours=True)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def guided(size: Size, net: nn.Module, rounds: int) -> dict[str, Any]:
    """One call of two samples against two calls of one: what batching cond and uncond would gain."""
    one, two = size.cond(1), size.cond(2)
    noise = torch.randn(2, *size.shape, generator=torch.Generator().manual_seed(0))
    t = size.kind.schedule().timestep(levels_of(size, "cpu")[:1].expand(2))

    def apart() -> None:
        for _ in range(2):
            size.call(net, noise[:1], t[:1], one)

    found = compared(partial(size.call, net, noise, t, two), apart, rounds)
    percent = {k: round(100 * (found[k] - 1), 1) for k in ("ratio", "low", "high")}
    found = {"overhead, %": percent["ratio"], "low": percent["low"], "high": percent["high"], "rounds": rounds}
    return {"what": "cond and uncond as one batch, over two calls"} | found
