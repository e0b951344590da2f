"""Methods that learn from the teacher's noise-latent pairs: the pairs on disk, DMD v1, Diffusion2GAN."""

from itertools import islice, repeat

import pytest
import torch
from oracle import Gaussian, ring
from safetensors.torch import load_file
from toy import FOUR, LAYERS, MLP, ONE, copy_of, heads_on, named

from dmd_core.conditioning import Cond
from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.discriminators import FeatureReader
from dmd_core.objectives.diffusion2gan import Diffusion2GAN, Diffusion2GANConfig, Perceptual, noise_input, pick
from dmd_core.objectives.dmd import DMD, DMDConfig
from dmd_core.pairs import Pairs, make_pairs, read_pairs
from dmd_core.samplers import sample_heun
from dmd_core.schedule import Flow
from dmd_core.train import TrainConfig, train

SIGMAS = torch.linspace(1, 0, 9).tolist()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shape_of_student() -> NetDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NetDenoiser(MLP(16), Flow(), Prediction.FLOW)
    model.net.requires_grad_(False)
    return model


def pair_batch(n: int = 8) -> Batch:
    noise = torch.randn(n, 2, generator=generator(1))
    return Batch(None, (n, 2), noise * 0.5 + 1, noise)


# --- pairs on disk ---------------------------------------------------------------------------------------------------


def test_pairs_are_what_the_teachers_sampler_gives(tmp_path):
    teacher = ring(Flow())
    (path,) = make_pairs(teacher, [Batch(None, (16, 2))], SIGMAS, tmp_path, seed=3)
    batch = read_pairs(path)
    assert torch.equal(batch.latents, sample_heun(teacher, batch.noise, torch.tensor(SIGMAS), None))
    assert batch.shape == (16, 2)
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_run_of_pairs_goes_on_to_the_same_pairs(tmp_path):
    teacher, prompts = ring(Flow()), [Batch(None, (8, 2))] * 4
    whole = [load_file(p) for p in make_pairs(teacher, prompts, SIGMAS, tmp_path / "whole", seed=0)]
    list(islice(make_pairs(teacher, prompts, SIGMAS, tmp_path / "cut", seed=0), 2))
    teacher.calls = 0
    again = [load_file(p) for p in make_pairs(teacher, prompts, SIGMAS, tmp_path / "cut", seed=0)]
    assert teacher.calls == 2 * (2 * 8 - 1)  # two files were there already; Heun calls twice but for the last step
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a["latents"], b["latents"])
        assert torch.equal(a["noise"], b["noise"])
    assert not torch.equal(whole[0]["noise"], whole[1]["noise"])


def test_pairs_of_another_recipe_or_a_damaged_file_are_refused(tmp_path):
    teacher, prompts = ring(Flow()), [Batch(None, (8, 2))]
    (path,) = make_pairs(teacher, prompts, SIGMAS, tmp_path, seed=0, recipe="guidance 4")
    with pytest.raises(ValueError, match="another teacher"):
        list(make_pairs(teacher, prompts, SIGMAS, tmp_path, seed=0, recipe="guidance 7"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a sound file of pairs"):
        read_pairs(path)
    with pytest.raises(ValueError, match="no pairs in"):
        Pairs(tmp_path / "nowhere")


def test_conditioning_survives_the_disk(tmp_path):
    cond = Cond(torch.randn(2, 3, 4), torch.randn(2, 5), {"guidance": torch.ones(2)})
    teacher = Gaussian(Flow(), 0.0, 0.5)
    (path,) = make_pairs(teacher, [Batch(cond, (2, 2))], SIGMAS, tmp_path, seed=0)
    read = read_pairs(path).cond
    assert torch.equal(read.cross, cond.cross)
    assert torch.equal(read.pooled, cond.pooled)
    assert torch.equal(read.extras["guidance"], cond.extras["guidance"])


def test_pairs_can_be_sought_and_every_epoch_has_each_file_once(tmp_path):
    list(make_pairs(ring(Flow()), [Batch(None, (2, 2))] * 5, SIGMAS, tmp_path, seed=0))
    pairs = Pairs(tmp_path, seed=1)
    first = [b.noise for b in islice(pairs.seek(0), 12)]
    later = [b.noise for b in islice(pairs.seek(7), 5)]
    assert all(torch.equal(a, b) for a, b in zip(first[7:], later, strict=True))
    for epoch in (first[:5], first[5:10]):
        assert len({tuple(n.flatten().tolist()) for n in epoch}) == 5
    assert not all(torch.equal(a, b) for a, b in zip(first[:5], first[5:10], strict=True))


# --- DMD v1 ----------------------------------------------------------------------------------------------------------


def dmd(sigmas=ONE, **config) -> DMD:
    base = shape_of_student()
    student, critic = copy_of(base), copy_of(base)
    settings = DMDConfig(sigmas=sigmas, guidance=1.0, **config)
    return DMD(ring(Flow()), student, critic, None, named(student), named(critic), settings)


def test_regression_compares_the_student_on_the_pairs_noise_with_the_pairs_latents():
    objective, batch = dmd(regression_weight=0.5), pair_batch()
    terms = objective.terms("student", batch, generator())
    made = objective.student(batch.noise, torch.ones(8), None)
    torch.testing.assert_close(terms["regression"], 0.5 * (made - batch.latents).square().mean())
    assert set(terms) == {"dmd", "regression"}


def test_matching_can_be_turned_off_for_a_warm_up_that_asks_no_teacher():
    objective = dmd(matching_weight=0.0, guidance_weight=0.0)
    terms = objective.terms("student", pair_batch(), generator())
    assert set(terms) == {"regression"}
    assert objective.teacher.calls == 0


def test_a_warm_up_teaches_the_student_alone_by_regression_alone():
    objective = dmd(warm_up=2, critic_updates=3)
    seen = [(r.counters, set(r.losses)) for r in train(objective, repeat(pair_batch()), TrainConfig(steps=3))]
    assert [counters for counters, _ in seen] == [
        {"critic": 0, "student": 1},
        {"critic": 0, "student": 2},
        {"critic": 3, "student": 3},
    ]
    assert [terms for _, terms in seen[:2]] == [{"student/regression"}] * 2
    assert seen[2][1] == {"critic/denoise", "student/dmd", "student/regression"}
    plain = list(train(dmd(critic_updates=3), repeat(pair_batch()), TrainConfig(steps=1)))
    assert plain[0].counters == {"critic": 3, "student": 1}  # control: off by default
    objective.turns(0)
    calls = objective.teacher.calls
    objective.terms("student", pair_batch(), generator())
    assert objective.teacher.calls == calls
    with pytest.raises(ValueError, match="weight above 0"):
        dmd(warm_up=5, regression_weight=0.0)


def test_a_perceptual_regression_sees_features_of_the_frozen_teacher():
    objective, batch = dmd(regression="perceptual", regression_weight=0.5), pair_batch()
    frozen = shape_of_student()
    objective.distance = Perceptual(FeatureReader(frozen, frozen.net, LAYERS))
    loss = objective.regression(batch, generator())["regression"]
    student = list(objective.players["student"].params.values())
    grads = torch.autograd.grad(loss, student, retain_graph=True)
    assert all(g.any() for g in grads)
    assert not any(p.requires_grad for p in frozen.net.parameters())
    grown = []  # how much further apart latents seem that are three times as far from the pair's
    for distance in (objective.distance, dmd().distance):
        near, far = (distance(batch.latents + s, batch.latents, batch, generator()) for s in (1.0, 3.0))
        grown.append((far / near).item())
    assert grown[0] < 6
    assert grown[1] == pytest.approx(9)
    made = objective.student(batch.noise, torch.ones(8), None)
    same = Batch(None, (8, 2), made.detach(), batch.noise)
    assert objective.regression(same, generator())["regression"] == 0  # control
    with pytest.raises(ValueError, match="use 'mse' or 'perceptual'"):
        dmd(regression="lpips")


def test_dmd_is_one_step_and_needs_pairs():
    with pytest.raises(ValueError, match="use DMD2"):
        dmd(FOUR)
    with pytest.raises(ValueError, match="generate pairs"):
        dmd().terms("student", Batch(None, (8, 2)), generator())


# --- Diffusion2GAN ---------------------------------------------------------------------------------------------------


def diffusion2gan(scales: int = 1, **config) -> Diffusion2GAN:
    base = shape_of_student()
    student, trunk = copy_of(base), copy_of(base)
    metric = Perceptual(FeatureReader(base, base.net, LAYERS))
    heads = [heads_on(trunk, seed) for seed in range(scales)]
    settings = Diffusion2GANConfig(sigmas=ONE, **config)
    return Diffusion2GAN(student, named(student), metric, heads, named(trunk), noise_input(2, maps=False), settings)


def test_metric_is_zero_for_the_target_itself_and_sees_a_difference():
    metric, batch = diffusion2gan().metric, pair_batch()
    assert metric(batch.latents, batch.latents, batch, generator()) == 0
    assert metric(batch.latents + 1, batch.latents, batch, generator()) > 1e-4


def test_metric_trains_the_generated_side_through_frozen_features():
    metric, batch = diffusion2gan().metric, pair_batch()
    made = (batch.latents + 0.5).requires_grad_()
    (grad,) = torch.autograd.grad(metric(made, batch.latents, batch, generator()), made)
    assert grad.abs().max() > 0


def test_r1_comes_every_so_many_steps_and_is_scaled_for_it():
    objective, batch = diffusion2gan(r1_every=4), pair_batch()
    for step in range(9):
        objective.turns(step)
        assert ("r1" in objective.terms("discriminator", batch, generator())) == (step % 4 == 0)


def test_without_a_gan_only_the_student_takes_turns():
    assert diffusion2gan(gan_weight=0.0).turns(0) == ("student",)
    assert diffusion2gan().turns(0) == ("discriminator", "student")
    assert "gan" not in diffusion2gan(gan_weight=0.0).terms("student", pair_batch(), generator())


def test_discriminator_reads_the_noise_once_its_input_has_learned():
    objective, batch = diffusion2gan(), pair_batch()

    def logits(noise):
        return objective.judge(batch.latents, noise, None, generator())[0]

    assert torch.equal(logits(batch.noise), logits(batch.noise.roll(1, 0)))  # starts at zero
    terms = objective.terms("discriminator", batch, generator())
    weight = objective.noise_input.weight
    (grad,) = torch.autograd.grad(terms["gan"] + terms["mismatched"], weight)
    assert grad.abs().max() > 0
    with torch.no_grad():
        weight -= grad
    assert not torch.equal(logits(batch.noise), logits(batch.noise.roll(1, 0)))


def test_all_its_players_learn_and_the_metric_does_not():
    objective = diffusion2gan()
    before = {k: {n: p.detach().clone() for n, p in v.params.items()} for k, v in objective.players.items()}
    metric = [p.clone() for p in objective.metric.reader.net.parameters()]
    reports = list(train(objective, repeat(pair_batch()), TrainConfig(steps=2)))
    assert reports[-1].counters == {"discriminator": 2, "student": 2}
    for name, player in objective.players.items():
        moved = [not torch.equal(p, before[name][n]) for n, p in player.params.items()]
        assert sum(moved) > len(moved) / 2
    assert all(torch.equal(a, b) for a, b in zip(metric, objective.metric.reader.net.parameters(), strict=True))


def test_mismatched_prompts_are_picked_from_the_same_batch():
    index = torch.tensor([2, 0])
    assert pick(None, index) is None
    assert torch.equal(pick(torch.arange(3), index), index)
    assert torch.equal(pick(Cond(torch.arange(3.0)[:, None, None]), index).cross.flatten(), index.float())
    with pytest.raises(TypeError, match="cannot be split"):
        pick(["a", "b"], index)


def test_a_second_step_is_refused():
    made, settings = diffusion2gan(), Diffusion2GANConfig(sigmas=FOUR)
    with pytest.raises(ValueError, match="one-step"):
        Diffusion2GAN(made.student, made.players["student"].params, made.metric, [], {}, made.noise_input, settings)
