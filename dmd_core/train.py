"""One training loop for every objective. It is a generator: the caller draws, saves, cancels."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import shards
from .trainstate import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 1000
    seed: int = 0
    clip: float = 1.0  # gradient norm per player; 0: off
    warmup: int = 0  # updates of a player until its lr is full
    cooldown: float = 0.0  # share of the steps, at the end, in which the lr falls linearly to 0
    precision: str = "fp32"  # fp32 | bf16: autocast around the network; losses stay fp32
    optimizer: str = "adamw"  # adamw | adamw8bit (bitsandbytes, else torchao)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; training needs at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r} is not known; use 'fp32' or 'bf16' (fp16 diverges for DMD)")
        if self.optimizer not in ("adamw", "adamw8bit"):
            raise ValueError(f"optimizer {self.optimizer!r} is not known; use 'adamw' or 'adamw8bit'")


@dataclass(frozen=True)
class Player:
    """A group of named parameters that takes turns learning."""

    params: Mapping[str, nn.Parameter]
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema: float | None = None  # decay; None: no average is kept
    accumulate: int = 1  # batches per update


class Objective(Protocol):
    @property
    def players(self) -> Mapping[str, Player]: ...

    def turns(self, step: int) -> Sequence[str]:
        """Who updates in this step, in order. Called at the start of every step, so a schedule may be read from it."""

    def terms(self, player: str, batch: Any, rng: torch.Generator) -> dict[str, Tensor]:
        """Named losses of one player on one batch; their sum is minimised. Terms without gradient are measurements."""


@runtime_checkable
class Reactive(Protocol):
    """An objective that acts after an update, say pulls the critic towards the student."""

    def updated(self, player: str) -> None: ...


@runtime_checkable
class Seekable(Protocol):
    """Batches that can start at any position, so that a resumed run need not draw what it already used."""

    def seek(self, cursor: int) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Report:
    step: int
    losses: dict[str, float]
    counters: dict[str, int]  # updates done, per player
    seconds: float
    norms: dict[str, float] = field(default_factory=dict)  # gradient norms before clipping


def lr_factor(config: TrainConfig, step: int, updates: int) -> float:
    warm = min(1.0, (updates + 1) / config.warmup) if config.warmup else 1.0
    cooling = config.cooldown * config.steps
    return min(warm, (config.steps - step) / cooling) if cooling else warm


class NonFinite(RuntimeError):
    """A loss or gradient became NaN or infinite; the parameters are still those of the step before."""


def train(
    objective: Objective,
    batches: Iterable[Any] | Seekable,
    config: TrainConfig,
    state: TrainState | None = None,
    reduce: Callable[[list[Tensor]], None] | None = None,
) -> Iterator[Report]:
    """Yields a Report per step. Goes on where `state` stands; `reduce` averages gradients in place over processes.

    Every draw comes from a generator reseeded by (seed, step), so a resumed run repeats an uninterrupted one exactly.
    """
    state = state if state is not None else TrainState(objective, config)
    source = batches.seek(state.cursor) if isinstance(batches, Seekable) else islice(batches, state.cursor, None)
    device = next(iter(next(iter(objective.players.values())).params.values())).device
    rng = torch.Generator(device)
    while state.step < config.steps:
        began = time.perf_counter()
        rng.manual_seed(mix(config.seed, state.step))
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for name in objective.turns(state.step):
            terms, norm = update(objective, name, source, rng, config, state, reduce)
            losses |= {f"{name}/{k}": v for k, v in terms.items()}
            norms[name] = norm
        state.step += 1
        yield Report(state.step, numbers(losses), dict(state.counters), time.perf_counter() - began, numbers(norms))


def update(
    objective: Objective,
    name: str,
    source: Iterator[Any],
    rng: torch.Generator,
    config: TrainConfig,
    state: TrainState,
    reduce: Callable[[list[Tensor]], None] | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step of one player. Gradients go to its parameters only; nothing needs zeroing."""
    player = objective.players[name]
    sums: dict[str, Tensor] = {}
    grads: list[Tensor] = []
    for _ in range(player.accumulate):
        batch = next_batch(source, state)
        with autocast(config, rng.device):
            terms = objective.terms(name, batch, rng)
        found = gradients(terms, player, name, state)
        grads = found if not grads else [a.add_(b) for a, b in zip(grads, found, strict=True)]
        sums = {k: sums.get(k, 0.0) + v.detach() for k, v in terms.items()}
    means = {k: v / player.accumulate for k, v in sums.items()}
    if player.accumulate > 1:
        torch._foreach_div_([shards.own(g) for g in grads], player.accumulate)
    if reduce is not None:
        reduce(grads)
    for p, g in zip(player.params.values(), grads, strict=True):
        p.grad = g
    # an infinite bound measures the norm without clipping
    clip = shards.clip if state.sharded else nn.utils.clip_grad_norm_
    norm = clip(list(player.params.values()), config.clip or float("inf"))
    refuse_nonfinite(name, means, norm, state.step)
    state.apply(name, player, player.lr * lr_factor(config, state.step, state.counters[name]))
    if isinstance(objective, Reactive):
        objective.updated(name)
    return means, norm


def next_batch(source: Iterator[Any], state: TrainState) -> Any:
    try:
        batch = next(source)
    except StopIteration:
        raise ValueError(
            f"the data ended after {state.cursor} batches, at step {state.step}; give batches that repeat"
        ) from None
    state.cursor += 1
    return batch


def gradients(terms: Mapping[str, Tensor], player: Player, name: str, state: TrainState) -> list[Tensor]:
    """d(sum of terms)/d(params). A parameter that no term reaches is named once and gets a zero gradient."""
    total = torch.stack([v.float() if v.dtype.itemsize < 4 else v for v in terms.values()]).sum()
    params = list(player.params.values())
    if state.sharded:
        grads = shards.gradients(total, params)
    else:
        grads = list(torch.autograd.grad(total, params, allow_unused=True))
    unreached = [k for k, g in zip(player.params, grads, strict=True) if g is None]
    if len(unreached) == len(params):
        raise ValueError(
            f"no parameter of {name!r} is reached by its loss {list(terms)}; check what the objective trains"
        )
    if unreached and not state.counters[name]:
        log.warning("%s: %d parameters are not reached by the loss: %s", name, len(unreached), ", ".join(unreached[:8]))
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]


def refuse_nonfinite(name: str, terms: Mapping[str, Tensor], norm: Tensor, step: int) -> None:
    # one device sync for all of them
    flags = torch.stack([v.isfinite() for v in (*terms.values(), norm)]).tolist()
    bad = [f"{name}/{k}" for k, ok in zip((*terms, "gradient"), flags, strict=True) if not ok]
    if bad:
        raise NonFinite(
            f"{', '.join(bad)} became NaN or infinite at step {step}; the state before this step is kept. "
            "Lower the learning rate, use bf16 instead of fp16, or check the data"
        )


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    if config.precision == "fp32":
        return nullcontext()
    # the weight cache is off: it would hand casts of one adapter mix to the next
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def mix(seed: int, step: int) -> int:
    """A seed per (seed, step); the odd constant is Knuth's 64-bit LCG multiplier."""
    return (seed * 6364136223846793005 + step * 1442695040888963407 + 1) % 2**63


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    if not values:
        return {}
    return dict(zip(values, torch.stack([v.detach().float() for v in values.values()]).tolist(), strict=True))
