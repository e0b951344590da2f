"""What a pool of pictures varies in: principal directions of its features, how sure they are, and words for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALIKE = 1e-5  # a standard deviation below this share of the features' size is rounding, not variety


@dataclass(frozen=True)
class Directions:
    """Unit vectors [k d] in the order of their score, with the pool's spread along each.

    sds, explained (share of all variance), stability (split-half |cos|), score (explained * stability): [k] each.
    """

    mean: Tensor
    vectors: Tensor
    sds: Tensor
    explained: Tensor
    stability: Tensor

    @property
    def score(self) -> Tensor:
        return self.explained * self.stability

    def __len__(self) -> int:
        return len(self.vectors)

    def project(self, features: Tensor) -> Tensor:
        """Coordinates in standard deviations. [n d] -> [n k]"""
        return (features - self.mean) @ self.vectors.T / self.sds


def principal(features: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions [r d] of falling variance, and their standard deviations [r]."""
    centred = features.double() - features.double().mean(0)
    _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
    return vectors, singular / (len(features) - 1) ** 0.5


def find_directions(features: Tensor, k: int, rng: torch.Generator, halves: int = 8) -> Directions:
    """The k directions of a pool [n d] with the highest variance * stability.

    Principal axes mix factors of similar variance; they are directions that the model can move in, not named causes.
    """
    if len(features) < 8:
        raise ValueError(f"the pool holds {len(features)} pictures; finding directions needs at least 8, better 500")
    vectors, sds = principal(features)
    size = features.double().square().mean().sqrt().clamp_min(1e-12)
    real = int((sds > ALIKE * size * features.shape[1] ** 0.5).sum())
    if real == 0:
        raise ValueError(
            f"all {len(features)} pictures of the pool are alike (no variance in their features); "
            "use different seeds, more prompt variations, or a model that varies more"
        )
    if real < k:
        raise ValueError(f"{k} directions were asked for, but this pool varies in {real} only; ask for {real} or fewer")
    # the best k by score may lie a little beyond the first k by variance
    near = min(real, 2 * k)
    vectors, sds, total = vectors[:near], sds[:near], sds.square().sum()
    stability = split_half(features, vectors, rng, halves)
    explained = sds.square() / total
    order = (explained * stability).argsort(descending=True)[:k]
    vectors = _signed(vectors[order])
    chosen = (v.float() for v in (sds[order], explained[order], stability[order]))
    return Directions(features.double().mean(0).float(), vectors.float(), *chosen)


def split_half(features: Tensor, vectors: Tensor, rng: torch.Generator, repeats: int) -> Tensor:
    """How well each direction is found again: |cos| between its counterparts in two random halves, mean. [k]"""
    found = []
    for _ in range(repeats):
        order = torch.randperm(len(features), generator=rng, device=rng.device).to(features.device)
        parts = order.chunk(2)
        first, second = (_counterparts(vectors, principal(features[p])[0][: 2 * len(vectors)]) for p in parts)
        found.append((first * second).sum(1).abs())
    return torch.stack(found).mean(0)


def _counterparts(vectors: Tensor, others: Tensor) -> Tensor:
    return others[(vectors @ others.T).abs().argmax(1)]


def _signed(vectors: Tensor) -> Tensor:
    """An axis has no sign of its own; the largest coordinate is made positive so that a run repeats."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def poles(high: Tensor, low: Tensor, words: Sequence[str], embedded: Tensor) -> tuple[str, str]:
    """The words nearest to the plus and the minus end.

    high, low: [n d] image features of a text-image encoder; embedded: its [k d] text features of the words.
    """
    if len(words) < 2:
        raise ValueError(f"naming the ends of a slider needs at least 2 words, got {len(words)}; give more")
    directions = F.normalize(embedded.float(), dim=1)
    directions = directions - directions.mean(0)
    away = F.normalize(high.float(), dim=1).mean(0) - F.normalize(low.float(), dim=1).mean(0)
    scores = F.normalize(directions, dim=1) @ away.to(directions)
    return words[int(scores.argmax())], words[int(scores.argmin())]


def name_of(number: int, ends: tuple[str, str] | None = None) -> str:
    return f"{ends[1]} - {ends[0]}" if ends else f"direction {number + 1}"
