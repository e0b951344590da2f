"""Pictures to learn from and to measure on: the same seed gives the same picture, whatever the batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, Guided
from ..objectives.sliding import count, pick
from ..samplers import sample_restart, start
from ..train import mix

# Groups of words that change what a model makes of a prompt without changing what it is about.
VARIATIONS = (
    ("in the morning", "at noon", "at dusk", "at night", "in winter", "in summer", "in the rain", "in fog"),
    ("soft light", "hard light", "backlight", "candle light", "neon light", "overcast", "golden hour", "studio light"),
    ("close up", "seen from afar", "seen from above", "seen from below", "from the side", "wide angle", "centred"),
    ("minimalist", "ornate", "old", "modern", "rustic", "elegant", "playful", "dramatic", "plain", "colourful"),
    ("photograph", "oil painting", "watercolour", "pencil drawing", "film still", "illustration", "3d render"),
    ("indoors", "outdoors", "in a city", "in a forest", "by the sea", "in the mountains", "on a plain background"),
)


def variations(prompt: str, n: int, rng: torch.Generator, words: Sequence[Sequence[str]] = VARIATIONS) -> list[str]:
    """n prompts about one thing, the bare one first. words: groups, of which each variation takes one to three entries.

    An entry that holds {} says where the prompt goes ("a drawing of {}"); any other is appended.
    """
    groups = [g for g in words if g]
    if n > 1 and not groups:
        raise ValueError(f"{n} prompt variations were asked for but the word list is empty; give words, or n = 1")

    def integer(high: int) -> int:
        return int(torch.randint(high, (1,), generator=rng, device=rng.device))

    made = [prompt]
    while len(made) < n:
        chosen = torch.randperm(len(groups), generator=rng, device=rng.device)[: 1 + integer(min(3, len(groups)))]
        text = prompt
        for group in chosen.tolist():
            entry = groups[group][integer(len(groups[group]))]
            text = entry.replace("{}", text) if "{}" in entry else f"{text}, {entry}"
        made.append(text)
    return made[:n]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are made: levels, stochasticity, guidance. Calling it turns seeds into clean latents [n c h w]."""

    shape: tuple[int, ...]  # [c h w] of one latent
    sigmas: tuple[float, ...]  # falling, without the final 0
    gamma: float | Sequence[float] = 0.0  # 0: deterministic; 1: fresh noise at every step (DMD2, LCM)
    keep: str = "time"  # see samplers.sample_restart
    guidance: float = 1.0  # as in KSampler; 1: none
    negative: Any = None
    batch: int = 16

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, cond: Any, seeds: Sequence[int], device: Any = "cpu") -> Tensor:
        """cond: one prompt per seed, or one for all."""
        parts = [
            self._part(denoiser, pick(cond, index), [seeds[i] for i in index.tolist()], device)
            for index in torch.arange(len(seeds)).split(self.batch)
        ]
        return torch.cat(parts)

    def _part(self, denoiser: Denoiser, cond: Any, seeds: Sequence[int], device: Any) -> Tensor:
        rngs = [torch.Generator().manual_seed(s) for s in seeds]

        def draw(like: Tensor | None = None) -> Tensor:
            return torch.stack([torch.randn(self.shape, generator=g) for g in rngs]).to(device)

        if self.guidance != 1:
            denoiser = Guided(denoiser, self.guidance, self.negative)
        levels = torch.tensor([*self.sigmas, 0.0], device=device)
        x = start(denoiser.schedule, draw(), levels[0])
        return sample_restart(denoiser, x, levels, cond, draw, self.gamma, keep=self.keep)


@dataclass(frozen=True)
class Pool:
    """Samples of the frozen model. latents: [n c h w]; row: which prompt each was made from, [n]."""

    latents: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def join(cls, parts: Sequence["Pool"]) -> "Pool":
        return cls(torch.cat([p.latents for p in parts]), torch.cat([p.row for p in parts]))


def draw_pool(
    denoiser: Denoiser,
    sampling: Sampling,
    cond: Any,
    n: int,
    first_seed: int = 0,
    device: Any = "cpu",
    begin: int = 0,
) -> Iterator[Pool]:
    """Parts of a pool of n, as they are made, so that the caller can draw, save and cancel; prompts take turns.

    begin: how many samples there are already; the rest is what an undivided call would have made of it.
    """
    if n < 1:
        raise ValueError(f"a pool of {n} samples was asked for; give at least 1 (directions need a few hundred)")
    if begin >= n:
        return
    row = torch.arange(n) % count(cond)
    for index in torch.arange(begin, n).split(sampling.batch):
        seeds = [first_seed + i for i in index.tolist()]
        yield Pool(sampling(denoiser, pick(cond, row[index]), seeds, device), row[index])


class PoolBatches:
    """Endless batches (latents, row) from a pool; one cursor always gives the same batch."""

    def __init__(self, pool: Pool, batch: int, seed: int = 0):
        if len(pool) == 0:
            raise ValueError("the pool is empty; sample some pictures first")
        self.pool, self.batch, self.seed = pool, batch, seed

    def seek(self, cursor: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator()
        while True:
            rng.manual_seed(mix(self.seed, cursor))
            index = torch.randint(len(self.pool), (self.batch,), generator=rng)
            yield self.pool.latents[index.to(self.pool.latents.device)], self.pool.row[index]
            cursor += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.seek(0)


@torch.no_grad()
def embedded(embed: Callable[[Tensor], Tensor], latents: Tensor, batch: int = 16) -> Tensor:
    """Features [n d] of latents, in parts, in fp32 on the CPU."""
    return torch.cat([embed(part).float().cpu() for part in latents.split(batch)])
