"""Models whose slider optimum is known in closed form: Gaussians with a mean per prompt and one Linear to adapt."""

import torch
from torch import Tensor, nn

from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.schedule import Discrete, Flow, Schedule, expand
from dmd_core.train import TrainConfig, train

SDXL = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)
KINDS = {
    "eps": (SDXL, Prediction.EPS),
    "v": (SDXL, Prediction.V),
    "flow": (Flow(), Prediction.FLOW),
    "x0": (Flow(), Prediction.X0),
}


class PromptMeans(nn.Module):
    """Posterior mean of N(mean(cond), basis diag(sds^2) basis^T), written as a network of any parametrisation.

    The mean is Linear(cond), so an adapter on it can reach every shift of the mean: nothing hides behind capacity.
    """

    def __init__(self, means: Tensor, schedule: Schedule, prediction: Prediction, sds: Tensor, basis: Tensor):
        super().__init__()
        self.mean = nn.Linear(*means.shape, bias=False)
        self.mean.weight.data = means.T.clone()
        self.schedule, self.prediction, self.sds, self.basis = schedule, prediction, sds, basis
        self.requires_grad_(False)

    def forward(self, x_in: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        sigma = self.schedule.sigma(timestep).to(x_in)
        x = x_in / self.prediction.scale_in(torch.ones_like(x_in), sigma)
        a, b = (expand(c, x) for c in self.schedule.coeffs(sigma))
        mean = self.mean(cond)
        gain = a * self.sds**2 / (a**2 * self.sds**2 + b**2)
        x0 = mean + (gain * ((x - a * mean) @ self.basis)) @ self.basis.T
        return self.prediction.from_x0(x0, x, sigma)


def world(
    means: Tensor, kind: str = "flow", sds: Tensor | float = 0.5, basis: Tensor | None = None
) -> tuple[Adapted, Tensor]:
    """The model, and its prompts as one-hot conditioning [n n]. means: [n d]"""
    schedule, prediction = KINDS[kind]
    d = means.shape[1]
    sds = torch.full((d,), sds) if isinstance(sds, float) else sds
    net = PromptMeans(means, schedule, prediction, sds, torch.eye(d) if basis is None else basis)
    return Adapted(NetDenoiser(net, schedule, prediction), AdapterBank(net)), torch.eye(len(means))


def learnt(model: Adapted, name: str, cond: Tensor) -> Tensor:
    """What strength 1 adds to the mean of one prompt. [d]"""
    adapter = model.bank.sets[name]["mean"]
    return (adapter(cond)).detach()


def fit(objective, batches, steps: int, seed: int = 0) -> list[float]:
    reports = train(objective, batches, TrainConfig(steps=steps, seed=seed, cooldown=0.5))
    return [sum(r.losses.values()) for r in reports]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
