"""Conditioning as one batch: what a prompt became after the text encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """cross: [b n d] for cross-attention; pooled: [b d]; extras: further tensors with a leading batch axis."""

    cross: Tensor
    pooled: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cross)

    def map(self, fn: Any) -> "Cond":
        pooled = None if self.pooled is None else fn(self.pooled)
        return replace(self, cross=fn(self.cross), pooled=pooled, extras={k: fn(v) for k, v in self.extras.items()})

    def to(self, *args: Any, **kwargs: Any) -> "Cond":
        return self.map(lambda v: v.to(*args, **kwargs))

    def take(self, index: Tensor | slice) -> "Cond":
        return self.map(lambda v: v[index.to(v.device) if isinstance(index, Tensor) else index])

    def expand(self, n: int) -> "Cond":
        """A single prompt for n samples."""
        if len(self) == n:
            return self
        if len(self) != 1:
            raise ValueError(f"conditioning holds {len(self)} prompts for a batch of {n}; give one prompt or {n}")
        return self.map(lambda v: v.expand(n, *v.shape[1:]))

    def dropout(self, negative: "Cond", chance: float, rng: torch.Generator) -> "Cond":
        """Each sample becomes the negative with the given chance (what classifier-free guidance needs in training)."""
        drop = torch.rand(len(self), generator=rng, device=rng.device) < chance
        index = torch.where(drop, torch.arange(len(self), device=drop.device), -1)
        both = cat([self, negative.expand(len(self))])
        source = torch.where(index >= 0, index + len(self), torch.arange(len(self), device=drop.device))
        return both.take(source)


def cat(conds: Sequence[Cond]) -> Cond:
    """One batch from several; shorter prompts are padded with zero tokens."""
    length = max(c.cross.shape[1] for c in conds)
    cross = torch.cat([pad_tokens(c.cross, length) for c in conds])
    pooled = [c.pooled for c in conds if c.pooled is not None]
    if pooled and len(pooled) != len(conds):
        raise ValueError(
            "some prompts have a pooled vector and some do not; encode all of them with the same text encoder"
        )
    keys = set(conds[0].extras)
    if any(set(c.extras) != keys for c in conds):
        raise ValueError(
            f"prompts carry different extras {[sorted(c.extras) for c in conds]}; encode them the same way"
        )
    extras = {k: torch.cat(same_length([c.extras[k] for c in conds])) for k in sorted(keys)}
    return Cond(cross, torch.cat(pooled) if pooled else None, extras)


def fit(cond: Any, n: int) -> Any:
    """One prompt (the negative, usually) for n samples; other kinds of conditioning are left to the network."""
    if isinstance(cond, Cond):
        return cond.expand(n)
    if isinstance(cond, Tensor) and len(cond) == 1:
        return cond.expand(n, *cond.shape[1:])
    return cond


def pad_tokens(tokens: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[1]))


def same_length(values: list[Tensor]) -> list[Tensor]:
    """Masks are as long as their tokens; what is padded is masked."""
    if values[0].ndim != 2:
        return values
    length = max(v.shape[1] for v in values)
    return [torch.nn.functional.pad(v, (0, length - v.shape[1])) for v in values]
