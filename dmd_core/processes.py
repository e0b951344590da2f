"""Many processes train one student: each sees its rows of the batch, and gradients are averaged.

n processes with b samples each do what one does with n * b: every process draws the noise of the whole batch from the
same generator and takes its rows (`together` where samples are not drawn one by one, as holes of one size). So a run
does not depend on how many processes it has, and may go on with another number. (Exact for losses that are means over
samples; what compares samples within a batch sees its rows only.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .conditioning import Cond
from .data import Batch
from .shards import is_shard
from .train import Objective, Player, Reactive, Seekable

DRAWS = (torch.randn, torch.rand, torch.randint, torch.multinomial)


class Processes(Protocol):
    """What a run needs of its fellow processes."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def mean(self, tensors: list[Tensor]) -> None:
        """Averages the tensors over all processes, in place."""

    def share(self, value: int) -> int:
        """The value that the first process has; everybody waits for it."""


@dataclass(frozen=True)
class Alone:
    rank: int = 0
    count: int = 1

    def mean(self, tensors: list[Tensor]) -> None:
        pass

    def share(self, value: int) -> int:
        return value


ALONE = Alone()


@dataclass(frozen=True)
class Accelerated:
    """Accelerate's collectives: whatever it was configured for does the talking."""

    accelerator: Any

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    def mean(self, tensors: list[Tensor]) -> None:
        """One message per dtype: thousands of small LoRA tensors would spend their time on latency."""
        tensors = [t for t in tensors if not is_shard(t)]  # FSDP averaged those
        for dtype in {t.dtype for t in tensors}:
            group = [t for t in tensors if t.dtype == dtype]
            flat = self.accelerator.reduce(torch.cat([t.reshape(-1) for t in group]), reduction="mean")
            for t, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(part.reshape(t.shape))

    def share(self, value: int) -> int:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


class Rows(TorchFunctionMode):
    """Inside, a draw whose first axis is this process's batch is its rows of a draw for all processes.

    Draws without the batch axis (the level that a whole batch starts from) come out the same everywhere.
    """

    def __init__(self, rank: int, count: int, batch: int):
        super().__init__()
        self.rank, self.count, self.batch = rank, count, batch

    def __enter__(self) -> "Rows":
        self.before = _sharing.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _sharing.reset(self.before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in DRAWS or kwargs.get("generator") is None or _sharing.get() is not self:
            return func(*args, **kwargs)
        if func is torch.multinomial:
            return self.multinomial(args, kwargs)
        args, size = split_size(func, args, kwargs)
        if not size or size[0] != self.batch:
            return func(*args, size, **kwargs)
        return self.own(func(*args, (size[0] * self.count, *size[1:]), **kwargs))

    def multinomial(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        given = dict(zip(("input", "num_samples", "replacement"), args, strict=False)) | kwargs
        # without replacement the samples depend on each other: nothing to share out
        if given["num_samples"] != self.batch or not given.get("replacement") or given["input"].ndim != 1:
            return torch.multinomial(**given)
        return self.own(torch.multinomial(**(given | {"num_samples": self.batch * self.count})))

    def own(self, drawn: Tensor) -> Tensor:
        return drawn[self.rank * self.batch : (self.rank + 1) * self.batch]


_sharing: ContextVar[Rows | None] = ContextVar("sharing", default=None)  # threads have each their own


def samples(n: int) -> int:
    """How many samples all processes see, where this one sees n."""
    rows = _sharing.get()
    return n if rows is None else n * rows.count


def together(draw: Callable[[int], Tensor], n: int) -> Tensor:
    """draw(n), whose samples depend on each other: it is asked for those of all processes, this one takes its rows."""
    rows = _sharing.get()
    if rows is None:
        return draw(n)
    token = _sharing.set(None)
    try:
        return rows.own(draw(n * rows.count))
    finally:
        _sharing.reset(token)


def split_size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """(arguments before the size, size) of torch.randn(2, 3), torch.randn((2, 3)), torch.randint(0, 9, (2, 3)) ..."""
    if "size" in kwargs:
        return args, tuple(kwargs.pop("size"))
    if func is torch.randint:
        return args[:-1], tuple(args[-1])
    return (), tuple(args) if not args or isinstance(args[0], int) else tuple(args[0])


class Shared:
    """An objective whose losses are means over all processes; its batches hold this one's rows."""

    def __init__(self, inner: Objective, processes: Processes):
        self.inner, self.processes = inner, processes
        self.config = getattr(inner, "config", None)  # a run is recognised by it

    @property
    def players(self) -> Mapping[str, Player]:
        return self.inner.players

    def turns(self, step: int) -> Sequence[str]:
        return self.inner.turns(step)

    def terms(self, player: str, batch: Any, rng: torch.Generator) -> dict[str, Tensor]:
        with Rows(self.processes.rank, self.processes.count, length(batch)):
            terms = self.inner.terms(player, batch, rng)
        # the value is everybody's, the gradient this process's: all take the same decisions, a NaN stops all of them
        values = torch.stack([v.detach().double() for v in terms.values()])
        self.processes.mean(means := [values.clone()])
        return {k: v + (m.to(v) - v.detach()) for (k, v), m in zip(terms.items(), means[0], strict=True)}

    def updated(self, player: str) -> None:
        if isinstance(self.inner, Reactive):
            self.inner.updated(player)


class SharedBatches:
    """This process's rows of every batch."""

    def __init__(self, inner: Iterable[Any] | Seekable, processes: Processes):
        self.inner, self.processes = inner, processes

    def seek(self, cursor: int) -> Iterator[Any]:
        whole = self.inner.seek(cursor) if isinstance(self.inner, Seekable) else islice(self.inner, cursor, None)
        for batch in whole:
            n, rest = divmod(length(batch), self.processes.count)
            if rest or not n:
                raise ValueError(
                    f"a batch of {length(batch)} cannot be shared by {self.processes.count} processes; "
                    "give a batch that is a multiple of their number"
                )
            yield rows(batch, slice(self.processes.rank * n, (self.processes.rank + 1) * n))

    def __iter__(self) -> Iterator[Any]:
        return self.seek(0)


def length(batch: Any) -> int:
    return batch.shape[0] if isinstance(batch, Batch) else len(batch[0] if isinstance(batch, tuple) else batch)


def rows(batch: Any, part: slice) -> Any:
    if isinstance(batch, Batch):
        shape = (part.stop - part.start, *batch.shape[1:])
        return replace(
            batch,
            cond=rows(batch.cond, part),
            shape=shape,
            **{k: rows(getattr(batch, k), part) for k in ("latents", "noise")},
        )
    if isinstance(batch, tuple):
        return tuple(rows(v, part) for v in batch)
    if isinstance(batch, Cond):
        return batch.take(part)
    return None if batch is None else batch[part]
