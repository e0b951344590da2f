"""Our samplers and adapters against the same network calls made by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.denoiser import Denoiser
from dmd_core.samplers import sample_euler, sample_heun, sample_restart, start

from .models import SMALL, Size
from .record import Table, all_compared, compared

STEPS = 4
SIZES = [replace(SMALL[n], shape=(SMALL[n].shape[0], 32, 32)) for n in ("sd15", "flux")]


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
    }


def on_cpu(rounds: int = 5) -> Table:
    table = Table(
        "sampling",
        "Sampling",
        "time of our samplers over that of the bare network calls, 4 steps; overhead = ratio - 1",
        settings={"steps": STEPS, "batch": 1, "precision": "fp32", "latent": "32 x 32", "LoRA rank": 8},
        notes=["Networks are scaled down: on a real one the same overhead is a smaller share."],
    )
    table.rows = [row for size in SIZES for row in rows_of(size, rounds)]
    return table


def rows_of(size: Size, rounds: int) -> list[dict]:
    net, cond, levels = size.net(), size.cond(1), levels_of(size, "cpu")
    noise = torch.randn(1, *size.shape, generator=torch.Generator().manual_seed(0))
    model = size.denoiser(net)
    calls = bare(size, net, levels, cond, noise)
    found = all_compared(samplers(size, model, levels, cond, noise), calls, rounds)
    seven = bare(size, net, levels_of(size, "cpu", 2 * STEPS - 1), cond, noise)  # as many calls as Heun makes
    x = start(model.schedule, noise, levels[0])
    found["sample_heun (7 calls)"] = compared(partial(sample_heun, model, x, levels, cond), seven, rounds)
    rows = [{"network": size.family, "what": what} | row for what, row in found.items()]
    return rows + adapters(size, rounds)


def adapters(size: Size, rounds: int) -> list[dict]:
    """What sets cost that are attached, over the network without any: asleep (the teacher's pass), and awake."""
    plain, net = size.net(), size.net()
    bank, rng = AdapterBank(net, size.kind.targets("all")), torch.Generator().manual_seed(0)
    for key in ("student", "critic", "slider"):
        bank.new(key, 8, rng)
    cond, levels = size.cond(1), levels_of(size, "cpu")
    noise = torch.randn(1, *size.shape, generator=torch.Generator().manual_seed(0))
    x = start(size.kind.schedule(), noise, levels[0])

    def run(model: Denoiser) -> Callable[[], Tensor]:
        return lambda: sample_euler(model, x, levels, cond)

    model = size.denoiser(net)
    works = {
        "three LoRA sets asleep": run(Adapted(model, bank, {})),
        "one LoRA set awake, over none": run(Adapted(model, bank, {"student": 1.0})),
    }
    found = all_compared(works, run(size.denoiser(plain)), rounds)
    return [{"network": size.family, "what": what} | row for what, row in found.items()]
