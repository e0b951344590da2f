"""Train Slider in the real ComfyUI, on tiny random models of its families."""

import logging
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():
    needs_host = pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))

    @needs_host
    def test_sliders_are_trained_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__), "-m", "comfy and not slow")

    @needs_host
    @pytest.mark.slow
    def test_every_family_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__), "-m", "comfy and slow")

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.model_management as mm
    import comfy.sample
    import comfy_tiny
    import folder_paths
    import slider_host
    from comfy_execution.graph_utils import ExecutionBlocker

    import nodes

    training = comfy_host.pack_module("nodes.train_slider")
    slider_run = comfy_host.pack_module("nodes.slider_run")
    runs = comfy_host.pack_module("dmd_core.runs")
    card = comfy_host.pack_module("dmd_core.sliders.card")
    students = comfy_host.pack_module("nodes.students")
    TrainSlider = training.TrainSlider

    @pytest.fixture(autouse=True)
    def place(tmp_path, monkeypatch):
        """ComfyUI's folders, all in one that goes away."""
        for name in ("output", "temp", "input"):
            (tmp_path / name).mkdir()
            monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
        (tmp_path / "loras").mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
        folder_paths.filename_list_cache.clear()
        return tmp_path

    def inputs(name="flux", **changes):
        return slider_host.inputs(TrainSlider, name, made_from=slider_host.WORDS, **changes)

    def execute(**given):
        """As ComfyUI runs nodes."""
        with torch.inference_mode():
            return TrainSlider.execute(**given).result

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

    def test_a_slider_from_words_on_flux(caplog):
        given = inputs(preview_every=5)
        before, state = draw("flux", given["model"]), torch.random.get_rng_state()
        sliders, lora, loss, strip, report, run = execute(**given)
        assert mm.in_training is False
        assert not any(m._forward_hooks for m in given["model"].model.modules())
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        assert torch.equal(draw("flux", given["model"]), before)
        assert len(loss["loss"]) == 10
        assert strip.ndim == 4
        found = sliders[0].card
        assert found.prompts["positive"] == "a big dog"
        assert (found.kind, found.rank, found.name) == ("text", 2, "run")
        assert found.base_hash == training.identity(given["model"])
        assert f"use it from {card.describe(found.usable)}" in report
        made = [draw("flux", with_lora(given["model"], lora, s)) for s in (1.0, -1.0)]
        assert not torch.equal(made[0], before)
        assert not torch.equal(made[0], made[1])
        assert (runs.locate(training.root(), run) / "previews" / "latest.png").is_file()
