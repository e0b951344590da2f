"""The graph of stock nodes beside a saved student: what it says, when there is none, and that ComfyUI runs it."""

import json
from dataclasses import replace
from pathlib import Path

import comfy_host
import graph_files
import pytest
import torch

from dmd_core.families import by_name
from dmd_core.weights.recipe import Recipe
from dmd_core.weights.stock_graph import PARTS, obstacle, stock_graph

FAMILIES = {"sd15": None, "sdxl": None, "sd3": 3.0, "flux": None, "z_image": 3.0, "qwen_image": 3.0}
LORA = "dmd2_sdxl_4step_lora_fp16.safetensors"


def recipe(name, steps=4, gamma=1.0, shift=None, **more):
    shift = FAMILIES.get(name) if shift is None else shift
    levels = tuple(by_name(name).sigmas(steps, shift).tolist())
    return Recipe(family=name, objective="dmd2", steps=steps, sigmas=levels, gamma=gamma, shift=shift, **more)


def drawn(name, **more):
    return stock_graph(recipe(name, **more), by_name(name), "base.safetensors", LORA)


def kinds(graph):
    return [n["class_type"] for n in graph.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_says_what_the_recipe_says_in_stock_nodes_alone(name):
    graph = drawn(name)
    sampler = graph["6"]["inputs"]
    assert [sampler[k] for k in ("steps", "cfg", "sampler_name", "scheduler")] == [4, 1.0, "lcm", "simple"]
    assert graph["2"]["inputs"]["lora_name"] == LORA
    assert not any(k.startswith("DMD_") for k in kinds(graph))
    links = [v for n in graph.values() for v in n["inputs"].values() if isinstance(v, list)]
    assert {link[0] for link in links} <= set(graph)
    assert ("CheckpointLoaderSimple" in kinds(graph)) == (name not in PARTS)


def test_samplers_cfg_and_steps_follow_the_recipe():
    still = drawn("sdxl", gamma=0.0, steps=8, cfg=3.0)["6"]["inputs"]
    assert [still[k] for k in ("steps", "cfg", "sampler_name")] == [8, 3.0, "euler"]
    whole = stock_graph(recipe("flux"), by_name("flux"), "all.safetensors", "", True)
    assert kinds(whole)[:2] == ["CheckpointLoaderSimple", "CLIPTextEncode"]
    assert whole["6"]["inputs"]["model"] == ["1", 0]  # merged: no LoRA between


def test_a_shift_node_stands_where_the_model_samples_with_another_shift():
    shift = drawn("qwen_image")["9"]
    assert (shift["class_type"], shift["inputs"]["shift"]) == ("ModelSamplingAuraFlow", 3.0)
    assert drawn("sd3", shift=5.0)["9"]["class_type"] == "ModelSamplingSD3"
    flux = drawn("flux", shift=2.0)["9"]["inputs"]
    assert flux["max_shift"] == flux["base_shift"] == pytest.approx(0.6931)
    assert all("9" not in drawn(name) for name in FAMILIES if name != "qwen_image")  # control


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (recipe("sdxl", 1), "starts below the highest noise level"),
        (recipe("sdxl", gamma=0.5), r"gamma 0\.5 is between"),
        (replace(recipe("flux"), objective="lazy_inpaint"), "fills holes"),
        (replace(recipe("sd3"), sigmas=(1.0, 0.8, 0.5, 0.2, 0.0)), "not those of the scheduler simple"),
        (recipe("pixart", shift=1.0), "not known here"),
    ],
)
def test_what_stock_nodes_cannot_sample_is_said_instead(made, why):
    with pytest.raises(ValueError, match=why):
        stock_graph(made, by_name(made.family), "base.safetensors", LORA)
    assert not obstacle(recipe("sdxl", 2), by_name("sdxl"))  # control


needs_host = pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))

if not comfy_host.in_comfy():

    @pytest.mark.comfy
    @needs_host
    def test_stock_graphs_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__), "-m", "comfy")

    @pytest.mark.browser
    @needs_host
    def test_stock_graphs_in_chromium():
        comfy_host.run_tests_in_comfy(Path(__file__), "-m", "browser")

else:
    comfy_host.start_comfy()

    import comfy.samplers
    import comfy_tiny
    from comfy_extras import nodes_model_advanced
    from comfy_server import name_files, serving
    from test_comfy_graphs import with_standins

    @pytest.mark.comfy
    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_levels_of_ksampler_are_those_of_the_recipe(name):
        made, graph = recipe(name), drawn(name)
        model = comfy_tiny.patcher({"sd15": "sd15_eps"}.get(name, name))
        if "9" in graph:
            inputs = {k: v for k, v in graph["9"]["inputs"].items() if k != "model"}
            node = getattr(nodes_model_advanced, graph["9"]["class_type"])()
            (patch,) = [getattr(node, node.FUNCTION)]
            (shifted,) = patch(model, **inputs)
            assert off(model, made) > 0.01  # control
            model = shifted
        assert off(model, made) < 0.01

    def off(model, made):
        sampling = model.get_model_object("model_sampling")
        levels = comfy.samplers.calculate_sigmas(sampling, "simple", made.steps)
        return ((levels - torch.tensor(made.sigmas)).abs() / levels.max()).max().item()

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        base = tmp_path_factory.mktemp("stock") / "comfy"
        name_files(base, graph_files.read_models())
        with serving(base) as found:
            yield found

    @pytest.fixture(scope="module")
    def browser(server):
        pytest.importorskip("playwright", reason="not run: ComfyUI's Python has no playwright")
        from graph_browser import browsing

        with browsing(server) as found:
            yield found

    BASES = {
        "sdxl": "sd_xl_base_1.0.safetensors",
        "sd3": "sd3.5_large_fp8_scaled.safetensors",
        "flux": "flux1-dev.safetensors",
        "z_image": "z_image_bf16.safetensors",
    }

    @pytest.mark.comfy
    @pytest.mark.parametrize("name", BASES)
    def test_it_is_queued_and_draws(server, name):
        graph = stock_graph(recipe(name), by_name(name), BASES[name], LORA)
        graph["5"]["inputs"].update(width=256, height=256)  # with_standins takes a quarter
        outputs = server.execute(with_standins(graph))
        assert outputs["8"]["images"]

    DROPPED = """async (text) => {
        await app.handleFile(new File([text], 'student.json', {type: 'application/json'}));
    }"""

    @pytest.mark.browser
    @pytest.mark.parametrize("name", BASES)
    def test_dropped_onto_comfyui_it_opens_and_means_the_same(browser, name):
        graph = stock_graph(recipe(name), by_name(name), BASES[name], LORA)
        browser.page.evaluate(DROPPED, json.dumps(graph))
        browser.page.wait_for_timeout(500)
        assert browser.strangers() == []
        assert graph_files.plain(browser.prompt()) == graph_files.plain(graph)
