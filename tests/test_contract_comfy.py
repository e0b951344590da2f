"""The contract on ComfyUI's native models, tiny and random: eleven families, with and without block checkpointing."""

from contextlib import nullcontext
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_contract_holds_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    # exact agreement needs both sides on one attention function; training takes PyTorch's
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.model_management
    import comfy.model_patcher
    import comfy.sample
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy_tiny
    import contract

    pack = comfy_host.pack_module("nodes.comfy_denoiser")
    conds = comfy_host.pack_module("nodes.comfy_conds")
    autograd = comfy_host.pack_module("nodes.comfy_autograd")
    core_conditioning = comfy_host.pack_module("dmd_core.conditioning")

    VP, FLOW = (5.0, 0.6), (0.9, 0.3)
    # in training LTX takes an unfused norm: the last bits differ
    HOST_TOLERANCE = {"ltxv": 1e-5}
    SIGMAS = {"sd15_eps": VP, "sd15_v": VP, "sdxl": VP}

    @torch.inference_mode()
    def host_x0(model, x, sigma, conditioning):
        """As KSampler computes it, without anything of ours."""
        comfy.model_management.load_models_gpu([model])
        model.pre_run()
        try:
            prepared = comfy.samplers.process_conds(
                model.model,
                x,
                {"positive": comfy.sampler_helpers.convert_cond(conditioning)},
                x.device,
                latent_image=torch.zeros_like(x),
                seed=0,
                latent_shapes=[x.shape],
            )["positive"]
            options = comfy.model_patcher.create_model_options_clone(model.model_options)
            return comfy.samplers.calc_cond_batch(model.model, [prepared], x, sigma, options)[0].clone()
        finally:
            model.cleanup()
            model.detach()

    @torch.inference_mode()
    def sampled(model, family):
        """Two steps of KSampler's euler with guidance."""
        shape = (1, *comfy_tiny.FAMILIES[family].shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        positive, negative = (comfy_tiny.conditioning(family, s) for s in (1, 2))
        latent = torch.zeros(shape)
        return comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=3
        ).clone()

    def make_case(family, denoiser, model=None):
        tiny = comfy_tiny.FAMILIES[family]
        raw = [comfy_tiny.conditioning(family, s) for s in (1, 2)]
        singles = tuple(conds.conds_from(c)[0] for c in raw)
        sigmas = SIGMAS.get(family, FLOW)
        case = contract.Case(
            name=family,
            denoiser=denoiser,
            bank=denoiser.bank,
            shape=(2, *tiny.shape),
            sigmas=sigmas,
            conds=singles,
            both=core_conditioning.cat(singles),
            host_tolerance=HOST_TOLERANCE.get(family, 0.0),
            host=lambda _x, _sigma, cond: reference[id(cond)],
        )
        x, sigma = case.x(), case.sigma()
        reference = {
            id(c): host_x0(model, x[i : i + 1], sigma[i : i + 1], raw[i]) for i, c in enumerate(singles) if model
        }
        return case

    # first, while no other denoiser is open
    @pytest.mark.parametrize("family", comfy_tiny.FAMILIES)
    def test_a_model_samples_the_same_bits_before_and_after_training(family):
        model = comfy_tiny.patcher(family)
        before = sampled(model, family)
        with pack.ComfyDenoiser(model, checkpoint_blocks=True) as denoiser:
            case = make_case(family, denoiser)
            bare = case.x0()
            with case.sets("student") as params:
                with denoiser.bank.use(student=1.0):
                    loss = denoiser(case.x(), case.sigma(), case.both).square().mean()
                torch.autograd.grad(loss, params["student"], allow_unused=True)
            assert torch.equal(case.x0(), bare)
        assert comfy.model_management.in_training is False
        assert not any(m._forward_hooks for m in model.model.modules())
        assert not any("forward" in vars(m) for m in model.model.modules())
        assert torch.equal(sampled(model, family), before)

    CASES = [(family, checkpointed) for family in comfy_tiny.FAMILIES for checkpointed in (False, True)]

    @pytest.fixture(scope="module", params=CASES, ids=lambda c: c[0] + "_checkpointed" * c[1])
    def case(request):
        family, checkpoint_blocks = request.param
        model = comfy_tiny.patcher(family)
        denoiser = pack.ComfyDenoiser(model, checkpoint_blocks=checkpoint_blocks)
        case = make_case(family, denoiser, model)
        with denoiser:
            yield case

    @pytest.mark.parametrize("check", contract.CHECKS, ids=lambda c: c.__name__)
    def test_contract(case, check):
        if case.name.startswith("anima") and check is contract.gradients_reach_only_the_active_set:
            pytest.xfail("fewer than 70 % of Anima's adapters get a gradient from plain prompts; not yet explained")
        check(case)

    # What the checks are worth: without each answer, the gradient is wrong or missing.

    def errors_of(family, checkpoint_blocks, at_backward=None):
        denoiser = pack.ComfyDenoiser(comfy_tiny.patcher(family), checkpoint_blocks=checkpoint_blocks)
        case = make_case(family, denoiser)
        with denoiser, case.sets("on", "other") as params:
            return max(contract.gradient_errors(case, params["on"], {"on": 1.0}, at_backward))

    def test_control_flux_without_kept_inputs_is_silently_wrong(monkeypatch):
        monkeypatch.setattr(pack, "input_savers", lambda net: ())
        assert errors_of("flux", checkpoint_blocks=True) > 0.02
        with pytest.raises(RuntimeError, match="inplace operation"):
            errors_of("flux", checkpoint_blocks=False)

    def test_control_flux_blocks_without_cloned_inputs_are_wrong(monkeypatch):
        monkeypatch.setattr(autograd, "fresh", lambda value: value)
        try:
            error = errors_of("flux", checkpoint_blocks=True)
        except RuntimeError:  # newer versions of torch notice the write
            error = 1.0
        assert error > 0.02

    def test_control_checkpointing_that_forgets_the_adapter_mix_is_wrong(monkeypatch):
        forgetful = lambda self: (nullcontext(), autograd.KeepInputs())  # noqa: E731
        monkeypatch.setattr(pack.ComfyDenoiser, "_recompute_contexts", forgetful)
        assert errors_of("sd3", checkpoint_blocks=True) < 3e-3
        assert errors_of("sd3", checkpoint_blocks=True, at_backward={"other": 1.0}) > 0.02

    def test_control_weights_left_in_inference_mode_have_no_backward(monkeypatch):
        monkeypatch.setattr(pack, "own_weights", lambda model, device: None)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            errors_of("sd3", checkpoint_blocks=False)
