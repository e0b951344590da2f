"""Diffusion2GAN (Kang et al. 2024), a reconstruction: pairs, a latent perceptual loss, a conditional discriminator.

The training code was never published. The paper's metric (E-LatentLPIPS) is a network of its own with non-commercial
weights; here the frozen teacher's features take its place, with the same random augmentation on both sides. The GAN's
weight is not given in the paper either: both defaults below are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..augment import random_augment
from ..conditioning import Cond
from ..data import Batch
from ..denoiser import Denoiser
from ..discriminators import Discriminator, FeatureReader, verdict
from ..samplers import start
from ..schedule import add_noise
from ..train import Player
from .generation import check_sigmas, gaussian, working_dtype


@dataclass
class Perceptual:
    """Distance of two latents in a frozen denoiser's features, averaged over random augmentations of both sides."""

    reader: FeatureReader
    times: tuple[float, float] = (0.05, 0.25)  # fractions of the schedule at which the features are read
    rounds: int = 1  # augmentations per evaluation

    def __call__(self, generated: Tensor, target: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
        schedule = self.reader.denoiser.schedule
        total = []
        for _ in range(self.rounds):
            augment = random_augment(tuple(target.shape), rng)
            sigma = schedule.sample(len(target), rng, *self.times).to(target)
            eps = gaussian(target.shape, rng, target.dtype)  # one noise for both: it must not count as a difference
            with torch.no_grad():
                wanted = self.reader(add_noise(schedule, augment(target), eps, sigma), sigma, batch.cond)
            found = self.reader(add_noise(schedule, augment(generated), eps, sigma), sigma, batch.cond)
            total.append(losses.latent_perceptual(found, wanted))
        return torch.stack(total).mean()


@dataclass(frozen=True, kw_only=True)
class Diffusion2GANConfig:
    sigmas: tuple[float, ...]  # one level: the method is one-step
    perceptual_weight: float = 1.0
    l1_weight: float = 0.1  # beside the metric, which is blind to the length of feature vectors
    gan_weight: float = 0.1
    r1_weight: float = 1.0  # approximate R1 on one sample
    r1_every: int = 16  # steps
    mismatched: float = 0.5  # share of real latents shown with another prompt and noise, and labelled fake
    judged_sigma: float = 0.05  # level at which the discriminator's network looks at latents
    student_lr: float = 1e-5
    discriminator_lr: float = 1e-5
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    ema: float | None = 0.99
    student_accumulate: int = 1
    discriminator_accumulate: int = 1


class Diffusion2GAN:
    """Batches carry the teacher's noise-latent pairs.

    discriminators: one per scale, on latents of full, half, quarter size, usually several heads on a trainable view of
    the teacher each; trunk: the parameters of that view (a LoRA set), which learn with the heads.
    """

    def __init__(
        self,
        student: Denoiser,
        student_params: Mapping[str, nn.Parameter],
        metric: Perceptual,
        discriminators: Sequence[Discriminator],
        trunk: Mapping[str, nn.Parameter],
        noise_input: nn.Module,
        config: Diffusion2GANConfig,
    ):
        check_sigmas(config.sigmas, student.schedule)
        if len(config.sigmas) != 1:
            raise ValueError(
                f"Diffusion2GAN is a one-step method, and {len(config.sigmas)} sigmas were given; give one"
            )
        self.student, self.metric, self.discriminators, self.config = student, metric, discriminators, config
        self.noise_input, self.dtype, self.step = noise_input, working_dtype(student_params), 0
        heads = {f"head.{i}.{k}": p for i, d in enumerate(discriminators) for k, p in d.parameters.items()}
        noise = {f"noise.{k}": p for k, p in noise_input.named_parameters()}
        c = config
        self.players = {
            "discriminator": Player(
                {**trunk, **heads, **noise},
                c.discriminator_lr,
                c.betas,
                c.weight_decay,
                None,
                c.discriminator_accumulate,
            ),
            "student": Player(student_params, c.student_lr, c.betas, c.weight_decay, c.ema, c.student_accumulate),
        }

    def turns(self, step: int) -> Sequence[str]:
        self.step = step  # R1 comes every so many steps
        return ("discriminator", "student") if self.config.gan_weight else ("student",)

    def terms(self, player: str, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        noise, latents = (v.to(self.dtype) for v in batch.pair("Diffusion2GAN"))
        with torch.set_grad_enabled(player == "student"):
            x = start(self.student.schedule, noise, self.config.sigmas[0])
            made = self.student(x, torch.full((len(x),), self.config.sigmas[0]).to(x), batch.cond)
        if player == "student":
            return self.student_terms(made, noise, latents, batch, rng)
        return self.discriminator_terms(made, noise, latents, batch, rng)

    def student_terms(
        self, made: Tensor, noise: Tensor, latents: Tensor, batch: Batch, rng: torch.Generator
    ) -> dict[str, Tensor]:
        c = self.config
        terms = {
            "perceptual": c.perceptual_weight * self.metric(made, latents, batch, rng),
            "l1": c.l1_weight * (made - latents).abs().mean(),
        }
        if c.gan_weight:
            terms["gan"] = c.gan_weight * losses.gan_student(self.judge(made, noise, batch.cond, rng))
        return terms

    def discriminator_terms(
        self, made: Tensor, noise: Tensor, latents: Tensor, batch: Batch, rng: torch.Generator
    ) -> dict[str, Tensor]:
        c = self.config
        real = self.judge(latents, noise, batch.cond, rng)
        fake = self.judge(made, noise, batch.cond, rng)
        terms = {"gan": losses.gan_critic(real, fake)}
        n = int(c.mismatched * len(latents))
        if n and len(latents) > 1:
            wrong = self.judge(latents[:n], noise.roll(1, 0)[:n], pick(batch.cond, torch.arange(n) - 1), rng)
            terms["mismatched"] = torch.stack([F.softplus(d).mean() for d in wrong]).mean()
        if c.r1_weight and self.step % c.r1_every == 0:
            one = pick(batch.cond, torch.arange(1))
            seed = int(torch.randint(2**31, (), generator=rng, device=rng.device))

            def judge(u: Tensor) -> list[Tensor]:
                again = torch.Generator(rng.device).manual_seed(seed)  # the same noise for both evaluations
                return self.judge(u, noise[:1], one, again)

            terms["r1"] = c.r1_every * c.r1_weight * losses.approximate_r1(judge, latents[:1], rng)
        return terms | verdict(real, fake)

    def judge(self, latents: Tensor, noise: Tensor, cond: Any, rng: torch.Generator) -> list[Tensor]:
        """Logits of all scales for latents that were (or claim to be) made from this noise and prompt."""
        logits = []
        for scale, discriminator in enumerate(self.discriminators):
            u, z = (F.avg_pool2d(v, 2**scale) if scale else v for v in (latents, noise))
            schedule = discriminator.reader.denoiser.schedule
            sigma = torch.full((len(u),), self.config.judged_sigma).to(u)
            x = add_noise(schedule, u, gaussian(u.shape, rng, u.dtype), sigma)
            logits += discriminator(x + self.noise_input(z), sigma, cond)
        return logits


def noise_input(channels: int, maps: bool = True) -> nn.Module:
    """How the discriminator is shown the noise: a 1x1 convolution (or Linear) that starts at zero."""
    with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global generator
        layer = nn.Conv2d(channels, channels, 1) if maps else nn.Linear(channels, channels)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def pick(cond: Any, index: Tensor) -> Any:
    """Some of a batch's prompts."""
    if cond is None:
        return None
    if isinstance(cond, Cond):
        return cond.take(index)
    if isinstance(cond, Tensor):
        return cond[index.to(cond.device)]
    raise TypeError(f"conditioning of type {type(cond).__name__} cannot be split; use Cond or a tensor")
