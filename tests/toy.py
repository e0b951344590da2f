"""Students small enough for seconds: an MLP in the plane, pretrained as a rectified flow of a mixture."""

import copy
from collections.abc import Iterator
from functools import lru_cache

import torch
from oracle import Mixture, ring, unequal
from torch import Tensor, nn

from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.discriminators import Discriminator, FeatureReader
from dmd_core.objectives.dmd2 import DMD2, DMD2Config
from dmd_core.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from dmd_core.samplers import sample_heun, sample_restart
from dmd_core.schedule import Flow
from dmd_core.train import TrainConfig, train

TARGETS = {"ring": ring, "unequal": unequal}
ONE, FOUR = (1.0,), (1.0, 0.75, 0.5, 0.25)
LAYERS = ("blocks.0", "blocks.1", "blocks.2")


class MLP(nn.Module):
    """Velocity of a point at a time; `blocks` are the feature layers."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(n, width), nn.SiLU()) for n in (2 + 8, width, width))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, timestep: Tensor, cond: object) -> Tensor:
        angle = timestep[:, None] / 1000 * torch.tensor([1.0, 2.0, 4.0, 8.0])
        h = torch.cat([x, angle.sin(), angle.cos()], 1)
        for block in self.blocks:
            h = block(h)
        return self.out(h)


def points(target: Mixture, n: int, seed: int) -> Iterator[tuple[Tensor, None]]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield target.sample(n, rng), None


def prompts(n: int, target: Mixture | None = None, seed: int = 0) -> Iterator[Batch]:
    """Prompt-only batches; with a target, real samples beside them."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield Batch(None, (n, 2), None if target is None else target.sample(n, rng))


@lru_cache
def learned(kind: str, steps: int = 700) -> NetDenoiser:
    """The multi-step model that a student starts from. Treat as frozen: use `copy_of`."""
    torch.manual_seed(0)
    model = NetDenoiser(MLP(), Flow(), Prediction.FLOW)
    config = RectifiedFlowConfig(lr=2e-3, ema=None)
    objective = RectifiedFlow(model, dict(model.net.named_parameters()), config)
    for _ in train(objective, points(TARGETS[kind](Flow()), 256, 1), TrainConfig(steps=steps, cooldown=0.5)):
        pass
    model.net.requires_grad_(False)
    return model


def copy_of(model: NetDenoiser) -> NetDenoiser:
    return NetDenoiser(copy.deepcopy(model.net).requires_grad_(True), model.schedule, model.prediction)


def draw(model, sigmas: tuple[float, ...], n: int = 4096, gamma: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    levels = torch.tensor([*sigmas, 0.0])
    return sample_restart(model, torch.randn(n, 2, generator=rng), levels, None, rng, gamma)


def named(model: NetDenoiser) -> dict[str, nn.Parameter]:
    return dict(model.net.named_parameters())


def run(objective, batches, steps: int, seed: int) -> dict[str, float]:
    """Losses of the last step."""
    *_, last = train(objective, batches, TrainConfig(steps=steps, seed=seed, cooldown=0.5))
    return last.losses


def dmd2_student(base: NetDenoiser, target, sigmas, seed=0, steps=800, batches=None, kind=DMD2, heads=False, **options):
    """A student of `target` by DMD2, from the multi-step model `base`."""
    settings = {"guidance": 1.0, "critic_updates": 2, "student_lr": 1e-3, "critic_lr": 1e-3, "ema": None}
    settings |= {"student_betas": (0.0, 0.99), "critic_betas": (0.0, 0.99), **options}
    negative = settings.pop("negative", None)
    config = settings.pop("config", DMD2Config)(sigmas=sigmas, **settings)
    student, critic = copy_of(base), copy_of(base)
    discriminator = heads_on(critic) if heads else None
    objective = kind(target, student, critic, negative, named(student), named(critic), config, discriminator)
    run(objective, prompts(256, target if heads else None) if batches is None else batches, steps, seed)
    return student


def heads_on(model: NetDenoiser, seed: int = 0) -> Discriminator:
    reader, rng = FeatureReader(model, model.net, LAYERS), torch.Generator().manual_seed(seed)
    return Discriminator.on(reader, torch.zeros(4, 2), torch.full((4,), 0.5), None, rng, width=64)


@lru_cache
def teacher_pairs(kind: str, n: int = 8192) -> tuple[Tensor, Tensor]:
    """(noise, points) of the exact teacher."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(50))
    return noise, sample_heun(TARGETS[kind](Flow()), noise, torch.linspace(1, 0, 33), None)


def pairs(kind: str, n: int = 256, seed: int = 0) -> Iterator[Batch]:
    noise, latents = teacher_pairs(kind)
    rng = torch.Generator().manual_seed(seed)
    while True:
        i = torch.randint(len(noise), (n,), generator=rng)
        yield Batch(None, (n, 2), latents[i], noise[i])
