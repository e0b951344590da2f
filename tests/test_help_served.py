"""Help and languages as ComfyUI serves them and as its frontend shows them. Pictures are kept in out/help."""

import json
import urllib.request
from pathlib import Path

import comfy_host
import pytest

pytestmark = pytest.mark.browser
PICTURES = comfy_host.PACK / "out" / "help"
HELP = comfy_host.PACK / "nodes" / "web" / "docs"

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_help_in_chromium():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    pytest.importorskip("playwright", reason="not run: ComfyUI's Python has no playwright")

    from comfy_server import serving
    from graph_browser import READY, browsing
    from node_schemas import LOCALES, golden

    NODES = sorted(golden())
    SHOWN = """async (type) => {
        app.graph.clear();
        const node = LiteGraph.createNode(type);
        // the frontend keeps labels by the ids of node and widget, also of nodes that are gone
        node.id = window.shown = (window.shown ?? 0) + 1;
        app.graph.add(node);
        await new Promise(r => setTimeout(r, 200));
        return {title: node.title, inputs: Object.fromEntries(node.inputs.map(i => [i.name, i.localized_name])),
                widgets: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.label]))};
    }"""

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        with serving(tmp_path_factory.mktemp("help") / "comfy") as found:
            yield found

    @pytest.fixture(scope="module")
    def browser(server):
        with browsing(server) as found:
            yield found

    def speaking(browser, language):
        """The frontend in that language, loaded again only where it spoke another one."""
        if browser.server.get("/settings").get("Comfy.Locale", "en") != language:
            browser.server.post("/settings/Comfy.Locale", language)
            browser.page.goto(browser.server.url, wait_until="domcontentloaded")
            browser.page.wait_for_function(READY, timeout=120_000)
            browser.page.wait_for_timeout(1500)
        browser.errors.clear()  # a fresh ComfyUI asks for settings that are not there yet
        return browser.page

    def fetched(server, path):
        with urllib.request.urlopen(server.url + path, timeout=60) as answer:
            return answer.read()

    def test_every_page_and_picture_of_the_help_is_served(server):
        for path in sorted(HELP.iterdir()):
            assert fetched(server, f"/extensions/ComfyUI-DMD/docs/{path.name}") == path.read_bytes()

    def test_nodes_come_with_what_the_help_needs(server):
        served = server.get("/object_info")
        for node in NODES:
            assert served[node]["python_module"].split(".") == ["custom_nodes", "ComfyUI-DMD"], "help is found by it"
            assert served[node]["description"]

    def test_nothing_of_ours_complains_at_the_start(server):
        lines = [line for line in server.log.splitlines() if "dmd" in line.lower()]
        bad = [line for line in lines if any(w in line.lower() for w in ("warning", "error", "failed", "traceback"))]
        assert bad == []

    def test_the_seed_of_a_training_stays_so_that_the_next_queue_goes_on(browser):
        # found by the seed: the frontend gives this widget the name of its value
        value = "() => app.graph.nodes[0].widgets.find(w => w.name === 'seed').linkedWidgets[0].value"
        page = speaking(browser, "en")
        for node in (n for n in NODES if "run_name" in golden()[n]["input"]["required"]):
            page.evaluate(SHOWN, node)
            assert page.evaluate(value) == "fixed", node
        page.evaluate(SHOWN, "DMD_FewStepSampler")
        assert page.evaluate(value) == "randomize", "the control: a sampler's seed does roll"

    @pytest.mark.parametrize("language", ["en", "fr", "ja"])
    def test_the_frontend_shows_nodes_in_the_users_language(browser, language):
        page = speaking(browser, language)
        words = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for node in NODES:
            shown = page.evaluate(SHOWN, node)
            assert shown["title"] == words[node]["display_name"]
            labels = {k.replace(".", "_"): v for k, v in shown["widgets"].items()}
            for name, strings in words[node]["inputs"].items():
                if name in labels:
                    assert labels[name] == strings["name"], f"{node}.{name}"
        assert browser.errors == []
        page.evaluate(SHOWN, "DMD_Distill")
        browser.screenshot(PICTURES / f"distill {language}.png")

    CHOOSE = "(method) => { app.graph.nodes[0].widgets.find(w => w.name === 'method').value = method; }"
    WHERE = """(name) => {
        const node = app.graph.nodes[0], ds = app.canvas.ds;
        node.pos = [200, 200];
        [ds.scale, ds.offset] = [1, [0, 0]];
        app.canvas.draw(true, true);
        const widget = node.widgets.find(w => w.name === name);
        const at = app.canvasEl.getBoundingClientRect();
        return [at.left + node.pos[0] + node.size[0] - 60, at.top + node.pos[1] + widget.y + 8];
    }"""

    def test_tooltips_inside_of_a_choice_are_in_the_users_language(browser):
        """Also of what comes with another choice than the first."""
        page = speaking(browser, "ja")
        words = json.loads((LOCALES / "ja" / "nodeDefs.json").read_text(encoding="utf-8"))["DMD_Distill"]["inputs"]
        page.evaluate(SHOWN, "DMD_Distill")
        for method, name in (("DMD2", "critic_updates"), ("Reflow", "lr")):
            page.mouse.move(5, 500)
            page.evaluate(CHOOSE, method)
            page.evaluate(WHERE, f"method.{name}")
            page.wait_for_timeout(600)
            page.mouse.move(*page.evaluate(WHERE, f"method.{name}"))
            page.wait_for_selector(".node-tooltip", timeout=10_000)
            assert page.locator(".node-tooltip").inner_text() == words[f"method_{name}"]["tooltip"]

    def test_the_help_page_opens_with_its_picture(browser):
        page, refused = speaking(browser, "en"), []
        page.on("response", lambda answer: answer.status >= 400 and refused.append(answer.url))
        page.evaluate(SHOWN, "DMD_LazyInpaint")
        page.evaluate("() => { const n = app.graph.nodes[0]; app.canvas.selectNode(n); }")
        page.wait_for_timeout(500)
        page.get_by_test_id("info-button").click()
        page.wait_for_selector("text=Only the tokens of the hole are computed", timeout=10_000)
        picture = page.locator('img[src*="lazy_inpaint.svg"]').first
        picture.wait_for(timeout=10_000)
        assert picture.evaluate("image => image.naturalWidth") > 300
        page.screenshot(path=str(PICTURES / "help page.png"))
        # a page of the user's own language is asked for first, and is not there
        assert {url.removeprefix(browser.server.url) for url in refused} <= {
            "/extensions/ComfyUI-DMD/docs/DMD_LazyInpaint/en.md"
        }
