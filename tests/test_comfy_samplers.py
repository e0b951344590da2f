"""Our samplers and few-step profiles against ComfyUI's own samplers and schedulers, in float64."""

from pathlib import Path
from types import SimpleNamespace

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_samplers_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import comfy.model_sampling
    import comfy.samplers
    import comfy.supported_models
    from comfy.k_diffusion import sampling
    from comfy_extras import nodes_flux

    denoisers = comfy_host.pack_module("dmd_core.denoiser")
    ours = comfy_host.pack_module("dmd_core.samplers")
    grids = comfy_host.pack_module("dmd_core.sigmas")
    schedules = comfy_host.pack_module("dmd_core.schedule")
    profiles = comfy_host.pack_module("dmd_core.weights.profiles")

    SIMPLE_ON_ITS_OWN_SHIFT = {"ernie-turbo": "ErnieImage", "mageflow-turbo": "MageFlow", "anima-turbo-lora": "Anima"}
    EXPONENTIAL_SHIFT = {"lens-turbo": "Lens"}

    class VP(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    class FlowSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    def vp_sampling():
        return VP(SimpleNamespace(sampling_settings={}))

    def flow_sampling(shift):
        return FlowSampling(SimpleNamespace(sampling_settings={"shift": shift}))

    def net(x, timestep, cond=None):
        t = torch.as_tensor(timestep).double().reshape(-1, *[1] * (x.ndim - 1)) / 1000
        return torch.tanh(1.3 * x + 0.4 * x.roll(1, 1) - t) + 0.3 * t * x

    class Host:
        """A model as ComfyUI's samplers see it: x0 from a state at sigma."""

        def __init__(self, model_sampling):
            self.model_sampling = model_sampling
            patcher = SimpleNamespace(get_model_object=lambda name: model_sampling)
            self.inner_model = SimpleNamespace(
                model_patcher=patcher, inner_model=SimpleNamespace(model_sampling=model_sampling)
            )
            self.seen = []

        def __call__(self, x, sigma, **_):
            t = self.model_sampling.timestep(sigma)
            self.seen.append(float(t[0]))
            x_in = self.model_sampling.calculate_input(sigma, x)
            return self.model_sampling.calculate_denoised(sigma, net(x_in, t), x)

    class Tape:
        def __init__(self):
            self.rng = torch.Generator().manual_seed(0)

        def __call__(self, like, _=None):
            like = like if like.ndim > 1 else noise()
            return torch.randn(like.shape, generator=self.rng, dtype=torch.float64)

    def noise():
        return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def ours_vp(model_sampling):
        schedule = schedules.Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)
        schedule.sigmas = model_sampling.sigmas.double()
        schedule.log_sigmas = schedule.sigmas.log()
        return denoisers.NetDenoiser(net, schedule, denoisers.Prediction.EPS)

    def stock_sigmas(model_sampling, scheduler, steps):
        return comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps)

    def at(schedule, timesteps):
        return torch.cat([schedule.sigmas[torch.tensor(timesteps)], torch.zeros(1, dtype=torch.float64)])

    def close(a, b, atol=1e-6):
        torch.testing.assert_close(a, b.to(a), atol=atol, rtol=0)

    def test_our_dmd2_equals_stock_lcm_and_simple():
        model_sampling = vp_sampling()
        host, denoiser = Host(model_sampling), ours_vp(model_sampling)
        sigmas = stock_sigmas(model_sampling, "simple", 4).double()
        x = model_sampling.noise_scaling(sigmas[0], noise(), torch.zeros_like(noise()), max_denoise=True)
        theirs = sampling.sample_lcm(host, x, sigmas, noise_sampler=Tape(), disable=True)
        assert host.seen == [999, 749, 499, 249]
        profile = profiles.profiles()["dmd2-sdxl-4step"]
        mine = at(denoiser.schedule, [int(t) for t in profile.trained()])
        start = ours.start(denoiser.schedule, noise(), mine[0])
        close(ours.sample_restart(denoiser, start, mine, None, Tape(), profile.gammas(4), keep=profile.keep), theirs)
        # controls: the normal schedule, and kept instead of fresh noise, give another image
        other = stock_sigmas(model_sampling, "normal", 4).double()
        assert (sampling.sample_lcm(host, x, other, noise_sampler=Tape(), disable=True) - theirs).abs().max() > 1e-3
        kept = ours.sample_restart(denoiser, start, mine, None, None, 0.0)
        assert (kept - theirs).abs().max() > 1e-3

    def test_lightning_equals_stock_euler_and_turbo_stock_ancestral():
        model_sampling = vp_sampling()
        host, denoiser = Host(model_sampling), ours_vp(model_sampling)
        sigmas = at(denoiser.schedule, grids.trailing(4))
        x = noise() * sigmas[0]
        close(
            ours.sample_restart(denoiser, x, sigmas, None, None, 0.0),
            sampling.sample_euler(host, x, sigmas, disable=True),
        )
        turbo = at(denoiser.schedule, grids.turbo(4))
        theirs = sampling.sample_euler_ancestral(host, x, turbo, noise_sampler=Tape(), disable=True)
        close(ours.sample_restart(denoiser, x, turbo, None, Tape(), 1.0, keep="ancestral"), theirs)

    @pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
    def test_flows_equal_stock_euler_and_lcm_with_simple(shift):
        model_sampling = flow_sampling(shift)
        host = Host(model_sampling)
        denoiser = denoisers.NetDenoiser(net, schedules.Flow(shift), denoisers.Prediction.FLOW)
        stock = stock_sigmas(model_sampling, "simple", 4).double()
        mine = torch.tensor([*grids.shifted(4, shift), 0.0], dtype=torch.float64)
        close(mine, stock)
        euler = sampling.sample_euler(host, noise(), stock, disable=True)
        close(ours.sample_restart(denoiser, noise(), stock, None, None, 0.0), euler)
        lcm = sampling.sample_lcm(host, noise(), stock, noise_sampler=Tape(), disable=True)
        close(ours.sample_restart(denoiser, noise(), stock, None, Tape(), 1.0), lcm)
        assert (lcm - euler).abs().max() > 1e-3

    def test_our_start_is_stocks_full_denoise_at_every_level_and_stock_is_not():
        model_sampling = vp_sampling()
        schedule = ours_vp(model_sampling).schedule
        big = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for t in (999, 800, 399):
            sigma = schedule.sigmas[t]
            full = model_sampling.noise_scaling(sigma, big.clone(), torch.zeros_like(big), max_denoise=True)
            close(ours.start(schedule, big, sigma), full)
        stock = model_sampling.noise_scaling(schedule.sigmas[399], big.clone(), torch.zeros_like(big))
        seen = model_sampling.calculate_input(schedule.sigmas[399].reshape(1), stock).std() / big.std()
        assert seen == pytest.approx(0.758, abs=1e-3)

    def test_the_table_of_stock_timesteps_is_what_the_schedulers_give():
        model_sampling = vp_sampling()
        for name, timesteps in profiles.stock_grids().items():
            if name == "sd_turbo":
                assert timesteps == (torch.arange(1, 11) * 100 - 1).flip(0)[:4].tolist()
                continue
            reached = model_sampling.timestep(stock_sigmas(model_sampling, name, 4)[:-1])
            assert reached.round().long().tolist()[:4] == timesteps, name

    def test_profiles_that_rest_on_comfyui_have_its_levels():
        table = profiles.profiles()
        resting = {p.id for p in table.values() if p.recompute == "comfy"}
        assert resting == {*SIMPLE_ON_ITS_OWN_SHIFT, *EXPONENTIAL_SHIFT}
        for name, family in {**SIMPLE_ON_ITS_OWN_SHIFT, **EXPONENTIAL_SHIFT}.items():
            settings = getattr(comfy.supported_models, family).sampling_settings
            if name in EXPONENTIAL_SHIFT:
                model_sampling = comfy.model_sampling.ModelSamplingFlux(SimpleNamespace(sampling_settings=settings))
            else:
                model_sampling = comfy.model_sampling.ModelSamplingDiscreteFlow(
                    SimpleNamespace(sampling_settings=settings)
                )
            stock = stock_sigmas(model_sampling, "simple", table[name].steps)[:-1]
            close(torch.tensor(table[name].trained()), stock, atol=1e-4)

    def test_klein_has_the_levels_of_flux2scheduler():
        stock = nodes_flux.get_schedule(4, 4096)[:-1]
        close(torch.tensor(profiles.profiles()["flux2-klein"].trained()), stock, atol=1e-5)
