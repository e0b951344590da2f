"""Distill, Save, Inspect Run and Encode Prompts in the real ComfyUI, on tiny random models of its families."""

import json
import logging
import shlex
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():
    needs_host = pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))

    @needs_host
    def test_distillation_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__), "-m", "comfy and not slow")

    @needs_host
    @pytest.mark.slow
    def test_every_family_and_method_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__), "-m", "comfy and slow")

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.model_management as mm
    import comfy.sd
    import comfy_tiny
    import folder_paths
    import safetensors.torch
    from comfy_execution.graph_utils import ExecutionBlocker
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    from PIL import Image

    import nodes

    distill = comfy_host.pack_module("nodes.distill")
    source = comfy_host.pack_module("nodes.comfy_source")
    encode = comfy_host.pack_module("nodes.encode_prompts")
    save_node = comfy_host.pack_module("nodes.save")
    save = save_node.Save
    inspect_run = comfy_host.pack_module("nodes.inspect_run")
    load_shapes = comfy_host.pack_module("nodes.load_shapes").LoadShapes
    runfile = comfy_host.pack_module("dmd_core.runfile")
    runs = comfy_host.pack_module("dmd_core.runs")
    headless = comfy_host.pack_module("dmd_core.headless")
    lora_files = comfy_host.pack_module("dmd_core.weights.lora")
    base_hash = comfy_host.pack_module("dmd_core.weights.checkpoint").base_hash
    Distill = distill.Distill
    STEPS = 2

    @pytest.fixture(autouse=True)
    def place(tmp_path, monkeypatch):
        """ComfyUI's folders, all in one that goes away."""
        for name in ("output", "temp", "input"):
            (tmp_path / name).mkdir()
            monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
        for name in ("loras", "diffusion_models"):
            (tmp_path / name).mkdir()
            entry = ([str(tmp_path / name)], {".safetensors"})
            monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
        folder_paths.filename_list_cache.clear()
        return tmp_path

    def method(label="DMD2", **changes):
        """A method as the DynamicCombo gives it."""
        options = next(i for i in Distill.GET_SCHEMA().inputs if i.id == "method").options
        found = {i.id: i.default for o in options if o.key == label for i in o.inputs}
        small = {"steps": STEPS, "guidance": 2.0, "critic_updates": 1, "student_lr": 1e-2, "lr": 1e-2, **changes}
        return {"method": label, **found, **{k: v for k, v in small.items() if k in found}}

    def inputs(family, label="DMD2", **changes):
        """All inputs of the node at their defaults, but small."""
        found = {i.id: i.default for i in Distill.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        small = {
            "model": comfy_tiny.patcher(family),
            "prompts": [comfy_tiny.conditioning(family, seed)[0] for seed in range(3)],
            "negative": comfy_tiny.conditioning(family, 9),
            "mode": "train",
            "run_name": "run",
            "method": method(label),
            **{"updates": 3, "size": 128, "batch": 2, "accumulate": 1, "rank": 2, "count": 2, "teacher_steps": 2},
            **{"pairs": 2, "pair_steps": 2, "preview_every": 2, "check_teacher": False},
        }
        return found | small | changes

    def draw(family, model, seed=5):
        """One call of the stock sampler."""
        cond, negative = (comfy_tiny.conditioning(family, s) for s in (1, 9))
        latent = {"samples": torch.zeros(1, *comfy_tiny.FAMILIES[family].shape)}
        with torch.inference_mode():
            (out,) = nodes.common_ksampler(model, seed, STEPS, 2.0, "euler", "simple", cond, negative, latent)
        return out["samples"].clone()

    def weights(run="run"):
        """The student's tensors in the run's best snapshot."""
        folder = runs.Run(runs.locate(distill.root(), run))
        return safetensors.torch.load_file(folder.snapshots()[-1] / "student.safetensors")

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    def round_trip(family, caplog, label="DMD2", updates=3):
        given = inputs(family, label, updates=updates)
        before = draw(family, given["model"])
        student, lora, loss, sheet, report, run = Distill.execute(**given).result
        assert mm.in_training is False
        assert torch.equal(draw(family, given["model"]), before), "the MODEL that went in has changed"
        first, *rest = report.splitlines()
        assert first.startswith(f"Run {run}: finished. {updates} of {updates} updates in ")
        assert f"Best snapshot: update {updates}" in first
        assert not [line for line in rest if "fits on" in line], "a plan is of no use after the run"
        assert len(loss["loss"]) == updates
        assert all(v == v for v in loss["loss"])
        assert sheet.ndim == 4
        assert 0 <= sheet.min() < sheet.max() <= 1
        path, *_ = save.execute(run=run).result
        with caplog.at_level(logging.INFO), torch.inference_mode():
            loader = nodes.LoraLoaderModelOnly()
            (loaded,) = loader.load_lora_model_only(given["model"], Path(path).name, 1.0)
            (off,) = loader.load_lora_model_only(given["model"], Path(path).name, 0.0)
        assert not [r for r in caplog.messages if "not loaded" in r or "ERROR" in r]
        made = draw(family, loaded)
        assert not torch.equal(made, before), "the LoRA changes nothing"
        torch.testing.assert_close(made, draw(family, student))
        assert torch.equal(draw(family, off), before)
        assert len(lora_files.read_lora(path).modules) == len(lora) // (3 if any("alpha" in k for k in lora) else 2)
        return path

    def test_a_run_on_flux_leaves_the_model_alone_and_a_lora_that_stock_comfyui_loads(caplog):
        path = round_trip("flux", caplog)
        recipe = lora_files.read_lora(path).recipe
        assert (recipe.family, recipe.objective, recipe.steps, recipe.trained_cfg) == ("flux", "dmd2", STEPS, 2.0)
        assert recipe.prediction == "flow"
        assert recipe.base_hash == base_hash(comfy_tiny.patcher("flux").model.diffusion_model)
        assert recipe.base_hash != base_hash(comfy_tiny.patcher("sd3").model.diffusion_model)  # control

    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["sd15_eps", "sd15_v", "sdxl", "sd3", "flux", "z_image"])
    def test_so_do_runs_of_twenty_updates_on_every_family(family, caplog):
        path = round_trip(family, caplog, updates=20)
        wanted = {"sd15_eps": "eps", "sd15_v": "v", "sdxl": "eps"}.get(family, "flow")
        assert lora_files.read_lora(path).recipe.prediction == wanted

    @pytest.mark.slow
    @pytest.mark.parametrize("label", [k for k, (name, _) in distill.METHODS.items() if name != "rectified_flow"])
    def test_so_do_the_other_methods(label, caplog):
        round_trip("flux", caplog, label)

    def interrupt_at(monkeypatch, step):
        """As the Cancel button does it, while the run is under way."""

        def cancel(progress, run):
            if progress.step == step:
                mm.interrupt_current_processing(True)

        monkeypatch.setattr(distill.live, "picture", cancel)

    def test_a_cancelled_run_goes_on_to_the_same_student(monkeypatch):
        given = inputs("flux", updates=4, run_name="whole")
        Distill.execute(**given)
        cut = given | {"run_name": "cut"}
        new = Distill.fingerprint_inputs(**cut)
        told, stopped = [], distill.live.stopped
        with monkeypatch.context() as patch:
            interrupt_at(patch, 2)
            patch.setattr(distill.live, "stopped", lambda run, *at: told.append(at) or stopped(run, *at))
            with pytest.raises(mm.InterruptProcessingException):
                Distill.execute(**cut)
        assert told == [(2, 4)], "the node would go on saying how long is left"
        assert mm.in_training is False
        assert not any(m._forward_hooks for m in given["model"].model.modules())
        states = runs.Run(runs.locate(distill.root(), "cut")).states()
        assert runs.step_of(states[0]) == 2
        # the same graph is run again, not answered from ComfyUI's cache
        assert Distill.fingerprint_inputs(**cut) != new
        report = Distill.execute(**cut).result[4]
        assert "goes on at step 2" in report
        assert same(weights("cut"), weights("whole"))
        # the control: another seed is another student
        Distill.execute(**given | {"run_name": "other", "seed": 1})
        assert not same(weights("other"), weights("whole"))

    def test_cancelling_takes_under_a_second_also_inside_of_a_long_update():
        given = inputs("flux", updates=3, accumulate=24, preview_every=0, checkpointing=False)
        run, pressed = runs.Run(runs.locate(distill.root(), "run")), []

        def press():
            """The Cancel button, a moment after the first update."""
            while not run.history():
                time.sleep(0.02)
            time.sleep(0.3)
            pressed.append(time.monotonic())
            mm.interrupt_current_processing(True)

        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(mm.InterruptProcessingException):
            Distill.execute(**given)
        took = time.monotonic() - pressed[0]
        thread.join()
        (first,) = run.history()
        assert took < 1
        assert first["seconds"] > 1.3 + took, "the update was over before it was cancelled"  # control
        assert runs.step_of(run.states()[0]) == 1
        assert mm.in_training is False

    def with_lora(model, strength=1.0, seed=0):
        """The MODEL as Load LoRA gives it."""
        found, rng = model.clone(), torch.Generator().manual_seed(seed)
        key = next(k for k, p in model.model.named_parameters() if k.startswith("diffusion_model.") and p.ndim == 2)
        out, into = model.model.state_dict()[key].shape
        up, down = torch.randn(out, 2, generator=rng), torch.randn(2, into, generator=rng)
        lora = {
            f"{key.removesuffix('.weight')}.lora_up.weight": up,
            f"{key.removesuffix('.weight')}.lora_down.weight": down,
        }
        (loaded, _) = comfy.sd.load_lora_for_models(found, None, lora, strength, 0.0)
        assert loaded.patches
        return loaded

    def test_a_run_does_not_go_on_with_another_model_or_other_loras_on_it(place):
        given = inputs("flux", updates=2)
        plain, longer = given["model"], given | {"updates": 3}
        others = {
            "another model": comfy_tiny.patcher("flux", seed=1),
            r"another LoRA on the model \(none, this is 1 layers": with_lora(plain),
        }
        Distill.execute(**given)
        noted = (place / "output" / "dmd" / "run" / "network.json").read_bytes()
        for words, model in others.items():
            with pytest.raises(ValueError, match=f"begun with {words}.*choose another run name"):
                Distill.execute(**longer | {"model": model})
        assert (place / "output" / "dmd" / "run" / "network.json").read_bytes() == noted
        assert "finished" in Distill.execute(**longer | {"model": plain.clone()}).result[4]  # control
        mine = given | {"run_name": "mine", "model": with_lora(plain)}
        Distill.execute(**mine)
        for model in (plain, with_lora(plain, 0.99), with_lora(plain, seed=1)):
            with pytest.raises(ValueError, match="another LoRA on the model"):
                Distill.execute(**mine | {"updates": 3, "model": model})
        Distill.execute(**mine | {"updates": 3, "model": with_lora(plain)})

    def test_a_run_out_of_time_hands_the_queue_back_and_goes_on():
        given = inputs("flux", updates=2, stop_minutes=1e-9)
        student, _lora, loss, _sheet, report, _run = Distill.execute(**given).result
        assert isinstance(student, ExecutionBlocker), "there is no snapshot yet, so there is no student"
        assert "queue again to go on" in report
        assert len(loss["loss"]) == 1
        student, *_, report, _run = Distill.execute(**given).result
        assert not isinstance(student, ExecutionBlocker)
        assert "finished" in report

    @pytest.mark.parametrize("label", ["LADD", "Reflow"])
    def test_methods_without_a_critic_show_pictures_and_curves_while_they_train(label, monkeypatch):
        shown, picture = {}, distill.live.picture

        def recorded(progress, run):
            shown[progress.step] = picture(progress, run)
            if progress.snapshot:  # where nothing can be decoded, there are curves at least
                (progress.snapshot / "sheet.png").unlink()
                shown["curves"] = picture(replace(progress, preview=None), run)
            return shown[progress.step]

        monkeypatch.setattr(distill.live, "picture", recorded)
        Distill.execute(**inputs("flux", label, updates=3))
        assert [k for k, v in shown.items() if v is not None] == [1, 2, 3, "curves"]
        (_, curves, _), (_, samples, _) = shown["curves"], shown[2]
        assert samples.height > curves.height > 100

    def test_plan_measures_and_makes_nothing():
        given = inputs("flux", mode="plan", check_teacher=True)
        before = draw("flux", given["model"])
        student, _lora, _loss, _sheet, words, run = Distill.execute(**given).result
        assert isinstance(student, ExecutionBlocker)
        assert isinstance(run, ExecutionBlocker), "Save and Inspect Run would find no snapshot"
        assert "3 steps of" in words
        assert "teacher: one-step variety" in words
        assert not runs.Run(runs.locate(distill.root(), "run")).states()
        assert torch.equal(draw("flux", given["model"]), before)

    def test_memory_for_training_is_kept_free_and_a_measured_plan_says_how_much(place, monkeypatch):
        asked, load = [], mm.load_models_gpu

        def recorded(models, memory_required=0, **more):
            asked.append(memory_required)
            return load(models, memory_required=memory_required, **more)

        def first(**changes):
            asked.clear()
            Distill.execute(**inputs("flux", mode="plan", **changes))
            return asked[0]

        monkeypatch.setattr(mm, "load_models_gpu", recorded)
        small = first()
        assert small > 0
        assert first(batch=4, run_name="batch") == pytest.approx(2 * small)
        assert first(size=256, run_name="size") == pytest.approx(4 * small)
        # as on CUDA, where the peak is measured
        made = source.Job.plan
        loaded = inputs("flux")["model"].model_size()
        monkeypatch.setattr(source.Job, "plan", lambda job: replace(made(job), peak=loaded + 12345.0))
        assert first(run_name="measured") == small
        assert 12345 <= first(run_name="measured") <= loaded + 12345
        assert first(run_name="measured", batch=4) == pytest.approx(2 * small)  # not measured yet
        assert first(run_name="judged") == small
        slower = method(student_lr=1e-3)  # control: the same memory
        assert 12345 <= first(run_name="judged", method=slower) <= loaded + 12345
        assert first(run_name="judged", method=method(gan_weight=0.01)) == small, "the GAN's heads were not measured"

    def test_the_exported_run_file_says_the_same(place):
        given = inputs("flux", mode="export run file", rank=7)
        words = Distill.execute(**given).result[4]
        file = runfile.read_run_file(place / "output" / "dmd" / "run" / "run.toml")
        command = next(line for line in words.splitlines() if line.startswith("run it with: "))
        assert shlex.split(command.partition(": ")[2])[:4] == ["python", "-m", "dmd_core", "train"]
        assert Path(shlex.split(command)[-1]) == place / "output" / "dmd" / "run" / "run.toml"
        assert (Path(words.partition("\nin ")[2].partition(",")[0]) / "dmd_core" / "__main__.py").is_file()
        assert "Set [model] path first" in words  # this MODEL was made in memory
        assert (file.lora.rank, file.train.steps, file.method.name, file.method.steps) == (7, 3, "dmd2", STEPS)
        assert file.method.options["student_lr"] == 1e-2
        batches = [file.method.options[f"{who}_accumulate"] for who in ("student", "critic")]
        assert batches == [1, 1]
        assert (place / "output" / "dmd" / "run" / "prompts.txt").read_text().splitlines() == [
            "prompt 1",
            "prompt 2",
            "prompt 3",
        ]

    def test_the_exported_run_of_the_embedded_model_runs_as_it_is(place):
        model, clip, _vae = load_shapes.execute("teacher").result
        with torch.inference_mode():
            prompts, negative = encode.EncodePrompts.execute([clip], ["a red circle\na large blue square"]).result
        given = inputs(
            "flux", model=model, prompts=prompts, negative=negative, size=0, updates=2, method=method(guidance=2.0)
        )
        words = Distill.execute(**given | {"mode": "export run file"}).result[4]
        assert "[model]" not in words
        run = headless.train_from(place / "output" / "dmd" / "run" / "run.toml", say=lambda line: None)
        assert list((run / "lora").glob("*.safetensors"))

    def test_a_run_that_is_refused_stays_as_it_was(place):
        """And so does what Save writes of it."""
        given = inputs("flux", updates=2)
        Distill.execute(**given)
        folder = place / "output" / "dmd" / "run"
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
        for change, words in {
            "steps": (given | {"updates": 3, "method": method(steps=1)}, r"other steps \(2, this is 1\)"),
            "guidance": (
                given | {"updates": 3, "method": method(guidance=5.0)},
                r"another guidance \(2.0, this is 5.0\)",
            ),
            "size": (given | {"updates": 3, "size": 64}, r"another size \(128 x 128, this is 64 x 64\)"),
            "seed": (given | {"updates": 3, "seed": 5}, r"another seed \(\d, this is 5\)"),
        }.values():
            with pytest.raises(ValueError, match=words):
                Distill.execute(**change)
        assert {p: p.read_bytes() for p in before} == before
        with pytest.raises(ValueError, match="100 x 100 pixels; give multiples of 16"):
            Distill.execute(**given | {"size": 100, "run_name": "fresh"})
        Distill.execute(**given | {"updates": 3})  # control

    def test_another_shift_on_the_model_is_refused_before_anything_is_written(place):
        """Levels follow from it, and Save reads them in the run's folder."""
        given = inputs("sd3", updates=2)
        Distill.execute(**given)
        noted = place / "output" / "dmd" / "run" / "network.json"
        before = noted.read_bytes()
        (shifted,) = ModelSamplingSD3().patch(given["model"], 7.0)
        with pytest.raises(ValueError, match=r"begun with other sigmas"):
            Distill.execute(**given | {"updates": 3, "model": shifted})
        assert noted.read_bytes() == before

    def test_what_saving_reads_is_written_once_the_state_has_been_loaded(place):
        given = inputs("flux", updates=2)
        Distill.execute(**given)
        run = place / "output" / "dmd" / "run"
        more = given | {"prompts": given["prompts"] * 2, "updates": 3}
        states = {p: p.read_bytes() for p in (run / "states").iterdir()}
        before = {name: (run / name).read_bytes() for name in ("network.json", "run.json")}
        for path in states:
            path.write_bytes(b"damaged")
        with pytest.raises(ValueError, match="none of the"):
            Distill.execute(**more)
        assert {name: (run / name).read_bytes() for name in before} == before
        for path, content in states.items():
            path.write_bytes(content)
        Distill.execute(**more)  # control
        assert all((run / name).read_bytes() != content for name, content in before.items())

    @pytest.mark.parametrize(("label", "judge"), [("DMD2", "critic"), ("LADD", "discriminator"), ("Reflow", "")])
    def test_student_and_critic_accumulate_apart(place, label, judge):
        def options(**changes):
            Distill.execute(**inputs("flux", label, mode="export run file", accumulate=3, **changes))
            file = runfile.read_run_file(place / "output" / "dmd" / "run" / "run.toml")
            return {k: v for k, v in file.method.options.items() if k.endswith("accumulate")}

        own, other = ("student_accumulate", f"{judge}_accumulate") if judge else ("accumulate", "accumulate")
        assert options(critic_accumulate=5) == {own: 3} | ({other: 5} if judge else {})
        assert options(critic_accumulate=0) == {own: 3, other: 3}  # control

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"prompts": comfy_tiny.conditioning("sd15_eps", 1)}, "do not fit this MODEL"),
            ({"negative": comfy_tiny.conditioning("sd15_eps", 1)}, "do not fit this MODEL"),
            ({"prompts": []}, "at least one prompt"),
            ({"negative": [c for s in (1, 2) for c in comfy_tiny.conditioning("flux", s)]}, "negative holds 2"),
            ({"run_name": "../out"}, "run name"),
            ({"optimizer": "sgd"}, "optimizer 'sgd'"),
        ],
    )
    def test_wrong_inputs_are_named_and_leave_the_model_clean(changes, words):
        given = inputs("flux") | changes
        with pytest.raises(ValueError, match=words):
            Distill.execute(**given)
        assert mm.in_training is False
        assert not any(m._forward_hooks for m in given["model"].model.modules())

    def test_defaults_of_the_widgets_are_those_of_the_config_classes():
        options = next(i for i in Distill.GET_SCHEMA().inputs if i.id == "method").options
        assert [o.key for o in options] == list(distill.METHODS)
        for option in options:
            config = {f.name: f.default for f in fields(runfile.CONFIGS[distill.METHODS[option.key][0]])}
            shown = {i.id: i.default for i in option.inputs if i.id not in ("steps", "guidance")}
            assert shown == {k: config[k] for k in shown}
            assert len(shown) > 3

    def test_snapshots_are_shown_saved_and_deleted(place):
        Distill.execute(**inputs("flux", snapshot_every=1, save_every=1))
        _curves, sheet, lora, loss, report = inspect_run.InspectRun.execute(run="run", snapshot="1").result
        assert [f"  {n}: fidelity" in report for n in (1, 2, 3)] == [True] * 3
        assert sheet.ndim == 4
        assert len(loss["loss"]) == 3
        path, card, shown = save.execute(run="run", snapshot="1", name="sub/first").result
        wired = inspect_run.InspectRun.execute(run=inspect_run.NONE, snapshot="1", run_name="run")
        assert torch.equal(shown, wired.result[1])
        assert Path(path) == place / "loras" / "sub" / "first_00001.safetensors"
        held = safetensors.torch.load_file(path)
        assert same(held, lora)
        # the control: the last one is another student
        assert not same(held, inspect_run.InspectRun.execute(run="run", snapshot="last").result[2])
        assert f"{STEPS}-step student" in card
        assert "open first_00001.json in ComfyUI, a graph of stock nodes" in card
        stock = json.loads((place / "loras" / "sub" / "first_00001.json").read_text())
        assert stock["2"]["inputs"]["lora_name"] == str(Path("sub") / "first_00001.safetensors")
        assert stock["6"]["inputs"]["steps"] == STEPS
        assert (place / "output" / "dmd" / "run" / "lora" / "first_00001.png").is_file()
        folder = runs.Run(runs.locate(distill.root(), "run"))
        inspect_run.InspectRun.execute(run="run", snapshot="1", action=inspect_run.DROP)
        inspect_run.InspectRun.execute(run="run", action=inspect_run.THIN)
        assert ([runs.step_of(p) for p in folder.snapshots()], len(folder.states())) == ([2, 3], 1)
        for choice in ("1", "first"):
            with pytest.raises(ValueError, match="has no snapshot"):
                save.execute(run="run", snapshot=choice)
        inspect_run.InspectRun.execute(run="run", action=inspect_run.DELETE)
        assert not folder.path.exists()
        with pytest.raises(ValueError, match="there is no run 'run'"):
            save.execute(run="run")

    def test_a_saved_student_is_drawn_in_steps_and_strengths(place):
        model, clip, vae = load_shapes.execute("teacher").result
        with torch.inference_mode():
            prompts, negative = encode.EncodePrompts.execute([clip], ["a red circle\na blue star"]).result
        given = inputs("flux", model=model, prompts=prompts, negative=negative, size=64, updates=1)
        Distill.execute(**given)
        with torch.inference_mode():
            path, _card, shown = save.execute(run="run", model=model, prompts=prompts, vae=vae).result
            *_, plain = save.execute(run="run").result
        rows, columns = round(shown.shape[1] / 260), round(shown.shape[2] / 260) - 1
        assert (rows, columns) == (3, len(save_node.STRENGTHS))  # 1, 2 and 4 steps of a student of 2
        assert shown.shape != plain.shape
        assert (place / "output" / "dmd" / "run" / "lora" / f"{Path(path).stem}.png").is_file()
        cells = [shown[0, -250:-10, -260 * i - 250 : -260 * i - 10] for i in range(columns)]
        assert not any(torch.equal(cells[0], c) for c in cells[1:]), "a strength changes nothing"
        with pytest.raises(ValueError, match="connect all three or none"):
            save.execute(run="run", prompts=prompts, vae=vae)

    def test_a_merged_model_draws_as_the_student_does(place):
        state = comfy_tiny.patcher("flux", inference=False).model.diffusion_model.state_dict()
        file = place / "diffusion_models" / "tiny.safetensors"
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in state.items()}, file)
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model(str(file))
        student, *_ = Distill.execute(**inputs("flux", model=model)).result
        path, *_ = save.execute(run="run", what="merged model", model=model).result
        with torch.inference_mode():
            merged = comfy.sd.load_diffusion_model(path)
        # the LoRA of the student MODEL is fp16, that of the merge fp32
        torch.testing.assert_close(draw("flux", merged), draw("flux", student), rtol=2e-3, atol=2e-3)
        assert (draw("flux", merged) - draw("flux", model)).abs().max() > 0.05
        with pytest.raises(ValueError, match="has LoRAs on it"):
            save.execute(run="run", what="merged model", model=student)
        with pytest.raises(ValueError, match="file of this MODEL is not known"):
            save.execute(run="run", what="merged model", model=comfy_tiny.patcher("flux"))
        with pytest.raises(ValueError, match="needs its base"):
            save.execute(run="run", what="merged model")

    def test_prompts_are_encoded_once_and_stay_what_comfyui_makes_of_them(place, monkeypatch):
        _model, clip, _vae = load_shapes.execute("teacher").result
        (place / "input" / "more.txt").write_text("a green star\n# not this\n\na red circle\n")
        execute = encode.EncodePrompts.execute
        with torch.inference_mode():
            prompts, negative = execute([clip], ["a red circle\na blue square"], ["more.txt"]).result
            assert [e[1]["dmd_prompt"] for e in prompts] == ["a red circle", "a blue square", "a green star"]
            (plain,) = nodes.CLIPTextEncode().encode(clip, "a blue square")[0]
            torch.testing.assert_close(prompts[1][0], plain[0], rtol=1e-3, atol=1e-3)
            assert not torch.allclose(prompts[0][0], plain[0], rtol=1e-3, atol=1e-3)
            asked = []
            once = encode.encode_one
            monkeypatch.setattr(encode, "encode_one", lambda c, p: asked.append(p) or once(c, p))
            again, _ = execute([clip], ["a blue square", "a new one"]).result
            assert [p for p in asked if p not in encode.PROBES] == ["a new one"]
            assert torch.equal(again[0][0], prompts[1][0])
            with_more, _ = execute([clip], [""], conditioning=[[plain]]).result
            assert len(with_more) == 1
        with pytest.raises(ValueError, match="no prompts in"):
            execute([clip], ["# nothing"])
        assert len(negative) == 1

    def pictured(place, vae, clip, count=4):
        """A folder of pictures of two shapes, encoded with their captions."""
        folder = place / "input" / "mine"
        folder.mkdir()
        for i in range(count):
            size = (96, 96) if i % 2 else (160, 80)
            Image.new("RGB", size, (60 * i, 0, 90)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"a red circle\n and {i}")
        with torch.inference_mode():
            return encode.EncodePrompts.execute([clip], [""], folder=["mine"], size=[64], vae=[vae]).result

    def test_a_folder_of_pictures_becomes_latents_with_captions_and_stays_inside_of_input(place):
        _model, clip, vae = load_shapes.execute("teacher").result
        prompts, negative = pictured(place, vae, clip)
        assert [e[1]["dmd_prompt"] for e in prompts] == [f"a red circle and {i}" for i in range(4)]
        assert {tuple(e[1]["dmd_latent"].shape[-2:]) for e in prompts} == {(8, 8), (6, 12)}
        assert "dmd_latent" not in negative[0][1]
        before = encode.EncodePrompts.fingerprint_inputs(folder=["mine"])
        (place / "input" / "mine" / "0.txt").write_text("another")
        assert encode.EncodePrompts.fingerprint_inputs(folder=["mine"]) != before
        execute = encode.EncodePrompts.execute
        for folder in ("..", "../output", "/tmp", "missing"):
            with pytest.raises(ValueError, match="is no folder in ComfyUI's input folder"):
                execute([clip], [""], folder=[folder], size=[64], vae=[vae])
        with pytest.raises(ValueError, match="need the VAE"):
            execute([clip], [""], folder=["mine"], size=[64])
        with pytest.raises(ValueError, match="brings its own prompts"):
            execute([clip], ["a red circle"], folder=["mine"], size=[64], vae=[vae])

    def test_native_latent_lists_come_with_their_prompts():
        from comfy_extras.nodes_dataset import MakeTrainingDataset, ResolutionBucket

        _model, clip, vae = load_shapes.execute("teacher").result
        images = [torch.rand(1, 64, 64 if i else 96, 3) for i in range(3)]
        with torch.inference_mode():
            made = MakeTrainingDataset.execute(images, [vae], [clip], ["a red circle", "a blue star", "a ring"]).result
            latents, conditioning = ResolutionBucket.execute(*made).result
            assert len(latents) == 2
            out, _ = encode.EncodePrompts.execute([clip], [""], conditioning=conditioning, latents=latents).result
            assert sorted(e[1]["dmd_latent"].shape[-1] for e in out) == [8, 8, 12]
            texts = ["a red circle", "a blue star", "a ring"]
            again, _ = encode.EncodePrompts.execute([clip], texts, latents=made[0]).result
        torch.testing.assert_close(again[1][1]["dmd_latent"], made[0][1]["samples"])
        with pytest.raises(ValueError, match="2 prompts; give one prompt for each"):
            encode.EncodePrompts.execute([clip], texts[:2], latents=made[0])

    @pytest.mark.parametrize(
        ("label", "options"),
        [
            ("LADD", {}),
            ("DMD2", {"gan_weight": 0.01}),
            ("DMD2", {"backward_simulation": False}),
            ("Rectified flow (your pictures)", {}),
        ],
    )
    def test_methods_that_learn_from_pictures_take_the_users_own(place, label, options):
        model, clip, vae = load_shapes.execute("teacher").result
        prompts, negative = pictured(place, vae, clip)
        given = inputs("flux", model=model, prompts=prompts, negative=negative, vae=vae, size=64, updates=2)
        given["method"] = method(label, **options)
        report = Distill.execute(**given).result[4]
        assert "finished" in report
        assert not (place / "output" / "dmd" / "run" / "pairs").exists()
        learned = weights()
        # the control: without pictures the teacher makes some, or the method says that it cannot do without
        given |= {
            "run_name": "plain",
            "prompts": [[c, {"dmd_prompt": o["dmd_prompt"]} | pooled(o)] for c, o in prompts],
        }
        if label.startswith("Rectified"):
            with pytest.raises(ValueError, match="your own pictures, and there are none"):
                Distill.execute(**given)
            return
        Distill.execute(**given)
        assert len(list((place / "output" / "dmd" / "plain" / "pairs").glob("*.safetensors"))) == 2
        assert not same(weights("plain"), learned)

    def pooled(options):
        return {"pooled_output": options["pooled_output"]}

    def test_fine_tuning_keeps_the_guidance_of_the_base(place):
        model, clip, vae = load_shapes.execute("teacher").result
        prompts, negative = pictured(place, vae, clip)
        given = inputs("flux", model=model, prompts=prompts, negative=negative, vae=vae, size=64, updates=2)
        Distill.execute(**given | {"method": method("Rectified flow (your pictures)", guidance=3.0)})
        path, card, _sheet = save.execute(run="run").result
        recipe = lora_files.read_lora(path).recipe
        assert (recipe.cfg, recipe.trained_cfg, recipe.steps) == (3.0, None, 20)
        assert "cfg 3" in card
        assert json.loads(Path(path).with_suffix(".json").read_text())["6"]["inputs"]["cfg"] == 3.0

    def test_pictures_may_be_wider_than_high(place):
        model, clip, _vae = load_shapes.execute("teacher").result
        with torch.inference_mode():
            prompts, negative = encode.EncodePrompts.execute([clip], ["a red circle\na blue star"]).result
        given = inputs("flux", "Reflow", model=model, prompts=prompts, negative=negative, size=96, updates=1)
        for name, height, rows in (("wide", 64, 8), ("square", 0, 12)):
            Distill.execute(**given | {"run_name": name, "height": height})
            (first, *_) = sorted((place / "output" / "dmd" / name / "pairs").glob("*.safetensors"))
            assert safetensors.torch.load_file(first)["latents"].shape == (2, 16, rows, 12)

    @pytest.mark.parametrize("label", ["DMD2", "LADD"])
    def test_one_prompt_without_its_picture_is_refused(place, label):
        model, clip, vae = load_shapes.execute("teacher").result
        prompts, negative = pictured(place, vae, clip, 2)
        prompts = [prompts[0], [prompts[1][0], {"dmd_prompt": "other", **pooled(prompts[1][1])}]]
        given = inputs("flux", model=model, prompts=prompts, negative=negative, size=64, updates=1)
        given["method"] = method(label)
        if label == "DMD2":  # looks at no pictures
            Distill.execute(**given)
            return
        with pytest.raises(ValueError, match="1 of 2 prompts have no picture"):
            Distill.execute(**given)

    @pytest.mark.slow
    def test_the_embedded_world_is_distilled_from_prompts_and_its_teacher_passes_the_probe():
        model, clip, vae = load_shapes.execute("teacher").result
        with torch.inference_mode():
            prompts, negative = encode.EncodePrompts.execute(
                [clip], ["a small red circle\na large blue square\na green star\na yellow triangle"]
            ).result
        given = inputs("flux", model=model, prompts=prompts, negative=negative, vae=vae, size=0, check_teacher=True)
        *_, sheet, report, _run = Distill.execute(**given).result
        assert "teacher: one-step variety" in report
        assert "finished" in report
        assert sheet.shape[-1] == 3
