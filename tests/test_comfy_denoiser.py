"""ComfyDenoiser beyond the contract: refusals, prompts, schedules, features, quantised weights, being unloaded."""

from pathlib import Path
from types import SimpleNamespace

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_native_denoiser_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.model_management
    import comfy.model_sampling
    import comfy.sd
    import comfy_tiny
    import contract
    import safetensors.torch

    pack = comfy_host.pack_module("nodes.comfy_denoiser")
    conds = comfy_host.pack_module("nodes.comfy_conds")
    autograd = comfy_host.pack_module("nodes.comfy_autograd")
    probe = comfy_host.pack_module("nodes.comfy_probe")
    adapters = comfy_host.pack_module("dmd_core.adapters")
    core_conditioning = comfy_host.pack_module("dmd_core.conditioning")
    core_features = comfy_host.pack_module("dmd_core.features")
    core_schedule = comfy_host.pack_module("dmd_core.schedule")

    def prompt(family, seed=1, tokens=comfy_tiny.TOKENS):
        return conds.conds_from(comfy_tiny.conditioning(family, seed, tokens))[0]

    def latent(family, n=1):
        return torch.randn(n, *comfy_tiny.FAMILIES[family].shape, generator=torch.Generator().manual_seed(9))

    def test_prompts_of_different_length_are_computed_as_if_alone():
        short, long = prompt("z_image", 1, tokens=7), prompt("z_image", 2, tokens=20)
        x, sigma = latent("z_image", 2), torch.tensor([0.9, 0.4])
        with pack.ComfyDenoiser(comfy_tiny.patcher("z_image")) as denoiser, torch.no_grad():
            both = denoiser(x, sigma, core_conditioning.cat([short, long]))
            alone = torch.cat([denoiser(x[:1], sigma[:1], short), denoiser(x[1:], sigma[1:], long)])
            assert torch.equal(both, alone)
            # the control: padded as one batch, the short prompt means something else
            padded = core_conditioning.Cond(core_conditioning.pad_tokens(short.cross, 20))
            assert contract.relative(denoiser(x[:1], sigma[:1], padded), alone[:1]) > 1e-3

    def test_one_prompt_serves_a_whole_batch():
        x, sigma = latent("flux", 3), torch.tensor([0.9, 0.5, 0.2])
        with pack.ComfyDenoiser(comfy_tiny.patcher("flux")) as denoiser, torch.no_grad():
            one = prompt("flux")
            three = core_conditioning.cat([one, one, one])
            assert torch.equal(denoiser(x, sigma, one), denoiser(x, sigma, three))

    def test_a_list_of_conditioning_is_not_taken_for_a_batch():
        pair = comfy_tiny.conditioning("sd3", 1) + comfy_tiny.conditioning("sd3", 2)
        assert len(conds.conds_from(pair)) == 2
        with pack.ComfyDenoiser(comfy_tiny.patcher("sd3")) as denoiser:
            with pytest.raises(ValueError, match="averages the entries"):
                denoiser(latent("sd3"), torch.tensor([0.5]), pair)

    def test_conditioning_with_areas_or_controlnets_is_refused():
        entry = comfy_tiny.conditioning("sd3", 1)[0]
        with pytest.raises(ValueError, match="'control'"):
            conds.cond_from([entry[0], {**entry[1], "control": object()}])

    def test_features_are_read_with_early_exit_and_carry_gradients():
        with pack.ComfyDenoiser(comfy_tiny.patcher("flux"), checkpoint_blocks=True) as denoiser:
            params = list(denoiser.bank.new("student", 2).parameters())
            x, sigma, cond = latent("flux"), torch.tensor([0.7]), prompt("flux")
            ran = []
            handle = denoiser.net.final_layer.register_forward_hook(lambda *_: ran.append(1))
            with denoiser.bank.use(student=1.0):
                found = core_features.features(
                    denoiser.net, ["double_blocks.1", "single_blocks.0"], lambda: denoiser(x, sigma, cond)
                )
            handle.remove()
            assert not ran
            grads = torch.autograd.grad(found[1].square().sum(), params, allow_unused=True)
            assert sum(g is not None and g.abs().max() > 0 for g in grads) > 10
            assert denoiser(x, sigma, cond).isfinite().all()

    def test_convolutions_carry_adapters_too():
        linear_or_conv = lambda _, m: adapters.is_linear(m) or isinstance(m, torch.nn.Conv2d)  # noqa: E731
        model = comfy_tiny.patcher("sd15_eps")
        with pack.ComfyDenoiser(model, targets=linear_or_conv, checkpoint_blocks=True) as denoiser:
            case = contract.Case(
                name="sd15",
                denoiser=denoiser,
                bank=denoiser.bank,
                shape=(1, 4, 16, 16),
                sigmas=(2.0, 2.0),
                conds=(prompt("sd15_eps"),) * 2,
                both=prompt("sd15_eps"),
                host=None,
            )
            object.__setattr__(case, "sigma", lambda: torch.tensor([2.0]))
            assert any(isinstance(m, torch.nn.Conv2d) for m in denoiser.bank.layers.values())
            with case.sets("on") as params:
                assert max(contract.gradient_errors(case, params["on"], {"on": 1.0})) < 3e-3

    def test_a_retained_graph_can_be_walked_twice():
        with pack.ComfyDenoiser(comfy_tiny.patcher("sd3"), checkpoint_blocks=True) as denoiser:
            params = list(denoiser.bank.new("student", 2).parameters())
            with denoiser.bank.use(student=1.0):
                loss = denoiser(latent("sd3"), torch.tensor([0.7]), prompt("sd3")).square().sum()
            first = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            second = torch.autograd.grad(loss, params, allow_unused=True)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)

    def test_a_model_pushed_out_by_another_is_loaded_again_with_its_adapters():
        x, sigma, cond = latent("sd3"), torch.tensor([0.7]), prompt("sd3")
        with pack.ComfyDenoiser(comfy_tiny.patcher("sd3")) as denoiser:
            denoiser.bank.new("student", 2)
            for adapter in denoiser.bank.sets["student"].values():
                adapter.up.data.fill_(0.05)
            with denoiser.bank.use(student=1.0), torch.no_grad():
                before = denoiser(x, sigma, cond)
                comfy.model_management.unload_all_models()
                denoiser.patcher.cleanup()
                assert not any(m._forward_hooks for m in denoiser.bank.layers.values())
                assert torch.equal(denoiser(x, sigma, cond), before)

    def test_an_error_inside_leaves_the_model_clean():
        model = comfy_tiny.patcher("flux")
        interrupt = comfy.model_management.InterruptProcessingException
        with pytest.raises(interrupt):
            with pack.ComfyDenoiser(model, checkpoint_blocks=True):
                raise interrupt
        assert comfy.model_management.in_training is False
        assert model.model.current_patcher is None
        assert not any(m._forward_hooks or "forward" in vars(m) for m in model.model.modules())

    def test_a_closed_denoiser_says_so():
        denoiser = pack.ComfyDenoiser(comfy_tiny.patcher("sd3"))
        with pytest.raises(RuntimeError, match="is closed"):
            denoiser(latent("sd3"), torch.tensor([0.7]), prompt("sd3"))

    @pytest.mark.parametrize("module", ["custom_nodes.ComfyUI-GGUF.ops", "nunchaku.models.transformer_flux"])
    def test_foreign_networks_are_refused_in_one_sentence(module):
        model = comfy_tiny.patcher("sd3")
        foreign = type("Linear", (torch.nn.Linear,), {"__module__": module})
        model.model.diffusion_model.extra = foreign(2, 2)
        with pytest.raises(ValueError, match="cannot be trained") as error:
            pack.ComfyDenoiser(model)
        assert "\n" not in str(error.value)

    def test_anything_but_a_model_is_refused():
        with pytest.raises(ValueError, match="without a diffusion network"):
            pack.ComfyDenoiser(SimpleNamespace(model=None))

    def test_the_probe_passes_sound_families_and_refuses_wrong_gradients(monkeypatch):
        shape = (1, *comfy_tiny.FAMILIES["flux"].shape)
        with pack.ComfyDenoiser(comfy_tiny.patcher("flux"), checkpoint_blocks=True) as denoiser:
            assert probe.check_trainable(denoiser, shape, prompt("flux")) < 3e-3
            assert not denoiser.bank.sets
            with monkeypatch.context() as patch:
                patch.setattr(pack, "input_savers", lambda net: ())
                with pytest.raises(ValueError, match="modified by an inplace operation"):
                    probe.check_trainable(denoiser, shape, prompt("flux"))
                assert probe.probe(denoiser, shape, prompt("flux")) > 0.01  # what recomputation hides from autograd
            with monkeypatch.context() as patch:
                cut = lambda *a, **k: denoiser_call(denoiser, *a, **k).detach().requires_grad_()  # noqa: E731
                denoiser_call = pack.ComfyDenoiser.__call__
                patch.setattr(pack.ComfyDenoiser, "__call__", lambda self, *a: cut(*a))
                with pytest.raises(ValueError, match="no finite gradient"):
                    probe.check_trainable(denoiser, shape, prompt("flux"))

    def test_control_without_a_kitchen_backward_fused_operators_do_not_differentiate():
        fused = [op for op in autograd.register_kitchen_backward() if "rms_rope_split_half" in op]
        assert fused
        definition = torch._library.custom_ops.OPDEFS[fused[0]]
        backward, definition._backward_fn = definition._backward_fn, None
        try:
            with pack.ComfyDenoiser(comfy_tiny.patcher("anima")) as denoiser:
                with pytest.raises(ValueError, match="backward pass fails"):
                    probe.check_trainable(denoiser, (1, *comfy_tiny.FAMILIES["anima"].shape), prompt("anima"))
        finally:
            definition._backward_fn = backward

    @pytest.mark.parametrize("family", comfy_tiny.FAMILIES)
    def test_the_schedule_noises_as_the_host_does(family):
        sampling = comfy_tiny.patcher(family, inference=False).get_model_object("model_sampling")
        schedule = pack.schedule_of(sampling)
        assert type(schedule).__name__ in ("Discrete", "Flow", "EDM")
        x0, eps = torch.randn(2, 5, 3, 3).unbind()
        for percent in (0.05, 0.5, 0.95):
            level = torch.tensor([sampling.percent_to_sigma(percent)]).repeat(5)
            host = sampling.noise_scaling(level, eps.clone(), x0.clone())
            torch.testing.assert_close(core_schedule.add_noise(schedule, x0, eps, level), host, rtol=0, atol=1e-6)
        other = pack.HostSchedule(sampling)
        torch.testing.assert_close(torch.stack(other.coeffs(level)), torch.stack(schedule.coeffs(level)))
        torch.testing.assert_close(schedule.sigma_max, float(sampling.sigma_max), rtol=1e-4, atol=0)

    def test_other_schedules_go_through_comfyui_and_image_to_image_models_are_refused():
        cs = comfy.model_sampling
        cosmos = type("Sampling", (cs.ModelSamplingCosmosRFlow, cs.COSMOS_RFLOW), {})()
        schedule = pack.schedule_of(cosmos)
        assert isinstance(schedule, pack.HostSchedule)
        levels = schedule.sample(64, torch.Generator().manual_seed(0))
        assert levels.min() > 0
        assert levels.max() <= schedule.sigma_max
        with pytest.raises(ValueError, match="does not start from noise"):
            pack.schedule_of(type("Sampling", (cs.ModelSamplingDiscreteFlow, cs.IMG_TO_IMG_FLOW), {})())

    def test_latents_go_in_and_out_and_gain_a_frame_axis_where_the_family_has_one():
        wan, sdxl = (pack.ComfyDenoiser(comfy_tiny.patcher(f)) for f in ("wan", "sdxl"))
        assert wan.latent_shape(128, 64, frames=5) == (16, 2, 8, 16)
        assert sdxl.latent_shape(128, 64) == (4, 8, 16)
        image = torch.randn(1, 16, 8, 8)
        assert wan.latent_in(image).shape == (1, 16, 1, 8, 8)
        torch.testing.assert_close(wan.latent_out(wan.latent_in(image))[:, :, 0], image)
        torch.testing.assert_close(sdxl.latent_in(torch.ones(1, 4, 2, 2)).mean().item(), 0.13025)

    @pytest.fixture
    def fp8_flux(tmp_path):
        """A tiny Flux file with scaled fp8 weights, through ComfyUI's own detection and loader."""
        state = comfy_tiny.patcher("flux", inference=False).model.diffusion_model.state_dict()
        marked = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        out = {}
        for key, value in state.items():
            if value.ndim == 2 and "blocks" in key:
                scale = value.abs().max() / 448
                out[key] = (value / scale).to(torch.float8_e4m3fn)
                out[key.replace(".weight", ".weight_scale")] = scale.float()
                out[key.replace(".weight", ".comfy_quant")] = marked.clone()
            else:
                out[key] = value.contiguous().clone()
        file = tmp_path / "tiny_fp8.safetensors"
        safetensors.torch.save_file(out, file)
        with torch.inference_mode():
            return comfy.sd.load_diffusion_model(str(file))

    def test_quantised_weights_train_through_their_own_backward(fp8_flux):
        quantised = [m for m in fp8_flux.model.modules() if type(m).__name__ == "Linear" and hasattr(m, "quant_format")]
        assert quantised, "the file was not loaded as a quantised model"
        with pack.ComfyDenoiser(fp8_flux, checkpoint_blocks=True) as denoiser:
            assert any(m is quantised[0] for m in denoiser.bank.layers.values())
            assert probe.check_trainable(denoiser, (1, 16, 16, 16), prompt("flux")) < 0.25
