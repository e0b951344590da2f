"""GAN heads on features of a diffusion network: any resolution, convolutional for maps, per token for transformers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .conditioning import Cond
from .denoiser import Denoiser, apart
from .features import features
from .losses import at_least_fp32
from .schedule import Schedule

TIME_WAVES = 4


@dataclass
class FeatureReader:
    """Outputs of the named layers of `net` while `denoiser` (a view of that network) runs, no further than needed."""

    denoiser: Denoiser
    net: nn.Module
    layers: Sequence[str]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> list[Tensor]:
        parts = apart(self.denoiser, cond, len(x))
        if len(parts) == 1:
            return features(self.net, self.layers, lambda: self.denoiser(x, sigma, cond))
        # reading stops within the first call of the network, so each of them is read by itself
        found = []
        for index in parts:
            given = x[index], sigma[index], cond.take(torch.tensor(index))
            found.append(features(self.net, self.layers, partial(self.denoiser, *given)))
        order = torch.tensor([i for index in parts for i in index]).argsort()
        return [joined(layer)[order.to(x.device)] for layer in zip(*found, strict=True)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One batch; of text tokens, which come first, as many as the shortest prompt has."""
    if parts[0].ndim != 3:
        return torch.cat(list(parts))
    shortest = min(f.shape[1] for f in parts)
    return torch.cat([f[:, f.shape[1] - shortest :] for f in parts])


class Modulation(nn.Module):
    """Scale and shift from noise level and pooled text; starts as the identity. map: [b c ...]"""

    def __init__(self, context: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(context, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.linear(context).chunk(2, 1)
        shape = scale.shape + (1,) * (h.ndim - 2)
        return h * (1 + scale.reshape(shape)) + shift.reshape(shape)


class MapHead(nn.Module):
    """[b c h w] -> patch logits [b n]; two strided convolutions at any size (DMD2's own head is fixed to one)."""

    def __init__(self, channels: int, width: int, context: int):
        super().__init__()
        groups = math.gcd(width, 8)
        self.enter = nn.Sequential(nn.Conv2d(channels, width, 1), nn.GroupNorm(groups, width))
        self.modulation = Modulation(context, width)
        self.body = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        return rearrange(self.body(self.modulation(self.enter(h), context)), "b 1 h w -> b (h w)")


class TokenHead(nn.Module):
    """[b n c] -> one logit per token [b n]; the attention below has mixed the tokens already."""

    def __init__(self, channels: int, width: int, context: int):
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.modulation = Modulation(context, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        h = rearrange(self.enter(h), "b n c -> b c n")
        h = rearrange(self.modulation(h, context), "b c n -> b n c")
        return rearrange(self.body(h), "b n 1 -> b n")


class Discriminator:
    """Logits (positive: real) of noised latents, one tensor [b n] per feature layer. The heads are what it adds."""

    def __init__(self, reader: FeatureReader, heads: nn.ModuleList):
        self.reader, self.heads = reader, heads

    @classmethod
    def on(
        cls, reader: FeatureReader, x: Tensor, sigma: Tensor, cond: Any, rng: torch.Generator, width: int = 128
    ) -> "Discriminator":
        """Heads that fit what the network gives for one example; initial weights come from rng."""
        with torch.no_grad():
            found = reader(x, sigma, cond)
            context = context_of(reader.denoiser.schedule, sigma, cond).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (1,), generator=rng, device=rng.device)))
            heads = nn.ModuleList(head_for(f, width, context) for f in found)
        return cls(reader, heads.to(x.device, at_least_fp32(x).dtype))

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.heads.named_parameters())

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> list[Tensor]:
        found = self.heard(x, sigma, cond)
        context = context_of(self.reader.denoiser.schedule, sigma, cond).to(x)
        return [head(as_tokens(f).to(context), context) for head, f in zip(self.heads, found, strict=True)]

    def heard(self, x: Tensor, sigma: Tensor, cond: Any) -> list[Tensor]:
        return self.reader(x, sigma, cond)


def as_tokens(feature: Tensor) -> Tensor:
    """A feature vector is one token."""
    return feature[:, None] if feature.ndim == 2 else feature


def head_for(feature: Tensor, width: int, context: int) -> nn.Module:
    feature = as_tokens(feature)
    if feature.ndim == 4:
        return MapHead(feature.shape[1], width, context)
    if feature.ndim == 3:
        return TokenHead(feature.shape[2], width, context)
    raise ValueError(
        f"a feature layer gives shape {tuple(feature.shape)}; heads take maps [b c h w], tokens [b n c] or vectors "
        "[b c]; choose other layers"
    )


def context_of(schedule: Schedule, sigma: Tensor, cond: Any) -> Tensor:
    """What the heads are told: waves of the flow time b / (a + b), and the pooled text where there is one. [b d]"""
    a, b = schedule.coeffs(sigma)
    t = (b / (a + b))[:, None] * math.pi * 2.0 ** torch.arange(TIME_WAVES, device=sigma.device)
    waves = torch.cat([t.sin(), t.cos()], 1)
    if isinstance(cond, Cond) and cond.pooled is not None:
        waves = torch.cat([waves, cond.pooled.to(waves)], 1)
    return waves


def verdict(real: Sequence[Tensor], fake: Sequence[Tensor]) -> dict[str, Tensor]:
    """Share of right decisions and the mean gap between real and fake logits: measurements, without gradient."""
    r, f = torch.cat([d.detach() for d in real], 1), torch.cat([d.detach() for d in fake], 1)
    right = ((r > 0).float().mean() + (f < 0).float().mean()) / 2
    return {"accuracy": right, "gap": at_least_fp32(r).mean() - at_least_fp32(f).mean()}


def alarms(accuracy: float, gap: float) -> list[str]:
    """What running means of `verdict` say about a discriminator, in plain words; empty when it is healthy."""
    found = []
    if accuracy > 0.95 or gap > 15:
        found.append(
            f"the discriminator wins ({accuracy:.0%} right, logit gap {gap:.1f}): the student learns nothing from it; "
            "lower its learning rate, enlarge the batch, or update the student more often"
        )
    if accuracy < 0.55 or gap < 0.1:
        found.append(
            f"the discriminator cannot tell real from generated ({accuracy:.0%} right, logit gap {gap:.2f}); "
            "raise its learning rate or update it more often"
        )
    return found
