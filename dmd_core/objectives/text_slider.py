"""Text sliders: a signed strength moves a prompt towards one description and away from another.

One equation in x0 space covers Concept Sliders (eq. 8), ESD and LECO: the adapted model at strength s learns
T(c0) + s * eta * (T(c+) - T(c-)), T being the frozen model. Networks that predict eps, v or flow differ only in how
the squared error is weighted. Published sliders are trained at +1 alone; here both poles are, for -1 is used as much.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..adapters import Adapted
from ..conditioning import Cond
from ..samplers import sample_euler, start
from ..train import Player
from .generation import check_sigmas, denoising_weight, gaussian
from .sliding import at, count, noise_levels, noised, pick


@dataclass(frozen=True)
class Words:
    """A slider's definition, encoded: n prompts of each kind, and any number that must not change."""

    neutral: Any
    positive: Any
    negative: Any
    keep: Any = None


@dataclass(frozen=True, kw_only=True)
class SliderPrompts:
    """A slider in words. Each attribute makes a row of its own: at {} where a prompt has it, else in front.

    "person" with "male" and "female" becomes "male person" and "female person"; "an old {} person" likewise. Parts
    divided by | fill several {} in turn: "a {} person {}" with "male | outdoors" is "a male person outdoors".
    """

    neutral: str
    positive: str
    negative: str
    attributes: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def rows(self) -> tuple[list[str], list[str], list[str]]:
        prompts = (self.neutral, self.positive, self.negative)
        neutral, positive, negative = ([_with(a, p) for a in self.attributes or ("",)] for p in prompts)
        return neutral, positive, negative

    def encode(self, encode: Callable[[Sequence[str]], Any]) -> Words:
        """encode: prompts -> conditioning with one row per prompt."""
        neutral, positive, negative = (encode(row) for row in self.rows())
        if self.positive.split() == self.negative.split() or _same(positive, negative):
            raise ValueError(
                f"the positive prompt {self.positive!r} and the negative prompt {self.negative!r} mean the same to "
                "this model; a slider needs two different ends, in words that the text encoder knows"
            )
        return Words(neutral, positive, negative, encode(self.keep) if self.keep else None)


def _with(attribute: str, prompt: str) -> str:
    parts, between = attribute.split("|"), prompt.split("{}")
    gaps = len(between) - 1
    if len(parts) == 1:
        text = attribute.join(between) if gaps else f"{attribute} {prompt}"
    elif len(parts) == gaps:
        text = "".join(t for pair in zip(between, [*parts, ""], strict=True) for t in pair)
    else:
        raise ValueError(
            f"the attribute {attribute!r} has {len(parts)} parts and the prompt {prompt!r} has room for {gaps}; "
            "give every prompt as many {} as there are parts, or an attribute of one part"
        )
    return " ".join(text.split())


def erasing(concept: str, keep: Sequence[str] = ()) -> SliderPrompts:
    """ESD as a slider: away from the concept, towards the empty prompt. Train it with poles=(1.0,)."""
    return SliderPrompts(neutral=concept, positive="", negative=concept, keep=tuple(keep))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Cond) and isinstance(b, Cond):
        return _same(a.cross, b.cross) and (a.pooled is None or _same(a.pooled, b.pooled))
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())


@dataclass(frozen=True, kw_only=True)
class TextSliderConfig:
    eta: float = 1.0  # size of the edit at strength 1; at 2 the toy left its data range in three of three seeds
    poles: tuple[float, ...] = (1.0, -1.0)  # strengths that are trained; erasing takes (1.0,)
    sigmas: tuple[float, ...] = ()  # a few-step model's own levels; none: all levels of the schedule
    low: float = 0.02  # fractions of the schedule, without sigmas
    high: float = 0.98
    on_policy: tuple[float, ...] = ()  # levels of a trajectory walked with the slider on, instead of noised samples
    weight: str = "native"  # native | v | edm | min_snr | x0
    keep_weight: float = 1.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not self.poles or 0 in self.poles:
            raise ValueError(f"poles are {self.poles}; give strengths other than 0, usually (1.0, -1.0)")


class TextSlider:
    """Batches are (x0 [b ...], row [b]): samples of the frozen model, and which prompt each was made from."""

    def __init__(self, model: Adapted, name: str, words: Words, config: TextSliderConfig):
        sizes = [count(c) for c in (words.neutral, words.positive, words.negative)]
        if len(set(sizes)) != 1:
            raise ValueError(
                f"the slider has {sizes[0]} neutral, {sizes[1]} positive and {sizes[2]} negative prompts; "
                "give the same number of each"
            )
        if config.on_policy:
            check_sigmas(config.on_policy, model.schedule)
        self.model, self.name, self.words, self.config = model, name, words, config
        params = model.bank.parameters(name)
        c = config
        self.players = {name: Player(params, c.lr, c.betas, c.weight_decay, None, c.accumulate)}

    def turns(self, step: int) -> Sequence[str]:
        return (self.name,)

    def terms(self, player: str, batch: tuple[Tensor, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
        x0, row = batch[0].to(rng.device), batch[1]
        neutral = pick(self.words.neutral, row)
        x, sigma = self.states(x0, neutral, rng)
        with torch.no_grad():
            here = self.model(x, sigma, neutral)
            pull = self.model(x, sigma, pick(self.words.positive, row))
            pull = self.config.eta * (pull - self.model(x, sigma, pick(self.words.negative, row)))
        weight = denoising_weight(self.config.weight, sigma)
        terms = {
            f"pole {s:+g}": losses.denoising(self.at(s)(x, sigma, neutral), here + s * pull, weight)
            for s in self.config.poles
        }
        if self.words.keep is not None:
            terms["keep"] = self.config.keep_weight * self.kept(x, sigma, weight, rng)
        return terms

    def at(self, strength: float) -> Adapted:
        return at(self.model, **{self.name: strength})

    def kept(self, x: Tensor, sigma: Tensor, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Prompts that the slider shall leave alone, at a random one of the poles."""
        index = torch.randint(count(self.words.keep), (len(x),), generator=rng, device=rng.device)
        pole = self.config.poles[int(torch.randint(len(self.config.poles), (1,), generator=rng, device=rng.device))]
        keep = pick(self.words.keep, index)
        with torch.no_grad():
            before = self.model(x, sigma, keep)
        return losses.denoising(self.at(pole)(x, sigma, keep), before, weight)

    @torch.no_grad()
    def states(self, x0: Tensor, neutral: Any, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noised samples of the base; or the slider's own way, no better in three seeds and twice as slow."""
        c, schedule = self.config, self.model.schedule
        if not c.on_policy:
            sigma = noise_levels(schedule, len(x0), rng, c.sigmas, c.low, c.high).to(x0)
            return noised(schedule, [x0], sigma, rng)[0], sigma
        path = torch.tensor(c.on_policy, device=x0.device, dtype=x0.dtype)
        k = int(torch.randint(len(path), (1,), generator=rng, device=rng.device))
        pole = c.poles[int(torch.randint(len(c.poles), (1,), generator=rng, device=rng.device))]
        x = start(schedule, gaussian(x0.shape, rng, x0.dtype), path[0])
        x = sample_euler(self.at(pole), x, path[: k + 1], neutral) if k else x
        return x, path[k].expand(len(x))
