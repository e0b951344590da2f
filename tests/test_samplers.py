"""Our samplers against diffusers' schedulers: tiny nonlinear networks, the same noise, float64, to 1e-6."""

import diffusers
import pytest
import torch

from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.samplers import Masked, sample_euler, sample_heun, sample_restart, sampled, start
from dmd_core.schedule import EDM, Discrete, Flow
from dmd_core.sigmas import at_timesteps, lcm, shifted, trailing, turbo

SHAPE = (2, 3, 4, 4)
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def sdxl() -> Discrete:
    """SDXL's table in float64: the comparison is of the algebra, not of float32 tables."""
    schedule = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)
    alpha_bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    schedule.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    schedule.log_sigmas = schedule.sigmas.log()
    return schedule


def sigmas_at(timesteps, last=0.0):
    return torch.cat([sdxl().sigmas[torch.tensor(timesteps)], torch.tensor([last], dtype=torch.float64)])


def net(x, timestep, cond=None):
    """Nonlinear in the state and in the time, mixes channels."""
    t = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1)) / 1000
    return torch.tanh(1.3 * x + 0.4 * x.roll(1, 1) - t) + 0.3 * t * x


def vp(prediction=Prediction.EPS):
    return NetDenoiser(net, sdxl(), prediction)


class Tape:
    """The same noises, in order, for both sides."""

    def __init__(self, seed=0):
        self.rng, self.played = torch.Generator().manual_seed(seed), 0

    def __call__(self, like):
        self.played += 1
        return torch.randn(like.shape, generator=self.rng, dtype=like.dtype)

    def instead_of_randn(self, shape, generator=None, device=None, dtype=None, layout=None):
        return self(torch.empty(shape, dtype=dtype))


def noise(seed=5):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_diffusers(scheduler, x, monkeypatch, tape=None, step=None, timesteps=None, **set_timesteps):
    """The pipelines' loop: a VP state of unit variance (or the scheduler's own) in, the last state out."""
    if hasattr(scheduler, "final_alpha_cumprod"):  # the Euler ones convert to sigmas in numpy, in float32
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        scheduler.alphas_cumprod = (1 - beta).cumprod(0)
        last = 1.0 if scheduler.config.get("set_alpha_to_one", True) else scheduler.alphas_cumprod[0].item()
        scheduler.final_alpha_cumprod = torch.tensor(last, dtype=torch.float64)
    module = __import__(type(scheduler).__module__, fromlist=["_"])
    if tape is not None:
        monkeypatch.setattr(module, "randn_tensor", tape.instead_of_randn)
    if timesteps is not None:
        set_timesteps["timesteps"] = timesteps
    scheduler.set_timesteps(**set_timesteps)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(x_in, t), t, x, **(step or {})).prev_sample
    return x


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs.to(ours), atol=1e-6, rtol=0)


def apart(a, b, by=1e-3):
    assert (a - b).abs().max() > by


# --- VP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_gamma_0_is_ddim(steps, prediction, monkeypatch):
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    scheduler = diffusers.DDIMScheduler(
        **VP, timestep_spacing="trailing", clip_sample=False, prediction_type=names[prediction]
    )
    theirs = run_diffusers(scheduler, noise(), monkeypatch, num_inference_steps=steps, step={"eta": 0.0})
    sigmas = sigmas_at(trailing(steps))
    scale = (1 + sigmas[0] ** 2).sqrt()
    denoiser = vp(Prediction(prediction))
    if prediction == "x0":  # our x0 networks take the state as it is, a VP one wants unit variance
        denoiser = NetDenoiser(lambda x, t, c: net(x, t), sdxl(), Prediction.X0)
        inner = denoiser.net
        denoiser.net = lambda x, t, c: inner(x / (1 + sdxl().sigmas[t].reshape(-1, 1, 1, 1) ** 2).sqrt(), t, c)
    close(sample_restart(denoiser, noise() * scale, sigmas, None, None, gamma=0.0), theirs)


def test_gamma_0_is_trailing_euler_and_our_own_euler(monkeypatch):
    scheduler = diffusers.EulerDiscreteScheduler(**VP, timestep_spacing="trailing")
    # diffusers' step rounds state and table to float32: its own table and small states keep that under 1e-6
    small = 0.05 * noise() * sdxl().sigmas[999]
    theirs = run_diffusers(scheduler, small, monkeypatch, num_inference_steps=4)
    sigmas = scheduler.sigmas.double()
    torch.testing.assert_close(sigmas, sigmas_at(trailing(4)), rtol=1e-6, atol=1e-9)
    ours = sample_restart(vp(), small, sigmas, None, None, gamma=0.0)
    close(ours, theirs)
    close(sample_euler(vp(), small, sigmas, None), ours)
    apart(sample_heun(vp(), small, sigmas, None), ours, 1e-4)
    apart(sample_restart(vp(), small, sigmas_at([999, 666, 333, 0]), None, None, gamma=0.0), theirs, 1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_gamma_1_on_its_grid_is_lcm(steps, monkeypatch):
    scheduler = diffusers.LCMScheduler(**VP, clip_sample=False)
    theirs = run_diffusers(scheduler, noise(), monkeypatch, Tape(), num_inference_steps=steps)
    sigmas = sigmas_at(lcm(steps))
    ours = sample_restart(vp(), noise() * (1 + sigmas[0] ** 2).sqrt(), sigmas, None, Tape(), gamma=1.0)
    close(ours, theirs)


def test_gamma_1_on_dmd2s_timesteps_is_dmd2(monkeypatch):
    scheduler = diffusers.LCMScheduler(**VP, clip_sample=False)
    theirs = run_diffusers(scheduler, noise(), monkeypatch, Tape(), timesteps=[999, 749, 499, 249])
    ours = sample_restart(vp(), start(sdxl(), noise(), sigmas_at([999])[0]), sigmas_at(trailing(4)), None, Tape())
    close(ours, theirs)
    # controls: the grid of `normal`, LCM's grid, and noise that is kept instead of drawn all give another image
    for other in ([999, 666, 333, 0], lcm(4)):
        apart(sample_restart(vp(), noise() * 14.6488, sigmas_at(other), None, Tape()), theirs)
    apart(sample_restart(vp(), noise() * 14.6488, sigmas_at(trailing(4)), None, Tape(), gamma=0.0), theirs)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_keep_tcd_is_tcd(eta, steps, monkeypatch):
    scheduler = diffusers.TCDScheduler(**VP, clip_sample=False)
    theirs = run_diffusers(scheduler, noise(), monkeypatch, Tape(), step={"eta": eta}, num_inference_steps=steps)
    # TCD ends at timestep 0, whose sigma is 0.029, not at 0
    sigmas = sigmas_at(lcm(steps), last=sdxl().sigmas[0].item())
    x = noise() * (1 + sigmas[0] ** 2).sqrt()
    ours = sample_restart(vp(), x, sigmas, None, Tape(), gamma=eta, keep="tcd")
    # theirs is a VP state, ours is x0 + sigma * eps
    close(ours / (1 + sigmas[-1] ** 2).sqrt(), theirs)
    other = sample_restart(vp(), x, sigmas, None, Tape(), gamma=abs(eta - 0.5), keep="tcd")
    apart(other / (1 + sigmas[-1] ** 2).sqrt(), theirs)


def test_ancestral_is_turbos_sampler(monkeypatch):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**VP, timestep_spacing="trailing")
    sigmas = sigmas_at(trailing(4))
    theirs = run_diffusers(scheduler, noise() * sigmas[0], monkeypatch, Tape(), num_inference_steps=4)
    ours = sample_restart(vp(), noise() * sigmas[0], sigmas, None, Tape(), gamma=1.0, keep="ancestral")
    torch.testing.assert_close(ours, theirs.to(ours), atol=2e-5, rtol=0)  # float32 inside diffusers' step
    apart(sample_restart(vp(), noise() * sigmas[0], sigmas, None, Tape(), gamma=1.0, keep="time"), theirs)


# --- flow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_flow_gamma_0_is_flow_match_euler(shift, steps, monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    plain = [1 - i / steps for i in range(steps)]
    theirs = run_diffusers(scheduler, noise(), monkeypatch, sigmas=plain)
    denoiser = NetDenoiser(net, Flow(shift), Prediction.FLOW)
    sigmas = torch.tensor([*shifted(steps, shift), 0.0], dtype=torch.float64)
    close(sample_restart(denoiser, noise(), sigmas, None, None, gamma=0.0), theirs)
    close(sample_euler(denoiser, noise(), sigmas, None), theirs)
    if steps > 1:
        wrong = torch.tensor([*shifted(steps, shift + 1), 0.0], dtype=torch.float64)
        apart(sample_restart(denoiser, noise(), wrong, None, None, gamma=0.0), theirs)


def test_flow_gamma_1_is_flow_match_lcm(monkeypatch):
    scheduler = diffusers.FlowMatchLCMScheduler(shift=3.0)
    theirs = run_diffusers(scheduler, noise(), monkeypatch, Tape(), sigmas=[1.0, 0.75, 0.5, 0.25])
    denoiser = NetDenoiser(net, Flow(3.0), Prediction.FLOW)
    sigmas = torch.tensor([*shifted(4, 3.0), 0.0], dtype=torch.float64)
    close(sample_restart(denoiser, noise(), sigmas, None, Tape()), theirs)


def test_keep_variance_mixes_old_and_new_noise_in_a_flow():
    denoiser = NetDenoiser(net, Flow(), Prediction.FLOW)
    x, g = noise(), 0.6
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    states = []
    sample_restart(denoiser, x, sigmas, None, Tape(), g, lambda i, x0, state: states.append((x0, state)), "variance")
    x0 = states[0][0]
    mixed = 0.5 * x0 + 0.5 * ((1 - g**2) ** 0.5 * x + g * Tape()(x))  # at sigma 1 the state is the noise
    close(states[1][1], mixed)


# --- one step, start, limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep", [399, 800, 999])
def test_one_step_start_has_unit_variance_at_the_networks_input(timestep):
    seen = []
    denoiser = NetDenoiser(lambda x, t, c: seen.append((x.std().item(), int(t[0]))) or x, sdxl(), Prediction.EPS)
    big = torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    sigmas = at_timesteps(sdxl(), [timestep])
    sample_restart(denoiser, start(sdxl(), big, sigmas[0]), sigmas, None, None, gamma=0.0)
    assert seen[-1][0] == pytest.approx(big.std().item(), abs=1e-4)
    assert seen[-1][1] == timestep
    # control: scaled by sigma alone, as a stock sampler does it
    sample_restart(denoiser, big * sigmas[0], sigmas, None, None, gamma=0.0)
    expected = {399: 0.7576, 800: 0.981, 999: 0.9977}[timestep]
    assert seen[-1][0] == pytest.approx(expected * big.std().item(), abs=1e-3)


def test_a_flow_starts_from_the_noise_itself():
    assert torch.equal(start(Flow(), noise(), 1.0), noise())
    torch.testing.assert_close(start(EDM(), noise(), 80.0), noise() * 80.0, rtol=1e-3, atol=0)


def test_a_start_from_a_latent_is_the_forward_process():
    latent = noise(1)
    close(start(sdxl(), noise(), 2.0, latent), latent + 2.0 * noise())
    close(start(Flow(), noise(), 0.75, latent), 0.25 * latent + 0.75 * noise())


def test_without_a_gamma_a_picture_is_made_by_plain_euler():
    sigmas = sigmas_at([999, 600, 300])
    x = start(sdxl(), noise(), sigmas[0])
    euler = sampled(vp(), noise(), sigmas, None, None, None)
    assert torch.equal(euler, sample_euler(vp(), x, sigmas, None))
    restart = sampled(vp(), noise(), sigmas, None, Tape(), 1.0)
    assert torch.equal(restart, sample_restart(vp(), x, sigmas, None, Tape()))
    assert not torch.allclose(euler, restart)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0, 0.0], [0.5, 1.0, 0.0], [1.0, -0.1]])
def test_sigmas_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="strictly falling"):
        sample_restart(vp(), noise(), torch.tensor(sigmas), None, None)


def test_gamma_must_fit_the_steps_and_noise_needs_a_generator():
    sigmas = sigmas_at(trailing(4))
    for gamma in ([1.0, 0.5], 1.5, [0.1] * 5):
        with pytest.raises(ValueError, match="gamma is"):
            sample_restart(vp(), noise(), sigmas, None, Tape(), gamma=gamma)
    with pytest.raises(ValueError, match="no random generator"):
        sample_restart(vp(), noise(), sigmas, None, None)
    with pytest.raises(ValueError, match="keep is"):
        sample_restart(vp(), noise(), sigmas, None, Tape(), keep="tdc")


def test_gamma_per_step_switches_the_noise_step_by_step():
    sigmas, tape = sigmas_at(trailing(4)), Tape()
    mixed = sample_restart(vp(), noise() * 14.65, sigmas, None, tape, gamma=[1.0, 0.0, 0.0])
    assert tape.played == 1
    head = sample_restart(vp(), noise() * 14.65, sigmas[:2], None, Tape(), gamma=1.0)
    close(sample_restart(vp(), head, sigmas[1:], None, None, gamma=0.0), mixed)
    apart(sample_restart(vp(), noise() * 14.65, sigmas, None, Tape(), gamma=1.0), mixed)


def test_half_precision_states_are_sampled_in_float32():
    out = sample_restart(vp(), (noise() * 14.65).half(), sigmas_at(trailing(4)).float(), None, None, gamma=0.0)
    assert out.dtype == torch.float32


# --- masks ----------------------------------------------------------------------------------------------------------


def known(schedule, prediction):
    latent = noise(7)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., :2] = 1
    return Masked(NetDenoiser(net, schedule, prediction), latent, mask)


@pytest.mark.parametrize("family", ["vp", "flow"])
@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_the_known_region_is_re_noised_to_every_level_and_comes_out_exact(family, gamma):
    schedule, prediction = (sdxl(), Prediction.EPS) if family == "vp" else (Flow(3.0), Prediction.FLOW)
    masked = known(schedule, prediction)
    sigmas = sigmas_at(trailing(4)) if family == "vp" else torch.tensor([*shifted(4, 3.0), 0.0], dtype=torch.float64)
    first, states = noise(), []
    x = masked.enter(start(schedule, first, sigmas[0]), first, sigmas[0])
    tape = Tape()
    out = sample_restart(masked, x, sigmas, None, tape, gamma, lambda i, x0, state: states.append(state))
    outside = (1 - masked.mask).expand(SHAPE).bool()
    assert torch.equal(out[outside], masked.latent[outside])
    for i, state in enumerate(states):
        a, b = schedule.coeffs(sigmas[i])
        implied = ((state - a * masked.latent) / b)[outside]
        if gamma == 0:  # the noise it started with, at every level
            torch.testing.assert_close(implied, first[outside], atol=1e-6, rtol=0)
        assert 0.5 < implied.std() < 1.6, "known region off its noise level"
    # control: without the mask the known region is another image
    apart(sample_restart(masked.inner, x, sigmas, None, Tape(), gamma), out)


def test_masks_of_ones_and_zeros_are_the_limits():
    masked, sigmas = known(sdxl(), Prediction.EPS), sigmas_at(trailing(4))
    x = start(sdxl(), noise(), sigmas[0])
    ones = Masked(masked.inner, masked.latent, torch.ones(1, 1, 4, 4, dtype=torch.float64))
    plain = sample_restart(masked.inner, x, sigmas, None, Tape())
    assert torch.equal(sample_restart(ones, ones.enter(x, noise(), sigmas[0]), sigmas, None, Tape()), plain)
    zeros = Masked(masked.inner, masked.latent, torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    assert torch.equal(sample_restart(zeros, x, sigmas, None, Tape()), masked.latent)


def test_turbo_stays_at_high_noise():
    assert turbo(4) == [999, 899, 799, 699]
    with pytest.raises(ValueError, match="10 levels"):
        turbo(11)
