import os
import signal
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmd_core.train import NonFinite, Player, TrainConfig, train
from dmd_core.trainstate import TrainState


class Tug:
    """Two players: `pull` fits the data, `push` fits what pull says, three times as often."""

    def __init__(self, accumulate=1, ema=0.9):
        g = torch.Generator().manual_seed(0)
        self.nets = {k: nn.Linear(3, 3) for k in ("push", "pull")}
        for net in self.nets.values():
            for p in net.parameters():
                p.data = torch.randn(p.shape, generator=g)
        self.players = {
            k: Player(dict(n.named_parameters()), 1e-2, (0.0, 0.99), 0.01, ema, accumulate)
            for k, n in self.nets.items()
        }
        self.poison_at = None
        self.calls = 0

    def turns(self, step):
        return ("push", "push", "push", "pull")

    def terms(self, player, batch, rng):
        self.calls += 1
        x = batch + 0.1 * torch.randn(batch.shape, generator=rng)
        pull = self.nets["pull"](x)
        target = pull.detach() if player == "push" else batch
        loss = (self.nets[player](x) - target).square().mean()
        return {"fit": loss * float("nan") if self.calls == self.poison_at else loss}


def data():
    for i in count():
        yield torch.randn(8, 3, generator=torch.Generator().manual_seed(i))


def consume(objective, config, state=None, steps=None):
    reports = []
    for report in train(objective, data(), config, state):
        reports.append(report)
        if report.step == steps:
            break
    return reports


def weights(objective):
    return [p.detach().clone() for n in objective.nets.values() for p in n.parameters()]


CONFIG = TrainConfig(steps=10, warmup=4, cooldown=0.3)


def test_training_fits_and_counts_both_players():
    objective = Tug()
    reports = consume(objective, TrainConfig(steps=150))
    assert reports[-1].losses["pull/fit"] < 0.5 * reports[0].losses["pull/fit"]
    assert reports[-1].counters == {"push": 450, "pull": 150}
    assert objective.calls == 600


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    whole = Tug()
    whole_state = TrainState(whole, CONFIG)
    expected = consume(whole, CONFIG, whole_state)

    first = Tug()
    state = TrainState(first, CONFIG)
    consume(first, CONFIG, state, steps=4)
    state.save(tmp_path / "state.safetensors")

    second = Tug()
    state = TrainState(second, CONFIG)
    state.load(tmp_path / "state.safetensors")
    rest = consume(second, CONFIG, state)
    assert [r.losses for r in rest] == [r.losses for r in expected[4:]]
    assert rest[-1].counters == expected[-1].counters
    for a, b in zip(weights(second), weights(whole), strict=True):
        assert torch.equal(a, b)
    for name, average in state.ema.items():
        assert all(torch.equal(v, whole_state.ema[name][k]) for k, v in average.items())


def test_forgetting_the_optimiser_would_be_noticed(tmp_path):
    whole = Tug()
    consume(whole, CONFIG)
    first = Tug()
    state = TrainState(first, CONFIG)
    consume(first, CONFIG, state, steps=4)
    state.optimizers["pull"].state.clear()
    consume(first, CONFIG, state)
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(whole), strict=True))


def test_accumulation_is_the_mean_over_batches():
    objective = Tug(accumulate=4)
    consume(objective, TrainConfig(steps=1))
    assert objective.calls == 16

    def update(accumulate, batches):
        objective = Tug(accumulate)
        before = weights(objective)[2]
        for _ in train(objective, batches, TrainConfig(steps=1, clip=0)):
            pass
        return weights(objective)[2] - before

    same = [torch.ones(8, 3)] * 16
    torch.testing.assert_close(update(4, same), update(1, same), atol=1e-3, rtol=0)


def test_averaged_swaps_the_ema_in_and_back():
    objective = Tug()
    state = TrainState(objective, CONFIG)
    consume(objective, CONFIG, state)
    live = weights(objective)
    with state.averaged("pull"):
        inside = weights(objective)
    assert not torch.equal(inside[2], live[2])
    assert torch.equal(inside[2], state.ema["pull"]["weight"])
    assert all(torch.equal(a, b) for a, b in zip(weights(objective), live, strict=True))


class Storages(TorchDispatchMode):
    """Of all tensors that operators give, on each device."""

    def __init__(self):
        super().__init__()
        self.seen = {"cpu": set(), "meta": set()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.seen[made.device.type].add(made.untyped_storage()._cdata)
        return made


def test_averaged_holds_no_further_copy_on_the_device():
    """On a device that is only pretended: nothing is computed, but everything has its place."""
    with FakeTensorMode():
        params = {k: nn.Parameter(torch.zeros(3, device="meta")) for k in ("a", "b")}
        state = TrainState(SimpleNamespace(players={"pull": Player(params, 1e-2, ema=0.9)}), CONFIG)
        there = {p.untyped_storage()._cdata for p in (*params.values(), *state.ema["pull"].values())}
        with Storages() as storages, state.averaged("pull"):
            pass
        assert storages.seen["meta"] <= there
        assert len(storages.seen["cpu"]) == 2
        with Storages() as control:
            kept = [p.detach().clone() for p in params.values()]
        assert len(control.seen["meta"] - there) == len(kept)


def test_clipping_and_warmup_bound_the_first_update():
    def moved(config):
        objective = Tug()
        before = weights(objective)
        consume(objective, config)
        return (weights(objective)[2] - before[2]).abs().max().item()

    assert moved(TrainConfig(steps=1, warmup=100)) < 0.05 * moved(TrainConfig(steps=1))


def test_a_nonfinite_loss_stops_before_the_update_and_names_term_and_step():
    objective = Tug()
    state = TrainState(objective, CONFIG)
    consume(objective, CONFIG, state, steps=2)
    before = weights(objective)
    objective.poison_at = objective.calls + 1
    with pytest.raises(NonFinite, match=r"push/fit, push/gradient became NaN or infinite at step 2"):
        consume(objective, CONFIG, state)
    assert all(torch.equal(a, b) for a, b in zip(weights(objective), before, strict=True))


def test_the_generator_leaves_grad_mode_and_the_global_rng_alone():
    objective = Tug()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for _ in train(objective, data(), TrainConfig(steps=2)):
        assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(1), expected)


def test_an_unreached_parameter_is_named_not_ignored(caplog):
    objective = Tug()
    extra = nn.Parameter(torch.zeros(2))
    objective.players["pull"] = Player({**objective.players["pull"].params, "spare": extra}, 1e-2)
    consume(objective, TrainConfig(steps=2))
    assert [r.message for r in caplog.records] == ["pull: 1 parameters are not reached by the loss: spare"]
    objective.players["pull"] = Player({"spare": extra}, 1e-2)
    with pytest.raises(ValueError, match="no parameter of 'pull' is reached"):
        consume(objective, TrainConfig(steps=1))


def test_data_that_ends_is_said():
    with pytest.raises(ValueError, match="ended after 2 batches"):
        list(train(Tug(), [torch.zeros(8, 3)] * 2, TrainConfig(steps=1)))


def test_bf16_autocast_trains_with_fp32_parameters():
    objective = Tug()
    reports = consume(objective, TrainConfig(steps=150, precision="bf16"))
    assert reports[-1].losses["pull/fit"] < 0.5 * reports[0].losses["pull/fit"]
    assert all(p.dtype == torch.float32 for p in weights(objective))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, "steps is 0"), ({"precision": "fp16"}, "fp16"), ({"optimizer": "sgd"}, "'sgd' is not known")],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


class TestStateFile:
    @pytest.fixture
    def saved(self, tmp_path):
        objective = Tug()
        state = TrainState(objective, CONFIG)
        consume(objective, CONFIG, state, steps=2)
        path = tmp_path / "run" / "state.safetensors"
        state.save(path)
        return path

    def fresh(self, config=CONFIG):
        return TrainState(Tug(), config)

    def test_only_the_file_itself_is_left(self, saved):
        assert [p.name for p in saved.parent.iterdir()] == ["state.safetensors"]

    def test_a_truncated_file_is_refused(self, saved):
        saved.write_bytes(saved.read_bytes()[:-100])
        with pytest.raises(ValueError, match="not a sound training state"):
            self.fresh().load(saved)

    def test_a_flipped_bit_is_refused(self, saved):
        raw = bytearray(saved.read_bytes())
        raw[-5] ^= 1
        saved.write_bytes(raw)
        with pytest.raises(ValueError, match="damaged"):
            self.fresh().load(saved)

    def test_a_missing_or_foreign_file_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no training state"):
            self.fresh().load(tmp_path / "none.safetensors")
        (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickled")
        with pytest.raises(ValueError, match="not a sound training state"):
            self.fresh().load(tmp_path / "x.safetensors")

    def test_other_settings_are_refused_but_more_steps_are_not(self, saved):
        self.fresh(TrainConfig(steps=999, warmup=4, cooldown=0.3)).load(saved)
        with pytest.raises(ValueError, match="other settings"):
            self.fresh(TrainConfig(steps=10, clip=0.5)).load(saved)

    def test_a_failed_save_keeps_the_old_file(self, saved, monkeypatch):
        before = saved.read_bytes()
        monkeypatch.setattr("dmd_core.trainstate.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            self.fresh().save(saved)
        assert saved.read_bytes() == before
        assert len(list(saved.parent.iterdir())) == 1


def save_until_killed(path):
    """A child process that saves one state after another; fork, so that it needs no second import of torch."""
    child = os.fork()
    if child:
        return child
    try:
        state = TrainState(Tug(), CONFIG)
        while True:
            state.step += 1
            state.save(path)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.endurance])])
def test_kills_while_saving_always_leave_a_loadable_state(tmp_path, kills):
    path = tmp_path / "state.safetensors"
    TrainState(Tug(), CONFIG).save(path)
    for delay in (0.05 * torch.rand(kills, generator=torch.Generator().manual_seed(0))).tolist():
        before, began = path.stat().st_ino, time.monotonic()
        child = save_until_killed(path)
        while path.stat().st_ino == before:  # a busy machine may take its time before the first of them
            assert time.monotonic() < began + 60, "the child saved nothing: the kill would test nothing"
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = TrainState(Tug(), CONFIG)
        state.load(path)
        assert state.step > 0
    TrainState(Tug(), CONFIG).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
