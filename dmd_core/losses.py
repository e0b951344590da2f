"""Losses as plain functions of clean latents and logits, computed in fp32 or better. Each returns one scalar."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import expand


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample_mean(x: Tensor) -> Tensor:
    """Mean over all but the batch axis, kept broadcastable. [b ...] -> [b 1 ...]"""
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def distribution_matching(x0: Tensor, real: Tensor, fake: Tensor, floor: float = 0.05) -> Tensor:
    """Surrogate whose gradient in x0 is (fake - real) / max(mean|x0 - real|, floor) / numel, per sample (DMD eq. 7-8).

    The floor keeps a student that already agrees with the teacher from dividing by nothing.
    """
    x0, real, fake = at_least_fp32(x0), at_least_fp32(real).detach(), at_least_fp32(fake).detach()
    with torch.no_grad():
        grad = (fake - real) / sample_mean((x0 - real).abs()).clamp_min(floor)
        target = x0 - grad
    return 0.5 * F.mse_loss(x0, target)


def denoising(pred_x0: Tensor, x0: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """mean(weight * |pred - x0|^2); weight: a number or [b]."""
    if isinstance(weight, Tensor):
        weight = expand(weight, pred_x0)
    return (weight * (at_least_fp32(pred_x0) - at_least_fp32(x0)) ** 2).mean()


def gan_student(fake: Sequence[Tensor], kind: str = "softplus") -> Tensor:
    """Non-saturating (softplus) or hinge generator loss over the logits of all heads."""
    loss = {"softplus": lambda d: F.softplus(-d).mean(), "hinge": lambda d: -d.mean()}[_known(kind)]
    return torch.stack([loss(at_least_fp32(d)) for d in fake]).mean()


def gan_critic(real: Sequence[Tensor], fake: Sequence[Tensor], kind: str = "softplus") -> Tensor:
    act = {"softplus": F.softplus, "hinge": lambda d: F.relu(1 + d)}[_known(kind)]
    pairs = zip(real, fake, strict=True)
    return torch.stack([act(-at_least_fp32(r)).mean() + act(at_least_fp32(f)).mean() for r, f in pairs]).mean()


def approximate_r1(
    logits: Callable[[Tensor], Sequence[Tensor]], x: Tensor, rng: torch.Generator, amount: float = 0.1
) -> Tensor:
    """(D(x) - D(x + amount * noise))^2: R1's penalty without a second derivative (as in seaweed-APT, FastGen)."""
    near = x + amount * torch.randn(x.shape, generator=rng, device=rng.device).to(x)
    pairs = zip(logits(x), logits(near), strict=True)
    return torch.stack([F.mse_loss(at_least_fp32(a), at_least_fp32(b)) for a, b in pairs]).mean()


def latent_perceptual(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Distance of two lists of features, maps [b c h w], tokens [b n c] or vectors [b c]; b is the target.

    As in LPIPS every position's feature vector is scaled to unit length, so that no layer outweighs the others. There
    are no learned weights: the features are the frozen teacher's own.
    """

    def unit(f: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(f), dim=1 if f.ndim in (2, 4) else -1)

    def distance(f: Tensor, g: Tensor) -> Tensor:
        return (unit(f) - unit(g).detach()).square().sum(1 if f.ndim in (2, 4) else -1).mean()

    return torch.stack([distance(f, g) for f, g in zip(a, b, strict=True)]).mean()


def _known(kind: str) -> str:
    if kind not in ("softplus", "hinge"):
        raise ValueError(f"GAN loss {kind!r} is not known; use 'softplus' or 'hinge'")
    return kind
