"""SliderSpace (Gandikota et al. 2025): one low-rank adapter per principal direction of what a model makes of a prompt.

Two losses on the displacement d = phi(x0_hat with the slider) - phi(x0_hat without), phi an image encoder:
regression  |d - s * reach * sd_i * v_i|^2 / sd_i^2 for strengths s of both signs: direction and size are both fixed
cosine      1 - cos(d, v_i) at strength +1, the paper's. It says nothing about size: after the same steps the effect
            at +1 varied 80-fold with rank and initialisation, so its sliders depend on calibration
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters import Adapted, AdapterBank
from ..losses import at_least_fp32
from ..train import Player
from .sliding import at, noise_levels, noised, pick

Embed = Callable[[Tensor], Tensor]  # clean latents [b ...] -> features [b d], differentiable
LOSSES = ("regression", "cosine")


@dataclass(frozen=True, kw_only=True)
class SliderSpaceConfig:
    loss: str = "regression"  # regression | cosine
    reach: float = 1.0  # standard deviations asked for at strength 1, in each single prediction
    sigmas: tuple[float, ...] = ()  # a few-step model's own levels; none: all levels of the schedule
    low: float = 0.02
    high: float = 0.98
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"slider loss {self.loss!r} is not known; use 'regression' or 'cosine'")


class SliderSpace:
    """Batches are (x0 [b ...], row [b]): samples of the frozen model and the number of the prompt each was made from.

    One slider learns per step, in turn, and only that one runs: a step costs the same for 4 directions and for 64.
    """

    def __init__(
        self,
        model: Adapted,
        directions: Mapping[str, tuple[Tensor, float]],
        embed: Embed,
        cond: Any,
        config: SliderSpaceConfig,
    ):
        """directions: name of an adapter set -> (unit direction [d], standard deviation along it)."""
        self.model, self.embed, self.cond, self.config = model, embed, cond, config
        self.directions = dict(directions)
        self.names = tuple(directions)
        if config.loss == "cosine":
            for name in self.names:
                refuse_zero(model.bank, name)
        c = config
        self.players = {n: Player(model.bank.parameters(n), c.lr, c.betas, c.weight_decay) for n in self.names}

    def turns(self, step: int) -> Sequence[str]:
        return (self.names[step % len(self.names)],)

    def terms(self, player: str, batch: tuple[Tensor, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        x0, c = batch[0].to(rng.device), self.config
        cond = pick(self.cond, batch[1])
        sigma = noise_levels(self.model.schedule, len(x0), rng, c.sigmas, c.low, c.high).to(x0)
        x = noised(self.model.schedule, [x0], sigma, rng)[0]
        strength = 1.0
        if c.loss == "regression":
            strength = 2 * float(torch.rand(1, generator=rng, device=rng.device)) - 1
        with torch.no_grad():
            before = at_least_fp32(self.embed(self.model(x, sigma, cond)))
        moved = at_least_fp32(self.embed(at(self.model, **{player: strength})(x, sigma, cond))) - before
        direction, sd = self.directions[player]
        wanted = direction.to(moved)
        if c.loss == "cosine":
            return {"cosine": 1 - F.cosine_similarity(moved, wanted[None], dim=1).mean()}
        return {"displacement": ((moved - strength * c.reach * sd * wanted) / sd).square().sum(1).mean()}


def refuse_zero(bank: AdapterBank, name: str) -> None:
    """The cosine of no displacement has an unbounded gradient, which would spoil Adam's averages for good."""
    if all(bool((a.up == 0).all()) for a in bank.sets[name].values()):
        raise ValueError(
            f"slider {name!r} starts at zero, where the cosine loss has no direction; "
            "give it a start with start_orthonormal, or use the regression loss"
        )


@torch.no_grad()
def start_orthonormal(bank: AdapterBank, name: str, rng: torch.Generator, scale: float = 0.1) -> None:
    """Random orthonormal columns in `up`, so that the adapter moves something from the first step on."""
    for adapter in bank.sets[name].values():
        up = adapter.up
        noise = torch.randn(up.shape[0], up.shape[1], generator=rng, device=rng.device)
        up.copy_((scale * torch.linalg.qr(noise).Q).reshape(up.shape))
