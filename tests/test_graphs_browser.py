"""The example graphs in the real frontend, in Chromium: what users open opens, and means what was authored.

Pictures of all open graphs are kept in out/graphs.
"""

import copy
from pathlib import Path

import comfy_host
import graph_files
import pytest

pytestmark = pytest.mark.browser
PICTURES = graph_files.PACK / "out" / "graphs"
NAMES = graph_files.names()

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_graphs_in_chromium():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    pytest.importorskip("playwright", reason="not run: ComfyUI's Python has no playwright")

    from comfy_server import name_files, serving
    from graph_browser import NOTE_TEXT, browsing

    @pytest.fixture(scope="module")
    def browser(tmp_path_factory):
        base = tmp_path_factory.mktemp("browser") / "comfy"
        name_files(base, graph_files.read_models())
        with serving(base) as server, browsing(server) as found:
            yield found

    def faults(browser, ui, name):
        """What is wrong with a graph once it is open; nothing where all is well."""
        browser.opened(ui)
        browser.page.wait_for_timeout(300)
        found = [f"{t} is missing" for t in browser.strangers()] + browser.errors
        prompt = graph_files.plain(browser.prompt())
        return found + ([] if prompt == graph_files.plain(graph_files.read_api(name)) else ["another graph"])

    @pytest.mark.parametrize("name", NAMES)
    def test_it_opens_and_means_what_was_authored(browser, name):
        ui = graph_files.read_ui(name)
        assert faults(browser, ui, name) == []
        kept = browser.app_view()
        assert len(kept["inputs"]) == len(graph_files.read_layout(name).inputs), "the app view lost inputs"
        assert [str(o) for o in kept["outputs"]] == graph_files.read_layout(name).outputs
        assert browser.screenshot(PICTURES / f"{name}.png").stat().st_size > 20_000

    def test_every_graph_and_its_thumbnail_are_in_the_template_browser(browser):
        listed = browser.server.get("/workflow_templates")["ComfyUI-DMD"]
        assert sorted(listed) == NAMES
        for name in NAMES:
            for ending in ("json", "jpg"):
                found = browser.page.evaluate(
                    "async (path) => { const a = await fetch(path); return [a.status, (await a.blob()).size]; }",
                    f"/api/workflow_templates/ComfyUI-DMD/{name}.{ending}",
                )
                assert found[0] == 200
                assert found[1] > 500

    FOLDED = """() => {
        const node = app.graph.nodes.find(n => n.type === 'DMD_MixSliders');
        const count = () => node.getLayoutWidgets().length;
        const before = [count(), node.size[1]];
        node.toggleAdvanced();
        return [...before, count(), node.size[1], node.widgets.length];
    }"""

    def test_advanced_inputs_are_folded_away_until_they_are_asked_for(browser):
        """On the classic canvas too, which shows them all by itself; the values stay in the prompt."""
        name = "Mix eight sliders"
        browser.opened(graph_files.read_ui(name))
        few, low, many, high, every = browser.page.evaluate(FOLDED)
        assert few < 30
        assert many == every
        assert low < high
        assert graph_files.plain(browser.prompt()) == graph_files.plain(graph_files.read_api(name))

    SIZES = "() => Object.fromEntries(app.graph.nodes.map(n => [n.id, [...n.size]]))"

    def test_nodes_open_as_large_as_they_were_saved(browser):
        """A training node has room for its preview; its choice of methods would take it back to its least size."""
        ui = graph_files.read_ui("Shapes - distill to 4 steps")
        opened = browser.opened(ui).page.evaluate(SIZES)
        for node in ui["nodes"]:
            assert opened[str(node["id"])] == pytest.approx(node["size"], abs=1), node["type"]

    NOTE = """() => {
        const note = app.graph.nodes.find(n => n.type === 'MarkdownNote').widgets[0].element;
        const text = note.querySelector('.tiptap');
        return [parseFloat(getComputedStyle(text).fontSize), text.scrollHeight, text.clientHeight];
    }"""

    @pytest.mark.parametrize("name", NAMES)
    def test_a_note_has_large_letters_and_is_not_cut_off(browser, name):
        browser.opened(graph_files.read_ui(name)).screenshot(PICTURES / "a note.png")
        size, needed, there = browser.page.evaluate(NOTE)
        assert size == NOTE_TEXT
        assert 0 < needed <= there
        plain = graph_files.read_ui(name)  # the control: other notes stay as they are
        (note,) = (n for n in plain["nodes"] if n["type"] == "MarkdownNote")
        note["properties"].pop("dmd text size")
        assert browser.opened(plain).page.evaluate(NOTE)[0] < NOTE_TEXT

    SAY = "text => app.graph.nodes.find(n => n.type === 'DMD_Distill').onExecuted({text: [text]})"
    SAID = """() => {
        const node = app.graph.nodes.find(n => n.type === 'DMD_Distill');
        const { element } = node.widgets.find(w => w.name === 'dmd report');
        return [element.value, element.scrollHeight, element.clientHeight];
    }"""

    @pytest.mark.parametrize("lines", [2, 12])
    def test_a_report_on_its_node_is_not_cut_off(browser, lines):
        browser.opened(graph_files.read_ui("Shapes - distill to 4 steps"))
        said = "\n".join(
            ["A line of a report that is too long for the box and is wrapped, as most of them are."] * lines
        )
        browser.page.evaluate(SAY, said)
        browser.screenshot(PICTURES / "report on a node.png")  # boxes have no size before they are drawn
        kept, needed, there = browser.page.evaluate(SAID)
        assert kept == said
        assert 20 * lines < needed <= there
        assert there < needed + 60, "it takes no more room than it needs"

    IN_A_TAB = "async ([ui, name]) => { await app.loadGraphData(ui, true, true, name); }"
    DONE = """text => app.api.dispatchCustomEvent('executed', {
        node: '3', display_node: '3', prompt_id: 'x', output: { text: [text] },
    })"""

    def test_a_report_is_still_there_after_a_look_at_another_tab(browser):
        page, mine = browser.page, "Shapes - distill to 4 steps"
        for name in (mine, "What is this file"):
            page.evaluate(IN_A_TAB, [graph_files.read_ui(name), name])
            page.wait_for_timeout(1000)
            if name == mine:
                page.evaluate(DONE, "Run shapes student: finished.")
        assert not page.evaluate("app.graph.nodes.some(n => n.type === 'DMD_Distill')"), "the other tab is open"
        page.locator(".workflow-tabs-container").get_by_text(mine[:12]).last.click()
        page.wait_for_function("app.graph.nodes.some(n => n.type === 'DMD_Distill')")
        page.wait_for_timeout(500)
        assert page.evaluate(SAID)[0] == "Run shapes student: finished."

    @pytest.mark.parametrize("change", ["renamed node", "wrong value", "missing link"])
    def test_a_broken_graph_is_told(browser, change):
        name = "SDXL DMD2 in 4 steps"
        ui = copy.deepcopy(graph_files.read_ui(name))
        (sampler,) = (n for n in ui["nodes"] if n["type"] == "DMD_FewStepSampler")
        if change == "renamed node":
            sampler["type"] = "DMD_FewStepSamplerOfTomorrow"
        elif change == "wrong value":
            sampler["widgets_values"][0] = 99
        else:
            ui["links"] = [link for link in ui["links"] if link[3] != sampler["id"] or link[5] != "CONDITIONING"]
            for given in sampler["inputs"]:
                given["link"] = None if given["name"] == "positive" else given["link"]
        assert faults(browser, ui, name) != []
