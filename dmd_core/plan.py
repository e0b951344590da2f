"""What a run will cost, measured on two steps before it starts, and what to change where it does not fit."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .train import Objective, Seekable, TrainConfig, train
from .trainstate import TrainState, whole

if TYPE_CHECKING:
    from .drive import DriveConfig

GIB = 2**30
CARDS = (12, 16, 24)  # GB
USABLE = 0.94  # of a card: the driver, the display and fragmentation take the rest
CONTEXT = int(0.6 * GIB)  # CUDA's own, which max_memory_allocated does not see [estimate]
WORTH = GIB // 2  # advice that saves less is noise


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes and seconds. peak is None on a CPU, where activations are not counted; inf: it did not fit at all."""

    device: str
    steps: int
    seconds_per_step: float
    base: int  # frozen weights
    trained: int  # parameters that learn
    averages: int
    optimizer: int
    peak: float | None
    fp8: int = 0  # what an fp8 base would save
    copies: int = 0  # players that train a whole copy of the network
    snapshot: int = 0  # one on disk: the student's average
    disk: int = 0  # the most that states and snapshots come to
    advice: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        return self.steps * self.seconds_per_step / 3600

    @property
    def state(self) -> int:
        """All that learns: what a saved state holds."""
        return self.trained + self.averages + self.optimizer

    @property
    def parameters(self) -> int:
        """All that is kept between steps."""
        return self.base + self.state

    def fits(self) -> dict[int, bool | None]:
        """Per card size; None where it cannot be told. Parameters alone can say no, never yes."""
        if self.peak is None:
            return {g: False if self.parameters + CONTEXT > g * GIB * USABLE else None for g in CARDS}
        return {g: self.peak + CONTEXT <= g * GIB * USABLE for g in CARDS}

    def words(self) -> str:
        answer = {True: "yes", False: "no", None: "not known"}
        cards = ", ".join(f"{g} GB {answer[fit]}" for g, fit in self.fits().items())
        kept = f"{size(self.base)} frozen + {size(self.trained)} trained + {size(self.optimizer)} optimiser"
        lines = [
            f"{self.steps} steps of {self.seconds_per_step:.3g} s: {duration(self.steps * self.seconds_per_step)} "
            f"on this {self.device}, measured on two steps",
            f"kept in memory: {kept} + {size(self.averages)} averages = {size(self.parameters)}",
        ]
        if self.copies:
            players = f"{self.copies} whole cop{'y' if self.copies == 1 else 'ies'} of the network"
            lines += [
                f"{players} to train: a saved state takes {size(self.state)} of disk and, as it is written, of memory",
                f"a snapshot {size(self.snapshot)}, all of them up to {size(self.disk)} (fewer: keep, keep_snapshots)",
            ]
        if self.peak is None:
            lines.append("peak memory: not measured. A CPU does not count activations: plan again on the GPU itself")
        elif self.peak == float("inf"):
            lines.append(f"peak memory: more than this {self.device} has")
        else:
            lines.append(f"peak memory: {size(self.peak)} measured, about {size(CONTEXT)} more for CUDA itself")
        return "\n".join([*lines, f"fits on {cards}", *(f"- {line}" for line in self.advice)])


def plan(
    objective: Objective,
    batches: Iterable[Any] | Seekable,
    config: TrainConfig,
    net: nn.Module | None = None,
    *,
    checkpointing: bool = False,
    batch: int = 0,
    steps_done: int = 0,
    first: int = 0,
    copies: int = 0,
    drive: "DriveConfig | None" = None,
) -> Plan:
    """Runs two steps and takes them back: parameters are what they were afterwards, to the bit.

    first: the step from which on all cost the same. copies: players that train whole copies of the network.
    drive: what is kept on disk.
    """
    device = next(iter(next(iter(objective.players.values())).params.values())).device
    before = {k: {n: p.detach().cpu().clone() for n, p in pl.params.items()} for k, pl in objective.players.items()}
    state = TrainState(objective, config)
    state.step = first
    seconds: list[float] = []
    full = False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for report in train(objective, batches, replace(config, steps=first + 2), state):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(report.seconds)
    except torch.OutOfMemoryError:
        full = True
    finally:
        put_back(objective, before)
    peak = None
    if device.type == "cuda":
        peak = float("inf") if full else float(torch.cuda.max_memory_allocated(device))
    elif full:
        peak = float("inf")
    learning = {id(p) for pl in objective.players.values() for p in pl.params.values()}
    frozen = [p for p in net.parameters() if id(p) not in learning] if net is not None else []
    made = Plan(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        steps=config.steps - steps_done,
        # the first step also chooses kernels and allocates
        seconds_per_step=seconds[-1] if seconds else float("nan"),
        base=sum(nbytes(p) for p in frozen),
        fp8=sum(nbytes(p) - p.numel() for p in frozen),
        trained=sum(nbytes(p) for pl in objective.players.values() for p in pl.params.values()),
        averages=sum(nbytes(v) for average in state.ema.values() for v in average.values()),
        optimizer=optimizer_bytes(state),
        peak=peak,
        copies=copies,
    )
    if drive is not None:
        made = replace(made, snapshot=sum(nbytes(p) for p in state.params.get(drive.player, {}).values()))
        made = replace(made, disk=disk(made, config.steps, drive))
    return replace(made, advice=tuple(advice(made, config, checkpointing, batch)))


def disk(made: Plan, steps: int, drive: "DriveConfig") -> int:
    """Bytes of all states and snapshots while one more of each is written; the best snapshot stays beside the last."""
    snapshots = math.ceil(steps / drive.snapshot_every) if drive.snapshot_every else 1
    return (drive.keep + 1) * made.state + min(drive.keep_snapshots + 2, snapshots) * made.snapshot


@torch.no_grad()
def put_back(objective: Objective, before: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, player in objective.players.items():
        for key, p in player.params.items():
            p.copy_(before[name][key])
            p.grad = None


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(state: TrainState) -> int:
    """Of what is there; where a player has not stepped yet, AdamW's two moments of its parameters."""
    total = 0
    for name, params in state.params.items():
        entries = state.optimizers[name].state
        for p in params.values():
            held = [v for v in entries.get(p, {}).values() if isinstance(v, Tensor)]
            total += sum(nbytes(part) for v in held for part in whole(v).values()) or 2 * nbytes(p)
    return total


def advice(made: Plan, config: TrainConfig, checkpointing: bool, batch: int) -> list[str]:
    """What to change, the cheapest for quality first; nothing that saves little or is not needed."""
    if all(made.fits().values()) or (made.peak is None and made.parameters < WORTH):
        return []
    found: list[tuple[float, str]] = []  # bytes less, where they are known; words
    activations = math.inf if made.peak in (None, math.inf) else max(0.0, made.peak - made.parameters)  # type: ignore[operator]
    if not checkpointing:
        words = "turn gradient checkpointing on: most of the activations go, a step takes about a third longer"
        found.append((activations, words))
    if config.precision == "fp32":
        found.append((activations / 2, "precision 'bf16': half the activations, and faster"))
    if batch > 1:
        less = activations * (1 - 1 / batch)
        share = f" (about {size(less)} less)" if less < math.inf else ""
        found.append((less, f"batch 1 with accumulate x {batch}: the same update{share}"))
    if config.optimizer == "adamw":
        found.append((0.75 * made.optimizer, f"optimizer 'adamw8bit': about {size(0.75 * made.optimizer)} less"))
    if made.copies:  # which a quantised base cannot have
        words = f"LoRA sets instead of whole copies (full = false): nearly all of {size(made.state)} less"
        found.append((made.state, words))
    else:
        found.append((made.state / 2, f"half the LoRA rank: about {size(made.state / 2)} less"))
        found.append((made.fp8, f"an fp8 base: up to {size(made.fp8)} less"))
    found.append((activations, "a smaller picture size"))
    return [words for less, words in found if less >= WORTH]


def size(count: float) -> str:
    return f"{count / GIB:.2f} GB" if count >= 0.01 * GIB else f"{count / 2**20:.2f} MB"


def duration(seconds: float) -> str:
    if seconds != seconds:  # not a number: nothing was measured
        return "unknown"
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"
