"""Students small enough for seconds: an MLP in the plane, pretrained as a rectified flow of a mixture."""

import copy
from collections.abc import Iterator
from functools import lru_cache

import torch
from oracle import Mixture, ring, unequal
from torch import Tensor, nn

from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from dmd_core.samplers import sample_restart
from dmd_core.schedule import Flow
from dmd_core.train import TrainConfig, train

TARGETS = {"ring": ring, "unequal": unequal}


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
