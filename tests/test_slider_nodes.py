"""Mix Sliders, Instant Slider and sweeps in Compare Grid in the real ComfyUI, on tiny random models."""

import logging
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_mixing_sliders_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.sample
    import comfy.samplers
    import comfy_tiny
    import folder_paths
    import slider_files as files
    import slider_host

    import nodes

    mix = comfy_host.pack_module("nodes.mix_sliders")
    shelf_of = comfy_host.pack_module("nodes.slider_files")
    timing = comfy_host.pack_module("nodes.slider_timing")
    comfy_denoiser = comfy_host.pack_module("nodes.comfy_denoiser")
    doctor = comfy_host.pack_module("nodes.doctor")
    evidence = comfy_host.pack_module("nodes.evidence")
    grid = comfy_host.pack_module("nodes.grid")
    instant = comfy_host.pack_module("nodes.instant_slider")
    sliders = comfy_host.pack_module("dmd_core.sliders")
    InstantSlider = instant.InstantSlider
    MixSliders = mix.MixSliders
    FIVE = ("sd15_eps", "sdxl", "sd3", "flux", "z_image")
    STEPS = 4

    @pytest.fixture(autouse=True)
    def shelf(tmp_path, monkeypatch):
        """ComfyUI's loras folder."""
        folder = tmp_path / "loras"
        folder.mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, "loras", ([str(folder)], folder_paths.supported_pt_extensions)
        )
        folder_paths.filename_list_cache.clear()
        return folder

    def rows(*given, **more):
        """(file, strength) or (file, strength, {other widgets}) for each row."""
        found = {}
        for i, (name, strength, *rest) in enumerate(given, 1):
            found |= {f"slider_{i}": Path(name).name, f"strength_{i}": strength}
            found |= {f"{k}_{i}": v for k, v in (rest[0] if rest else {}).items()}
        return found | more

    def mixed(model, *given, **more):
        with torch.inference_mode():
            return MixSliders.execute(model, **rows(*given, **more)).result

    def draw(name, model, seed=5, steps=STEPS, cfg=2.0, trace=None):
        """A stock run; trace collects (x, x0) of every step."""
        tiny = comfy_tiny.FAMILIES[name]
        cond, negative = (comfy_tiny.conditioning(name, s) for s in (1, 9))
        start = torch.zeros(1, *tiny.shape)

        def keep(step, x0, x, total):
            if trace is not None:
                trace.append((x.clone(), x0.clone()))

        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(start, seed)
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "simple", cond, negative, start, seed=seed, callback=keep
            ).clone()

    def stock(model, *given):
        """The same by chaining ComfyUI's own loaders."""
        with torch.inference_mode():
            for name, strength in given:
                (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, Path(name).name, strength)
        return model

    def close(a, b, tolerance=1e-5):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())

    # --- the same as stock loaders ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", FIVE)
    def test_three_rows_are_three_stock_loaders(name, shelf, caplog):
        model = comfy_tiny.patcher(name)
        before = draw(name, model)
        made = [(files.write(shelf, f"s{i}", model, i), s) for i, s in enumerate((1.0, -0.5, 0.75))]
        with caplog.at_level(logging.INFO):
            mixed_model, report = mixed(model, *made)
        assert not [m for m in caplog.messages if "not loaded" in m.lower() or "ERROR" in m]
        wanted = draw(name, stock(model, *made))
        close(draw(name, mixed_model), wanted)
        assert not torch.allclose(wanted, before, rtol=1e-3, atol=1e-3), "the sliders do nothing"
        # the control: one strength is different
        close_to = draw(name, stock(model, *made[:2], (made[2][0], 0.5)))
        assert (close_to - wanted).abs().max() > 1e-4
        assert report.count("not calibrated") == 3
        assert torch.equal(draw(name, model), before), "the MODEL that went in has changed"

    @pytest.mark.parametrize("name", ["sd15_eps", "flux"])
    def test_while_sampling_gives_what_in_the_weights_gives(name, shelf):
        model = comfy_tiny.patcher(name)
        made = [(files.write(shelf, f"s{i}", model, i), s) for i, s in enumerate((1.0, -0.5))]
        wanted = draw(name, mixed(model, *made)[0])
        running = mixed(model, *made, apply=mix.RUNNING)[0]
        close(draw(name, running), wanted, 1e-4)
        assert not running.patches
        assert not torch.allclose(wanted, draw(name, model), rtol=1e-3, atol=1e-3)

    def test_nodes_in_a_row_add_up_also_those_that_run_while_sampling(shelf):
        model = comfy_tiny.patcher("flux")
        one, two = (files.write(shelf, f"s{i}", model, i) for i in range(2))
        wanted = draw("flux", mixed(model, (one, 1.0), (two, -0.5))[0])
        for how in ({}, {"apply": mix.RUNNING}):
            first = mixed(model, (one, 1.0), **how)[0]
            close(draw("flux", mixed(first, (two, -0.5), **how)[0]), wanted, 1e-4)
            # the first one is still itself
            close(draw("flux", first), draw("flux", stock(model, (one, 1.0))), 1e-4)

    # --- off is off ---------------------------------------------------------------------------------------------------

    def test_nothing_active_gives_the_very_model(shelf):
        model = comfy_tiny.patcher("flux")
        file = files.write(shelf, "s", model)
        off = [
            rows((file, 0.0)),
            rows((file, 1.0, {"on": False})),
            rows((file, 1.0), master=0.0),
            rows((file, 0.0), randomise=0.0, seed=7),
            {},
        ]
        for given in off:
            assert MixSliders.execute(model, **given).result == (model, mix.OFF)
        assert MixSliders.execute(model, **rows((file, 1.0)))[0] is not model

    def test_the_model_is_clean_after_a_run_that_broke_and_gives_the_same_again(shelf, monkeypatch):
        model = comfy_tiny.patcher("flux")
        before = draw("flux", model)
        timed = mixed(model, (files.write(shelf, "s", model), 1.0, {"start_step": 1}))[0]
        image = draw("flux", timed)

        def broken(step, *_rest):
            if step == 2:
                raise KeyboardInterrupt

        class Breaking(list):
            def append(self, _item):
                broken(len(self) + 2)

        with pytest.raises(KeyboardInterrupt):
            draw("flux", timed, trace=Breaking())
        assert torch.equal(draw("flux", model), before)
        assert not any(m._forward_hooks for m in model.model.modules())
        assert torch.equal(draw("flux", timed), image)
        assert not torch.equal(image, before)

    # --- at some steps only -------------------------------------------------------------------------------------------

    def steps_at_work(name, model, given, full):
        """For each of the steps: does the prediction there follow the model with the slider, or the one without?"""
        trace = []
        draw(name, mixed(model, given)[0], cfg=1.0, trace=trace)
        cond, found = comfy_tiny.conditioning(name, 1), []
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
        for i, (x, x0) in enumerate(trace):
            apart = []
            for variant in (model, full):
                with comfy_denoiser.ComfyDenoiser(variant) as denoiser, torch.no_grad():
                    apart.append((denoiser(x.clone(), sigmas[i : i + 1].clone(), cond) - x0).abs().max().item())
            size = x0.abs().max().item()
            assert min(apart) < 1e-5 * size
            assert max(apart) > 100 * min(apart)
            found.append(apart[1] < apart[0])
        return found

    @pytest.mark.parametrize("name", ["sd15_eps", "flux"])
    @pytest.mark.parametrize(
        ("widgets", "wanted"),
        [
            ({"start_step": 2}, [0, 0, 1, 1]),
            ({"end_step": 1}, [1, 0, 0, 0]),
            ({"start_step": 1, "end_step": 3}, [0, 1, 1, 0]),
        ],
    )
    def test_a_row_works_at_its_steps_and_at_no_other(name, widgets, wanted, shelf):
        model = comfy_tiny.patcher(name)
        file = files.write(shelf, "s", model)
        assert steps_at_work(name, model, (file, 1.0, widgets), stock(model, (file, 1.0))) == [bool(w) for w in wanted]

    def test_shares_of_the_sampling_are_comfyuis(shelf):
        """On levels that are even in time, a quarter is a step of four."""
        model = comfy_tiny.patcher("sd15_eps")
        file = files.write(shelf, "s", model)
        full = stock(model, (file, 1.0))
        for widgets, wanted in [
            ({"start": 0.25}, [0, 1, 1, 1]),
            ({"end": 0.5}, [1, 1, 0, 0]),
            ({"start": 0.2, "end": 0.7}, [0, 1, 1, 0]),
            ({"start": 0.25, "end_step": 3}, [0, 1, 1, 0]),
        ]:
            assert steps_at_work("sd15_eps", model, (file, 1.0, widgets), full) == [bool(w) for w in wanted], widgets

    def test_calls_between_two_levels_belong_to_the_step_above():
        levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        assert [timing.step_of(s, levels) for s in (1.0, 0.9, 0.75, 0.7500001, 0.3, 0.01)] == [0, 0, 1, 1, 2, 3]

    # --- what is said -------------------------------------------------------------------------------------------------

    def test_ranges_wrong_bases_and_uncalibrated_files_are_said(shelf):
        model, other = comfy_tiny.patcher("flux"), comfy_tiny.patcher("flux", seed=1)
        mine = files.a_card(shelf_of.identity(model))
        good = files.write(shelf, "good", model, card=mine)
        bad = files.write(shelf, "bad", model, card=files.a_card("else", verdict="nothing"))
        free = files.write(shelf, "free", model)
        report = mixed(model, (good, 2.0), (free, 3.0))[1]
        assert "measured from -1.5 to +2" in report
        assert "Warning" not in report
        assert "not calibrated" in report
        assert "outside of the measured range" in mixed(model, (good, 1.0), master=-2.0)[1]
        said = mixed(model, (bad, 1.0))[1]
        assert "not this MODEL" in said
        assert "does not move what it should" in said
        assert "not this MODEL" in mixed(other, (good, 1.0))[1]

    def test_the_base_is_known_again_while_loras_are_in_its_weights(shelf):
        model = comfy_tiny.patcher("flux")
        loaded = stock(model, (files.write(shelf, "s", model), 1.0))
        bare = shelf_of.identity(model)
        draw("flux", loaded)  # the weights now hold the LoRA
        shelf_of._hashes.clear()
        assert shelf_of.identity(loaded) == bare
        shelf_of._hashes.clear()
        assert shelf_of.identity(comfy_tiny.patcher("flux", seed=1)) != bare

    def test_random_strengths_stay_in_the_measured_range_and_hang_on_the_seed(shelf):
        model = comfy_tiny.patcher("flux")
        one = files.write(shelf, "one", model, card=files.a_card(usable=(-0.5, 2.0)))
        two = files.write(shelf, "two", model, 1)
        given = rows((one, 0.0), (two, 0.0))
        drawn = [mix.rows_of(given, None, 1.0, 0.5, seed) for seed in range(40)]
        first, second = ([r[i].strength for r in drawn] for i in range(2))
        assert -0.25 <= min(first) < -0.1 < 0.8 < max(first) <= 1.0
        assert -0.5 <= min(second) < -0.3 < 0.3 < max(second) <= 0.5
        again = mix.rows_of(given | {"on_1": False}, None, 1.0, 0.5, 3)
        assert [r.strength for r in again] == [second[3]], "another row changes this one's draw"

    def test_a_few_step_lora_in_a_row_is_still_known_by_its_name(shelf):
        model = comfy_tiny.patcher("flux")
        one, two = (files.write(shelf, f"s{i}", model, i).name for i in range(2))
        folder_paths.filename_list_cache.clear()
        found = list(evidence.lora_files({"inputs": rows((one, 0.5), (two, 1.0, {"on": False}))}))
        assert [(e.name, e.strength) for e, _ in found] == [(one, 0.5), (two, 0.0)]

    def test_entries_of_a_set_are_chosen_by_number(shelf):
        model = comfy_tiny.patcher("flux")
        made = [files.write(shelf, f"s{i}", model, i) for i in range(2)]
        known = [shelf_of.read(p.name, str(p)) for p in made]
        got = draw("flux", MixSliders.execute(model, known, slider_1="set 2", strength_1=1.0)[0])
        assert torch.equal(got, draw("flux", mixed(model, (made[1], 1.0))[0]))
        assert not torch.equal(got, draw("flux", mixed(model, (made[0], 1.0))[0]))
        for sliders, message in ((known, "the slider set has 2"), (None, "no slider set is connected")):
            with pytest.raises(ValueError, match=message):
                MixSliders.execute(model, sliders, slider_1="set 3", strength_1=1.0)

    # --- other people's files -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("name", "ending", "preset"),
        [
            ("sd15_eps", ".pt", "all"),  # with convolutions, as Concept Sliders train them by default
            ("sdxl", ".safetensors", "kv"),
            ("flux", ".pt", "attention"),
            ("flux", ".safetensors", "attention"),
        ],
    )
    def test_published_sliders_load_in_full(name, ending, preset, shelf, caplog):
        """UNets as they are; Flux in the spelling that ComfyUI drops without an error."""
        model = comfy_tiny.patcher(name)
        found = files.state(model, preset=preset)
        file = files.write_baulab(shelf / f"published{ending}", model, found)
        wanted = draw(name, stock(model, (files.write(shelf, "ours", model, preset=preset), 1.0)))
        assert not torch.allclose(wanted, draw(name, model), rtol=1e-3, atol=1e-3)
        for widgets in ({}, {"end_step": 100}):  # in the weights, and while sampling
            got, report = mixed(model, (file, 1.0, widgets))
            close(draw(name, got), wanted, 1e-4)
            assert ("translated" in report) == (name == "flux")
        with caplog.at_level(logging.WARNING):
            plain = draw(name, stock(model, (file, 1.0)))
        dropped = [m for m in caplog.messages if "not loaded" in m]
        assert bool(dropped) == (name == "flux"), "what stock ComfyUI does with such a file has changed"
        assert torch.equal(plain, draw(name, model)) == (name == "flux")

    @pytest.mark.parametrize("ending", [".pt", ".safetensors"])
    def test_the_doctor_repairs_what_comfyui_drops(ending, shelf, caplog):
        model = comfy_tiny.patcher("flux")
        file = files.write_baulab(shelf / f"published{ending}", model, files.state(model))
        folder_paths.filename_list_cache.clear()
        report = doctor.Doctor.execute(f"loras/{file.name}", model=model)[0]
        assert "ComfyUI drops" in report
        assert "0 of" in report
        said, path = doctor.Doctor.execute(f"loras/{file.name}", doctor.COPY, model=model).result
        assert "Refused" not in said
        wanted = draw("flux", stock(model, (files.write(shelf, "ours", model), 1.0)))
        with caplog.at_level(logging.WARNING):
            close(draw("flux", stock(model, (path, 1.0))), wanted, 3e-3)  # the copy is fp16
        assert not [m for m in caplog.messages if "not loaded" in m]

    def test_wrong_files_are_named(shelf):
        model = comfy_tiny.patcher("flux")
        foreign = files.write(shelf, "unet", comfy_tiny.patcher("sdxl"))
        (shelf / "broken.safetensors").write_bytes(b"no weights")
        mine = files.write(shelf, "mine", model)
        for given, message in [
            (rows((foreign, 1.0)), "does not belong on this MODEL"),
            (rows(("absent.safetensors", 1.0)), r"'absent\.safetensors' is not in ComfyUI's loras folders"),
            (rows(("broken.safetensors", 1.0)), "cannot be read"),
            (rows((mine, 1.0, {"start": 0.5, "end": 0.5})), "row 1 starts at 0.5"),
            (rows((mine, 1.0), apply="else"), "apply is 'else'"),
        ]:
            with pytest.raises(ValueError, match=message):
                MixSliders.execute(model, **given)

    # --- without training ---------------------------------------------------------------------------------------------

    def at_once(name, model, **changes):
        given = {"positive": "a big dog", "negative": "a small dog", "strength": 0.7, **changes}
        with torch.inference_mode():
            return InstantSlider.execute(model, slider_host.FakeClip(name), **given)[0]

    @pytest.mark.parametrize("name", ["sd15_eps", "flux"])
    def test_an_instant_slider_is_the_engines_at_every_step_where_it_works(name):
        model, trace = comfy_tiny.patcher(name), []
        draw(name, at_once(name, model, start_step=1, end_step=3), cfg=1.0, trace=trace)
        cond = comfy_tiny.conditioning(name, 1)
        ends = [slider_host.FakeClip(name).encode_from_tokens_scheduled(f"a {s} dog") for s in ("big", "small")]
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
        with comfy_denoiser.ComfyDenoiser(model) as denoiser, torch.no_grad():
            for i, (x, x0) in enumerate(trace):
                wanted = sliders.Instant(denoiser, *ends, strength=0.7 if i in (1, 2) else 0.0)
                close(x0, wanted(x.clone(), sigmas[i : i + 1].clone(), cond), 1e-4)
                other = sliders.Instant(denoiser, *ends, strength=0.0 if i in (1, 2) else 0.7)
                assert (x0 - other(x.clone(), sigmas[i : i + 1].clone(), cond)).abs().max() > 1e-3

    def test_it_costs_three_forwards_where_it_works_and_one_elsewhere(monkeypatch):
        model = comfy_tiny.patcher("flux")
        before, seen = draw("flux", model, cfg=1.0), []
        inner = type(model.model)._apply_model
        monkeypatch.setattr(
            type(model.model), "_apply_model", lambda *a, **k: (seen.append(1), inner(*a, **k))[1], raising=True
        )
        for changes, wanted in [({}, 3 * STEPS), ({"start_step": 3}, STEPS + 2), ({"end": 0.1}, STEPS + 2)]:
            seen.clear()
            draw("flux", at_once("flux", model, **changes), cfg=1.0)
            assert len(seen) == wanted, changes
        assert at_once("flux", model, strength=0.0) is model
        assert torch.equal(draw("flux", model, cfg=1.0), before)

    def test_instant_sliders_add_up_and_repeat_themselves():
        model = comfy_tiny.patcher("flux")
        once = draw("flux", at_once("flux", model, strength=1.0))
        twice = at_once("flux", at_once("flux", model, strength=0.5), strength=0.5)
        close(draw("flux", twice), once, 1e-4)
        assert torch.equal(draw("flux", twice), draw("flux", twice))
        back = at_once("flux", at_once("flux", model, strength=0.5), strength=-0.5)
        close(draw("flux", back), draw("flux", model), 1e-4)
        assert not torch.allclose(once, draw("flux", model), rtol=1e-3, atol=1e-3)

    def test_instant_sliders_refuse_equal_ends_and_empty_spans():
        model = comfy_tiny.patcher("flux")
        for changes, message in [
            ({"negative": "a big dog"}, "mean the same to this model"),
            ({"start": 0.6, "end": 0.5}, "let it end later"),
        ]:
            with pytest.raises(ValueError, match=message):
                at_once("flux", model, **changes)

    # --- sweeps -------------------------------------------------------------------------------------------------------

    def sheet_of(model, name="sd15_eps", **given):
        cond = comfy_tiny.conditioning(name, 1)
        start = {"samples": torch.zeros(1, 4, 8, 8)}
        with torch.inference_mode():
            return grid.Grid.execute(
                model, cond, cond, slider_host.FakeVAE(4), start, steps="2", cfg=1.0, cell=64, **given
            )

    def test_the_grid_sweeps_one_slider_over_seeds_and_two_at_one_seed(shelf, monkeypatch):
        model = comfy_tiny.patcher("sd15_eps")
        one = files.write(shelf, "one", model, card=files.a_card(usable=(-1.0, 1.0))).name
        two = files.write(shelf, "two", model, 1).name
        pages = []
        inner = grid.sheet
        monkeypatch.setattr(grid, "sheet", lambda *args: (pages.append(args), inner(*args))[1])
        text = sheet_of(model, slider=one, strengths="-2, 0, 1", seeds="1, 2")[1]
        rows, labels, heads, _cell = pages[-1]
        assert [len(r) for r in rows] == [2, 2, 2]
        assert heads == ["seed 1", "seed 2"]
        assert [w in row for w, row in zip(("-2, beyond its range", "+0", "+1"), labels, strict=True)] == [True] * 3
        assert "seeds differ by" in text
        out = sheet_of(model, slider=one, strengths="-1, 1", slider_2=two, strengths_2="-1, 0, 0.5", seeds="7")
        rows, labels, heads, _cell = pages[-1]
        assert [len(r) for r in rows] == [3, 3]
        assert heads == ["two_00001 -1", "two_00001 +0", "two_00001 +0.5"]
        assert "strengths differ by" in out[1]
        # each picture is the one that stock loaders give
        for i, s in enumerate((-1.0, 1.0)):
            for j, t in enumerate((-1.0, 0.0, 0.5)):
                alone = stock(model, (one, s), (two, t))
                sheet_of(alone, seeds="7")
                torch.testing.assert_close(rows[i][j], pages[-1][0][0][0], rtol=1e-4, atol=1e-4)
        assert (rows[0][0] - rows[1][2]).abs().max() > 1e-2
        known = [shelf_of.read(one, str(shelf / one))]
        sheet_of(model, slider="set 1", strengths="1", sliders=known, seeds="7")
        torch.testing.assert_close(pages[-1][0][0][0], rows[1][1])
        with pytest.raises(ValueError, match="no slider set is connected"):
            sheet_of(model, slider="set 1", strengths="1")
        with pytest.raises(ValueError, match="does not belong on this MODEL"):
            sheet_of(model, slider=files.write(shelf, "flux", comfy_tiny.patcher("flux")).name, strengths="1")

    # --- the schema ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("node", [MixSliders, InstantSlider, grid.Grid])
    def test_schemas_have_words_for_everything(node):
        schema = node.GET_SCHEMA()
        assert all(i.tooltip for i in schema.inputs)
        assert all(o.tooltip for o in schema.outputs)
        assert schema.search_aliases

    def test_the_schema_is_whole_and_has_eight_rows_of_sliders():
        schema = MixSliders.GET_SCHEMA()
        assert all(i.tooltip for i in schema.inputs)
        assert all(o.tooltip for o in schema.outputs)
        strengths = [i for i in schema.inputs if i.id.startswith("strength_")]
        assert len(strengths) == 8
        assert {(i.step, i.display_mode.value, i.default) for i in strengths} == {(0.05, "slider", 0.0)}
        assert MixSliders.GET_NODE_INFO_V1()["display_name"] == schema.display_name
