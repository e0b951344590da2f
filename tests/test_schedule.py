import pytest
import torch

from dmd_core.schedule import EDM, Discrete, Flow, add_noise, shift_time


def sdxl() -> Discrete:
    return Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)


def test_discrete_has_the_published_sdxl_constants():
    schedule = sdxl()
    t = torch.tensor([999, 749, 499, 249, 399])
    alpha_bar = torch.tensor([0.004660, 0.056623, 0.277670, 0.675432, 0.426086])
    sigma = torch.tensor([14.6146, 4.08173, 1.61289, 0.69320, 1.16058])
    torch.testing.assert_close(schedule.alphas_cumprod[t], alpha_bar, atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.sigma(t), sigma, atol=1e-4, rtol=0)


def test_linear_betas_are_another_schedule():
    other = Discrete.from_betas("linear", 0.00085, 0.012, 1000)
    assert (other.sigma_max - sdxl().sigma_max) > 1


@pytest.mark.parametrize("schedule", [sdxl(), Flow(3.0), EDM()], ids=["discrete", "flow", "edm"])
def test_timestep_and_sigma_are_inverse(schedule):
    sigma = schedule.sample(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(schedule.sigma(schedule.timestep(sigma)), sigma, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", [sdxl(), Flow(), EDM()], ids=["discrete", "flow", "edm"])
def test_samples_lie_inside_the_given_range_of_time(schedule):
    rng = torch.Generator().manual_seed(0)
    middle, all_of_it = schedule.sample(512, rng, 0.4, 0.6), schedule.sample(512, rng, 0.02, 0.98)
    assert all_of_it.min() < middle.min()
    assert middle.max() < all_of_it.max()
    assert all_of_it.max() <= schedule.sigma_max


def test_zero_terminal_snr_leaves_no_signal_and_stays_finite():
    schedule = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000, zero_terminal_snr=True)
    assert 4000 < schedule.sigma_max < 5000
    assert torch.isfinite(schedule.sigmas).all()
    assert schedule.sigmas[0] == pytest.approx(sdxl().sigmas[0].item(), rel=1e-3)


def test_flow_states_are_a_straight_line():
    x0, eps = torch.randn(3, 4), torch.randn(3, 4)
    x = add_noise(Flow(), x0, eps, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(x, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * eps[1], eps[2]]))


def test_shift_moves_times_towards_noise_and_keeps_the_ends():
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_an_unknown_beta_schedule_is_named():
    with pytest.raises(ValueError, match="'cosine' is not known"):
        Discrete.from_betas("cosine", 0.1, 0.2, 10)
