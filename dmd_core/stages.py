"""Several models over one run: which levels each of them does.

At any noise level a student's input is the same as a teacher's: a noised image. So a teacher may do the noisy steps
(composition, variety) and hand its half-done image to the student at one of the levels that the student knows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .schedule import Schedule
from .sigmas import ending


def with_head(schedule: Schedule, sigmas: Tensor, steps: int, replaced: int = 1) -> Tensor:
    """The student's sigmas (ending in 0) with its first `replaced` levels spread to `steps` levels, evenly in time."""
    levels = sigmas.tolist()
    if len(levels) < replaced + 2:
        raise ValueError(
            f"the student has {len(levels) - 1} steps, {replaced} of them are to be replaced; one has to stay: "
            "use more steps of the student, or none of the first model"
        )
    if steps < 1:
        return sigmas
    # timesteps as the schedule counts them: even in them is even in the network's own time
    top, low = schedule.timestep(sigmas[:1]).double(), schedule.timestep(sigmas[replaced : replaced + 1]).double()
    times = top + (low - top) * torch.arange(steps, dtype=torch.float64) / steps
    head = schedule.sigma(times.float()).tolist()
    head[0] = levels[0]
    return ending([*head, *levels[replaced:-1]])


def steps_above(sigmas: Tensor, level: float) -> int:
    """How many steps begin at a level or above it (to the rounding of `turn`): Wan's boundary as a number of steps."""
    return sum(s * (1 + 1e-4) >= level for s in sigmas[:-1].tolist())


def boundaries(sigmas: Tensor, steps: Sequence[int]) -> list[float]:
    """The level at which each model but the last hands over, from the number of steps that each does."""
    total = len(sigmas) - 1
    if sum(steps) >= total or any(n < 0 for n in steps):
        raise ValueError(
            f"{' + '.join(map(str, steps))} steps are given to the earlier models, {total} there are in all; "
            "leave at least one for the last model"
        )
    return [float(sigmas[sum(steps[: i + 1])]) for i in range(len(steps))]


def turn(sigma: float, handovers: Sequence[float]) -> int:
    """Whose turn it is at a level; the level of a handover is already the next model's."""
    return sum(sigma <= level * (1 + 1e-4) for level in handovers)
