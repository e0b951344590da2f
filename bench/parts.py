"""Where a training step's time goes: the network's passes, the optimiser, and what is left, which is the engine's own.

The clocks sit inside one run, so that other work on the machine does not change the shares.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from dmd_core.trainstate import TrainState

from .models import SMALL
from .record import Table
from .training import RANK, Ours

PASSES = ("forward without gradient", "forward with gradient", "backward")
WORK = (*PASSES, "optimiser", "clipping")


@contextmanager
def clocks(net: nn.Module) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Seconds and calls of each part, while inside."""
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def around(name: Callable[[], str] | str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            part = name if isinstance(name, str) else name()
            began = time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - began
                calls[part] += 1

        return timed

    def forward() -> str:
        return PASSES[torch.is_grad_enabled()]

    with (
        mock.patch.object(net, "forward", around(forward, net.forward)),
        mock.patch.object(torch.autograd, "grad", around("backward", torch.autograd.grad)),
        mock.patch.object(TrainState, "apply", around("optimiser", TrainState.apply)),
        mock.patch.object(nn.utils, "clip_grad_norm_", around("clipping", nn.utils.clip_grad_norm_)),
    ):
        yield spent, calls


def on_cpu(rounds: int = 3) -> Table:
    table = Table(
        "parts",
        "Parts of a training step",
        "shares of one student update of DMD2, five critic updates included. rest: noise, losses, checks and the "
        "engine's Python",
        settings={"rank": RANK["cpu"], "batch": 1, "precision": "fp32", "rounds": rounds},
        notes=[
            "Adapters at work are inside the forward passes; their share is in the table of sampling.",
            "Waits for a GPU in a step: one reading per update and two for the report, no copy to the device "
            "(counted by a test); with a student of several levels one more reading per update.",
        ],
    )
    for name, size in SMALL.items():
        made = Ours(size, 1, rank=RANK["cpu"])
        made.update()
        with clocks(made.net) as (spent, calls):
            began = time.process_time()
            for _ in range(rounds):
                made.update()
            whole = time.process_time() - began
        row: dict[str, Any] = {"network": name}
        row |= {f"{part} ({calls[part] // rounds})": round(spent[part] / whole, 4) for part in WORK}
        table.rows.append(row | {"rest": round(1 - sum(spent.values()) / whole, 4)})
    return table
