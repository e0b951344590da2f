"""What one training batch holds, for every objective that generates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conditioning import Cond
from .train import mix


@dataclass(frozen=True)
class Batch:
    """Prompts alone suffice; latents and noise are there for objectives that ask for them.

    shape: [b c h w] of the latents to generate; cond: what the denoisers take, b prompts long;
    latents: clean ones that fit the prompts; noise: the noise that the teacher made those latents from.
    """

    cond: Any
    shape: tuple[int, ...]
    latents: Tensor | None = None
    noise: Tensor | None = None

    def clean(self, purpose: str) -> Tensor:
        """The latents, or an error that says who needs them."""
        if self.latents is None:
            raise ValueError(f"{purpose} needs latents, and the data holds prompts alone; give latents or turn it off")
        return self.latents

    def pair(self, purpose: str) -> tuple[Tensor, Tensor]:
        """(noise, latents) of the teacher."""
        if self.noise is None or self.latents is None:
            raise ValueError(
                f"{purpose} needs the teacher's noise-latent pairs, and the data holds none; generate pairs first"
            )
        return self.noise, self.latents


class Prompts:
    """Endless batches of prompts from an encoded pool; one cursor always gives the same batch."""

    def __init__(self, pool: Cond, shape: tuple[int, ...], batch: int, seed: int = 0):
        if len(pool) == 0:
            raise ValueError("no prompts were given; training needs at least one, a few hundred are better")
        self.pool, self.shape, self.batch, self.seed = pool, (batch, *shape), batch, seed

    def seek(self, cursor: int) -> Iterator[Batch]:
        rng = torch.Generator()
        while True:
            rng.manual_seed(mix(self.seed, cursor))
            yield Batch(self.pool.take(torch.randint(len(self.pool), (self.batch,), generator=rng)), self.shape)
            cursor += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.seek(0)


class Latents:
    """Endless batches of clean latents with their prompts, as Prompts gives them; latents[i] [c h w] fits prompt i.

    Latents of one size form a bucket; a batch comes from one bucket, and every latent is equally likely.
    """

    def __init__(
        self,
        pool: Cond,
        latents: Sequence[Tensor],
        batch: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        if len(pool) != len(latents) or not latents:
            raise ValueError(f"{len(latents)} latents were given for {len(pool)} prompts; give one latent for each")
        bad = [i for i, latent in enumerate(latents) if not torch.isfinite(latent).all()]
        if bad:
            raise ValueError(
                f"latents {bad[:5]} of {len(latents)} hold NaN or infinite values; encode these pictures again (in "
                "fp32 if the VAE overflows in fp16) or leave them out"
            )
        self.pool, self.latents, self.batch, self.seed, self.device = pool, latents, batch, seed, device
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for i, latent in enumerate(latents):
            self.buckets.setdefault(tuple(latent.shape), []).append(i)

    def seek(self, cursor: int) -> Iterator[Batch]:
        rng = torch.Generator()
        while True:
            rng.manual_seed(mix(self.seed, cursor))
            first = int(torch.randint(len(self.latents), (1,), generator=rng))
            bucket = torch.tensor(self.buckets[tuple(self.latents[first].shape)])
            index = bucket[torch.randint(len(bucket), (self.batch,), generator=rng)]
            latents = torch.stack([self.latents[i] for i in index.tolist()]).to(self.device)
            yield Batch(self.pool.take(index), tuple(latents.shape), latents)
            cursor += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.seek(0)
