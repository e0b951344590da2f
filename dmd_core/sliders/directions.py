"""What a pool of pictures varies in: principal directions of its features, how sure they are, and words for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALIKE = 1e-5  # a standard deviation below this share of the features' size is rounding, not variety
MAIN = 0.05  # a main direction holds this share of the variance
TIED = 3.0  # variances closer than this many of their sampling errors are not told apart
KEPT = 512  # coordinates that halves of a pool are compared in; all of them where it has no more pictures


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

    Principal axes mix factors of similar variance, so main ones whose variances the pool cannot tell apart are turned
    among themselves (see turned). They are directions that the model can move in, not named causes.
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
    axes, vectors, sds, total = vectors, vectors[:near], sds[:near], sds.square().sum()
    groups = ties(sds.square() / total, len(features))
    vectors = turned(features, vectors, groups)
    sds = ((features.double() - features.double().mean(0)) @ vectors.T).std(0)
    own = axes[:KEPT]
    stability = split_half(features.double() @ own.T, vectors @ own.T, rng, halves, groups)
    explained = sds.square() / total
    order = (explained * stability).argsort(descending=True)[:k]
    vectors = _signed(vectors[order])
    chosen = (v.float() for v in (sds[order], explained[order], stability[order]))
    return Directions(features.double().mean(0).float(), vectors.float(), *chosen)


def ties(explained: Tensor, n: int) -> list[list[int]]:
    """Runs of main directions whose variances, from n pictures, differ by less than their sampling errors.

    The error of a variance is sqrt(2 / n) of it (North et al. 1982): in such a run any axes fit as well as any others.
    """
    error, runs = TIED * (2 / n) ** 0.5 * explained, [[0]]
    for i in range(1, int((explained >= MAIN).sum())):
        if explained[i - 1] - explained[i] < error[i - 1] + error[i]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return [run for run in runs if len(run) > 1]


def turned(features: Tensor, vectors: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Each group turned within its plane to where the pool looks least Gaussian.

    What comes in kinds (left or right, dark or light) is far from Gaussian, a mixture of two such things is nearer.
    """
    vectors, centred = vectors.clone(), features.double() - features.double().mean(0)
    for group in groups:
        vectors[group] = least_gaussian(centred @ vectors[group].T) @ vectors[group]
    return vectors


def least_gaussian(scores: Tensor, sweeps: int = 10, tries: int = 91) -> Tensor:
    """The rotation [k k] of scores [n k] with the largest squared excess kurtosis, one pair of axes after another."""
    angles = torch.linspace(-math.pi / 4, math.pi / 4, tries, dtype=scores.dtype, device=scores.device)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
    pairs = [(i, j) for j in range(len(rotation)) for i in range(j)]
    for _ in range(sweeps):
        before = rotation.clone()
        for i, j in pairs:
            a, b = (scores @ rotation[[i, j]].T).T[:, :, None]
            sides = torch.stack([cos * a + sin * b, cos * b - sin * a])
            excess = sides.pow(4).mean(1) / sides.square().mean(1).square() - 3
            best = excess.square().sum(0)
            # an axis that is no better elsewhere stays
            t = int(best.argmax()) if float(best.max()) > 1.0001 * float(best[tries // 2]) else tries // 2
            turn = torch.stack([cos[t], sin[t], -sin[t], cos[t]]).reshape(2, 2)
            rotation[[i, j]] = turn @ rotation[[i, j]]
        if torch.equal(rotation, before):
            break
    return rotation


def split_half(
    features: Tensor, vectors: Tensor, rng: torch.Generator, repeats: int, groups: Sequence[Sequence[int]] = ()
) -> Tensor:
    """How well each direction is found again: |cos| between its counterparts in two random halves, mean. [k]"""

    def found(half: Tensor) -> Tensor:
        own = principal(half)[0][: 2 * len(vectors)]
        own = turned(half, own, [[i for i in group if i < len(own)] for group in groups])
        return own[(vectors @ own.T).abs().argmax(1)]

    seen = []
    for _ in range(repeats):
        order = torch.randperm(len(features), generator=rng, device=rng.device).to(features.device)
        first, second = (found(features[part]) for part in order.chunk(2))
        seen.append((first * second).sum(1).abs())
    return torch.stack(seen).mean(0)


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
