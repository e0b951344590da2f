"""Graphs in the real frontend, in Chromium: API form -> what a user opens, and back."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_server import Server
from graph_files import SCREEN, Api, Layout

GAP, COLUMN_GAP, GROUP_GAP = 64, 30, 40  # between nodes, columns and groups; a node's title stands in the first
PAD, HEADER = 20, 84  # inside of a group: at its sides, above its first node's body
TITLE = 30  # of a node, above its body
NOTE_WIDTH, NOTE_TEXT = 460, 15  # pixels; nodes/web/notes.js sets the size of the text
LETTERS, NOTE_LINE, FRAME = 1.9, 1.2, 40  # letters in as much of a line as one is high; line height; around the text
VIEW = {"width": 2000, "height": 1100}
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # a first start greets with a tour
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text stays text when a whole graph is looked at
    "Comfy.Minimap.Visible": False,
}
READY = "window.app && window.app.graph && Object.keys(window.LiteGraph?.registered_node_types || {}).length > 100"
LOAD_API = """async (spec) => {
    await app.loadApiJson(spec.api, spec.name);
    for (const node of app.graph.nodes)
        for (const w of node.widgets ?? []) if (w.name === 'control_after_generate') w.value = 'fixed';
    return Object.fromEntries(app.graph.nodes.map(n => [String(n.id), [...n.computeSize()]]));
}"""
ARRANGE = """(spec) => {
    for (const [id, box] of Object.entries(spec.nodes)) {
        const node = app.graph.getNodeById(id) ?? app.graph.getNodeById(Number(id));
        node.pos = [box[0], box[1]];
        node.setSize([box[2], box[3]]);
    }
    const note = LiteGraph.createNode('MarkdownNote');
    note.title = 'Read me';
    app.graph.add(note);
    note.pos = [spec.note.box[0], spec.note.box[1]];
    note.setSize([spec.note.box[2], spec.note.box[3]]);
    note.widgets[0].value = spec.note.text;
    for (const g of spec.groups) {
        const group = new LiteGraph.LGraphGroup(g.title);
        group.pos = [g.box[0], g.box[1]];
        group.size = [g.box[2], g.box[3]];
        app.graph.add(group);
    }
    return app.graph.serialize();
}"""
OPEN = "async (ui) => { await app.loadGraphData(ui); }"
PROMPT = "async () => (await app.graphToPrompt()).output"
STRANGERS = "() => app.graph.nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)"
APP_VIEW = """() => app.graph.extra?.linearData ?? null"""
FIT = """() => {
    const boxes = [...app.graph.nodes, ...app.graph.groups].map(n => n.boundingRect ?? n.getBounding?.());
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
    const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
    const ds = app.canvas.ds, [w, h] = [window.innerWidth - 120, window.innerHeight - 140];
    ds.scale = Math.min(w / (right - left), h / (bottom - top), 1);
    ds.offset = [-left + 90 / ds.scale, -top + 90 / ds.scale];
    app.canvas.setDirty(true, true);
}"""


@dataclass
class Browser:
    page: Any
    server: Server
    errors: list[str] = field(default_factory=list)  # of the console, since the last graph was opened

    def sizes(self, name: str, api: Api) -> dict[str, list[float]]:
        """Opens an API form; the least size of every node."""
        found: dict[str, list[float]] = self.page.evaluate(LOAD_API, {"api": api, "name": name})
        return found

    def arranged(self, layout: Layout, note: str, sizes: Mapping[str, list[float]]) -> dict[str, Any]:
        """What is open, laid out, with its note and groups, as the frontend saves it."""
        ui: dict[str, Any] = self.page.evaluate(ARRANGE, boxes(layout, note, sizes))
        return ui

    def opened(self, ui: Mapping[str, Any]) -> "Browser":
        self.errors.clear()
        self.page.evaluate(OPEN, dict(ui))
        return self

    def prompt(self) -> Api:
        """The API form of what is open."""
        found: Api = self.page.evaluate(PROMPT)
        return found

    def strangers(self) -> list[str]:
        """Types of nodes that this ComfyUI does not have."""
        found: list[str] = self.page.evaluate(STRANGERS)
        return found

    def app_view(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.page.evaluate(APP_VIEW)
        return found

    def screenshot(self, path: Path, **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.evaluate(FIT)
        self.page.wait_for_timeout(700)
        self.page.screenshot(path=str(path), **options)
        return path


def chromium() -> str | None:
    """CHROMIUM, or a browser of the system; None leaves it to playwright."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((p for n in names if (p := shutil.which(n))), None)


@contextmanager
def browsing(server: Server) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    for name, value in SETTINGS.items():
        server.post(f"/settings/{name}", value)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        page = found.new_page(viewport=VIEW)
        browser = Browser(page, server)
        page.on("pageerror", lambda error: browser.errors.append(str(error)))
        page.on("console", lambda said: ours(said, server.url) and browser.errors.append(said.text))
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120_000)
        page.wait_for_timeout(1500)
        try:
            yield browser
        finally:
            found.close()


def ours(said: Any, url: str) -> bool:
    """An error, and not that a service in the world out there cannot be reached from here."""
    place = (said.location or {}).get("url", "")
    outside = place.startswith("http") and not place.startswith(url)
    return said.type == "error" and not outside and "ERR_" not in said.text


def boxes(layout: Layout, words: str, sizes: Mapping[str, list[float]]) -> dict[str, Any]:
    """Where everything stands: the note and the groups from top to bottom while there is height, then from left to
    right; inside of a group its columns side by side. ComfyUI fits a template into its window, and text in nodes is
    drawn only down to a scale of 0.57: a row of all groups would open as grey boxes.
    """
    width = layout.sizes.get("note", [NOTE_WIDTH])[0]
    note = [width, note_height(words, width)]
    inner = [group_boxes(group["columns"], layout, sizes) for group in layout.groups]
    corners = stacked([[note[0], note[1] + TITLE], *[size for _, size in inner]])
    nodes, groups = {}, []
    for group, (placed, (width, height)), (left, top) in zip(layout.groups, inner, corners[1:], strict=True):
        groups.append({"title": group["title"], "box": [left, top, width, height]})
        nodes.update({k: [left + x, top + y, w, h] for k, (x, y, w, h) in placed.items()})
    left, top = corners[0]
    return {"nodes": nodes, "groups": groups, "note": {"text": words, "box": [left, top + TITLE, *note]}}


def group_boxes(
    columns: list[list[str]], layout: Layout, sizes: Mapping[str, list[float]]
) -> tuple[dict[str, list[float]], list[float]]:
    """Of a group's nodes their place in it, and its own size."""
    placed: dict[str, list[float]] = {}
    left, bottom = float(PAD), 0.0
    for column in columns:
        boxes = {k: [max(a, b) for a, b in zip(sizes[k], layout.sizes.get(k, (270, 0)), strict=True)] for k in column}
        top = float(HEADER)
        for key, (w, h) in boxes.items():
            placed[key] = [left, top, w, h]
            top += h + GAP
        left += max(w for w, _ in boxes.values()) + COLUMN_GAP
        bottom = max(bottom, top - GAP)
    return placed, [left - COLUMN_GAP + PAD, bottom + PAD]


def stacked(sizes: list[list[float]]) -> list[tuple[float, float]]:
    """Corners of boxes of these sizes: below the one before where that stays low enough, else in a new column."""
    corners: list[tuple[float, float]] = []
    left, bottom, width = 0.0, -GROUP_GAP, 0.0
    for w, h in sizes:
        if corners and bottom + GROUP_GAP + h > SCREEN[1]:
            left, bottom, width = left + width + GROUP_GAP, -GROUP_GAP, 0.0
        corners.append((left, bottom + GROUP_GAP))
        bottom, width = bottom + GROUP_GAP + h, max(width, w)
    return corners


def note_height(text: str, width: float) -> float:
    """Of Markdown as the frontend draws it: titles twice as large, a line's room between paragraphs, items indented."""
    height, before = float(FRAME), False
    for part in re.split(r"\n\n|\n(?=- |\d\. )", re.sub(r"\]\(.*?\)", "]", text.strip())):
        size, item = (2 if part.startswith("# ") else 1) * NOTE_TEXT, bool(re.match(r"- |\d\. ", part))
        letters = (width - 20 - 40 * item) / size * LETTERS
        height += (1 + len(part) // letters) * size * NOTE_LINE + (0 if item and before else NOTE_TEXT)
        before = item
    return height + NOTE_TEXT
