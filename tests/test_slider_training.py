"""Train Slider and Discover Sliders in the real ComfyUI, on tiny random models of its families."""

import logging
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_sliders_are_trained_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.clip_vision
    import comfy.model_management as mm
    import comfy.sample
    import comfy.sd
    import comfy_tiny
    import folder_paths
    import slider_host
    from comfy_execution.graph_utils import ExecutionBlocker

    import nodes

    training = comfy_host.pack_module("nodes.train_slider")
    discovery = comfy_host.pack_module("nodes.discover_sliders")
    slider_run = comfy_host.pack_module("nodes.slider_run")
    slider_files = comfy_host.pack_module("nodes.slider_files")
    slider_eyes = comfy_host.pack_module("nodes.slider_eyes")
    comfy_source = comfy_host.pack_module("nodes.comfy_source")
    mix = comfy_host.pack_module("nodes.mix_sliders")
    save = comfy_host.pack_module("nodes.save").Save
    doctor = comfy_host.pack_module("nodes.doctor")
    inspect_run = comfy_host.pack_module("nodes.inspect_run").InspectRun
    runs = comfy_host.pack_module("dmd_core.runs")
    card = comfy_host.pack_module("dmd_core.sliders.card")
    settings = comfy_host.pack_module("dmd_core.sliders.settings")
    families = comfy_host.pack_module("dmd_core.families")
    lora_files = comfy_host.pack_module("dmd_core.weights.lora")
    recipes = comfy_host.pack_module("dmd_core.weights.recipe")
    TrainSlider, DiscoverSliders = training.TrainSlider, discovery.DiscoverSliders
    FIVE = ("sd15_eps", "sdxl", "sd3", "flux", "z_image")
    PAIRS = {"made_from": "image pairs", "prompt": "a dog"}

    @pytest.fixture(autouse=True)
    def place(tmp_path, monkeypatch):
        """ComfyUI's folders, all in one that goes away."""
        for name in ("output", "temp", "input"):
            (tmp_path / name).mkdir()
            monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
        for name in ("loras", "diffusion_models", "checkpoints"):
            (tmp_path / name).mkdir()
            entry = ([str(tmp_path / name)], {".safetensors"})
            monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
        folder_paths.filename_list_cache.clear()
        return tmp_path

    def inputs(name="flux", **changes):
        return slider_host.inputs(TrainSlider, name, **{"made_from": slider_host.WORDS, **changes})

    def explore(name="flux", **changes):
        small = {"prompt": "a dog", "sliders": 3, "steps": 4, "pool": 16, "rank": 1}
        return slider_host.inputs(DiscoverSliders, name, **(small | changes))

    def execute(node=TrainSlider, **given):
        """As ComfyUI runs nodes."""
        with torch.inference_mode():
            return node.execute(**given).result

    def draw(name, model, seed=5):
        cond, negative = (comfy_tiny.conditioning(name, s) for s in (1, 9))
        start = torch.zeros(1, *comfy_tiny.FAMILIES[name].shape)
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(start, seed)
            made = comfy.sample.sample(model, noise, 2, 2.0, "euler", "simple", cond, negative, start, seed=seed)
        return made.clone()

    def with_lora(model, lora, strength):
        with torch.inference_mode():
            return comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)[0]

    def stock(model, path, strength):
        with torch.inference_mode():
            return nodes.LoraLoaderModelOnly().load_lora_model_only(model, Path(path).name, strength)[0]

    def run_of(name="run"):
        return runs.Run(runs.locate(training.root(), name))

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    def is_clean(model):
        return mm.in_training is False and not any(m._forward_hooks for m in model.model.modules())

    # --- train, save, load --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", FIVE)
    def test_a_slider_from_words_is_saved_and_loads_in_full_in_stock_comfyui(name, caplog):
        given = inputs(name, preview_every=5)
        before, state = draw(name, given["model"]), torch.random.get_rng_state()
        sliders, lora, loss, strip, report, run = execute(**given)
        assert is_clean(given["model"])
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        assert torch.equal(draw(name, given["model"]), before), "the MODEL that went in has changed"
        assert len(loss["loss"]) == 10
        assert strip.ndim == 4
        assert (run_of(run).path / "previews" / "latest.png").is_file()
        found = sliders[0].card
        assert (found.kind, found.rank, found.name, found.prompts["positive"]) == ("text", 2, "run", "a big dog")
        assert found.base_hash == slider_files.identity(given["model"])
        assert f"use it from {card.describe(found.usable)}" in report

        path, words, *_ = execute(save, run=run, sliders="1")
        assert words in report
        with caplog.at_level(logging.INFO):
            plus, minus, off = (stock(given["model"], path, s) for s in (1.0, -1.0, 0.0))
        assert not [m for m in caplog.messages if "not loaded" in m.lower() or "ERROR" in m]
        assert torch.equal(draw(name, off), before)
        assert not torch.equal(draw(name, plus), draw(name, minus))
        assert torch.equal(draw(name, plus), draw(name, with_lora(given["model"], lora, 1.0)))
        assert len(lora_files.read_lora(path).modules) == len(lora) // (3 if any("alpha" in k for k in lora) else 2)
        assert "+1 moves it by" in doctor.Doctor.execute(f"loras/{Path(path).name}")[0]
        chosen = execute(mix.MixSliders, model=given["model"], sliders=sliders, slider_1="set 1", strength_1=1.0)
        assert torch.equal(draw(name, chosen[0]), draw(name, plus))
        assert "not this MODEL" not in chosen[1]

    def test_the_unit_is_in_the_weights(monkeypatch):
        """What calibration found multiplies `up`; the state that training goes on from stays as it was."""
        execute(**inputs(steps=4))
        (finished,) = slider_run.written(run_of())
        raw = safetensors_of(run_of().snapshots()[-1] / "student.safetensors")
        unit = finished.finished.card.unit
        for key, value in finished.finished.state.items():
            torch.testing.assert_close(value, raw[key] * (unit if key.endswith(".up") else 1.0))
        assert unit != 1.0

    def safetensors_of(path):
        from safetensors.torch import load_file

        return load_file(path)

    def test_a_slider_that_does_nothing_is_said_and_not_saved_unasked():
        report = execute(**inputs(lr=1e-6, steps=1))[4]
        assert "DOES NOTHING" in report
        assert "WARNING" in report
        with pytest.raises(ValueError, match="no slider of this run moves what it should"):
            execute(save, run="run")
        assert Path(execute(save, run="run", sliders="1")[0]).is_file()
        for wrong in ("2", "one", ""):
            with pytest.raises(ValueError, match="use 'all' or numbers from 1 to 1"):
                execute(save, run="run", sliders=wrong)

    # --- stopping and going on ----------------------------------------------------------------------------------------

    def cut_at(monkeypatch, patch, call):
        """The Cancel button, when something is called for the n-th time."""
        owner, name = patch
        inner, seen = getattr(owner, name), []

        def counted(*args, **options):
            seen.append(1)
            if len(seen) == call:
                mm.interrupt_current_processing(True)
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    @pytest.mark.parametrize(
        ("what", "call"), [("pool", 1), ("training", 4), ("measuring", 6)], ids=["pool", "training", "measuring"]
    )
    def test_a_cancelled_run_goes_on_to_the_same_slider(monkeypatch, what, call):
        given = inputs(pool=16, at_once=4)
        whole = execute(**given | {"run_name": "whole"})[0][0]
        cut = given | {"run_name": "cut"}
        places = {
            "pool": (slider_run.NativeTeacher, "load"),
            "training": (training.TextSlider, "terms"),
            "measuring": (training, "watched"),
        }
        with monkeypatch.context() as patch:
            if what == "measuring":
                inner = training.watched

                def watched(bench):
                    measure, seen = inner(bench), []

                    def counted(*args):
                        seen.append(1)
                        if len(seen) == call:
                            mm.interrupt_current_processing(True)
                        return measure(*args)

                    return counted

                patch.setattr(training, "watched", watched)
            else:
                cut_at(patch, places[what], call)
            with pytest.raises(mm.InterruptProcessingException):
                execute(**cut)
        assert is_clean(given["model"])
        made = len(list((run_of("cut").path / "pool").glob("part_*")))
        assert made == (0 if what == "pool" else 4)
        assert bool(run_of("cut").states()) == (what != "pool")
        assert slider_run.written(run_of("cut")) == []
        again = execute(**cut)
        assert same(again[0][0].tensors, whole.tensors)
        assert again[0][0].card.points == whole.card.points
        # the control: another seed is another slider
        assert not same(execute(**given | {"run_name": "other", "seed": 1})[0][0].tensors, whole.tensors)

    def test_a_finished_run_is_answered_from_its_folder_and_goes_on_when_more_steps_are_asked_for(monkeypatch):
        given = inputs(steps=4)
        first = execute(**given)
        with monkeypatch.context() as patch:
            patch.setattr(training, "carry_out", None)
            again = execute(**given)
        assert same(again[0][0].tensors, first[0][0].tensors)
        assert same(again[1], first[1])
        more = execute(**given | {"steps": 8})
        assert len(more[2]["loss"]) == 8
        assert not same(more[1], first[1])
        # a run is not silently continued with something else
        words = slider_host.WORDS | {"positive": "an old dog"}
        with pytest.raises(ValueError, match="begun with other prompts"):
            execute(**given | {"made_from": words, "steps": 9})
        with pytest.raises(ValueError, match=r"begun with another rank \(2, this is \d+\)"):
            execute(**given | {"rank": 1})
        assert execute(**given | {"made_from": words, "resume": "new"})[5] == "run_2"

    def test_a_finished_run_is_no_answer_to_another_question():
        """What measures a slider counts too, though its weights are the same."""
        node = {TrainSlider: inputs(steps=1), DiscoverSliders: explore(steps=1, sliders=2, run_name="found")}
        for kind, given in node.items():
            execute(kind, **given)
            for other in ({"seeds": 5}, {"pool": 17}, {"clip_vision": tiny_vision(), "vae": TinyVAE(16)}):
                with pytest.raises(ValueError, match=f"begun with (an)?other {next(iter(other))}"):
                    execute(kind, **given | other)
            assert execute(kind, **given | {"preview_every": 7, "at_once": 3})[0]  # what decides nothing
        one, two = tiny_vision(), tiny_vision()
        with torch.inference_mode():
            assert slider_eyes.eyes_of(one) == slider_eyes.eyes_of(two)
            comfy_tiny.randomize(two.model, 4)
            assert slider_eyes.eyes_of(one) != slider_eyes.eyes_of(two)

    def test_on_policy_states_can_be_asked_for(monkeypatch):
        seen = []
        inner = training.TextSliderConfig
        given = inputs(steps=2)
        monkeypatch.setattr(training, "TextSliderConfig", lambda **k: (seen.append(k.get("on_policy")), inner(**k))[1])
        cached = execute(**given)[0][0]
        walked = execute(**given | {"on_policy": True, "run_name": "walked"})[0][0]
        assert seen[0] is None
        assert len(seen[1]) == 2  # the levels of its pictures
        assert not same(cached.tensors, walked.tensors)
        with pytest.raises(ValueError, match=r"another on_policy \(False, this is True\)"):
            execute(**given | {"on_policy": True})

    def test_time_runs_out_and_the_queue_is_free():
        given = inputs(steps=3, stop_minutes=1e-9)
        sliders, lora, _loss, _strip, report, _run = execute(**given)
        assert isinstance(sliders, ExecutionBlocker)
        assert isinstance(lora, ExecutionBlocker)
        assert "queue again to go on" in report
        with pytest.raises(ValueError, match="not measured yet"):
            execute(save, run="run")
        execute(**given)
        assert len(execute(**given)[0]) == 1

    # --- image pairs, erasing -----------------------------------------------------------------------------------------

    def pictures(n=3, seed=0, size=128, light=0.0):
        rng = torch.Generator().manual_seed(seed)
        return (torch.rand(n, size, size, 3, generator=rng) * 0.5 + 0.25 + light).clamp(0, 1)

    def pairs(**changes):
        ends = {"images_plus": pictures(light=0.2), "images_minus": pictures(light=-0.2)}
        return inputs(**({"made_from": PAIRS, "vae": slider_host.FakeVAE(16)} | ends | changes))

    def test_a_slider_from_image_pairs_with_levels_between():
        sliders, _lora, loss, *_ = execute(**pairs(images_plus_half=pictures(light=0.1)))
        assert sliders[0].card.kind == "image pairs"
        assert {k for k in loss if "level" in k} == {"slider/level +1", "slider/level +0.5", "slider/level -1"}
        # other pictures are another run
        with pytest.raises(ValueError, match="begun with other pictures"):
            execute(**pairs())

    def test_erasing_trains_one_pole():
        erase = {"made_from": "erase a concept", "concept": "a dog", "keep": "a cat\na horse"}
        sliders, _lora, loss, *_ = execute(**inputs(made_from=erase))
        assert set(loss) == {"loss", "slider/pole +1", "slider/keep"}
        assert sliders[0].card.prompts["concept"] == "a dog"

    def wrong(node, message, **given):
        with pytest.raises(ValueError, match=message):
            execute(node, **given)
        assert is_clean(given["model"])

    def test_wrong_inputs_are_named_before_anything_is_loaded(monkeypatch):
        monkeypatch.setattr(mm, "unload_all_models", None)  # would fail if it came that far
        vae, words = slider_host.FakeVAE(16), slider_host.WORDS
        one = {"images_plus": pictures(1), "images_minus": pictures(1, light=-0.1)}
        wrong(TrainSlider, "one image pair is too few", **pairs(**one))
        wrong(TrainSlider, "different numbers of pictures", **pairs(images_minus=pictures(2)))
        wrong(TrainSlider, "pictures of both ends are identical", **pairs(images_minus=pictures(light=0.2)))
        wrong(TrainSlider, "different sizes", **pairs(images_minus=pictures(size=64)))
        wrong(TrainSlider, "needs images_plus and images_minus", **inputs(made_from=PAIRS, vae=vae))
        wrong(TrainSlider, "needs the VAE", **pairs(vae=None))
        two = {"made_from": "image pairs", "prompt": "a dog\na cat"}
        wrong(TrainSlider, "2 prompts for 3 image pairs", **pairs() | {"made_from": two})
        wrong(TrainSlider, "images are connected", **pairs() | {"made_from": words})
        equal = words | {"negative": words["positive"]}
        wrong(TrainSlider, "mean the same to", **inputs(made_from=equal))
        erase = {"made_from": "erase a concept", "concept": " ", "keep": ""}
        wrong(TrainSlider, "concept to erase is empty", **inputs(made_from=erase))
        wrong(TrainSlider, "run name", **inputs(run_name="../out"))
        wrong(TrainSlider, "seeds is 3", **inputs(seeds=3))
        wrong(DiscoverSliders, "prompt is empty", **explore(prompt=" \n"))

    def test_wrong_inputs_that_only_the_model_can_tell():
        vision = tiny_vision()
        wrong(TrainSlider, "connect the VAE too", **inputs(clip_vision=vision, run_name="b"))
        vision.model_type = "siglip2_vision_model"
        wrong(TrainSlider, "siglip2", **inputs(clip_vision=vision, vae=slider_host.FakeVAE(16), run_name="c"))
        wrong(DiscoverSliders, "varies in", **explore(sliders=12, pool=8, run_name="d"))

    def test_a_pool_without_variety_is_refused(monkeypatch):
        pool = comfy_host.pack_module("dmd_core.sliders.pool")

        def alike(model, sampling, cond, n, first_seed, device, begin):
            return iter([pool.Pool(torch.ones(n, *sampling.shape), torch.zeros(n, dtype=torch.long))])

        monkeypatch.setattr(slider_run, "draw_pool", alike)
        wrong(DiscoverSliders, "are alike", **explore())
        wrong(TrainSlider, "do not differ along this slider", **inputs())

    # --- how it is sampled, what looks at it --------------------------------------------------------------------------

    def test_a_few_step_model_is_sampled_and_trained_at_its_own_levels():
        model = comfy_tiny.patcher("flux")
        shape = comfy_tiny.FAMILIES["flux"].shape
        family = families.detect(model.model.diffusion_model)
        chosen = settings.SliderSettings()
        slow = slider_run.how(model, shape, chosen, family, {}, "")
        assert (slow.few, len(slow.sigmas)) == (False, settings.SLOW_STEPS)
        levels = (1.0, 0.8, 0.4)
        recipe = recipes.Recipe(family="flux", objective="dmd2", steps=3, sigmas=(*levels, 0.0), prediction="flow")
        names = [n for n, _ in model.model.diffusion_model.named_modules() if n]
        state = {"double_blocks.0.img_attn.proj.down": torch.ones(1, 128)}
        state["double_blocks.0.img_attn.proj.up"] = torch.zeros(128, 1)
        tensors = lora_files.lora_tensors(state, family, names)
        metadata = recipes.header_metadata("student", family, recipe, "lora")
        student = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0, lora_metadata=metadata)[0]
        few = slider_run.how(student, shape, chosen, family, {}, "")
        assert (few.few, few.cfg, few.gamma) == (True, 1.0, (1.0,) * 3)
        assert few.sigmas == pytest.approx(levels)
        # a slider on it is no second distillation
        sliders, *_ = execute(**inputs(model=student, steps=2, sample_steps=0, cfg=0.0))
        assert len(sliders) == 1
        both = with_lora(student, sliders[0].tensors, 1.0)
        assert slider_run.how(both, shape, chosen, family, {}, "").sigmas == pytest.approx(levels)

    def tiny_vision(kind="clip_vision_model"):
        config = {
            "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
            "image_size": 28, "patch_size": 14, "num_channels": 3, "hidden_act": "gelu", "projection_dim": 16,
            "layer_norm_eps": 1e-5, "model_type": kind, "use_swiglu_ffn": False, "num_register_tokens": 0,
        }  # fmt: skip
        with torch.inference_mode():
            vision = comfy.clip_vision.ClipVisionModel(config)
            comfy_tiny.randomize(vision.model, 3)
        return vision

    class TinyVAE:
        """What clip_eyes touches of comfy.sd.VAE."""

        def __init__(self, channels):
            self.first_stage_model = torch.nn.Module()
            self.first_stage_model.conv = torch.nn.ConvTranspose2d(channels, 3, 8, 8)
            self.first_stage_model.decode = lambda z: self.first_stage_model.conv(z)
            torch.nn.init.normal_(
                self.first_stage_model.conv.weight, std=0.1, generator=torch.Generator().manual_seed(1)
            )
            self.device, self.vae_dtype = torch.device("cpu"), torch.float32
            self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, self.device)
            self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)

        def decode(self, samples):
            with torch.no_grad():
                return self.process_output(self.first_stage_model.decode(samples.float())).movedim(1, -1)

    @pytest.mark.parametrize("kind", ["clip_vision_model", "dinov2"])
    def test_an_image_encoder_sees_what_the_stock_node_sees_and_passes_the_gradient_on(kind):
        model, vision, vae = comfy_tiny.patcher("flux"), tiny_vision(kind), TinyVAE(16)
        rng = torch.Generator().manual_seed(0)
        x, direction = (torch.randn(2, 16, 8, 8, generator=rng) for _ in range(2))
        with comfy_source.NativeTeacher(model) as teacher:
            eyes = slider_eyes.clip_eyes(teacher, vision, vae)
            x.requires_grad_()
            seen = eyes.embed(x)
            weight = torch.randn(seen.shape, generator=rng)
            (gradient,) = torch.autograd.grad((seen * weight).sum(), x)
            # along the gradient and a random direction, in units of its norm
            direction = gradient / gradient.norm() + direction / direction.norm()
            expected, errors = (gradient * direction).sum().item(), []
            for h in (1e-3, 3e-3, 1e-2):
                with torch.no_grad():
                    up, down = ((eyes.embed(x + s * h * direction) * weight).sum().item() for s in (1, -1))
                errors.append(abs((up - down) / (2 * h) - expected))
            assert min(errors) < 0.02 * gradient.norm()
            pictures = vae.decode(teacher.latent_out(x).detach())
        with torch.inference_mode():
            stock_sees = torch.nn.functional.normalize(vision.encode_image(pictures)["image_embeds"], dim=1)
        torch.testing.assert_close(seen.detach(), stock_sees.clone(), rtol=0.02, atol=0.02)

    def test_a_slider_judged_by_an_image_encoder_says_so():
        sliders, *_ = execute(**inputs(steps=2, clip_vision=tiny_vision(), vae=TinyVAE(16)))
        assert sliders[0].card.encoder == "clip_vision, 28 pixels"

    # --- discovery ----------------------------------------------------------------------------------------------------

    def test_directions_are_found_measured_saved_and_mixed(caplog):
        given = explore(preview_every=6)
        before = draw("flux", given["model"])
        sliders, loras, loss, sheet, report, run = execute(DiscoverSliders, **given)
        assert is_clean(given["model"])
        assert torch.equal(draw("flux", given["model"]), before)
        assert (len(sliders), len(loras), len(loss["loss"])) == (3, 3, 12)
        assert [s.name for s in sliders] == ["direction 1", "direction 2", "direction 3"]
        assert sheet.shape[1] > 3 * 128
        assert "nearest word" in report
        cards = [s.card for s in sliders]
        scores = [c.explained * c.stability for c in cards]
        assert scores == sorted(scores, reverse=True)
        assert all(0 < c.explained < 1 and c.additivity is not None for c in cards)
        mixed = execute(mix.MixSliders, model=given["model"], sliders=sliders, slider_1="set 2", strength_1=1.0)[0]
        assert torch.equal(draw("flux", mixed), draw("flux", with_lora(given["model"], loras[1], 1.0)))
        paths = execute(save, run=run, sliders="1, 3")[0].splitlines()
        assert [Path(p).parent.name for p in paths] == ["run", "run"]
        with caplog.at_level(logging.INFO), torch.inference_mode():
            for path, lora in zip(paths, (loras[0], loras[2]), strict=True):
                loader = nodes.LoraLoaderModelOnly()
                (loaded,) = loader.load_lora_model_only(given["model"], f"run/{Path(path).name}", 1.0)
                assert torch.equal(draw("flux", loaded), draw("flux", with_lora(given["model"], lora, 1.0)))
        assert not [m for m in caplog.messages if "not loaded" in m.lower()]
        assert execute(inspect_run, run=run)[1].shape == sheet.shape

    def test_a_cancelled_discovery_goes_on_to_the_same_sliders(monkeypatch):
        given = explore()
        whole = execute(DiscoverSliders, **given | {"run_name": "whole"})[0]
        with monkeypatch.context() as patch:
            cut_at(patch, (discovery.SliderSpace, "terms"), 7)
            with pytest.raises(mm.InterruptProcessingException):
                execute(DiscoverSliders, **given)
        again = execute(DiscoverSliders, **given)[0]
        assert all(same(a.tensors, b.tensors) for a, b in zip(whole, again, strict=True))

    def test_the_papers_loss_and_an_image_encoder_work_too():
        given = explore(loss="cosine", clip_vision=tiny_vision(), vae=TinyVAE(16), sliders=2)
        sliders, _loras, loss, *_ = execute(DiscoverSliders, **given)
        assert {k.rpartition("/")[2] for k in loss} == {"loss", "cosine"}
        assert sliders[0].card.encoder.startswith("clip_vision")

    class WordClip:
        """Two of its words lie along the first axis of what looks at the pictures."""

        def __init__(self, width):
            self.width = width

        def tokenize(self, text):
            return text

        def encode_from_tokens(self, text, return_pooled=False):
            pooled = torch.zeros(1, self.width)
            pooled[0, {"bright": 0, "dark": 0}.get(text, 1 + len(text) % 3)] = -1.0 if text == "dark" else 1.0
            return None, pooled

    def test_a_finished_discovery_takes_other_names_without_training_or_measuring(monkeypatch):
        given = explore(clip_vision=tiny_vision(), vae=TinyVAE(16), sliders=2, steps=2)
        plain = execute(DiscoverSliders, **given)
        assert [s.name for s in plain[0]] == ["direction 1", "direction 2"]
        monkeypatch.setattr(discovery, "carry_out", None)
        named = given | {"name_clip": WordClip(16), "names": "cat, bright, horse\ndark, mouse"}
        sliders, _, _, sheet, report, run = execute(DiscoverSliders, **named)
        assert all(set(s.card.ends) <= {"cat", "bright", "horse", "dark", "mouse"} for s in sliders)
        assert all(s.name.startswith(f"{s.card.ends[1]} - {s.card.ends[0]}") for s in sliders)
        assert sliders[0].name in report
        assert sheet.shape == plain[3].shape
        assert not torch.equal(sheet, plain[3])  # its labels are others
        assert all(same(a.tensors, b.tensors) for a, b in zip(sliders, plain[0], strict=True))
        # nothing given: the pack's own words, and it is said
        words = execute(DiscoverSliders, **named | {"names": " "})
        own = {w for group in discovery.VARIATIONS for w in group}
        assert all(set(s.card.ends) <= own for s in words[0])
        assert "pack's own word list" in words[4]
        assert "word list" not in report
        # without the CLIP names stay as they are
        again = execute(DiscoverSliders, **given)
        assert [s.name for s in again[0]] == [s.name for s in words[0]]
        assert torch.equal(again[3], words[3])
        (run_of(run).path / discovery.SEEN).unlink()
        assert "not kept by this run" in execute(DiscoverSliders, **named)[4]

    def test_ends_are_named_by_the_nearest_words():
        ends = {"0 high": torch.full((4, 8), 0.1), "0 low": torch.full((4, 8), 0.1)}
        ends["0 high"][:, 0] += 1
        ends["0 low"][:, 0] -= 1
        made = execute(**inputs(steps=1))[0][0].card
        given = {"name_clip": WordClip(8), "names": "cat, bright, horse\ndark, mouse"}
        assert discovery.labelled([made], ends, given)[0].ends == ("bright", "dark")
        two = discovery.labelled([made] * 2, ends | {f"1 {k}": ends[f"0 {k}"] for k in ("high", "low")}, given)
        assert [c.name for c in two] == ["dark - bright", "dark - bright 2"]
        assert discovery.labelled([made], ends, given | {"name_clip": None})[0].ends is None
        with pytest.raises(ValueError, match="gives 5 numbers per text"):
            discovery.labelled([made], ends, given | {"name_clip": WordClip(5)})

    def test_words_that_cannot_name_are_refused_before_anything_is_trained(monkeypatch):
        monkeypatch.setattr(discovery, "train", None)
        wrong(DiscoverSliders, "no CLIP_VISION", **explore(name_clip=WordClip(16)))
        eyes = {"clip_vision": tiny_vision(), "vae": TinyVAE(16), "name_clip": WordClip(5)}
        wrong(DiscoverSliders, "gives 5 numbers per text", **explore(**eyes))

    def test_prompts_are_varied_by_the_words_or_taken_as_they_are():
        small = settings.DiscoverySettings(prompts=5)
        made = discovery.prompts_of("a dog", "red, blue\nat {} night", small)
        assert made[0] == "a dog"
        assert len(made) == 5
        assert all(set(p.replace(",", "").split()) <= {"a", "dog", "red", "blue", "at", "night"} for p in made)
        assert discovery.prompts_of("a dog\na cat", "", small) == ["a dog", "a cat"]

    # --- schemas ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("node", "kind"), [(TrainSlider, settings.SliderSettings), (DiscoverSliders, settings.DiscoverySettings)]
    )
    def test_defaults_are_those_of_the_config_classes_and_everything_has_words(node, kind):
        schema, own = node.GET_SCHEMA(), kind()
        assert all(i.tooltip for i in schema.inputs)
        assert all(o.tooltip for o in schema.outputs)
        shown = {i.id: i.default for i in schema.inputs if hasattr(own, i.id)}
        assert shown == {k: getattr(own, k) for k in shown}
        assert len(shown) > 10
        assert node.GET_NODE_INFO_V1()["display_name"] == schema.display_name
