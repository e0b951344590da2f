"""Who does which levels when several models share a run."""

import pytest
import torch

from dmd_core import sigmas as grids
from dmd_core.schedule import Discrete, Flow
from dmd_core.stages import boundaries, steps_above, turn, with_head

VP = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)


@pytest.mark.parametrize("schedule", [VP, Flow(3.0)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_head_ends_where_the_student_goes_on(schedule, steps):
    student = (
        grids.at_timesteps(VP, grids.trailing(4)) if schedule is VP else grids.ending(grids.shifted(4, schedule.shift))
    )
    longer = with_head(schedule, student, steps)
    assert len(longer) == len(student) + steps - 1
    assert longer[0] == student[0]
    torch.testing.assert_close(longer[steps:], student[1:])
    assert (longer.diff() < 0).all()
    if steps == 2:
        times = schedule.timestep(longer[:3]).double()
        assert times[1].item() == pytest.approx((times[0] + times[2]).item() / 2, abs=1)
    assert torch.equal(with_head(schedule, student, 0), student)


def test_a_student_of_one_step_has_no_room_for_a_head():
    with pytest.raises(ValueError, match="one has to stay"):
        with_head(VP, grids.at_timesteps(VP, [999]), 2)


def test_the_level_of_a_handover_is_the_next_models():
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
    handovers = boundaries(sigmas, [1, 2])
    assert [turn(s, handovers) for s in sigmas[:-1].tolist()] == [0, 1, 1, 2]
    assert turn(float(sigmas[1]) * (1 + 1e-6), handovers) == 1  # rounding on the way does not move it
    assert boundaries(sigmas, []) == []
    assert turn(1.0, []) == 0
    for steps in ([4], [2, 2], [-1]):
        with pytest.raises(ValueError, match="leave at least one"):
            boundaries(sigmas, steps)


def test_a_boundary_by_level_is_a_number_of_steps():
    wan = grids.ending(grids.shifted(4, 5.0))  # 1, .9375, .8333, .625
    assert [steps_above(wan, level) for level in (1.5, 1.0, 0.95, 0.9375, 0.875, 0.1)] == [0, 1, 1, 2, 2, 4]
    for level in (0.9, 0.8333, 0.7):
        handover = boundaries(wan, [steps_above(wan, level)])
        assert [turn(s, handover) for s in wan[:-1].tolist()] == [
            int(s < level * (1 - 1e-4)) for s in wan[:-1].tolist()
        ]
    vp = grids.at_timesteps(VP, grids.trailing(4))
    assert steps_above(vp, 4.0) == 2
