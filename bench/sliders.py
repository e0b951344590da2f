"""What sliders cost, against the number of them."""

import torch

from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.objectives.slider_space import SliderSpace, SliderSpaceConfig
from dmd_core.train import TrainConfig, train

from .models import SMALL
from .record import Table, compared

RANK, COUNTS, AWAKE = 1, (1, 4, 16, 64), (1, 2, 4, 8)


def on_cpu(rounds: int = 9) -> Table:
    size = SMALL["flux"]
    table = Table(
        "sliders",
        "Sliders",
        "discovering: a training step with n sliders in the set over one with a single slider. "
        "using: a network call with n sliders at work over the bare call",
        settings={"network": "flux, scaled down", "rank": RANK, "layers": "cross-attention", "batch": 1},
    )
    cond = size.cond(1)
    x = torch.randn(1, *size.shape, generator=torch.Generator().manual_seed(0))

    def fresh(count: int) -> Adapted:
        net, rng = size.net(), torch.Generator().manual_seed(0)
        bank = AdapterBank(net, size.kind.targets("cross-attention"))
        for i in range(count):
            bank.new(f"s{i}", RANK, rng)
        return Adapted(size.denoiser(net), bank, {})

    def stepping(count: int):
        model = fresh(count)
        directions = {f"s{i}": (torch.eye(8)[i % 8], 1.0) for i in range(count)}

        def embed(latents: torch.Tensor) -> torch.Tensor:
            return latents.flatten(1)[:, :8]

        objective = SliderSpace(model, directions, embed, cond, SliderSpaceConfig())
        batches = iter(lambda: (x, torch.zeros(1, dtype=torch.long)), None)
        steps = train(objective, batches, TrainConfig(steps=10**9))
        return lambda: next(steps)

    one = stepping(1)
    for count in COUNTS[1:]:
        table.rows.append({"what": "discovering", "sliders": count} | compared(stepping(count), one, rounds))
    sigma, bare = torch.full((1,), 0.7), size.denoiser(size.net())

    def calling(model: object):
        @torch.no_grad()
        def call() -> None:
            for _ in range(4):
                model(x, sigma, cond)

        return call

    for count in (0, *AWAKE):
        model = fresh(max(AWAKE))
        model.scales = {f"s{i}": 0.5 for i in range(count)}
        table.rows.append({"what": "using", "sliders": count} | compared(calling(model), calling(bare), rounds))
    return table
