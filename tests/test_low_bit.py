"""8-bit AdamW by bitsandbytes or torchao, as the state saves and loads it: with stand-ins, and the real torchao."""

import sys
from dataclasses import replace
from itertools import count
from types import ModuleType

import pytest
import torch
from test_train import CONFIG, Tug, consume, weights
from torch.testing._internal.two_tensor import TwoTensor

from dmd_core.plan import optimizer_bytes
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import TrainState, read_state

LOW = TrainConfig(steps=10, warmup=4, cooldown=0.3, optimizer="adamw8bit")
PACKAGES = ("bitsandbytes", "torchao")


class Bitsandbytes(torch.optim.Optimizer):
    """Its state as bitsandbytes names it: bytes, a scale, and a step that is a number."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "state1": torch.zeros_like(p, dtype=torch.uint8), "absmax1": torch.zeros(1)}
                state["step"] += 1
                moment = (state["state1"].float() / 127 - 1) * state["absmax1"] * 0.9 + p.grad
                state["absmax1"] = moment.abs().max()[None]
                state["state1"] = ((moment / state["absmax1"] + 1) * 127).round().to(torch.uint8)
                p.sub_(group["lr"] * moment)


class Torchao(torch.optim.Optimizer):
    """As torchao: the learning rate is a tensor and stays one, the moments are tensors made of several."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "weight_decay": weight_decay})

    def _new_buffer(self, p, signed):
        return TwoTensor(torch.zeros_like(p), torch.full_like(p, float(signed)))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                raise RuntimeError("lr was changed to a non-Tensor object")
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": self._new_buffer(p, True)}
                    state["exp_avg_sq"] = self._new_buffer(p, False)
                state["step"] += 1
                state["exp_avg"].a.mul_(0.9).add_(p.grad)
                state["exp_avg_sq"].a.mul_(0.9).add_(p.grad.square())
                p.sub_(group["lr"] * state["exp_avg"].a / (state["exp_avg_sq"].a.sqrt() + state["exp_avg"].b))


STANDINS = {"bitsandbytes": Bitsandbytes, "torchao": Torchao}


@pytest.fixture
def installed(monkeypatch):
    """Only these of the two packages."""

    def install(*names):
        for name in PACKAGES:
            optim = ModuleType(f"{name}.optim")
            if name in names:
                optim.AdamW8bit = STANDINS[name]
                monkeypatch.setattr(STANDINS[name], "__module__", f"{name}.optim.adamw")
            monkeypatch.setitem(sys.modules, name, ModuleType(name) if name in names else None)
            monkeypatch.setitem(sys.modules, f"{name}.optim", optim if name in names else None)

    return install


def resumed(tmp_path):
    """(of a whole run, of one that was saved and loaded in between) weights."""
    whole = Tug()
    consume(whole, LOW)
    first = Tug()
    state = TrainState(first, LOW)
    consume(first, LOW, state, steps=4)
    state.save(tmp_path / "state.safetensors")
    second = Tug()
    state = TrainState(second, LOW)
    state.load(tmp_path / "state.safetensors")
    consume(second, LOW, state)
    return weights(whole), weights(second)


@pytest.mark.parametrize("package", PACKAGES)
def test_it_is_built_saved_and_goes_on_to_the_bit(installed, tmp_path, package):
    installed(package)
    state = TrainState(Tug(), LOW)
    assert {type(o) for o in state.optimizers.values()} == {STANDINS[package]}
    whole, again = resumed(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    tensors, _ = read_state(tmp_path / "state.safetensors")
    held = {k.split("/")[2] for k in tensors if k.startswith("optimizer/pull/")}
    assert held >= ({"exp_avg.a", "exp_avg.b"} if package == "torchao" else {"state1", "absmax1"})
    plain = Tug()
    consume(plain, CONFIG)
    assert not all(torch.equal(a, b) for a, b in zip(whole, weights(plain), strict=True))  # control: another optimiser


def test_the_learning_rate_follows_its_schedule_in_a_tensor_too(installed):
    installed("torchao")
    objective = Tug()
    state = TrainState(objective, LOW)
    seen = []
    for _ in train(objective, (torch.ones(8, 3) for _ in range(99)), LOW, state):
        (group,) = state.optimizers["pull"].param_groups
        seen.append(group["lr"].item())
    assert seen[0] == pytest.approx(1e-2 / 4)
    assert seen[3] == pytest.approx(1e-2)
    assert seen[-1] < seen[3]


def test_bitsandbytes_comes_first_and_neither_is_named(installed):
    installed(*PACKAGES)
    assert isinstance(TrainState(Tug(), LOW).optimizers["pull"], Bitsandbytes)
    installed()
    with pytest.raises(ValueError, match="needs the package bitsandbytes or torchao; install one"):
        TrainState(Tug(), LOW)


def test_a_state_of_the_other_package_is_refused_and_changes_nothing(installed, tmp_path):
    installed("torchao")
    resumed(tmp_path)
    installed("bitsandbytes")
    objective = Tug()
    before = weights(objective)
    with pytest.raises(ValueError, match="the optimizer of torchao, here it is that of bitsandbytes"):
        TrainState(objective, LOW).load(tmp_path / "state.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, weights(objective), strict=True))


def test_the_plan_counts_what_quantised_moments_hold(installed):
    installed("torchao")
    objective = Tug()
    state = TrainState(objective, LOW)
    consume(objective, LOW, state, steps=1)
    parameters = sum(p.numel() for p in weights(objective))
    steps = 4 * len(weights(objective))
    assert optimizer_bytes(state) == 4 * 4 * parameters + steps  # two moments of two tensors each


class Wide(Tug):
    """Large enough that torchao does quantise."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.nets = {k: torch.nn.Linear(64, 64) for k in self.nets}
        self.players = {
            k: replace(p, params=dict(self.nets[k].named_parameters()), betas=(0.9, 0.99))
            for k, p in self.players.items()
        }


@pytest.mark.slow
def test_torchao_itself_goes_on_to_the_bit(tmp_path):
    pytest.importorskip("torchao", reason="not run: torchao is not installed")

    def run(state, objective, last):
        seen = (torch.randn(8, 64, generator=torch.Generator().manual_seed(i)) for i in count())
        for report in train(objective, seen, LOW, state):
            if report.step == last:
                return

    made = []
    for stops in ((10,), (4, 10)):
        for stop in stops:
            objective = Wide()
            state = TrainState(objective, LOW)
            if stop != stops[0]:
                state.load(tmp_path / "state.safetensors")
            run(state, objective, stop)
            state.save(tmp_path / "state.safetensors")
        made.append(weights(objective))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    tensors, _ = read_state(tmp_path / "state.safetensors")
    assert tensors["optimizer/pull/exp_avg.codes/weight"].dtype == torch.uint8
