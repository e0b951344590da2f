"""Few-step nodes in the real ComfyUI, on tiny models: against the engine, stock samplers and themselves."""

from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_few_step_nodes_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import comfy.controlnet
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.utils
    import comfy_tiny
    import folder_paths
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    few_step = comfy_host.pack_module("nodes.few_step")
    switch_models = comfy_host.pack_module("nodes.switch_models")
    negative_guidance = comfy_host.pack_module("nodes.negative_guidance")
    doctor = comfy_host.pack_module("nodes.doctor")
    evidence = comfy_host.pack_module("nodes.evidence")
    sampler = comfy_host.pack_module("nodes.sampler")
    comfy_denoiser = comfy_host.pack_module("nodes.comfy_denoiser")
    ours = comfy_host.pack_module("dmd_core.samplers")
    adapters = comfy_host.pack_module("dmd_core.adapters")
    families = comfy_host.pack_module("dmd_core.families")
    lora = comfy_host.pack_module("dmd_core.weights.lora")
    recipes = comfy_host.pack_module("dmd_core.weights.recipe")
    FewStep, FewStepSampler = few_step.FewStep, few_step.FewStepSampler
    NODES = (FewStep, FewStepSampler, switch_models.SwitchModels, negative_guidance.NegativeGuidance, doctor.Doctor)

    def latent(name, batch=1, seed=None, size=8):
        channels, *rest = comfy_tiny.FAMILIES[name].shape
        shape = (batch, channels, *rest[:-2], size, size)
        rng = torch.Generator().manual_seed(seed or 0)
        return {"samples": torch.zeros(shape) if seed is None else torch.randn(shape, generator=rng)}

    def prompts(name, *seeds):
        """Several prompts as one batch."""
        entries = [comfy_tiny.conditioning(name, s)[0] for s in seeds]
        options = dict(entries[0][1])
        if "pooled_output" in options:
            options["pooled_output"] = torch.cat([e[1]["pooled_output"] for e in entries])
        if "attention_mask" in options:
            options["attention_mask"] = torch.cat([e[1]["attention_mask"] for e in entries])
        return [[torch.cat([e[0] for e in entries]), options]]

    def custom(name, out, start, seed=5, cfg=1.0):
        """SamplerCustom with what Few-Step Settings gives."""
        positive = comfy_tiny.conditioning(name, 1)
        return SamplerCustom.execute(
            out[0], True, seed, cfg, positive, comfy_tiny.conditioning(name, 2), out[1], out[2], start
        )[0]["samples"]

    def engine(name, model, profile, steps=0, seed=5, gamma=None):
        """The engine's own loop on the same noise, around the same network."""
        found = few_step.profiles()[profile]
        found = found.at(steps) if steps else found
        with comfy_denoiser.ComfyDenoiser(model) as denoiser, torch.no_grad():
            shape = latent(name)["samples"]
            noise = comfy.sample.prepare_noise(shape, seed)
            size = few_step.pixels(model, latent(name))
            sigmas = found.sigmas(denoiser.schedule, 1.0, *size)
            x = ours.start(denoiser.schedule, noise, sigmas[0])
            rng = torch.Generator().manual_seed(seed + 1)
            gammas = found.gammas(len(sigmas) - 1) if gamma is None else gamma
            x0 = ours.sample_restart(
                denoiser, x, sigmas, comfy_tiny.conditioning(name, 1), rng, gammas, keep=found.keep
            )
            return denoiser.latent_out(x0)

    # --- the sampler --------------------------------------------------------------------------------------------------

    CASES = [
        ("sd15_eps", "dmd2-sdxl-4step", 0),
        ("sd15_eps", "dmd2-sdxl-1step", 0),
        ("sd15_eps", "sdxl-turbo", 3),
        ("sd15_eps", "tcd-sd15-lora", 0),
        ("sd15_v", "hyper-sd15-lora", 0),
        ("flux", "flux-schnell", 0),
        ("flux", "hyper-flux-lora", 0),
        ("sd3", "flash-sd3-lora", 0),
        ("qwen_image", "qwen-lightning-lora", 0),
        ("wan", "fastwan21", 0),
    ]

    @torch.inference_mode()
    @pytest.mark.parametrize(("name", "profile", "steps"), CASES)
    def test_settings_with_sampler_custom_give_the_engines_image(name, profile, steps):
        model = comfy_tiny.patcher(name)
        out = FewStep.execute(model, steps, 1.0, profile, latent(name))
        image = custom(name, out, latent(name))
        expected = engine(name, model, profile, steps)
        torch.testing.assert_close(image, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        if len(out[2]) > 2:  # the control: kept instead of fresh noise, or the other way round
            other = engine(name, model, profile, steps, gamma=1.0 if out[1].gammas[0] == 0 else 0.0)
            assert (image - other).abs().max() > 1e-2 * expected.abs().max()

    def ksampler(model, start, seed=5, scheduler="simple", denoise=1.0, cond=None):
        cond = cond or comfy_tiny.conditioning("sd15_eps", 1)
        noise = comfy.sample.prepare_noise(start["samples"], seed)
        return comfy.sample.sample(
            model, noise, 4, 1.0, "lcm", scheduler, cond, cond, start["samples"], denoise=denoise,
            noise_mask=start.get("noise_mask"), seed=seed,
        )  # fmt: skip

    @torch.inference_mode()
    def test_dmd2_settings_give_what_stock_lcm_and_simple_give_also_with_a_mask():
        model = comfy_tiny.patcher("sd15_eps")
        out = FewStep.execute(model, 0, 1.0, "dmd2-sdxl-4step")
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :4] = 1
        for start in (latent("sd15_eps", 2), latent("sd15_eps", 2) | {"noise_mask": mask}):
            image, stock = custom("sd15_eps", out, start), ksampler(model, start)
            size = stock.abs().max().item()
            torch.testing.assert_close(image, stock, atol=1e-4 * size, rtol=0)
            assert (ksampler(model, start, scheduler="normal") - stock).abs().max() > 1e-2 * size
        kept = latent("sd15_eps", 1, seed=3) | {"noise_mask": mask}
        image = custom("sd15_eps", out, kept)
        torch.testing.assert_close(image[..., 4:], kept["samples"][..., 4:], atol=1e-5, rtol=1e-5)
        assert (image[..., :4] - kept["samples"][..., :4]).abs().max() > 0.05

    @torch.inference_mode()
    def test_masks_of_all_ones_and_all_zeros():
        model, start = comfy_tiny.patcher("sd15_eps"), latent("sd15_eps", 1, seed=3)
        out = FewStep.execute(model, 0, 1.0, "dmd2-sdxl-4step")
        plain = custom("sd15_eps", out, start)
        ones = custom("sd15_eps", out, start | {"noise_mask": torch.ones(1, 1, 8, 8)})
        torch.testing.assert_close(ones, plain, atol=1e-5, rtol=1e-5)
        none = custom("sd15_eps", out, start | {"noise_mask": torch.zeros(1, 1, 8, 8)})
        torch.testing.assert_close(none, start["samples"], atol=1e-5, rtol=1e-5)

    @torch.inference_mode()
    @pytest.mark.parametrize(
        ("name", "profile"), [("sd15_eps", "dmd2-sdxl-4step"), ("sd15_eps", "lcm-lora-sd15"), ("flux", "flux-schnell")]
    )
    @pytest.mark.parametrize("denoise", [0.3, 0.6, 0.9])
    def test_image_to_image_stays_on_the_trained_levels(name, profile, denoise):
        model, start = comfy_tiny.patcher(name), latent(name, 1, seed=3)
        whole = FewStep.execute(model, 0, 1.0, profile)[2]
        out = FewStep.execute(model, 0, denoise, profile)
        trained = whole
        if "lcm" in profile:  # LCM was trained on 50 timesteps, and spreads its steps over them
            table = comfy_denoiser.schedule_of(model.get_model_object("model_sampling"))
            trained = torch.cat([table.sigma(torch.arange(19, 1000, 20)), torch.zeros(1)])
        assert all((trained - s).abs().min() < 1e-4 for s in out[2])
        assert out[2][0] < whole[0]
        # the control: a stock sampler at the same denoise leaves them (0.9 of 4 steps it rounds to all 4)
        if "dmd2" in profile and denoise < 0.9:
            ks = comfy.samplers.KSampler(model, 4, "cpu", "lcm", "simple", denoise, model.model_options)
            assert max((trained - s).abs().min() for s in ks.sigmas) > 1e-2
        image = custom(name, out, start)
        assert image.isfinite().all()
        # less denoise keeps more of the image
        if denoise == 0.3:
            far = custom(name, FewStep.execute(model, 0, 1.0, profile), start)
            assert (image - start["samples"]).pow(2).mean() < (far - start["samples"]).pow(2).mean()

    @torch.inference_mode()
    def test_one_step_starts_with_unit_variance_at_the_network_whatever_the_latent_holds():
        model, seen = comfy_tiny.patcher("sd15_eps"), []
        out = FewStep.execute(model, 0, 1.0, "dmd2-sdxl-1step")
        watched = out[0].clone()

        def watch(apply, args):
            seen.append(args["input"] / (args["timestep"][0] ** 2 + 1) ** 0.5)
            return apply(args["input"], args["timestep"], **args["c"])

        watched.set_model_unet_function_wrapper(watch)
        for start in (latent("sd15_eps", 1, None, 64), latent("sd15_eps", 1, 3, 64)):
            custom("sd15_eps", (watched, out[1], out[2]), start)
        assert len(seen) == 2
        assert seen[0].std().item() == pytest.approx(1.0, abs=0.02)
        assert torch.equal(seen[0], seen[1])
        stock = comfy.samplers.sampler_object("lcm")
        custom("sd15_eps", (watched, stock, out[2]), latent("sd15_eps", 1, None, 64))
        assert seen[2].std().item() == pytest.approx(0.758, abs=0.02)

    @torch.inference_mode()
    def test_a_split_list_of_sigmas_carries_on_where_it_was():
        model = comfy_tiny.patcher("sd15_eps")
        out = FewStep.execute(model, 0, 1.0, "hyper-sd15-lora")  # deterministic
        whole = custom("sd15_eps", out, latent("sd15_eps"))
        half = custom("sd15_eps", (out[0], out[1], out[2][:3]), latent("sd15_eps"))
        positive = comfy_tiny.conditioning("sd15_eps", 1)
        rest = SamplerCustom.execute(out[0], False, 5, 1.0, positive, positive, out[1], out[2][2:], {"samples": half})[
            0
        ]["samples"]
        torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)

    @torch.inference_mode()
    def test_the_one_node_sampler_is_settings_plus_sampler_custom_and_repeats_itself():
        model, start = comfy_tiny.patcher("flux"), latent("flux", 2)
        positive = comfy_tiny.conditioning("flux", 1)
        before = (dict(model.object_patches), str(model.model_options), dict(model.attachments), len(model.patches))
        args = (model, positive, start, 5, 0, 1.0, 0.0, "flux-schnell")
        first, second = FewStepSampler.execute(*args), FewStepSampler.execute(*args)
        assert torch.equal(first[0]["samples"], second[0]["samples"])
        assert torch.equal(
            first[0]["samples"], custom("flux", FewStep.execute(model, 0, 1.0, "flux-schnell", start), start)
        )
        assert before == (
            dict(model.object_patches), str(model.model_options), dict(model.attachments), len(model.patches)
        )  # fmt: skip
        assert start["samples"].abs().max() == 0
        with pytest.raises(ValueError, match="needs a negative prompt"):
            FewStepSampler.execute(model, positive, start, 5, 0, 1.0, 3.0, "flux-schnell")

    class Control(comfy.controlnet.ControlBase):
        """Adds to what the middle of a UNet gives."""

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            begin, end = self.timestep_range
            added = 2.0 if end < float(t[0]) <= begin else 0.0
            return {"input": [], "middle": [torch.full((1, 1, 1, 1), added)], "output": []}

        def inference_memory_requirements(self, dtype):
            return 0

    def controlled(end=1.0):
        control = Control().set_cond_hint(None, 1.0, (0.0, end))
        cond, options = comfy_tiny.conditioning("sd15_eps", 1)[0]
        return [[cond, {**options, "control": control, "control_apply_to_uncond": True}]]

    @torch.inference_mode()
    def test_a_controlnet_works_as_in_the_stock_sampler_and_one_that_ends_early_is_told():
        model, start = comfy_tiny.patcher("sd15_eps"), latent("sd15_eps")

        def one_node(cond):
            return FewStepSampler.execute(model, cond, start, 5, 0, 1.0, 0.0, "dmd2-sdxl-4step")

        image, said = one_node(controlled())[:2]
        stock = ksampler(model, start, cond=controlled())
        torch.testing.assert_close(image["samples"], stock, atol=1e-4 * stock.abs().max().item(), rtol=0)
        plain = one_node(comfy_tiny.conditioning("sd15_eps", 1))[0]["samples"]
        assert (image["samples"] - plain).abs().max() > 1e-2 * plain.abs().max()
        assert "ControlNet" not in said
        assert "ControlNet ends at 80%" in one_node(controlled(0.8))[1]

    # --- recognition --------------------------------------------------------------------------------------------------

    def student_file(folder, model, name="x", steps=2, metadata=True, preset="attention"):
        """A LoRA as the trainer writes it, for this model."""
        net, rng = model.model.diffusion_model, torch.Generator().manual_seed(1)
        bank = adapters.AdapterBank(net, families.detect(net).targets(preset))
        bank.detach()
        bank.new("student", 2, rng)
        state = {k: torch.randn(v.shape, generator=rng) / 4 for k, v in bank.state("student").items()}
        recipe = recipes.Recipe(family="sd15", objective="dmd2", steps=steps, timesteps=(999, 499)[:steps], gamma=1.0)
        names = [n for n, _ in net.named_modules() if n]
        return lora.save_lora(folder, name, state, names, recipe=recipe if metadata else None, dtype="fp32")

    def loaded(model, path, strength=1.0):
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0, lora_metadata=metadata)[0]

    @torch.inference_mode()
    def test_a_student_of_our_trainer_samples_itself_also_under_another_lora(tmp_path):
        with torch.inference_mode(False):
            base = comfy_tiny.patcher("sd15_eps", inference=False)
            path, style = student_file(tmp_path, base), student_file(tmp_path, base, "style", metadata=False)
        model = loaded(base, path)
        out = FewStep.execute(model)
        assert "certain" in out[4]
        assert out[3] == 1.0
        image = custom("sd15_eps", out, latent("sd15_eps"))
        found = few_step.recognise(*evidence.evidence(model, {}, "")).profile
        few_step.profiles()[found.id] = found
        try:
            expected = engine("sd15_eps", model, found.id)
        finally:
            del few_step.profiles()[found.id]
        torch.testing.assert_close(image, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        # the control: the base without the student
        assert (custom("sd15_eps", (base, out[1], out[2]), latent("sd15_eps")) - image).abs().max() > 1e-3
        under = loaded(model, style, 0.7)  # the newer file's metadata hides the older one's
        _, loras = evidence.evidence(under, {}, "")
        assert [e.strength for e in loras] == [1.0, pytest.approx(0.7)]
        assert "certain" in FewStep.execute(under)[4]

    @torch.inference_mode()
    def test_the_graph_names_the_loras_that_the_model_forgets(tmp_path):
        folder_paths.add_model_folder_path("loras", str(tmp_path))
        with torch.inference_mode(False):
            base = comfy_tiny.patcher("sd15_eps", inference=False)
            path = student_file(tmp_path, base, metadata=False, preset="all")
        named = path.rename(tmp_path / "Hyper-SD15-4steps-lora.safetensors")
        folder_paths.filename_list_cache.clear()
        graph = {
            "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
            "2": {"class_type": "LoraLoaderModelOnly",
                  "inputs": {"model": ["1", 0], "lora_name": named.name, "strength_model": 0.8}},
            "3": {"class_type": "DMD_FewStep", "inputs": {"model": ["2", 0]}},
        }  # fmt: skip
        model = loaded(base, named, 0.8)
        match = few_step.recognise(*evidence.evidence(model, graph, "3"))
        assert match.profile is not None, match.reason
        assert (match.profile.id, match.profile.steps, match.sure) == ("hyper-sd15-lora", 4, "likely")
        assert match.strength == pytest.approx(0.8)
        # the control: without the graph nobody knows, and that is said with what to do
        with pytest.raises(ValueError, match="Choose a profile by hand"):
            FewStep.execute(model)

    @torch.inference_mode()
    def test_wrong_pairings_are_said_and_logged_once(caplog):
        few_step.LOGGED.clear()
        model = comfy_tiny.patcher("sd15_eps")
        wrong = ModelSamplingDiscrete().patch(model, "lcm", False)[0]
        out = FewStep.execute(wrong, 0, 1.0, "hyper-sd15-lora")
        assert out[4].count("ModelSamplingDiscrete (lcm)") == 1
        assert FewStep.execute(wrong, 0, 1.0, "hyper-sd15-lora")[4] == out[4]  # queued again: told, not logged
        assert sum("ModelSamplingDiscrete" in r.getMessage() for r in caplog.records) == 1
        right = FewStep.execute(model, 0, 1.0, "hyper-sd15-lora")
        assert "Warning" not in right[4]
        assert "is made for" in FewStep.execute(model, 0, 1.0, "dmd2-sdxl-4step")[4]
        assert torch.equal(right[2], out[2])
        assert "model_sampling" in wrong.object_patches
        caplog.clear()
        args = (model, comfy_tiny.conditioning("sd15_eps", 1), latent("sd15_eps"), 1, 0, 1.0, 7.0, "dmd2-sdxl-4step")
        assert "cfg 7 burns" in FewStepSampler.execute(*args, comfy_tiny.conditioning("sd15_eps", 2))[1]
        with pytest.raises(ValueError, match="flow"):
            FewStep.execute(model, 0, 1.0, "flux-schnell")
        with pytest.raises(ValueError, match="steps"):
            FewStep.execute(model, 3, 1.0, "dmd2-sdxl-1step")

    @pytest.fixture
    def registered(monkeypatch):
        """ComfyUI's table of nodes, as it is when packs are loaded."""
        from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider

        import nodes

        classes = {"BasicScheduler": BasicScheduler, "CFGGuider": CFGGuider, "SamplerCustom": SamplerCustom}
        classes |= {"DMD_FewStep": FewStep, "DMD_NegativeGuidance": negative_guidance.NegativeGuidance}
        for name, cls in classes.items():
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, cls)

    def said_of(monkeypatch, graph):
        """The warnings about samplers of Few-Step Settings, which is node 1 of the graph."""
        graph = {"1": {"class_type": "DMD_FewStep", "inputs": {"model": ["9", 0]}}, **graph}
        monkeypatch.setattr(few_step, "graph_of", lambda _: (graph, "1"))
        text = FewStep.execute(comfy_tiny.patcher("sd15_eps"), 0, 1.0, "dmd2-sdxl-4step")[4]
        said = [line for line in text.splitlines() if line.startswith("Warning")]
        return "\n".join(line for line in said if "is made for" not in line)

    CUSTOM = {"class_type": "SamplerCustom", "inputs": {"model": ["1", 0], "cfg": 1.0, "sigmas": ["s", 0]}}
    KARRAS = {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "karras", "steps": 4}}

    @pytest.mark.parametrize("order", [("c", "s"), ("s", "c")])
    def test_every_sampler_and_scheduler_is_told_in_any_order(order, registered, monkeypatch):
        graph = {"c": CUSTOM, "s": KARRAS}
        assert said_of(monkeypatch, {k: graph[k] for k in order}).count("karras is the wrong scheduler") == 1
        right = {**KARRAS, "inputs": {**KARRAS["inputs"], "scheduler": "simple"}}
        assert "scheduler" not in said_of(monkeypatch, {k: {**graph, "s": right}[k] for k in order})

    def test_two_samplers_are_told_each_its_own(registered, monkeypatch):
        first = {"class_type": "KSampler", "inputs": {"model": ["1", 0], "cfg": 1.0, "scheduler": "simple"}}
        second = {"class_type": "KSampler", "inputs": {"model": ["1", 0], "cfg": 7.0, "scheduler": "simple"}}
        assert "cfg 7 burns" in said_of(monkeypatch, {"a": first, "b": second})
        assert said_of(monkeypatch, {"a": first}) == ""

    def test_what_stands_behind_a_patching_node_or_a_guider_is_told(registered, monkeypatch):
        guidance = {"class_type": "DMD_NegativeGuidance", "inputs": {"model": ["1", 0], "scale": 2.0}}
        words = {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry"}}
        inputs = {"model": ["g", 0], "cfg": 1.0, "negative": ["w", 0], "sigmas": ["s", 0], "sampler": ["e", 0]}
        euler = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
        guider = {"class_type": "CFGGuider", "inputs": {k: inputs[k] for k in ("model", "cfg", "negative")}}
        away = {**KARRAS, "inputs": {**KARRAS["inputs"], "model": ["9", 0]}}  # straight from the loader
        advanced = {"guider": ["c", 0], "sigmas": ["s", 0], "sampler": ["e", 0]}
        samplers = {
            "custom": {"c": {"class_type": "SamplerCustom", "inputs": inputs}},
            "advanced": {"c": guider, "a": {"class_type": "SamplerCustomAdvanced", "inputs": advanced}},
        }
        for nodes_between in samplers.values():
            said = said_of(monkeypatch, {**nodes_between, "g": guidance, "w": words, "s": away, "e": euler})
            assert said.count("karras is the wrong scheduler") == 1, said
            assert said.count("euler keeps the noise") == 1
            assert "negative" not in said, "guidance in between makes the negative prompt count"
        off = {**guidance, "inputs": {**guidance["inputs"], "scale": 0}}
        said = said_of(monkeypatch, {**samplers["custom"], "g": off, "w": words, "s": away, "e": euler})
        assert "The negative prompt is ignored" in said

    def test_a_wrong_sampler_behind_the_node_is_told(registered, monkeypatch):
        model = comfy_tiny.patcher("sd15_eps")
        inputs = {"model": ["1", 0], "cfg": 7.0, "sampler_name": "euler", "scheduler": "karras", "negative": ["3", 0]}
        graph = {
            "1": {"class_type": "DMD_FewStep", "inputs": {"model": ["9", 0]}},
            "2": {"class_type": "KSampler", "inputs": inputs},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry"}},
        }
        monkeypatch.setattr(few_step, "graph_of", lambda _: (graph, "1"))
        said = FewStep.execute(model, 0, 1.0, "dmd2-sdxl-4step")[4]
        for words in (
            "karras is the wrong scheduler",
            "cfg 7 burns",
            "euler keeps the noise",
            "The negative prompt is",
        ):
            assert said.count(words) == 1, said
        inputs |= {"cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "negative": ["9", 1]}
        right = FewStep.execute(model, 0, 1.0, "dmd2-sdxl-4step")[4]
        assert "scheduler" not in right
        assert "burns" not in right

    def test_a_lora_on_an_fp8_base_is_told(tmp_path):
        base = comfy_tiny.patcher("sd15_eps", inference=False)
        model = loaded(base, student_file(tmp_path, base))
        assert "fp8" not in FewStep.execute(model)[4]
        layer = next(m for m in base.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear))
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        assert FewStep.execute(model)[4].count("fp8 base loses small changes") == 1
        assert "fp8" not in FewStep.execute(base, 0, 1.0, "dmd2-sd15-1step")[4], "no LoRA, no trouble"

    # --- negative guidance --------------------------------------------------------------------------------------------

    def run(model, positive, noise, cfg=1.0, negative=None, levels=(0.9, 0.5)):
        """Two deterministic steps, samples independent of each other."""
        sampling = model.get_model_object("model_sampling")
        sigmas = torch.tensor([*(float(sampling.percent_to_sigma(1 - v)) for v in levels), 0.0])
        guider = sampler.guider_of(model, positive, negative or positive, cfg)
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=0,
                             disable_pbar=True)  # fmt: skip

    def noises(name, batch):
        return torch.randn(latent(name, batch)["samples"].shape, generator=torch.Generator().manual_seed(9))

    GUIDED = ["sd15_eps", "sdxl", "sd3", "flux", "flux2", "z_image", "qwen_image", "wan", "anima", "ltxv"]

    @torch.inference_mode()
    @pytest.mark.parametrize("name", GUIDED)
    def test_negative_guidance_is_off_at_zero_works_per_sample_and_leaves_nothing(name):
        model, negative = comfy_tiny.patcher(name), comfy_tiny.conditioning(name, 50)
        noise, batch = noises(name, 4), prompts(name, 1, 2, 3, 4)
        plain = run(model, batch, noise)
        execute = negative_guidance.NegativeGuidance.execute
        assert torch.equal(run(execute(model, negative, 0.0)[0], batch, noise), plain)
        guided = execute(model, negative, 3.0, 2.5, 0.5)[0]
        image = run(guided, batch, noise)
        assert (image - plain).abs().max() > 1e-3 * plain.abs().max()
        for i in range(4):
            alone = run(guided, prompts(name, i + 1), noise[i : i + 1])
            torch.testing.assert_close(alone, image[i : i + 1], atol=2e-5 * image.abs().max().item(), rtol=0)
        assert torch.equal(run(guided, batch, noise), image)
        assert torch.equal(run(model, batch, noise), plain)
        # the control: the prompt itself as negative pushes nowhere
        same = run(execute(model, prompts(name, 1), 3.0)[0], prompts(name, 1), noise[:1])
        torch.testing.assert_close(same, plain[:1], atol=1e-3 * plain.abs().max().item(), rtol=0)

    @torch.inference_mode()
    @pytest.mark.parametrize("name", ["sd15_eps", "flux"])
    def test_negative_guidance_beside_cfg_and_with_prompts_of_other_lengths(name):
        model, noise = comfy_tiny.patcher(name), noises(name, 2)
        positive, uncond = prompts(name, 1, 2), comfy_tiny.conditioning(name, 3)
        guided = negative_guidance.NegativeGuidance.execute(model, comfy_tiny.conditioning(name, 50), 3.0)[0]
        both = run(guided, positive, noise, 3.0, uncond)
        # CFG of the guided prediction: only the prompt's half is guided
        levels = (0.5,)
        cond, plain = run(guided, positive, noise, levels=levels), run(model, uncond, noise, levels=levels)
        mixed = run(guided, positive, noise, 3.0, uncond, levels)
        torch.testing.assert_close(mixed, plain + 3 * (cond - plain), atol=3e-5 * mixed.abs().max().item(), rtol=1e-4)
        assert (both - run(model, positive, noise, 3.0, uncond)).abs().max() > 1e-3
        longer = comfy_tiny.conditioning(name, 50, tokens=33)
        assert run(negative_guidance.NegativeGuidance.execute(model, longer, 3.0)[0], positive, noise).isfinite().all()

    @torch.inference_mode()
    def test_negative_guidance_keeps_to_its_part_of_the_sampling():
        model, noise = comfy_tiny.patcher("flux"), noises("flux", 1)
        positive, negative = prompts("flux", 1), comfy_tiny.conditioning("flux", 50)
        execute = negative_guidance.NegativeGuidance.execute
        late = execute(model, negative, 3.0, 2.5, 0.5, 0.8, 1.0)[0]
        assert torch.equal(run(late, positive, noise), run(model, positive, noise))
        with pytest.raises(ValueError, match="below end"):
            execute(model, negative, 3.0, 2.5, 0.5, 0.8, 0.2)

    # --- several models -----------------------------------------------------------------------------------------------

    def switched(name, first, last, **options):
        out = switch_models.SwitchModels.execute(
            first, last, comfy_tiny.conditioning(name, 1), comfy_tiny.conditioning(name, 2), **options
        )
        start = latent(name)
        return sampler.sample_latent(last, out[0], out[1], out[2], start, 5)["samples"], out

    @torch.inference_mode()
    def test_switching_after_no_steps_is_plain_sampling_to_the_bit():
        first, last = comfy_tiny.patcher("sd15_eps", 1), comfy_tiny.patcher("sd15_eps")
        image, _ = switched("sd15_eps", first, last, first_steps=0, profile="dmd2-sdxl-4step")
        plain = custom("sd15_eps", FewStep.execute(last, 0, 1.0, "dmd2-sdxl-4step"), latent("sd15_eps"))
        assert torch.equal(image, plain)
        headed, _ = switched("sd15_eps", first, last, first_steps=2, profile="dmd2-sdxl-4step")
        assert (headed - plain).abs().max() > 1e-2

    @torch.inference_mode()
    @pytest.mark.parametrize(("name", "profile"), [("sd15_eps", "dmd2-sdxl-4step"), ("wan", "wan22-lightning-lora")])
    @pytest.mark.parametrize("how", [switch_models.HEAD, switch_models.SHARE])
    def test_each_model_does_its_levels_with_its_own_cfg(name, profile, how):
        first, last = comfy_tiny.patcher(name, 1), comfy_tiny.patcher(name)
        options = {"first_steps": 2, "first_cfg": 4.0, "profile": profile, "how": how}
        image, out = switched(name, first, last, **options)
        trained = FewStep.execute(last, 0, 1.0, profile)[2]
        if how == switch_models.SHARE:
            assert torch.equal(out[2], trained)
        else:
            assert len(out[2]) == len(trained) + 1
            torch.testing.assert_close(out[2][2:], trained[1:])
        assert torch.equal(image, switched(name, first, last, **options)[0])

        # the engine's loop around a denoiser that picks by level
        cond, uncond = comfy_tiny.conditioning(name, 1), comfy_tiny.conditioning(name, 2)
        noise = comfy.sample.prepare_noise(latent(name)["samples"], 5)

        def x0(x, sigma, _):
            early = float(sigma[0]) > float(out[2][2]) * 1.001
            with comfy_denoiser.ComfyDenoiser(first if early else last) as denoiser, torch.no_grad():
                positive, negative = denoiser(x, sigma, cond), denoiser(x, sigma, uncond)
            return negative + 4.0 * (positive - negative) if early else positive

        x0.schedule = comfy_denoiser.schedule_of(last.get_model_object("model_sampling"))
        x = ours.start(x0.schedule, noise, out[2][0])
        rng = torch.Generator().manual_seed(6)
        expected = ours.sample_restart(x0, x, out[2], None, rng, out[1].gammas, keep=out[1].keep)
        expected = last.model.process_latent_out(expected)
        torch.testing.assert_close(image, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)

    @torch.inference_mode()
    @pytest.mark.parametrize(("name", "profile"), [("sd15_eps", "dmd2-sdxl-4step"), ("wan", "wan22-lightning-lora")])
    def test_a_boundary_by_noise_level_is_the_cut_by_steps_that_it_implies(name, profile):
        first, last = comfy_tiny.patcher(name, 1), comfy_tiny.patcher(name)
        options = {"first_cfg": 4.0, "profile": profile, "how": switch_models.SHARE}
        levels = FewStep.execute(last, 0, 1.0, profile)[2].tolist()
        images = {}
        for steps in (1, 2, 3):
            level = (levels[steps - 1] + levels[steps]) / 2
            images[steps], out = switched(name, first, last, first_steps=steps, **options)
            by_level, told = switched(name, first, last, first_steps=9, first_until=level, **options)
            assert torch.equal(by_level, images[steps])
            assert f"{steps} steps." in told[3]
            assert torch.equal(told[2], out[2])
        assert not torch.equal(images[1], images[2])
        off, out = switched(name, first, last, first_steps=2, first_until=0.0, **options)
        assert torch.equal(off, images[2])
        assert "down to the noise level" not in out[3]
        plain = custom(name, FewStep.execute(last, 0, 1.0, profile), latent(name))
        above, _ = switched(name, first, last, first_steps=2, first_until=levels[0] * 1.5, **options)
        assert torch.equal(above, plain), "no level is that noisy: the first model has no step"
        with pytest.raises(ValueError, match="nothing is left for the last model"):
            switched(name, first, last, first_until=levels[3] / 2, **options)

    @torch.inference_mode()
    def test_extra_steps_replace_the_students_steps_above_the_boundary():
        first, last = comfy_tiny.patcher("sd15_eps", 1), comfy_tiny.patcher("sd15_eps")
        trained = FewStep.execute(last, 0, 1.0, "dmd2-sdxl-4step")[2]
        options = {"first_steps": 3, "profile": "dmd2-sdxl-4step"}
        _, out = switched("sd15_eps", first, last, first_until=4.0, **options)  # 14.6 and 4.08 are above
        assert len(out[2]) == 3 + len(trained) - 2
        torch.testing.assert_close(out[2][3:], trained[2:])
        assert out[1].gammas == [0.0] * 3 + [1.0] * 2
        # a teacher's step may begin below the boundary, and stays the teacher's
        assert float(out[2][2]) < 4.0
        assert out[0].handovers == [pytest.approx(float(trained[2]))]
        _, none = switched("sd15_eps", first, last, first_until=20.0, **options)
        assert torch.equal(none[2], trained), "no level is that noisy: nothing is replaced"
        one, plain = (switched("sd15_eps", first, last, first_until=u, **options)[0] for u in (5.0, 0.0))
        assert torch.equal(one, plain), "one replaced step is what the node does without a boundary"

    @torch.inference_mode()
    def test_clones_of_one_model_and_three_models_hand_over_and_stay_clean(tmp_path):
        with torch.inference_mode(False):
            base = comfy_tiny.patcher("sd15_eps", inference=False)
            path = student_file(tmp_path, base)
        student, weights = loaded(base, path), {k: v.clone() for k, v in base.model.state_dict().items()}
        options = {"first_steps": 1, "middle_steps": 1, "middle": base, "middle_cfg": 2.0, "how": switch_models.HEAD}
        image, out = switched("sd15_eps", base, student, first_cfg=3.0, profile="dmd2-sdxl-4step", **options)
        assert image.isfinite().all()
        assert "model 3" in out[3]
        student.detach()
        assert all(torch.equal(v, weights[k]) for k, v in base.model.state_dict().items())
        with pytest.raises(ValueError, match="leave at least one"):
            switched("sd15_eps", base, student, first_steps=4, how=switch_models.SHARE, profile="dmd2-sdxl-4step")
        with pytest.raises(ValueError, match="cannot hand over"):
            switched("sd15_eps", comfy_tiny.patcher("flux"), base, how=switch_models.SHARE, profile="dmd2-sdxl-4step")

    @torch.inference_mode()
    def test_negative_guidance_also_works_on_a_model_that_joins_later():
        name = "sd15_eps"
        first, last = comfy_tiny.patcher(name, 1), comfy_tiny.patcher(name)
        guided = negative_guidance.NegativeGuidance.execute(last, comfy_tiny.conditioning(name, 50), 3.0)[0]
        options = {"first_steps": 1, "how": switch_models.SHARE, "profile": "dmd2-sdxl-4step"}
        plain, image = (switched(name, first, m, **options)[0] for m in (last, guided))
        assert (plain - image).abs().max() > 1e-3

    # --- the doctor ---------------------------------------------------------------------------------------------------

    @pytest.fixture
    def shelf(tmp_path):
        folder = tmp_path / "shelf"
        folder.mkdir()
        known = folder_paths.folder_names_and_paths["loras"]
        folder_paths.folder_names_and_paths["loras"] = ([str(folder)], known[1])
        folder_paths.filename_list_cache.clear()
        yield folder
        folder_paths.folder_names_and_paths["loras"] = known
        folder_paths.filename_list_cache.clear()

    def peft(path, shapes):
        from safetensors.torch import save_file

        rng, state = torch.Generator().manual_seed(0), {}
        for name, (out, width) in shapes.items():
            state[f"unet.{name}.lora_A.weight"] = torch.randn(2, width, generator=rng)
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, 2, generator=rng)
        save_file(state, path)

    def test_a_lora_that_loads_half_is_told_and_its_copy_loads_in_full(shelf):
        model = comfy_tiny.patcher("sd15_eps")
        block = "down_blocks.0.attentions.0.transformer_blocks.0."
        shapes = {f"{block}attn2.to_k": (32, 48), f"{block}attn2.to_v": (32, 48), f"{block}ff.net.2": (32, 128)}
        peft(shelf / "half.safetensors", shapes)
        out = doctor.Doctor.execute("loras/half.safetensors", doctor.COPY, model=model)
        assert "On this BaseModel: 1 of 3 layers load" in out[0], out[0]
        copy = Path(out[1])
        assert copy.parent == shelf
        assert copy.name == "half_repaired_00001.safetensors"
        assert "3 of 3 layers load" in doctor.Doctor.execute(f"loras/{copy.name}", model=model)[0]

        def patched(file):
            tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
            return len(comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0].patches)

        assert (patched(shelf / "half.safetensors"), patched(copy)) == (1, 3)

    def test_files_that_must_not_be_opened_are_refused_in_words(shelf):
        (shelf / "page.safetensors").write_text("<html>not found</html>")
        (shelf / "huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{" + b" " * 50)
        (shelf / "code.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/dmd_owned'\ntR.")
        folder_paths.filename_list_cache.clear()
        for name, word in [("page.safetensors", "web page"), ("huge.safetensors", "cut off"), ("code.pt", "pickle")]:
            out = doctor.Doctor.execute(f"loras/{name}", doctor.COPY)
            assert out[0].startswith("Refused:")
            assert word in out[0]
        assert not Path("/tmp/dmd_owned").exists()
        assert len(list(shelf.iterdir())) == 3  # nothing was written
        for wild in ("loras/../../etc/passwd", "/etc/passwd", "vae/x.safetensors", "loras/absent.safetensors"):
            with pytest.raises(ValueError, match="choose one of the list"):
                doctor.Doctor.execute(wild)

    # --- all of them --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("node", NODES)
    def test_schemas_are_whole(node):
        schema = node.GET_SCHEMA()
        assert schema.node_id.startswith("DMD_")
        assert schema.category.startswith("DMD/")
        assert schema.description
        assert schema.search_aliases
        assert all(i.tooltip for i in schema.inputs)
        assert node.GET_NODE_INFO_V1()["display_name"] == schema.display_name
