"""LADD: what the student sees, what the discriminator sees, and who learns from it."""

import re

import pytest
import torch
from node_schemas import golden
from oracle import Gaussian
from torch import nn
from toy import FOUR, MLP, ONE, copy_of, heads_on, named

from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.objectives.ladd import LADD, LADDConfig, logit_normal
from dmd_core.schedule import Discrete, Flow

SDXL = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ladd(sigmas=FOUR, steps=0, **config) -> LADD:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = NetDenoiser(MLP(16), Flow(), Prediction.FLOW)
    base.net.requires_grad_(False)
    student = copy_of(base)
    return LADD(student, named(student), heads_on(base), LADDConfig(sigmas=sigmas, **config), steps)


def levels(objective: LADD, n: int = 8000) -> list[float]:
    _, sigma = objective.student_input(torch.zeros(n, 2), generator())
    return [(sigma == s).double().mean().item() for s in objective.config.sigmas]


def test_curriculum_starts_on_the_cleaner_half_and_then_favours_pure_noise():
    objective = ladd(early_steps=500)
    objective.turns(0)
    assert levels(objective) == pytest.approx([0, 0, 0.5, 0.5], abs=0.03)
    objective.turns(500)
    assert levels(objective) == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.03)
    objective = ladd(early_steps=1, shares=(1.0, 1.0, 2.0, 0.0), early_shares=(0.0, 0.0, 0.0, 1.0))
    objective.turns(0)
    assert levels(objective) == [0, 0, 0, 1]
    objective.turns(1)
    assert levels(objective) == pytest.approx([0.25, 0.25, 0.5, 0], abs=0.03)


def test_every_preset_trains_pure_noise_for_four_fifths_of_its_run_and_a_longer_one_never_begins_anew():
    presets = golden()["DMD_Distill"]["input"]["required"]["preset"][1]["tooltip"]
    lengths = [int(n) for n in re.findall(r"(\d+) updates", presets)]
    assert len(lengths) == 3
    runs = [ladd(steps=n) for n in lengths]
    for i, (objective, n) in enumerate(zip(runs, lengths, strict=True)):
        for step in range(n // 5, n, n // 10):
            objective.turns(step)
            assert levels(objective, 200)[0] > 0.5
        objective.turns(0)
        assert levels(objective, 200)[0] == 0  # control: the beginning leaves it out
        assert all(longer.early <= n for longer in runs[i:])
    assert ladd(steps=100, early_steps=30).early == 30
    assert ladd(steps=100, early_steps=500).early == 500  # what is asked for is done


def test_no_signal_leaks_in_at_the_first_level():
    objective = ladd(early_steps=0)
    objective.turns(0)
    x, sigma = objective.student_input(torch.full((400, 2), 100.0), generator())
    assert x[sigma == 1].abs().max() < 10
    assert x[sigma < 1].abs().min() > 10


@pytest.mark.parametrize("schedule", [SDXL, Flow()], ids=["vp", "flow"])
def test_discriminator_times_are_logit_normal_for_every_family(schedule):
    sigma = logit_normal(schedule, 50_000, generator(), 1.0, 0.5).double()
    a, b = schedule.coeffs(sigma)
    logit = (b / a).log()  # logit of the flow time b / (a + b)
    assert logit.mean().item() == pytest.approx(1.0, abs=0.02)
    assert logit.std().item() == pytest.approx(0.5, abs=0.02)


def test_each_player_learns_from_the_other_with_its_own_parameters_only():
    objective = ladd()
    batch = Batch(None, (8, 2), torch.randn(8, 2, generator=generator()))
    for player in ("discriminator", "student"):
        other = ({"discriminator", "student"} - {player}).pop()
        loss = objective.terms(player, batch, generator())["gan"]
        own = torch.autograd.grad(
            loss, list(objective.players[player].params.values()), allow_unused=True, retain_graph=True
        )
        assert max(g.abs().max() for g in own if g is not None) > 0
        if player == "discriminator":  # generation is without gradient there
            with pytest.raises(RuntimeError, match="not have been used"):
                torch.autograd.grad(loss, list(objective.players[other].params.values()))


def test_a_single_sample_per_update_is_refused_until_it_accumulates():
    """Batch 1 with hinge saturates within a few hundred updates."""
    batch = Batch(None, (1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="accumulate"):
        ladd().terms("discriminator", batch, generator())
    assert "gan" in ladd(discriminator_accumulate=2).terms("discriminator", batch, generator())


def test_measurements_carry_no_gradient():
    batch = Batch(None, (8, 2), torch.randn(8, 2, generator=generator()))
    terms = ladd().terms("discriminator", batch, generator())
    assert set(terms) == {"gan", "accuracy", "gap"}
    assert not terms["accuracy"].requires_grad
    assert terms["gan"].requires_grad


def test_prompts_alone_are_not_enough():
    with pytest.raises(ValueError, match="LADD needs latents"):
        ladd().terms("student", Batch(None, (4, 2)), generator())


@pytest.mark.parametrize("shares", [(1.0,), (1.0, -1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)])
def test_shares_that_do_not_fit_the_levels_are_refused(shares):
    with pytest.raises(ValueError, match="one number for each"):
        LADDConfig(sigmas=FOUR, shares=shares)


def test_one_step_student_is_always_given_pure_noise():
    objective = ladd(sigmas=ONE)
    for step in (0, 10_000):
        objective.turns(step)
        assert levels(objective) == [1.0]


def test_the_oracle_of_the_data_fools_no_one_but_a_shifted_one_is_caught():
    """A discriminator trained by the objective separates a wrong student from the data, and not a right one."""
    batch = Batch(None, (256, 2), 0.5 * torch.randn(256, 2, generator=generator(7)))
    accuracy = {}
    for name, mean in (("right", 0.0), ("wrong", 2.0)):
        objective = ladd(sigmas=ONE, discriminator_lr=5e-3, noise_mean=-2.0)
        exact = Gaussian(Flow(), mean, 0.5)

        class Sampler:
            schedule = Flow()

            def __call__(self, x, sigma, cond, exact=exact):
                return exact.mean + exact.std * x  # the exact map from noise to N(mean, std^2)

        objective.student = Sampler()
        params = list(objective.discriminator.parameters.values())
        optimizer = torch.optim.Adam(params, 5e-3)
        for step in range(60):
            terms = objective.terms("discriminator", batch, generator(step))
            optimizer.zero_grad()
            terms["gan"].backward()
            optimizer.step()
        accuracy[name] = terms["accuracy"].item()
    assert accuracy["wrong"] > 0.9
    assert accuracy["right"] < 0.7


def test_gradients_of_frozen_teacher_are_never_built():
    objective = ladd()
    batch = Batch(None, (8, 2), torch.randn(8, 2, generator=generator()))
    objective.terms("discriminator", batch, generator())["gan"].backward()
    net = objective.discriminator.reader.net
    assert all(p.grad is None for p in net.parameters())
    assert isinstance(net, nn.Module)
