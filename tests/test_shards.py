"""Whole copies that two processes share out (FSDP2, gloo on the CPU): they learn what one process learns."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from oracle import ring
from test_full import full
from test_headless import ROOT, Doubled, small_world
from toy import LAYERS, MLP

from dmd_core import headless, shards
from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.discriminators import Discriminator, FeatureReader
from dmd_core.drive import DriveConfig, drive
from dmd_core.objectives.dmd2 import DMD2, DMD2Config
from dmd_core.processes import ALONE, Shared, SharedBatches
from dmd_core.runs import Run
from dmd_core.schedule import Flow
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import TrainState

CONFIG = TrainConfig(steps=5, clip=0.5)
OFTEN = DriveConfig(save_every=2, snapshot_every=0, preview_every=0)
DMD = DMD2Config(
    sigmas=(1.0, 0.5), guidance=1.0, critic_updates=2, student_lr=1e-2, critic_lr=1e-2, synchronise=0.1,
    student_accumulate=2, gan_weight=0.1, gan_critic_weight=1.0,
)  # fmt: skip


def duel(count=1):
    """Student and critic in float64, each shared out over `count` processes; a GAN's heads, which every process has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [MLP(8).double() for _ in range(3)]
    frozen = nets.pop().requires_grad_(False)
    if count > 1:
        for net in nets:
            shards.shard(net, LAYERS, count)
    models = [NetDenoiser(Doubled(n), Flow(), Prediction.FLOW, torch.float64) for n in (*nets, frozen)]
    reader, rng = FeatureReader(models.pop(), frozen, LAYERS), torch.Generator().manual_seed(1)
    x = torch.zeros(2, 2, dtype=torch.float64)
    heads = Discriminator.on(reader, x, x[:, 0] + 0.5, None, rng, 8)
    return DMD2(ring(Flow()), *models, None, *(dict(n.named_parameters()) for n in nets), DMD, heads)


def points(n=8):
    for i in range(1000):
        x = torch.randn(n, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        yield Batch(None, (n, 2), x)


def flat(objective):
    params = {f"{k}.{n}": p for k, player in objective.players.items() for n, p in player.params.items()}
    return {k: v.clone() for k, v in shards.collected(params).items()}


def go(run, processes=ALONE, stop=0):
    """The run in its folder, broken off after `stop` steps; what it has learned."""
    objective = duel(processes.count)
    steps = drive(objective, points(), CONFIG, run, OFTEN, processes=processes)
    for progress in steps:
        if progress.step == stop:
            steps.close()
    return flat(objective)


def moments(state, player):
    """Bytes of the optimiser's moments that are here, and of all of them."""
    found = [v for s in state.optimizers[player].state.values() for k, v in s.items() if k != "step"]
    return sum(shards.own(v).nbytes for v in found), sum(v.numel() * v.element_size() for v in found)


def work(processes, out):
    """In each of two processes; the first one writes what was learned."""
    from safetensors.torch import save_file

    found = {}
    for name, stop in (("two", 3), ("one", 0)):
        if stop:
            go(Run(out / name), processes, stop)
            processes.share(0)
            if processes.rank == 0:
                assert "cancelled; the last good state, of step 2" in (out / name / "report.txt").read_text()
                shutil.copytree(out / name, out / "two then one")
            processes.share(0)
        found |= {f"{name}/{k}": v for k, v in go(Run(out / name), processes).items()}
    objective = duel(processes.count)
    state = TrainState(objective, CONFIG)
    steps = train(Shared(objective, processes), SharedBatches(points(), processes), CONFIG, state, processes.mean)
    next(steps)
    here, all_of_it = moments(state, "student")
    assert 0.4 < here / all_of_it < 0.6, (here, all_of_it)
    assert shards.is_shard(next(iter(state.ema["student"].values())))
    # the control: nobody averages
    lonely = duel()
    for _ in train(Shared(lonely, processes), SharedBatches(points(), processes), CONFIG):
        pass
    found |= {f"lonely/{k}": v for k, v in flat(lonely).items()}
    if processes.rank == 0:
        save_file({k: v.contiguous() for k, v in found.items()}, out / "found.safetensors")
    whole_run(processes, out)


def whole_run(processes, out):
    """A run file on a tiny world, with previews, snapshots and an export."""
    with pytest.MonkeyPatch.context() as patch:
        small_world(patch)
        patch.setattr(headless, "fellows", lambda file: (processes, torch.device("cpu")))
        headless.train_from(out / "RUN.toml", say=lambda line: None)


SCRIPT = """
import sys
sys.path.insert(0, r"{tests}")
import conftest, test_shards
from accelerate import Accelerator
from dmd_core.processes import Accelerated
from pathlib import Path
test_shards.work(Accelerated(Accelerator(cpu=True)), Path(r"{out}"))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder in which two processes have worked."""
    out = tmp_path_factory.mktemp("shards")
    go(Run(out / "one"), stop=2)
    full(out, more="critic_updates = 1\nstudent_lr = 1e-3")
    (out / "job.py").write_text(SCRIPT.format(tests=ROOT / "tests", out=out))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    logs = [out / f"{rank}.log" for rank in range(2)]
    jobs = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            ranks = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            jobs.append(subprocess.Popen([sys.executable, out / "job.py"], stderr=file, stdout=file, env=ranks))
    try:
        assert [job.wait(3000) for job in jobs] == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for job in jobs:
            job.kill()
    return out


@pytest.mark.slow
class TestTwoProcesses:
    def test_equal_one_with_the_double_batch(self, launched):
        expected, found = self.expected(), self.found(launched)
        for run in ("two", "one"):  # broken off by two processes and by one
            for k, v in expected.items():
                torch.testing.assert_close(found[f"{run}/{k}"], v, rtol=1e-6, atol=1e-9)

    def test_would_not_without_the_averaging(self, launched):
        expected, found = self.expected(), self.found(launched)
        assert any((found[f"lonely/{k}"] - v).abs().max() > 1e-3 for k, v in expected.items())

    def test_leave_what_one_process_goes_on_with(self, launched):
        made = go(Run(launched / "two then one"))
        for k, v in self.expected().items():
            torch.testing.assert_close(made[k], v, rtol=1e-6, atol=1e-9)

    def test_train_a_run_file(self, launched, monkeypatch):
        small_world(monkeypatch)
        folder = launched / "runs" / "tiny"
        run = Run(folder)
        assert (folder / "previews" / "latest.png").exists()
        assert (run.snapshots()[-1] / "sheet.png").exists()
        assert len(list((folder / "model").glob("*.safetensors"))) == 1
        path = launched / "RUN.toml"
        path.write_text(path.read_text().replace("steps = 2", "steps = 3").replace('"tiny"', '"alone"'))
        headless.train_from(path, say=lambda line: None)
        for one, two in zip(Run(launched / "runs" / "alone").history(), run.history(), strict=False):
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
        path.write_text(path.read_text().replace('"alone"', '"tiny"'))
        headless.train_from(path, resume=True, say=lambda line: None)
        assert [r["step"] for r in run.history()] == [1, 2, 3]

    def expected(self):
        objective = duel()
        list(train(objective, points(), CONFIG))
        return flat(objective)

    def found(self, out):
        from safetensors.torch import load_file

        return load_file(out / "found.safetensors")


class TestAlone:
    """Tensors of one process pass through."""

    def test_collecting_and_filling(self):
        p = torch.nn.Parameter(torch.randn(3, 2))
        assert not shards.is_shard(p)
        assert torch.equal(shards.collected({"a": p})["a"], p)
        assert shards.collected({"a": p}, keep=False) == {}
        value = torch.randn(3, 2)
        shards.fill(p, value)
        assert torch.equal(p, value)
        assert not TrainState(duel(), CONFIG).sharded

    def test_backward_gives_what_autograd_grad_gives(self):
        """Also after a turn of somebody else left gradients behind."""
        net = MLP(8)
        params = list(net.parameters())

        def loss():
            return net(torch.ones(4, 2), torch.ones(4), None).square().mean()

        expected = torch.autograd.grad(loss(), params)
        loss().backward()
        found = shards.gradients(loss(), params)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(p.grad is None for p in params)

    @pytest.mark.parametrize("bound", [0.1, float("inf")])
    def test_clipping_is_that_of_torch(self, bound):
        made = []
        for clip in (shards.clip, torch.nn.utils.clip_grad_norm_):
            params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)]
            for i, p in enumerate(params):
                p.grad = torch.arange(len(p)) + float(i)
            norm = clip(params, bound)
            made.append([norm, *(p.grad for p in params)])
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a, b)
