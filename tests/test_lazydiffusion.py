"""LazyDiffusion, small: what is computed, what is seen, what learns. On the embedded teacher."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from dmd_core import shapes
from dmd_core.conditioning import Cond
from dmd_core.inpaint.lazydiffusion import LazyDiffusion, kept, patches, rows, unpatched
from dmd_core.inpaint.partial import cells
from dmd_core.objectives.hole_flow import HoleFlow
from dmd_core.objectives.rectified_flow import RectifiedFlowConfig
from dmd_core.shapes.teacher import denoiser
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import TrainState

LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def canvas_of(seed: int) -> torch.Tensor:
    return draw(2, 16, 8, 8, seed=seed)


@pytest.fixture(scope="module")
def net():
    return shapes.load_teacher()


@pytest.fixture(scope="module")
def encode():
    text = shapes.load_text_encoder()
    return lambda *prompts: Cond(*text.encode(prompts))


@pytest.fixture
def model(net, encode):
    return LazyDiffusion(net, encode(""))


@pytest.fixture
def hearing(model):
    """As if it had been trained: the decoder listens."""
    weight = model.decoder.join.weight
    weight.data[:, weight.shape[0] :] = 0.1 * draw(*weight[:, weight.shape[0] :].shape, seed=9)
    return model


@pytest.fixture
def cond(encode):
    return encode("a red circle", "a large blue square on light")


@pytest.fixture
def mask():
    """Four tokens, another place in each picture; of one token a single cell."""
    hole = torch.zeros(2, 16, dtype=torch.bool)
    hole[0, [0, 1, 4, 5]] = hole[1, [5, 6, 7, 15]] = True
    found = cells(hole, torch.empty(2, 16, 8, 8), 2)[:, 0].float()
    found[0, 0, :2] = found[0, 1, 0] = 0
    return found


def everywhere() -> torch.Tensor:
    return torch.ones(2, 8, 8)


def flow(model, x, level, asked):
    return model.denoiser()(x, torch.full((len(x),), level), asked)


# --- what is computed


@torch.no_grad()
def test_untrained_and_with_a_hole_everywhere_the_decoder_is_the_teacher(net, model, hearing, cond):
    x = canvas_of(1)
    whole = patches(denoiser(net)(x, torch.full((2,), 0.7), cond))
    fresh = LazyDiffusion(net, Cond(model.encoder.tokens, model.encoder.pooled))
    asked = fresh.read(canvas_of(2), everywhere(), cond)
    assert (flow(fresh, patches(x), 0.7, asked) - whole).abs().max() < 1e-5
    assert (flow(hearing, patches(x), 0.7, asked) - whole).abs().max() > 1e-2  # control: one that listens


@pytest.mark.parametrize("steps", [1, 4])
def test_the_encoder_is_called_once_and_the_decoder_gets_the_holes_tokens_alone(model, cond, mask, steps):
    encoded, decoded = [], []
    model.encoder.register_forward_hook(lambda *call: encoded.append(1))
    for block in model.decoder.trunk.joint_blocks:
        block.register_forward_hook(lambda block, given, out: decoded.append(given[1].shape[1]))
    model.fill(canvas_of(2), mask, cond, LEVELS[-steps - 1 :], canvas_of(3))
    assert len(encoded) == 1
    assert decoded == [4] * 3 * steps  # three blocks; of 16 tokens
    decoded.clear()
    model.fill(canvas_of(2), everywhere(), cond, LEVELS[-2:], canvas_of(3))
    assert decoded == [16] * 3  # control


def test_patches_come_back_in_the_teachers_order():
    x = torch.arange(2 * 16 * 8 * 8).reshape(2, 16, 8, 8).float()
    assert torch.equal(unpatched(patches(x), x), x)
    assert patches(x)[0, 1, :16].tolist() == x[0, :, 0, 2].tolist()


def test_tokens_are_those_that_the_mask_touches(mask):
    assert rows(mask).tolist() == [[0, 1, 4, 5], [5, 6, 7, 15]]
    ragged = mask.clone()
    ragged[0, 7, 7] = 1
    with pytest.raises(ValueError, match=r"\[5, 4\] tokens"):
        rows(ragged)


# --- what is seen


@torch.no_grad()
def test_outside_the_hole_nothing_changes_and_inside_the_canvas_is_never_read(hearing, cond, mask):
    canvas, hidden = canvas_of(2), (mask[:, None] > 0).expand(2, 16, 8, 8)
    made = hearing.fill(canvas, mask, cond, LEVELS, canvas_of(3))
    assert torch.equal(made[~hidden], canvas[~hidden])
    assert (made - canvas)[hidden].abs().min() > 0
    painted = torch.where(hidden, 7.0, canvas)
    assert torch.equal(hearing.fill(painted, mask, cond, LEVELS, canvas_of(3))[hidden], made[hidden])
    around = torch.where(hidden, canvas, canvas.flip(-1))
    assert not torch.equal(hearing.fill(around, mask, cond, LEVELS, canvas_of(3))[hidden], made[hidden])  # control
    assert torch.equal(hearing.fill(canvas, torch.zeros_like(mask), cond, LEVELS, canvas_of(3)), canvas)


@torch.no_grad()
def test_far_context_reaches_the_hole_through_the_encoder_alone(model, hearing, cond, mask):
    """The last row of tokens touches no hole of the first picture."""
    canvas, noise = canvas_of(2), canvas_of(3)
    other = canvas.clone()
    other[0, :, 6:] += 1
    first = mask[:1], cond.take(slice(1)), LEVELS, noise[:1]

    def difference(network) -> float:
        hidden = (mask[:1, None] > 0).expand(1, 16, 8, 8)
        return (network.fill(canvas[:1], *first) - network.fill(other[:1], *first))[hidden].abs().max().item()

    assert difference(hearing) > 1e-3
    hearing.decoder.join.weight.data[:, hearing.decoder.join.weight.shape[0] :] = 0
    assert difference(hearing) == 0  # control: deaf


@torch.no_grad()
def test_what_the_encoder_says_outlives_a_prompt(hearing, encode, cond, mask):
    said = [hearing.read(canvas_of(2), mask, c).extras["context"] for c in (cond, encode("a green star"))]
    assert torch.equal(*said)


# --- what learns


def objective_of(model):
    return HoleFlow(model, RectifiedFlowConfig(lr=1e-3, ema=0.9))


def batches(cond, mask):
    while True:
        yield canvas_of(2), mask, cond


def test_the_gradient_reaches_encoder_and_decoder_and_not_the_teacher(net, hearing, cond, mask):
    objective = objective_of(hearing)
    params = objective.players["student"].params
    (term,) = objective.terms("student", (canvas_of(2), mask, cond), torch.Generator().manual_seed(0)).values()
    grads = dict(zip(params, torch.autograd.grad(term, list(params.values()), allow_unused=True), strict=True))
    assert [k for k, g in grads.items() if g is None] == []
    for side in ("encoder.mask_embedder", "encoder.trunk", "decoder.join", "decoder.trunk"):
        assert any(g.abs().max() > 0 for k, g in grads.items() if k.startswith(side))
    assert not any(p.requires_grad for p in net.parameters())
    # control: while the decoder is deaf the encoder learns nothing
    weight = hearing.decoder.join.weight
    weight.data[:, weight.shape[0] :] = 0
    (term,) = objective.terms("student", (canvas_of(2), mask, cond), torch.Generator().manual_seed(0)).values()
    silent = torch.autograd.grad(term, list(hearing.encoder.parameters()))
    assert all(g.abs().max() == 0 for g in silent)


def test_the_loss_is_that_of_the_hole(model, cond, mask):
    """For a network that is deaf to the context, what lies outside changes nothing."""
    objective = objective_of(model)
    canvas = canvas_of(2)
    outside = cells(torch.ones(2, 16, dtype=torch.bool).scatter(1, rows(mask), False), canvas, 2)
    terms = [
        objective.terms("student", (c, mask, cond), torch.Generator().manual_seed(0))["flow"]
        for c in (canvas, torch.where(outside, 5.0, canvas), torch.where(outside, canvas, 5.0))
    ]
    assert terms[0] == terms[1]
    assert terms[0] != terms[2]  # control


def test_a_resumed_run_is_the_run(net, encode, cond, mask, tmp_path):
    def run(steps, load=None):
        model = LazyDiffusion(net, encode(""))
        objective, config = objective_of(model), TrainConfig(steps=steps)
        state = TrainState(objective, config)
        if load:
            state.load(load)
        losses = [r.losses["student/flow"] for r in train(objective, batches(cond, mask), config, state)]
        return model, state, losses

    whole, state, losses = run(2)
    half, at_one, _ = run(1)
    at_one.save(tmp_path / "state.safetensors")
    resumed, again, last = run(2, tmp_path / "state.safetensors")
    assert last == losses[1:]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(v, again.ema["student"][k]) for k, v in state.ema["student"].items())
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))  # control


# --- the benchmark's holes


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    yield importlib.import_module("bench.lazydiffusion")
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        del sys.modules[name]


def test_holes_lie_over_the_scene_and_some_leave_strips_known(bench):
    strips = 0
    for seed in range(30):
        mask = bench.holes(4, torch.Generator().manual_seed(seed))
        found = rows(mask)
        assert 1 <= found.shape[1] <= 16
        edge = mask.clone()
        edge[:, 4:12, 4:12] = 0
        assert edge.max() == 0
        strips += bool(kept(patches(mask[:, None].expand(-1, 16, -1, -1)), mask).min() == 0)
    assert 10 < strips < 30


def test_the_scenes_are_those_of_the_other_table_and_the_truth_is_judged_right(bench):
    place = bench.demo.World.load(torch.device("cpu"))
    (group, *_) = bench.half_hidden.groups(4, 0)
    with torch.no_grad():
        true = place.autoencoder.encode(group.picture)
    assert rows(bench.cells(group.mask)).shape == (4, 6)
    assert bench.judged(place, [group], lambda g: place.pictures(true)) == 1
    assert bench.judged(place, [group], lambda g: g.picture.flip(-1)) < 0.5  # control


def test_filled_before_encoding_nothing_tells_what_was_there(bench):
    """Encoded with its object, a picture's known cells differ from those of one without; prefilled they do not."""
    place = bench.demo.World.load(torch.device("cpu"))
    (group, *_) = bench.half_hidden.groups(4, 0)
    hole = group.mask[:, None] > 0
    other = torch.where(hole, -group.picture, group.picture)
    known = (bench.cells(group.mask)[:, None] == 0).expand(-1, 16, -1, -1)

    def difference(prepare) -> float:
        a, b = (place.autoencoder.encode(prepare(p)) for p in (group.picture, other))
        return (a - b)[known].abs().max().item()

    with torch.no_grad():
        assert difference(lambda p: bench.half_hidden.prefilled(p, group.mask)) == 0
        assert difference(lambda p: p) > 0.1  # control
    batch = next(bench.prefilled(place, 1, 4, 0))
    assert [tuple(v.shape) for v in batch[:2]] == [(4, 16, 16, 16), (4, 16, 16)]
    # what is learned is what the hole hides, not what it was filled with
    hidden = (batch[1][:, None] > 0).expand_as(batch[0])
    assert (batch[3] - batch[0])[hidden].abs().mean() > 0.1
    objective = objective_of(LazyDiffusion(place.net, place.encode([""])))
    rng = torch.Generator()
    losses = [
        objective.terms("student", given, rng.manual_seed(0)) for given in (batch, batch[:3], (*batch[:3], batch[0]))
    ]
    assert losses[0]["flow"] != losses[1]["flow"]
    assert losses[1]["flow"] == losses[2]["flow"]  # control


def test_the_table_says_that_the_control_fails(bench):
    found = json.loads((sys.modules["bench.record"].RESULTS / "lazydiffusion.cpu.json").read_text(encoding="utf-8"))
    for row in found["rows"]:
        assert row["blank canvas"] <= row["no context"] + bench.NOISE
        assert row["LazyDiffusion"] >= row["untrained"] + bench.NOISE
    assert found["settings"]["updates"] == bench.TRAIN["updates"]
