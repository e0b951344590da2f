"""The fast path in the real ComfyUI, on tiny models: what it changes, what it leaves, and when it says no."""

from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_fast_path_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import comfy.taesd.taesd
    import comfy.utils
    import comfy_tiny
    import folder_paths
    from comfy_execution.graph_utils import ExecutionBlocker

    import nodes

    fast_path = comfy_host.pack_module("nodes.fast_path")
    few_step = comfy_host.pack_module("nodes.few_step")
    negative_guidance = comfy_host.pack_module("nodes.negative_guidance")
    OFF, LAYOUT, COMPILE = fast_path.OFF, fast_path.LAYOUT, fast_path.COMPILE
    PROFILES = {"sd15_eps": "dmd2-sdxl-4step", "flux": "flux-schnell"}

    def sample(model, name, fast, seed=3, cfg=0.0):
        channels, *rest = comfy_tiny.FAMILIES[name].shape
        start = {"samples": torch.zeros(1, channels, *rest[:-2], 8, 8)}
        positive, negative = comfy_tiny.conditioning(name, 1), comfy_tiny.conditioning(name, 2)
        return few_step.FewStepSampler.execute(
            model, positive, start, seed, 0, 1.0, cfg, PROFILES[name], negative, fast
        )

    def close(image, plain):
        torch.testing.assert_close(image, plain, atol=1e-4 * plain.abs().max().item(), rtol=0)

    def kernels(model):
        return [m.weight for m in model.model.diffusion_model.modules() if isinstance(m, torch.nn.Conv2d)]

    def last(kernel):
        """A 1 x 1 kernel is both at once."""
        return kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()

    def watched(model, seen):
        """What the network's call finds, by a hook on the clone."""
        model = model.clone()

        def watch(apply, args):
            seen.append((sum(map(last, kernels(model))), len(args["input"])))
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(watch)
        return model

    @torch.inference_mode()
    def test_channels_last_holds_inside_a_run_and_not_after_it():
        model, seen = comfy_tiny.patcher("sd15_eps"), []
        before = [k.clone() for k in kernels(model)]
        plain = sample(watched(model, seen), "sd15_eps", OFF)[0]["samples"]
        assert [n for n, _ in seen] == [0] * 4
        out = sample(watched(model, seen), "sd15_eps", LAYOUT)
        assert min(n for n, _ in seen[4:]) > 5
        close(out[0]["samples"], plain)
        assert not any(map(last, kernels(model)))
        assert all(torch.equal(a, b) for a, b in zip(before, kernels(model), strict=True))
        assert torch.equal(sample(model, "sd15_eps", OFF)[0]["samples"], plain)

    @torch.inference_mode()
    def test_a_cancelled_run_leaves_the_layout_as_it_was():
        model = comfy_tiny.patcher("sd15_eps")

        def cancel(apply, args):
            assert any(map(last, kernels(model)))
            raise RuntimeError("cancelled")

        stopped = model.clone()
        stopped.set_model_unet_function_wrapper(cancel)
        with pytest.raises(RuntimeError, match="cancelled"):
            sample(stopped, "sd15_eps", LAYOUT)
        assert not any(map(last, kernels(model)))

    @torch.inference_mode()
    def test_a_transformer_has_no_use_of_it_and_that_is_said():
        model = comfy_tiny.patcher("flux")
        out = sample(model, "flux", LAYOUT)
        assert "is for UNets" in out[1]
        assert torch.equal(out[0]["samples"], sample(model, "flux", OFF)[0]["samples"])

    @pytest.fixture
    def counted(monkeypatch):
        """torch.compile that counts its compilations and makes nothing of the graphs."""
        import torch._dynamo

        torch._dynamo.reset()
        made = []

        def backend(graph, _inputs, **_options):
            made.append(graph)
            return graph.forward

        monkeypatch.setattr(fast_path, "BACKEND", backend)
        yield made
        torch._dynamo.reset()

    @torch.inference_mode()
    @pytest.mark.parametrize("name", PROFILES)
    def test_compiled_draws_the_same_once_for_all_seeds_and_says_what_it_costs(name, counted):
        model = comfy_tiny.patcher(name)
        plain = sample(model, name, OFF)[0]["samples"]
        assert counted == []
        out = sample(model, name, COMPILE)
        assert "first run at each image size takes a minute" in out[1]
        first = len(counted)
        assert first >= 1
        close(out[0]["samples"], plain)
        assert not torch.equal(sample(model, name, COMPILE, seed=4)[0]["samples"], plain)
        assert len(counted) == first
        assert torch.equal(sample(model, name, OFF)[0]["samples"], plain)
        assert "OptimizedModule" not in {type(m).__name__ for m in model.model.modules()}

    @torch.inference_mode()
    def test_blocks_of_a_transformer_share_their_compilation(counted):
        model = comfy_tiny.patcher("flux")
        names = fast_path.blocks(model.model.diffusion_model)
        assert names == [f"diffusion_model.{k}_blocks.{i}" for k in ("double", "single") for i in (0, 1)]
        sample(model, "flux", COMPILE)
        assert len(counted) < len(names) * 4, "as many as blocks and steps: nothing was shared"

    @torch.inference_mode()
    def test_what_works_inside_the_layers_is_not_compiled_away(counted):
        model = comfy_tiny.patcher("sd15_eps")
        guided = negative_guidance.NegativeGuidance.execute(model, comfy_tiny.conditioning("sd15_eps", 50), 3.0)[0]
        out = sample(guided, "sd15_eps", COMPILE)
        assert "Not compiled: another node works inside its layers" in out[1]
        assert counted == []
        assert torch.equal(out[0]["samples"], sample(guided, "sd15_eps", OFF)[0]["samples"])
        assert not torch.equal(out[0]["samples"], sample(model, "sd15_eps", OFF)[0]["samples"])

    def test_another_word_is_refused():
        with pytest.raises(ValueError, match="channels last"):
            fast_path.faster(comfy_tiny.patcher("sd15_eps"), "turbo")

    @torch.inference_mode()
    @pytest.mark.parametrize("name", PROFILES)
    def test_cond_and_uncond_are_one_batch(name):
        seen = []
        sample(watched(comfy_tiny.patcher(name), seen), name, OFF, cfg=3.0)
        assert [b for _, b in seen] == [2] * 4
        seen.clear()  # the control: without guidance there is nothing to join
        sample(watched(comfy_tiny.patcher(name), seen), name, OFF)
        assert [b for _, b in seen] == [1] * 4

    # --- the tiny VAE -------------------------------------------------------------------------------------------------

    GRAPH = {
        "7": {"class_type": "DMD_FewStep", "inputs": {"model": ["1", 0]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["7", 5]}},
    }

    @pytest.fixture
    def approximations(tmp_path):
        known = folder_paths.folder_names_and_paths["vae_approx"]
        folder_paths.folder_names_and_paths["vae_approx"] = ([str(tmp_path)], known[1])
        folder_paths.filename_list_cache.clear()
        yield tmp_path
        folder_paths.folder_names_and_paths["vae_approx"] = known
        folder_paths.filename_list_cache.clear()

    @torch.inference_mode()
    def test_a_tiny_vae_that_is_there_decodes_what_is_wired_to_it(approximations):
        model = comfy_tiny.patcher("sd15_eps")
        missing = fast_path.tiny_vae(model, GRAPH, "7", 5)
        assert isinstance(missing, ExecutionBlocker)
        assert "taesd is not in models/vae_approx" in missing.message
        tiny, rng = comfy.taesd.taesd.TAESD(latent_channels=4), torch.Generator().manual_seed(1)
        for part, net in (("encoder", tiny.taesd_encoder), ("decoder", tiny.taesd_decoder)):
            weights = {k: torch.randn(v.shape, generator=rng) / 20 for k, v in net.state_dict().items()}
            comfy.utils.save_torch_file(weights, str(approximations / f"taesd_{part}.safetensors"))
        folder_paths.filename_list_cache.clear()
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        image = fast_path.tiny_vae(model, GRAPH, "7", 5).decode(latent)
        assert image.shape == (1, 64, 64, 3)
        assert image.std() > 1e-3
        assert torch.equal(image, nodes.VAELoader().load_vae("taesd")[0].decode(latent))
        # the control: a model of another family has no use of these files
        assert "taesdxl is not" in fast_path.tiny_vae(comfy_tiny.patcher("sdxl"), GRAPH, "7", 5).message
        assert fast_path.tiny_vae(model, GRAPH, "7", 4) is None, "nobody asked for it"
        assert fast_path.tiny_vae(model, {}, "7", 5) is None

    def test_a_family_without_a_tiny_vae_says_so(monkeypatch):
        model = comfy_tiny.patcher("sd15_eps")
        monkeypatch.setattr(model.get_model_object("latent_format"), "taesd_decoder_name", None)
        assert "no tiny VAE is known" in fast_path.tiny_vae(model, GRAPH, "7", 5).message
