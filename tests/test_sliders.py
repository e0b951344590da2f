"""Text and image sliders, calibration and cards, against optima known in closed form."""

import json
from dataclasses import replace

import pytest
import torch
from slider_worlds import KINDS, fit, generator, learnt, world
from torch import Tensor

from dmd_core.conditioning import Cond
from dmd_core.denoiser import NetDenoiser
from dmd_core.objectives.image_slider import ImageSlider, ImageSliderConfig, Pairs
from dmd_core.objectives.sliding import at
from dmd_core.objectives.text_slider import SliderPrompts, TextSlider, TextSliderConfig, Words, erasing
from dmd_core.sliders import (
    Axis,
    Bench,
    CalibrationConfig,
    Instant,
    Joining,
    Pool,
    PoolBatches,
    Sampling,
    additivity,
    axis_along,
    axis_between,
    bake,
    calibrate,
    card,
    draw_pool,
    embedded,
    from_metadata,
    random_strengths,
    variations,
)
from dmd_core.sliders.calibration import find_unit, per_seed_spearman, ranked
from dmd_core.sliders.card import describe
from dmd_core.sliders.card import words as words_of

D = 6
NEUTRAL, PLUS, MINUS, OTHER, TWIN = range(5)
MEANS = torch.randn(5, D, generator=generator(3))
MEANS[TWIN] = MEANS[PLUS]
EDIT = MEANS[PLUS] - MEANS[MINUS]
QUICK = TextSliderConfig(lr=0.03)
STEPS = 250


def prompt(*numbers: int) -> Tensor:
    return torch.eye(5)[list(numbers)]


def words(neutral=NEUTRAL, positive=PLUS, negative=MINUS) -> Words:
    return Words(prompt(neutral), prompt(positive), prompt(negative))


def pool(n: int = 128) -> PoolBatches:
    samples = MEANS[NEUTRAL] + 0.5 * torch.randn(n, D, generator=generator(4))
    return PoolBatches(Pool(samples, torch.zeros(n, dtype=torch.long)), batch=8)


def slider(kind="flow", which=None, config=QUICK, rank=1, seed=0, steps=STEPS):
    model, _ = world(MEANS, kind)
    model.bank.new("s", rank, generator(seed))
    losses = fit(TextSlider(model, "s", which or words(), config), pool(), steps)
    return model, losses


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- text sliders: the optimum is s * eta * (mean+ - mean-) ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_parametrisation_learns_the_same_closed_form_edit(kind):
    model, losses = slider(kind)
    assert relative(learnt(model, "s", prompt(NEUTRAL)[0]), EDIT) < 0.02
    assert sum(losses[-20:]) < 1e-3 * sum(losses[:20])


@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_eta_is_the_size_of_the_edit(eta):
    model, _ = slider(config=replace(QUICK, eta=eta))
    assert relative(learnt(model, "s", prompt(NEUTRAL)[0]), eta * EDIT) < 0.02


def test_parametrisations_give_one_loss_on_one_state():
    """eps, v and x0 networks of one VP model: same draws, same weighting, same terms and gradients."""
    values = []
    for kind in ("eps", "v"):
        model, _ = world(MEANS, kind)
        model.bank.new("s", 1, generator())
        model.bank.sets["s"]["mean"].up.data.fill_(0.3)
        objective = TextSlider(model, "s", words(), QUICK)
        terms = objective.terms("s", next(iter(pool())), generator(1))
        values.append(torch.stack(list(terms.values())))
        assert list(terms) == ["pole +1", "pole -1"]
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=0)


def test_the_loss_is_zero_at_the_optimum_and_nowhere_near_it():
    model, _ = world(MEANS)
    model.bank.new("s", 1, generator())
    adapter = model.bank.sets["s"]["mean"]
    adapter.down.data = prompt(NEUTRAL)
    objective = TextSlider(model, "s", words(), QUICK)

    def loss(edit: Tensor) -> float:
        adapter.up.data = edit[:, None].clone()
        return sum(v.item() for v in objective.terms("s", next(iter(pool())), generator()).values())

    assert loss(EDIT) < 1e-9
    assert loss(0.9 * EDIT) > 1e-3


def test_equal_ends_teach_nothing_and_swapped_ends_turn_the_sign():
    same, _ = slider(which=words(positive=PLUS, negative=TWIN))
    assert learnt(same, "s", prompt(NEUTRAL)[0]).norm() < 0.05 * EDIT.norm()
    swapped, _ = slider(which=words(positive=MINUS, negative=PLUS))
    assert relative(learnt(swapped, "s", prompt(NEUTRAL)[0]), -EDIT) < 0.02


def test_a_random_adapter_of_equal_norm_does_not_point_along_the_edit():
    model, _ = slider()
    trained = learnt(model, "s", prompt(NEUTRAL)[0])
    cosines = []
    for seed in range(20):
        edit = torch.randn(D, generator=generator(seed)) * trained.norm() / D**0.5
        cosines.append(torch.cosine_similarity(edit, EDIT, dim=0).abs().item())
    assert torch.cosine_similarity(trained, EDIT, dim=0) > 0.999
    assert sorted(cosines)[10] < 0.6


def test_a_kept_prompt_stays_and_without_keeping_it_moves():
    """A prompt that shares words with the neutral one is dragged along unless it is kept."""
    related = 0.7 * (prompt(NEUTRAL) + prompt(OTHER))
    moved = {}
    for keep in (None, related):
        model, _ = world(MEANS)
        model.bank.new("s", 2, generator(8))
        fit(TextSlider(model, "s", replace(words(), keep=keep), QUICK), pool(), 400)
        moved[keep is not None] = (learnt(model, "s", related[0]).norm() / EDIT.norm()).item()
        assert relative(learnt(model, "s", prompt(NEUTRAL)[0]), EDIT) < 0.05
    assert moved[True] < 0.05
    assert moved[False] > 0.5


def test_erasing_is_a_slider_with_one_pole():
    """ESD: T(c) - eta * (T(c) - T(empty)): at eta 1 the concept becomes the empty prompt's content."""
    spec = erasing("a dog", keep=["a cat"])
    table = {"a dog": PLUS, "": NEUTRAL, "a cat": OTHER}
    encoded = spec.encode(lambda prompts: prompt(*(table[p] for p in prompts)))
    model, _ = slider(which=encoded, config=replace(QUICK, poles=(1.0,)), rank=2, steps=400)
    assert relative(MEANS[PLUS] + learnt(model, "s", prompt(PLUS)[0]), MEANS[NEUTRAL]) < 0.05
    assert learnt(model, "s", prompt(OTHER)[0]).norm() < 0.05 * EDIT.norm()


def test_on_policy_states_lead_to_the_same_optimum():
    model, _ = slider(config=replace(QUICK, on_policy=(1.0, 0.75, 0.5, 0.25)))
    assert relative(learnt(model, "s", prompt(NEUTRAL)[0]), EDIT) < 0.02


def test_a_few_step_model_is_only_asked_at_its_own_levels():
    model, _ = world(MEANS)
    asked = []

    class Spy(NetDenoiser):
        def __call__(self, x, sigma, cond):
            asked.extend(sigma.tolist())
            return super().__call__(x, sigma, cond)

    inner = model.inner
    model = replace(model, inner=Spy(inner.net, inner.schedule, inner.prediction))
    model.bank.new("s", 1, generator())
    fit(TextSlider(model, "s", words(), replace(QUICK, sigmas=(1.0, 0.75, 0.5, 0.25))), pool(), 5)
    assert set(asked) == {1.0, 0.75, 0.5, 0.25}
    asked.clear()
    fit(TextSlider(model, "s", words(), QUICK), pool(), 5)
    assert len(set(asked)) > 20  # control


def test_a_slider_sits_on_top_of_what_the_model_already_wears():
    """A few-step LoRA stays on in targets and predictions alike: the edit is learnt relative to it."""
    model, _ = world(MEANS)
    for name in ("student", "s"):
        model.bank.new(name, 1, generator())
    model.bank.sets["student"]["mean"].up.data.fill_(0.7)
    dressed = replace(model, scales={"student": 1.0})
    fit(TextSlider(dressed, "s", words(), QUICK), pool(), STEPS)
    student = model.bank.sets["student"]["mean"]
    edit = EDIT + student(prompt(PLUS)[0]) - student(prompt(MINUS)[0])
    assert relative(learnt(model, "s", prompt(NEUTRAL)[0]), edit.detach()) < 0.02
    assert relative(edit.detach(), EDIT) > 0.1  # control: the student does matter


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_attributes_make_rows():
    spec = SliderPrompts(
        neutral="person", positive="old person", negative="young person", attributes=("male", "female")
    )
    assert spec.rows()[1] == ["male old person", "female old person"]
    assert [len(r) for r in spec.rows()] == [2, 2, 2]
    placed = SliderPrompts(neutral="a {}", positive="a large {}", negative="a small {}", attributes=("cat", "dog"))
    assert placed.rows()[1] == ["a large cat", "a large dog"]
    parts = SliderPrompts(neutral="a {} {}", positive="a {} left {}", negative="{} {}", attributes=("cat|on dark",))
    assert parts.rows() == (["a cat on dark"], ["a cat left on dark"], ["cat on dark"])
    with pytest.raises(ValueError, match=r"2 parts and the prompt 'a cat \{\}' has room for 1"):
        SliderPrompts(neutral="a cat {}", positive="a", negative="b", attributes=("large|on dark",)).rows()


@pytest.mark.parametrize(
    ("positive", "negative"), [("old  man", "old man"), ("oold man", "yyoung man")], ids=["same", "same once encoded"]
)
def test_ends_that_mean_the_same_are_refused(positive, negative):
    spec = SliderPrompts(neutral="man", positive=positive, negative=negative)

    def encode(prompts):  # strange words become the unknown token
        rows = [[{"old": 1.0, "young": 2.0, "man": 3.0}.get(w, 0.0) for w in p.split()] for p in prompts]
        return Cond(torch.tensor(rows)[..., None])

    with pytest.raises(ValueError, match="two different ends"):
        spec.encode(encode)
    assert SliderPrompts(neutral="man", positive="old man", negative="young man").encode(encode).keep is None


def test_unequal_prompt_lists_and_zero_poles_are_refused():
    model, _ = world(MEANS)
    model.bank.new("s", 1, generator())
    uneven = Words(prompt(NEUTRAL), prompt(PLUS, TWIN), prompt(MINUS))
    with pytest.raises(ValueError, match="same number of each"):
        TextSlider(model, "s", uneven, QUICK)
    with pytest.raises(ValueError, match="poles are"):
        TextSliderConfig(poles=(0.0,))


def test_prompt_variations_repeat_and_keep_the_prompt():
    made = variations("a cat", 20, generator())
    assert made[0] == "a cat"
    assert made == variations("a cat", 20, generator())
    assert len(set(made)) > 15
    assert all("a cat" in m for m in made)
    own = variations("a cat", 6, generator(), [["a drawing of {}"]])
    assert own[1:] == ["a drawing of a cat"] * 5
    with pytest.raises(ValueError, match="word list is empty"):
        variations("a cat", 2, generator(), [])


# --- image pairs: the optimum is half the mean difference, whatever the pictures share -------------------------------


def pairs(levels=(1.0, -1.0), n=4, shared=2.0) -> tuple[dict[float, Tensor], Tensor]:
    edit = torch.randn(D, generator=generator(5))
    common = shared * torch.randn(n, D, generator=generator(6))
    return {s: common + s * edit for s in levels}, edit


@pytest.mark.parametrize("levels", [(1.0, -1.0), (1.0, 0.5, -0.5, -1.0), (2.0, -1.0, 0.0)])
def test_pairs_teach_their_difference_and_not_what_they_share(levels):
    model, cond = world(MEANS)
    model.bank.new("s", 1, generator())
    latents, edit = pairs(levels)
    data = Pairs(latents, batch=4)
    objective = ImageSlider(model, "s", cond[:1], data.strengths, ImageSliderConfig(lr=0.03))
    fit(objective, data, 600)
    got = learnt(model, "s", cond[0])
    # least squares over levels: sum s (mean_s - mean_base) / sum s^2; opposite levels cancel what is shared
    rows = torch.stack([s * (latents[s].mean(0) - MEANS[NEUTRAL]) for s in data.strengths])
    expected = rows.sum(0) / sum(s**2 for s in data.strengths)
    assert relative(got, expected) < 0.12
    if sum(data.strengths) == 0:
        assert relative(expected, edit) < 1e-5


def test_shared_noise_cancels_in_the_gradient_at_zero():
    """At the start the gradient of opposite poles is the same for any noise; with separate noises it is not."""
    model, cond = world(MEANS)
    model.bank.new("s", 1, generator())
    latents, _ = pairs()
    objective = ImageSlider(model, "s", cond[:1], (1.0, -1.0), ImageSliderConfig(sigmas=(0.5,)))
    up = model.bank.sets["s"]["mean"].up
    batch = (torch.stack([latents[1.0], latents[-1.0]]), torch.arange(4))

    def gradient(seed: int, key: str | None = None) -> Tensor:
        terms = objective.terms("s", batch, generator(seed))
        return torch.autograd.grad(sum(terms.values()) if key is None else terms[key], up)[0]

    torch.testing.assert_close(gradient(1), gradient(2), atol=1e-5, rtol=1e-5)
    assert relative(gradient(1, "level +1"), gradient(2, "level +1")) > 0.05  # control


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ({1.0: torch.zeros(1, D), -1.0: torch.ones(1, D)}, "got 1 image pair"),
        ({1.0: torch.zeros(3, D), -1.0: torch.ones(2, D)}, "needs a partner"),
        ({1.0: torch.zeros(3, D), 2.0: torch.ones(3, D)}, "one positive and one negative"),
        ({1.0: torch.zeros(3, D), -1.0: torch.zeros(3, D)}, "identical"),
        ({1.0: torch.zeros(3, 4, 2, 2), -1.0: torch.ones(3, 4, 2, 3)}, "different sizes"),
    ],
    ids=["one pair", "unequal", "one-sided", "identical", "sizes"],
)
def test_unusable_pairs_are_refused(latents, message):
    with pytest.raises(ValueError, match=message):
        Pairs(latents)


# --- pools -----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_one_picture_whatever_the_batch():
    model, cond = world(MEANS)
    for gamma in (0.0, 1.0):
        sampling = Sampling(shape=(D,), sigmas=(1.0, 0.6, 0.3), gamma=gamma, batch=3)
        many = sampling(model, cond[:1], range(8))
        alone = replace(sampling, batch=1)(model, cond[:1], [5])
        torch.testing.assert_close(many[5:6], alone)
        assert not torch.allclose(many[4], many[5])


def test_a_pool_follows_the_model_and_its_batches_repeat():
    model, cond = world(MEANS)
    sampling = Sampling(shape=(D,), sigmas=tuple(1 - i / 20 for i in range(20)), batch=64)
    parts = list(draw_pool(model, sampling, cond[:2], 600))
    made = Pool.join(parts)
    assert [len(p) for p in parts] == [64] * 9 + [24]
    for row in (0, 1):
        mine = made.latents[made.row == row]
        torch.testing.assert_close(mine.mean(0), MEANS[row], atol=0.12, rtol=0)
        assert 0.4 < mine.std(0).mean() < 0.55
    batches = PoolBatches(made, 4, seed=9)
    first, again = next(batches.seek(7)), next(batches.seek(7))
    assert torch.equal(first[0], again[0])
    assert torch.equal(made.latents[(made.latents == first[0][0]).all(1)][0], first[0][0])


# --- calibration -----------------------------------------------------------------------------------------------------


def bench(model, cond) -> Bench:
    sampling = Sampling(shape=(D,), sigmas=(1.0, 0.75, 0.5, 0.25), batch=64)
    return Bench(model, sampling, cond, lambda x: x)


def features_of(b: Bench, cond: Tensor, n: int = 256) -> Tensor:
    made = Pool.join(list(draw_pool(b.model, b.sampling, cond, n)))
    return embedded(b.embed, made.latents)


def test_strength_one_becomes_one_standard_deviation():
    """A Gaussian's mean shifts by exactly s * edit, so the unit is known: sd / |edit|."""
    model, _ = slider()
    b = bench(model, prompt(NEUTRAL))
    base = features_of(b, prompt(NEUTRAL))
    ends = (features_of(b, prompt(p), 8) for p in (PLUS, MINUS))
    axis = axis_between(*ends, base)
    assert torch.cosine_similarity(axis.pattern, EDIT, dim=0) > 0.9999
    assert torch.cosine_similarity(axis.vector, EDIT, dim=0) > 0.99
    found = calibrate(b, "s", axis, CalibrationConfig())
    assert found.unit == pytest.approx(axis.sd / EDIT.norm().item(), rel=0.05)
    bake(model.bank, "s", found.unit)
    moved = axis.along(b({"s": 1.0}, range(5000, 5016)) - b({}, range(5000, 5016)))
    assert moved.mean() == pytest.approx(1.0, abs=0.05)
    assert found.point(-1.0).response == pytest.approx(-1.0, abs=0.05)
    assert found.verdict == "works"
    assert found.usable == (-2.0, 2.0)
    assert found.monotony == pytest.approx(1.0)
    assert found.point(1.0).drift < 0.05
    again = calibrate(b, "s", axis, CalibrationConfig())
    assert again.unit == pytest.approx(1.0, rel=0.05)


AXIS = Axis(torch.tensor([1.0, 0.0]), 2.0, torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]))


def responding(own, other=lambda s: 0.0 * s, noise: float = 0.0):
    """A model that is nothing but its response to one slider."""

    def measure(strengths, seeds):
        s = torch.tensor(sum(strengths.values(), 0.0))
        start = torch.stack([torch.randn(2, generator=generator(i)) for i in seeds])
        shake = torch.stack([torch.randn(2, generator=generator(int(i * 1000 + 100 * s))) for i in seeds])
        return start + torch.stack([own(s), other(s)]) + noise * shake

    return measure


@pytest.mark.parametrize("most", [2.1, 6.0, 20.0])  # the axis' sd is 2
def test_one_standard_deviation_is_found_however_soon_the_response_saturates(most):
    _, response = find_unit(responding(lambda s: most * torch.tanh(s / 0.3)), "s", AXIS, range(4), CalibrationConfig())
    assert response == pytest.approx(1, abs=0.03)


def test_a_saturating_slider_has_the_range_in_which_it_still_rises():
    # 1.5 sd at most (sd is 2); 1 sd at s = .5; from 3 to 4 it grows by 0.02 of what it does around 0
    wide = CalibrationConfig(multiples=(0.5, 1.0, 2.0, 3.0, 4.0))
    found = calibrate(responding(lambda s: 3 * torch.tanh(1.609 * s)), "s", AXIS, wide)
    assert found.unit == pytest.approx(0.5, rel=0.05)
    assert found.usable == (-3.0, 3.0)
    linear = calibrate(responding(lambda s: 4 * s), "s", AXIS, wide)
    assert linear.usable == (-4.0, 4.0)


def test_a_range_is_as_long_on_both_sides_though_one_is_through_sooner_and_a_dead_side_has_none():
    sooner = responding(lambda s: torch.where(s > 0, 2 * torch.tanh(4 * s), 2 * s))
    assert calibrate(sooner, "s", AXIS, CalibrationConfig()).usable == (-2.0, 2.0)
    dead = calibrate(responding(lambda s: 2 * s.clamp_min(0)), "s", AXIS, CalibrationConfig())
    assert describe(dead.usable) == "+0 to +2"
    assert dead.verdict == "one way"


def test_a_side_that_falls_ends_its_own_range_and_leaves_the_other_alone():
    def bent(s):  # rises to half a standard deviation, then goes back
        return torch.where(s > 0.5, 2 * (1 - s).clamp_min(-1), 2 * s)

    assert calibrate(responding(bent), "s", AXIS, CalibrationConfig()).usable == (-2.0, 0.5)


def test_the_range_ends_where_something_else_moves():
    # the other direction's sd is .5: drift of one sd at s = 1.25 on the plus side only
    drifting = responding(lambda s: 2 * s, lambda s: 0.4 * s.clamp_min(0))
    found = calibrate(drifting, "s", AXIS, CalibrationConfig())
    assert found.usable == (-2.0, 1.0)
    assert found.point(1.0).drift == pytest.approx(0.8, abs=0.03)
    assert found.verdict == "works"


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [
        (lambda s: 2 * s, lambda s: 0.1 * s, "works"),
        (lambda s: 0.01 * torch.tanh(s), lambda s: 0.0 * s, "nothing"),
        (lambda s: -2 * s, lambda s: 0.0 * s, "nothing"),
        (lambda s: 0.8 * torch.tanh(s), lambda s: 0.0 * s, "weak"),
        (lambda s: 0.5 * s, lambda s: 2.0 * s, "drifts"),
    ],
    ids=["good", "too small", "reversed", "weak", "moves another thing"],
)
def test_what_a_slider_is_worth_is_said(own, other, verdict):
    found = calibrate(responding(own, other), "s", AXIS, CalibrationConfig())
    assert found.verdict == verdict
    warning = card(found, **FACTS).warning
    assert (warning == "") == (verdict == "works")


def test_noise_without_response_is_nothing():
    found = calibrate(responding(lambda s: 0.0 * s, noise=1.0), "s", AXIS, CalibrationConfig())
    assert found.verdict in ("nothing", "drifts")
    assert found.monotony is None or found.monotony < 0.5


def test_a_range_that_is_too_small_to_tell_is_said_and_looked_at_more_closely():
    # beyond a quarter of a standard deviation something else moves by more than its own
    near = calibrate(responding(lambda s: 2 * s, lambda s: 1.8 * s), "s", AXIS, CalibrationConfig())
    assert near.usable == (-0.25, 0.25)
    assert near.monotony == pytest.approx(1.0)
    assert [p.strength for p in near.points if 0 < p.strength < 1] == [0.125, 0.25, 0.5]
    none = calibrate(responding(lambda s: 2 * s, lambda s: 18 * s), "s", AXIS, CalibrationConfig())
    assert none.usable == (0.0, 0.0)
    assert none.monotony is None
    made = card(none, **FACTS)
    assert "too small to tell" in words_of(made)
    assert "rank correlation" not in words_of(made)
    assert from_metadata(made.metadata()) == made
    assert "rank correlation of 1.00" in words_of(card(near, **FACTS))


def test_equal_responses_share_their_rank_and_a_constant_follows_nothing():
    """Ranks by sorting alone would call a slider that does nothing perfect."""
    strengths = [-1.0, -0.5, 0.0, 0.5, 1.0]
    constant = torch.full((5, 3), 0.7)
    assert constant.argsort(dim=0, stable=True).argsort(0)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert per_seed_spearman(strengths, constant) == 0
    assert per_seed_spearman([0.0] * 5, torch.randn(5, 3, generator=generator())) == 0
    assert ranked(torch.tensor([[2.0], [1.0], [2.0], [3.0]]))[:, 0].tolist() == [1.5, 0.0, 1.5, 3.0]
    rising = torch.linspace(0, 1, 5)[:, None]
    assert per_seed_spearman(strengths, rising) == pytest.approx(1)
    assert per_seed_spearman(strengths, torch.cat([rising, -rising, constant[:, :1]], 1)) == pytest.approx(0)
    # one step of five: by hand from average ranks
    step = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0]])
    assert per_seed_spearman(strengths, step) == pytest.approx(0.5**0.5)


def test_an_untrained_slider_is_called_nothing():
    model, _ = world(MEANS)
    model.bank.new("s", 1, generator())
    b = bench(model, prompt(NEUTRAL))
    found = calibrate(b, "s", axis_along(EDIT, features_of(b, prompt(NEUTRAL))), CalibrationConfig())
    assert found.verdict == "nothing"


def test_the_axis_of_words_reads_past_what_else_varies():
    """Both ends and the pool vary far more along three other features than the words do along theirs."""
    scale, read, plain = torch.cat([torch.full((3,), 4.0), torch.full((30,), 0.3)]), [], []
    for seed in range(4, 9):
        rng = generator(seed)
        own = {"plus": torch.ones(16, 1), "minus": -torch.ones(16, 1), "pool": torch.randn(64, 1, generator=rng)}
        seen = {k: torch.cat([v, scale * torch.randn(len(v), len(scale), generator=rng)], 1) for k, v in own.items()}
        axis = axis_between(seen["plus"], seen["minus"], seen["pool"])
        for vector, found in ((axis.vector, read), ((seen["plus"] - seen["minus"]).mean(0), plain)):
            found.append(torch.corrcoef(torch.stack([seen["pool"] @ vector, own["pool"][:, 0]]))[0, 1])
        assert axis.drift(axis.pattern.expand(4, -1)) < 1e-3  # its own way is no drift
    assert torch.stack(read).mean() > 0.7  # 0.82
    assert torch.stack(plain).mean() < 0.4  # control, 0.23: their plain difference reads the rest


def test_an_axis_without_spread_or_length_is_refused():
    flat = torch.randn(32, 3, generator=generator()) * torch.tensor([1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="do not differ along this slider"):
        axis_along(torch.tensor([0.0, 0.0, 1.0]), flat)
    with pytest.raises(ValueError, match="look the same"):
        axis_between(flat, flat, flat)
    assert axis_along(torch.tensor([0.0, 2.0, 0.0]), flat).sd == pytest.approx(flat[:, 1].std().item(), rel=1e-4)


def test_additivity_is_the_interaction_of_sliders():
    axes = {"a": Axis(torch.tensor([1.0, 0.0]), 1.0, torch.zeros(0, 2), torch.zeros(0))}
    axes["b"] = Axis(torch.tensor([0.0, 1.0]), 1.0, torch.zeros(0, 2), torch.zeros(0))

    def measure(strengths, seeds):
        a, b = strengths.get("a", 0.0), strengths.get("b", 0.0)
        return torch.tensor([[a + 0.8 * a * b, b]]).expand(len(seeds), 2)

    errors = additivity(measure, axes, range(4), 0.5)
    assert errors["a"] == pytest.approx(0.2, abs=1e-5)
    assert errors["b"] == pytest.approx(0.0, abs=1e-5)


# --- at inference ----------------------------------------------------------------------------------------------------


def test_an_instant_slider_is_what_training_would_reach():
    model, _ = slider()
    sampling = Sampling(shape=(D,), sigmas=(1.0, 0.75, 0.5, 0.25))
    for strength in (-1.0, 0.5):
        instant = Instant(replace(model, scales={}), prompt(PLUS), prompt(MINUS), strength)
        made = sampling(instant, prompt(NEUTRAL), range(4))
        torch.testing.assert_close(made, sampling(at(model, s=strength), prompt(NEUTRAL), range(4)), atol=0.05, rtol=0)
    assert torch.equal(
        sampling(Instant(model, prompt(PLUS), prompt(MINUS), 0.0), prompt(NEUTRAL), range(4)),
        sampling(model, prompt(NEUTRAL), range(4)),
    )


def test_a_late_slider_leaves_the_early_steps_alone():
    model, _ = slider()
    sampling = Sampling(shape=(D,), sigmas=(1.0, 0.75, 0.5, 0.25))
    b = Bench(model, sampling, prompt(NEUTRAL), lambda x: x)
    base, full = b({}, range(4)), b({"s": 1.0}, range(4))
    late = replace(b, below=0.8)({"s": 1.0}, range(4))
    assert 0.1 < (late - base).norm() / (full - base).norm() < 0.9
    assert torch.equal(replace(b, below=0.1)({"s": 1.0}, range(4)), base)
    x, sigma = torch.zeros(2, D), torch.full((2,), 0.9)
    joining = Joining(model, at(model, s=1.0), 0.8)
    assert torch.equal(joining(x, sigma, prompt(NEUTRAL, NEUTRAL)), model(x, sigma, prompt(NEUTRAL, NEUTRAL)))


# --- cards -----------------------------------------------------------------------------------------------------------

FACTS = {
    "kind": "text",
    "name": "age",
    "prompts": {"neutral": "person", "positive": "old person", "negative": "young person"},
    "encoder": "dinov2",
    "base": "sdxl",
    "base_hash": "abc",
    "rank": 4,
    "layers": "kv",
}


def test_a_card_goes_through_a_files_metadata():
    found = calibrate(responding(lambda s: 2 * s), "s", AXIS, CalibrationConfig())
    made = card(found, **FACTS, ends=("old", "young"), additivity=0.03)
    metadata = made.metadata()
    assert all(isinstance(v, str) for v in metadata.values())
    assert from_metadata(metadata) == made
    assert from_metadata({"ss_network_module": "networks.lora"}) is None
    newer = json.loads(metadata["dmd_slider"]) | {"version": 9, "something": 1}
    assert from_metadata({"dmd_slider": json.dumps(newer)}).usable == made.usable
    with pytest.raises(ValueError, match="cannot be read"):
        from_metadata({"dmd_slider": "{"})
    with pytest.raises(ValueError, match="not known"):
        replace(made, kind="magic")


def test_random_strengths_stay_inside_the_measured_ranges():
    found = calibrate(responding(lambda s: 2 * s, lambda s: 0.4 * s.clamp_min(0)), "s", AXIS, CalibrationConfig())
    cards = [card(found, **{**FACTS, "name": n}) for n in ("a", "b")]
    assert cards[0].usable == (-2.0, 1.0)
    mixes = random_strengths(cards, 200, generator())
    drawn = torch.tensor([[m["a"], m["b"]] for m in mixes])
    assert drawn.min() >= -2
    assert drawn.max() <= 1
    assert drawn[:, 0].min() < -1.7
    assert abs(torch.corrcoef(drawn.T)[0, 1]) < 0.2
    half = random_strengths(cards, 200, generator(), share=0.5)
    assert min(m["a"] for m in half) == pytest.approx(drawn[:, 0].min().item() / 2)
