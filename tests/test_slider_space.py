"""Directions in a pool, and adapters that move along them, in a world whose covariance is planted."""

import time

import pytest
import torch
from slider_worlds import fit, generator, learnt, world
from torch import Tensor, nn

from dmd_core.adapters import Adapted, AdapterBank, LowRank
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.objectives.slider_space import SliderSpace, SliderSpaceConfig, start_orthonormal
from dmd_core.objectives.sliding import at
from dmd_core.schedule import Flow
from dmd_core.sliders import (
    Bench,
    CalibrationConfig,
    Pool,
    PoolBatches,
    Sampling,
    additivity,
    axis_along,
    bake,
    calibrate,
    directions,
    draw_pool,
    embedded,
    find_directions,
    name_of,
    own_features,
    poles,
)
from dmd_core.sliders.directions import principal, split_half, ties, turned

D, K = 8, 3
SDS = torch.tensor([1.4, 0.9, 0.55, 0.1, 0.1, 0.1, 0.1, 0.1])
BASIS = torch.linalg.qr(torch.randn(D, D, generator=generator(1))).Q
ENCODER = torch.linalg.qr(torch.randn(D, D, generator=generator(2))).Q
PLANTED = (BASIS.T @ ENCODER)[:K]  # the world's directions as the encoder sees them
FEW = (1.0, 0.75, 0.5, 0.25)


def embed(x: Tensor) -> Tensor:
    return x @ ENCODER


def planted_world() -> tuple[Adapted, Tensor]:
    return world(torch.zeros(1, D), "flow", SDS, BASIS)


def pool(model: Adapted, cond: Tensor, n: int = 2000) -> Pool:
    # the exact distribution; draw_pool's own samples are checked in test_sliders
    noise = torch.randn(n, D, generator=generator(4))
    return Pool(noise * SDS @ BASIS.T, torch.zeros(n, dtype=torch.long))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=1).abs()


# --- directions ------------------------------------------------------------------------------------------------------


def test_planted_directions_are_found_with_their_spread():
    features = embed(pool(*planted_world()).latents)
    found = find_directions(features, K, generator())
    assert (cosines(found.vectors, PLANTED) > 0.99).all()
    torch.testing.assert_close(found.sds, SDS[:K], rtol=0.05, atol=0)
    torch.testing.assert_close(found.explained, SDS[:K] ** 2 / SDS.square().sum(), rtol=0.1, atol=0)
    assert (found.stability >= 0.95).all()
    assert found.score.tolist() == sorted(found.score.tolist(), reverse=True)
    scores = found.project(features)
    torch.testing.assert_close(scores.std(0), torch.ones(K), rtol=1e-3, atol=0)


def test_directions_are_those_of_the_covariance():
    features = torch.randn(3000, 5, generator=generator()) @ torch.randn(5, 5, generator=generator(7))
    found = find_directions(features, 2, generator())
    _, values, vectors = torch.linalg.svd(torch.cov(features.double().T))
    assert (cosines(found.vectors.double(), vectors[:2]) > 1 - 1e-6).all()
    torch.testing.assert_close(found.sds.double(), values[:2].sqrt(), rtol=1e-5, atol=0)


def test_directions_of_equal_variance_are_not_called_stable():
    round_cloud = torch.randn(300, 12, generator=generator())
    assert find_directions(round_cloud, 3, generator()).stability.max() < 0.9


def test_a_stable_direction_passes_larger_unstable_ones():
    """Among four equal variances any axes are as good as others; the fifth, smaller one is found again and again."""
    features = torch.randn(3000, 5, generator=generator(2)) * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.85])
    found = find_directions(features, 3, generator())
    place = found.vectors.abs().argmax(1).tolist().index(4)  # by variance alone it would not be among the first three
    assert found.stability[place] > 0.9
    assert found.stability.sum() - found.stability[place] < 1.8
    assert found.explained[place] == found.explained.min()


def two_sided(n: int = 400) -> Tensor:
    """Left or right, top or bottom, each as large as the other, in a turned space with a little noise."""
    sides = 2.0 * (torch.rand(n, 2, generator=generator(3)) < 0.5) - 1
    noise = 0.3 * torch.randn(n, D, generator=generator(5))
    return sides @ PLANTED[:2] + noise


def test_causes_that_come_in_kinds_are_told_apart_where_variances_cannot():
    features = two_sided()
    plain, _ = principal(features)
    assert cosines(plain[:2].float(), PLANTED[:2]).max() < 0.95  # the control: any turn of the two is as good
    assert split_half(features, plain[:4], generator(), 8)[:2].max() < 0.9
    found = find_directions(features, 2, generator())
    assert (PLANTED[:2] @ found.vectors.T).abs().amax(1).min() > 0.99
    assert found.stability.min() > 0.98
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.project(features).std(0), torch.ones(2), rtol=1e-3, atol=0)


def test_halves_may_be_compared_in_the_first_coordinates_of_the_pool(monkeypatch):
    """The control keeps so few that an unstable direction looks stable."""
    spectrum = torch.tensor([1.0, 0.97, 0.6, 0.4] + [0.3 * 0.8**i for i in range(36)])
    features = torch.randn(200, 40, generator=generator(4)) * spectrum
    whole = find_directions(features, 4, generator()).stability
    far = {}
    for kept in (24, 4):
        monkeypatch.setattr(directions, "KEPT", kept)
        far[kept] = float((find_directions(features, 4, generator()).stability - whole).abs().max())
    assert far[24] < 0.002
    assert far[4] > 0.02


def test_only_main_directions_of_like_variance_are_turned():
    shares = torch.tensor([0.3, 0.2, 0.19, 0.1, 0.04, 0.04])
    assert ties(shares, 1000) == [[1, 2]]
    assert ties(shares, 100000) == []
    assert ties(shares, 50) == [[0, 1, 2, 3]]
    vectors = torch.eye(6, dtype=torch.float64)
    assert torch.equal(turned(torch.randn(50, 6, generator=generator()), vectors, []), vectors)


def test_directions_repeat_to_the_bit():
    features = embed(pool(*planted_world(), n=300).latents)
    a, b = (find_directions(features, K, generator()) for _ in range(2))
    assert torch.equal(a.vectors, b.vectors)
    assert torch.equal(a.stability, b.stability)


@pytest.mark.parametrize("value", [0.0, 3.7, 1e4])
def test_a_pool_without_variance_is_refused(value):
    same = torch.full((64, D), value) + torch.linspace(0, 1, D)
    with pytest.raises(ValueError, match="all 64 pictures of the pool are alike"):
        find_directions(same, 2, generator())


def test_more_directions_than_the_pool_has_are_refused():
    flat = torch.randn(64, 2, generator=generator()) @ torch.randn(2, D, generator=generator(1))
    with pytest.raises(ValueError, match="varies in 2 only"):
        find_directions(flat, 3, generator())
    with pytest.raises(ValueError, match="at least 8"):
        find_directions(flat[:5], 1, generator())


def test_ends_get_the_nearest_words():
    table = {"red": [1.0, 0, 0], "blue": [-1.0, 0, 0], "round": [0, 1.0, 0], "old": [0, 0, 1.0]}
    high = torch.tensor([[0.9, 0.3, 0.2]]).repeat(4, 1)
    low = torch.tensor([[-0.8, 0.3, 0.2]]).repeat(4, 1)
    words, embedded = list(table), torch.tensor(list(table.values()))
    ends = poles(high, low, words, embedded)
    assert ends == ("red", "blue")
    assert poles(low, high, words, embedded) == ("blue", "red")
    assert name_of(2, ends) == "blue - red"
    assert name_of(2) == "direction 3"
    with pytest.raises(ValueError, match="at least 2 words"):
        poles(high, low, ["red"], torch.zeros(1, 3))


# --- the model's own features ----------------------------------------------------------------------------------------


class Painter(nn.Module):
    """A convolution and a token layer, as UNets and transformers have them."""

    def __init__(self):
        super().__init__()
        self.conv, self.token = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 6)
        self.never = nn.Linear(6, 3)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        tokens = self.token(self.conv(x).flatten(2).transpose(1, 2))
        return self.never(tokens).transpose(1, 2).reshape(x.shape)


def test_a_models_own_features_tell_pictures_and_places_apart():
    torch.manual_seed(0)
    net = Painter().requires_grad_(False)
    model = Adapted(NetDenoiser(net, Flow(), Prediction.FLOW), AdapterBank(net))
    see = own_features(model, net, ["conv", "token"], torch.zeros(1, 4), sigma=0.1)
    x = torch.randn(2, 3, 8, 8, generator=generator())
    seen = see(x)
    assert seen.shape == (2, 16 * 5 + 16 * 6)
    assert torch.equal(seen, see(x))  # one and the same noise
    torch.testing.assert_close(seen[1:], see(x[1:]))  # whatever the batch
    assert (see(x.flip(2)) - seen).norm() > 0.1 * seen.norm()  # upside down is another picture
    y = x.clone().requires_grad_()
    assert torch.autograd.grad(see(y).square().sum(), y)[0].norm() > 0
    # an encoder is not to change with the slider that it judges
    model.bank.new("s", 2, generator())
    for adapter in model.bank.sets["s"].values():
        adapter.up.data.fill_(1.0)
    assert torch.equal(see(x), seen)
    with pytest.raises(AttributeError, match="nowhere"):
        own_features(model, net, ["nowhere"], torch.zeros(1, 4), sigma=0.1)(x)


# --- training --------------------------------------------------------------------------------------------------------


def trained(config: SliderSpaceConfig, steps: int = 150, seed: int = 0):
    model, cond = planted_world()
    directions = find_directions(embed(pool(model, cond).latents), K, generator())
    named = {f"s{i}": (directions.vectors[i], directions.sds[i].item()) for i in range(K)}
    for i, name in enumerate(named):
        model.bank.new(name, 1, generator(seed + i))
        if config.loss == "cosine":
            start_orthonormal(model.bank, name, generator(seed + i))
    fit(SliderSpace(model, named, embed, cond, config), PoolBatches(pool(model, cond), 16), K * steps, seed)
    return model, cond, directions


@pytest.mark.parametrize("sigmas", [(), FEW], ids=["all levels", "few-step"])
def test_regression_reaches_its_closed_form_displacement(sigmas):
    """One shift for all levels: least squares gives reach * sd * E[m] / E[m^2], m = b^2 / (a^2 sd^2 + b^2)."""
    model, cond, directions = trained(SliderSpaceConfig(sigmas=sigmas, lr=0.03))
    sigma = torch.tensor(sigmas) if sigmas else Flow().sample(100_000, generator())
    a, b = Flow().coeffs(sigma)
    for i in range(K):
        sd = directions.sds[i]
        m = b**2 / (a**2 * sd**2 + b**2)
        moved = embed(learnt(model, f"s{i}", cond[0]))
        assert torch.cosine_similarity(moved, directions.vectors[i], dim=0) > 0.99
        assert moved.norm() == pytest.approx((sd * m.mean() / m.square().mean()).item(), rel=0.08)


def test_cosine_finds_the_direction_and_leaves_the_size_to_chance():
    """Both losses point the right way; the learning rate alone changes what +1 does under the cosine, 4.5 to 9 fold."""
    for loss, ratio in (("cosine", (3.0, 99.0)), ("regression", (0.9, 1.1))):
        norms = []
        for lr in (0.03, 0.1):
            model, cond, directions = trained(SliderSpaceConfig(loss=loss, lr=lr, sigmas=FEW), steps=100)
            moved = torch.stack([embed(learnt(model, f"s{i}", cond[0])) for i in range(K)])
            assert (torch.nn.functional.cosine_similarity(moved, directions.vectors) > 0.99).all()
            norms.append(moved.norm(dim=1))
        growth = norms[1] / norms[0]
        assert (growth > ratio[0]).all()
        assert (growth < ratio[1]).all()


def test_cosine_refuses_a_start_at_zero():
    model, cond = planted_world()
    model.bank.new("s0", 1, generator())
    directions = {"s0": (PLANTED[0], 1.0)}
    with pytest.raises(ValueError, match="starts at zero"):
        SliderSpace(model, directions, embed, cond, SliderSpaceConfig(loss="cosine"))
    with pytest.raises(ValueError, match="not known"):
        SliderSpaceConfig(loss="cos")


def test_a_calibrated_slider_moves_one_sigma_on_seeds_it_has_not_seen():
    model, cond, directions = trained(SliderSpaceConfig(lr=0.03))
    sampling = Sampling(shape=(D,), sigmas=FEW, batch=64)
    base = Pool.join(list(draw_pool(model, sampling, cond, 512)))
    bench = Bench(model, sampling, cond, embed)
    axes = {f"s{i}": axis_along(v, embedded(embed, base.latents)) for i, v in enumerate(directions.vectors)}
    unseen = range(77_000, 77_032)
    for name, axis in axes.items():
        found = calibrate(bench, name, axis, CalibrationConfig(seeds=8, held_out=8))
        bake(model.bank, name, found.unit)
        plus, minus = (axis.along(bench({name: s}, unseen) - bench({}, unseen)).mean().item() for s in (1.0, -1.0))
        assert plus == pytest.approx(1.0, abs=0.05)
        assert minus == pytest.approx(-1.0, abs=0.05)
        assert found.verdict == "works"
        assert found.monotony > 0.99
    # an affine world: sums are exact
    assert max(additivity(bench, axes, unseen).values()) < 0.01
    # controls: another slider's axis, and a random adapter of the same norm
    assert abs(axes["s1"].along(bench({"s0": 1.0}, unseen) - bench({}, unseen)).mean()) < 0.1
    model.bank.new("random", 1, generator(50))
    adapter, like = model.bank.sets["random"]["mean"], model.bank.sets["s2"]["mean"]
    adapter.up.data = torch.randn(D, 1, generator=generator(51))
    adapter.up.data *= (like.up @ like.down).norm() / (adapter.up @ adapter.down).norm()
    stray = calibrate(bench, "random", axes["s2"], CalibrationConfig())
    assert stray.verdict != "works"


# --- only the active slider runs -------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Six layers wide enough that an adapter's share of the time is what it is in practice: small."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def deep(sliders: int) -> tuple[SliderSpace, Adapted]:
    torch.manual_seed(0)
    net = Deep().requires_grad_(False)
    model = Adapted(NetDenoiser(net, Flow(), Prediction.FLOW), AdapterBank(net))
    directions = {}
    for i in range(sliders):
        model.bank.new(f"s{i}", 4, generator(i))
        directions[f"s{i}"] = (torch.nn.functional.normalize(torch.randn(256, generator=generator(i)), dim=0), 1.0)
    return SliderSpace(model, directions, lambda x: x, torch.zeros(1, 4), SliderSpaceConfig()), model


def test_a_step_runs_the_active_slider_alone(monkeypatch):
    calls = []
    forward = LowRank.forward
    monkeypatch.setattr(LowRank, "forward", lambda self, x: (calls.append(id(self)), forward(self, x))[1])
    objective, model = deep(16)
    batch = (torch.randn(2, 256, generator=generator()), torch.zeros(2, dtype=torch.long))
    objective.terms("s5", batch, generator())
    assert calls == [id(a) for a in model.bank.sets["s5"].values()]
    calls.clear()
    at(model, s2=1.0, s3=0.0)(*batch[:1], torch.full((2,), 0.5), torch.zeros(2, 4))
    assert calls == [id(a) for a in model.bank.sets["s2"].values()]
    calls.clear()
    at(model, **{f"s{i}": 1.0 for i in range(16)})(*batch[:1], torch.full((2,), 0.5), torch.zeros(2, 4))
    assert len(calls) == 16 * 6  # control: this counts what runs


def test_a_step_with_sixteen_sliders_in_the_set_costs_what_one_does():
    """Target 1.1 (best of repeats, interleaved); the bound leaves room for a busy machine."""
    steps = {}
    for n in (1, 16):
        objective, _ = deep(n)
        batches = PoolBatches(Pool(torch.randn(64, 256), torch.zeros(64, dtype=torch.long)), 64)
        steps[n] = (objective, next(iter(batches)))

    def once(n: int) -> float:
        objective, batch = steps[n]
        began = time.process_time()
        loss = sum(objective.terms("s0", batch, generator()).values())
        torch.autograd.grad(loss, list(objective.players["s0"].params.values()))
        return time.process_time() - began

    best = {1: float("inf"), 16: float("inf")}
    for _ in range(40):
        for n in best:
            best[n] = min(best[n], once(n))
    ratio = best[16] / best[1]
    print(f"16 sliders in the set, one active: {ratio:.3f} x the cost of one")
    assert ratio < 1.3
