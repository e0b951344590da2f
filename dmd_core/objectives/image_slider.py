"""Image-pair sliders: a few sets of pictures that differ in one thing only, each at its own signed strength.

Every level is denoised at its strength, all under the same noise and at the same noise level. What the levels have in
common then cancels: for opposite levels the gradients of the shared content and of the noise itself are equal and
opposite, and only the difference is learnt.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..adapters import Adapted
from ..train import Player, mix
from .generation import denoising_weight
from .sliding import at, noise_levels, noised, pick

USUAL_PAIRS = "2 to 6"


@dataclass(frozen=True, kw_only=True)
class ImageSliderConfig:
    sigmas: tuple[float, ...] = ()  # a few-step model's own levels; none: all levels of the schedule
    low: float = 0.02
    high: float = 0.98
    weight: str = "native"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    accumulate: int = 1


class Pairs:
    """Endless batches (x0 [level b ...], number [b]) of latents that belong together across levels."""

    def __init__(self, latents: Mapping[float, Tensor], batch: int = 1, seed: int = 0):
        """latents: strength -> [n c h w]; picture i of one level belongs to picture i of every other."""
        sizes = {f"{s:+g}": len(x) for s, x in latents.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the levels hold different numbers of pictures ({sizes}); every picture needs a partner in each level"
            )
        if not any(s > 0 for s in latents) or not any(s < 0 for s in latents):
            raise ValueError(
                f"levels are {list(sizes)}; give at least one positive and one negative strength, such as +1 and -1"
            )
        if next(iter(sizes.values())) < 2:
            raise ValueError(
                f"got {next(iter(sizes.values()))} image pair; give at least 2 ({USUAL_PAIRS} are usual): "
                "from a single pair the slider would learn those two pictures, not what differs"
            )
        if len({tuple(x.shape[1:]) for x in latents.values()}) > 1:
            shapes = {k: list(x.shape[1:]) for k, x in zip(sizes, latents.values(), strict=True)}
            raise ValueError(f"the levels hold pictures of different sizes ({shapes}); bring all to one size")
        # level 0 is the model itself: nothing to learn there
        self.strengths = tuple(sorted((s for s in latents if s), reverse=True))
        self.latents = torch.stack([latents[s] for s in self.strengths])
        if bool((self.latents[0] == self.latents[-1]).all()):
            raise ValueError("the pictures of both ends are identical; give pictures that differ in one thing")
        self.batch, self.seed = batch, seed

    def seek(self, cursor: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = torch.Generator()
        while True:
            rng.manual_seed(mix(self.seed, cursor))
            index = torch.randint(self.latents.shape[1], (self.batch,), generator=rng)
            yield self.latents[:, index], index
            cursor += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.seek(0)


class ImageSlider:
    """Batches come from `Pairs`; cond is one prompt, or one per pair."""

    def __init__(self, model: Adapted, name: str, cond: Any, strengths: Sequence[float], config: ImageSliderConfig):
        self.model, self.name, self.cond, self.strengths, self.config = model, name, cond, strengths, config
        c = config
        params = model.bank.parameters(name)
        self.players = {name: Player(params, c.lr, c.betas, c.weight_decay, None, c.accumulate)}

    def turns(self, step: int) -> Sequence[str]:
        return (self.name,)

    def terms(self, player: str, batch: tuple[Tensor, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        versions, c = batch[0].to(rng.device), self.config
        cond = pick(self.cond, batch[1])
        sigma = noise_levels(self.model.schedule, len(batch[1]), rng, c.sigmas, c.low, c.high).to(versions)
        states = noised(self.model.schedule, list(versions), sigma, rng)
        weight = denoising_weight(c.weight, sigma)
        return {
            f"level {s:+g}": losses.denoising(at(self.model, **{self.name: s})(x, sigma, cond), x0, weight)
            for s, x, x0 in zip(self.strengths, states, versions, strict=True)
        }
