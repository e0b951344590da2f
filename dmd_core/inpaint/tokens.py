"""From a mask to the tokens that are computed, and what that costs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Which of a transformer's image tokens are computed.

    computed: bool [n], hole, ring and padding; hole: bool [n], those that the mask touches.
    """

    computed: Tensor
    hole: Tensor

    @property
    def share(self) -> float:
        """m of the cost law: computed tokens over all."""
        return int(self.computed.sum()) / len(self.computed)


def token_mask(mask: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Latent mask [b t h w] -> touched tokens, bool [t' h' w']; a batch is one union, a cut patch a whole one."""
    touched = (mask > 0).any(0).float()
    pads = [(-size) % p for size, p in zip(touched.shape, patch, strict=True)]
    touched = F.pad(touched, (0, pads[2], 0, pads[1], 0, pads[0]))
    return F.max_pool3d(touched[None, None], patch)[0, 0].bool()


def select(touched: Tensor, ring: int = 1, multiple: int = 64) -> Tokens:
    """Touched tokens [t h w], a ring of known tokens around them, and the nearest ones up to a multiple.

    The ring is computed too, so that the seam is decided by fresh tokens. A rounded count keeps kernels and
    compiled shapes few; nearest means fewest rings away. Small pictures round to a sixteenth of their tokens.
    """
    multiple = max(1, min(multiple, touched.numel() // 16))
    if not touched.any():
        none = torch.zeros_like(touched).flatten()
        return Tokens(none, none)
    distance = rings(touched)
    computed = distance <= ring
    missing = (-int(computed.sum())) % multiple
    if missing:
        order = torch.where(computed, distance.max() + 1, distance).flatten().argsort(stable=True)
        spare = order[: min(missing, int((~computed).sum()))]
        computed = computed.flatten().index_fill(0, spare, True)
    return Tokens(computed.flatten(), touched.flatten())


def rings(touched: Tensor) -> Tensor:
    """Rings to the nearest touched token (Chebyshev), within each frame; a frame without any is far away."""
    t, h, w = touched.shape
    far = h + w + t
    distance = torch.where(touched, 0, far)
    current = touched.float()[:, None]
    for step in range(1, max(h, w)):
        grown = F.max_pool2d(current, 3, 1, 1)
        if torch.equal(grown, current):
            break
        distance = torch.where((grown > current)[:, 0], step, distance)
        current = grown
    return distance


def step_cost(share: float, tokens: int, text: int) -> float:
    """The law: (m N + T) / (N + T), a step's cost over a dense one's. Queries decide every term, attention included."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of computed tokens is {share}; it lies in 0 to 1")
    return (share * tokens + text) / (tokens + text)


def dense_steps(steps: int, warm: int = 3, every: int = 5) -> frozenset[int]:
    """Which steps of a run compute everything: the first `warm`, then every `every`-th."""
    if warm < 1 or every < 1:
        raise ValueError(f"refresh got warm={warm} and every={every}; both must be at least 1")
    return frozenset(i for i in range(steps) if i < warm or (i - warm + 1) % every == 0)


def run_cost(share: float, tokens: int, text: int, steps: int, dense: int = 0) -> float:
    """Mean cost per step over a dense run's, with `dense` steps computed whole."""
    if not 0 <= dense <= steps:
        raise ValueError(f"{dense} dense steps of {steps} were asked for; give 0 to {steps}")
    return (dense + (steps - dense) * step_cost(share, tokens, text)) / steps
