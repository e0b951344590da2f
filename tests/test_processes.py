"""Several processes learn what one learns with all their rows: what the lazy methods draw for a whole batch."""

from itertools import islice

import pytest
import torch
from test_headless import side_by_side
from test_reliability import METHODS

from dmd_core.inpaint import draw_holes
from dmd_core.processes import Rows, Shared, SharedBatches
from dmd_core.train import TrainConfig, train

CONFIG = TrainConfig(steps=7)  # four that only denoise, three that play


def learn(made, processes=None):
    objective, data = made
    shared = (objective, data)
    if processes is not None:
        shared = Shared(objective, processes), SharedBatches(data, processes)
    reports = list(train(*shared, CONFIG, reduce=processes and processes.mean))
    found = {f"{k}.{n}": p.detach().clone() for k, pl in objective.players.items() for n, p in pl.params.items()}
    return found, [r.losses for r in reports]


@pytest.mark.parametrize("kind", ["lazy_inpaint", "lazy_ladd"])
def test_two_processes_of_one_picture_each_learn_what_one_learns_from_two(kind):
    expected, losses = learn(METHODS[kind]())
    made = [METHODS[kind]() for _ in range(2)]
    for params, seen in side_by_side(lambda rank, processes: learn(made[rank], processes)):
        for k, v in expected.items():
            torch.testing.assert_close(params[k], v, rtol=1e-4, atol=1e-6)
        for a, b in zip(seen, losses, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


class OneOf:
    """The first of several processes, with nobody to talk to."""

    rank = 0

    def __init__(self, count):
        self.count = count

    def mean(self, tensors):
        pass


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(6)


@pytest.mark.parametrize("each", [1, 2, 3, 4, 5])
def test_the_holes_of_several_processes_are_rows_of_one_batch(each):
    """Four numbers of a drawing are no rows of four samples either."""
    objective, _ = METHODS["lazy_inpaint"]()
    canvas = torch.zeros(2 * each, 2, 16, 16)
    whole, _student = objective.task(None, canvas, generator())
    seed = int(torch.randint(2**62, (), generator=generator()))
    assert not whole.all()  # a hole everywhere would compare nothing
    apart = []
    for rank in range(2):
        mine = slice(rank * each, (rank + 1) * each)
        with Rows(rank, 2, each):
            assert torch.equal(objective.task(None, canvas[mine], generator())[0], whole[mine])
            # what is drawn next is shared out as before
            after = torch.rand(each, generator=generator())
            apart.append(draw_holes(each, 8, 8, torch.Generator().manual_seed(seed), objective.lazy.masks))
        assert torch.equal(after, torch.rand(2 * each, generator=generator())[mine])
    # control: drawn by each process for itself
    assert any(a.shape != w.shape or not torch.equal(a, w) for a, w in zip(apart, whole.split(each), strict=True))


def test_a_discriminator_counts_the_samples_of_all_processes():
    objective, batches = METHODS["ladd"]()
    (row,) = islice(SharedBatches(batches, OneOf(8)), 1)
    assert "gan" in Shared(objective, OneOf(8)).terms("discriminator", row, generator())
    with pytest.raises(ValueError, match="one sample per update"):  # control
        objective.terms("discriminator", row, generator())
