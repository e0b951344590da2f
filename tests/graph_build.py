"""Makes the graphs that users open from those that are authored, through the real frontend.

    scripts/graphs [NAME ...]         workflows/NAME.json and .jpg from workflows/api/NAME.json and .toml
    scripts/graphs --run [NAME ...]   runs the shapes graphs too: thumbnails and docs/images of their own output

Also completes what the author left at its default, and rewrites tests/golden/core_nodes.json for the core nodes in use.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import comfy_host
import graph_files
from graph_browser import NOTE_TEXT
from graph_files import PACK, WORKFLOWS, Api, Layout
from PIL import Image, ImageDraw, ImageFont

SHAPES = "Shapes - "
IMAGES = PACK / "docs" / "images"
THUMBNAIL = (640, 400)
PAPER, INK, LINE, BOX, OWN = (250, 250, 247), (35, 38, 45), (150, 155, 165), (231, 233, 238), (205, 222, 245)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/graphs")
    parser.add_argument("names", nargs="*", help="graphs; all of them where none is named")
    parser.add_argument("--run", action="store_true", help="run the shapes graphs and keep their pictures")
    given = parser.parse_args()
    if not comfy_host.in_comfy():
        done = comfy_host.run_in_comfy([__file__, *sys.argv[1:]])
        print(done.stdout + (done.stderr if done.returncode else ""))
        sys.exit(done.returncode)
    names = given.names or graph_files.names()
    from comfy_server import name_files, serving
    from graph_browser import browsing

    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_now:
        base = Path(folder) / "comfy"
        name_files(base, graph_files.read_models())
        server = open_now.enter_context(serving(base))
        schemas = live_schemas(server.get("/object_info"))
        version = server.get("/system_stats")["system"]["comfyui_version"]
        browser = open_now.enter_context(browsing(server))
        for name in names:
            build(browser, name, schemas, version)
            if given.run and name.startswith(SHAPES):
                run(browser, name)
    write_core(schemas)


def live_schemas(infos: dict[str, Any]) -> dict[str, Any]:
    """Of all nodes of a running ComfyUI; ours as the golden has them."""
    ours = json.loads(graph_files.OURS.read_text(encoding="utf-8"))
    return {k: graph_files.core_schema(v) for k, v in infos.items()} | ours


def write_core(schemas: dict[str, Any]) -> None:
    used = {n["class_type"] for name in graph_files.names() for n in graph_files.read_api(name).values()}
    rows = {k: schemas[k] for k in sorted(used) if not k.startswith("DMD_")}
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    graph_files.CORE.write_text(text + "\n", encoding="utf-8")


def build(browser: Any, name: str, schemas: dict[str, Any], version: str) -> None:
    api, layout = graph_files.completed(graph_files.read_api(name), schemas), graph_files.read_layout(name)
    if wrong := graph_files.complaints(api, schemas):
        sys.exit(f"{name}:\n  " + "\n  ".join(wrong))
    graph_files.write_api(name, api)
    ui = browser.arranged(layout, graph_files.note_of(name), browser.sizes(name, api))
    finish(ui, name, api, layout, version)
    back = graph_files.plain(browser.opened(ui).prompt())
    if back != graph_files.plain(api):
        sys.exit(f"{name}: the frontend gives another graph back: {difference(back, graph_files.plain(api))}")
    text = json.dumps(ui, indent=1, ensure_ascii=False)
    (WORKFLOWS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    picture = WORKFLOWS / f"{name}.jpg"
    if not (name.startswith(SHAPES) and picture.is_file()):  # those have pictures of their own output
        diagram(name, api, layout, schemas).save(picture, quality=88)
    print(f"{name}: {len(api)} nodes", flush=True)


def finish(ui: dict[str, Any], name: str, api: Api, layout: Layout, version: str) -> None:
    """What the frontend does not write: whose nodes these are, where files are found, the app view."""
    ui["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfy-dmd/{name}"))
    models, wanted = graph_files.read_models(), {}
    for key, _, file in graph_files.named_files(api):
        wanted.setdefault(key, []).append({"name": file, **models[file]})
    for node in ui["nodes"]:
        own = node["type"].startswith("DMD_")
        if node["type"] == "MarkdownNote":
            node.update(color="#432", bgcolor="#653")
            node["properties"] = {**node.get("properties", {}), "dmd text size": NOTE_TEXT}
            continue
        properties = node.setdefault("properties", {})
        properties["cnr_id"], properties["ver"] = pack() if own else ("comfy-core", version)
        if str(node["id"]) in wanted and not own:  # the stock loaders' way; Doctor and Grid name what is there already
            properties["models"] = wanted[str(node["id"])]
    extra = ui.setdefault("extra", {})
    extra["linearData"] = {"inputs": layout.inputs, "outputs": layout.outputs}
    extra["linearMode"] = False
    extra.pop("ds", None)  # the view fits itself to the window


def pack() -> tuple[str, str]:
    """Name and version of this pack."""
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    found = [re.search(rf'^{key} = "(.+?)"', text, re.M) for key in ("name", "version")]
    assert found[0]
    assert found[1]
    return found[0][1], found[1][1]


def difference(found: Api, wanted: Api) -> list[str]:
    """Every input in which two graphs differ."""
    empty: dict[str, Any] = {"class_type": None, "inputs": {}}
    rows = []
    for key in sorted({*found, *wanted}):
        a, b = (graph.get(key, empty) for graph in (found, wanted))
        if a["class_type"] != b["class_type"]:
            rows.append(f"{key}: {a['class_type']}, not {b['class_type']}")
        names = sorted({*a["inputs"], *b["inputs"]})
        pairs = [(name, a["inputs"].get(name), b["inputs"].get(name)) for name in names]
        rows += [f"{key}.{name}: {x!r}, not {y!r}" for name, x, y in pairs if x != y]
    return rows


# --- pictures ---------------------------------------------------------------------------------------------------------


def diagram(name: str, api: Api, layout: Layout, schemas: dict[str, Any]) -> Image.Image:
    """The groups of a graph as columns of boxes: no picture pretends to come from a model that was not run."""
    page = Image.new("RGB", THUMBNAIL, PAPER)
    draw = ImageDraw.Draw(page)
    width, height = THUMBNAIL
    draw.text((20, 14), name, fill=INK, font=font(24 if len(name) < 42 else 20))
    columns = [[k for column in g["columns"] for k in column] for g in layout.groups]
    step = (width - 40) / len(columns)
    for i, (group, keys) in enumerate(zip(layout.groups, columns, strict=True)):
        left, top = 20 + i * step, 62
        draw.text((left, top), clipped(draw, group["title"], step - 16, font(15)), fill=INK, font=font(15))
        row = min(54.0, (height - top - 62) / max(len(keys), 1))
        for j, key in enumerate(keys):
            y = top + 28 + j * row
            own = api[key]["class_type"].startswith("DMD_")
            draw.rounded_rectangle((left, y, left + step - 22, y + row - 9), 5, fill=OWN if own else BOX, outline=LINE)
            label = clipped(draw, title(api[key], schemas), step - 36, font(13))
            draw.text((left + 7, y + (row - 9) / 2), label, fill=INK, font=font(13), anchor="lm")
        if i + 1 < len(columns):
            middle = top + 28 + (row - 9) / 2
            draw.line((left + step - 18, middle, left + step - 5, middle), fill=INK, width=2)
            draw.polygon(
                [(left + step - 8, middle - 5), (left + step, middle), (left + step - 8, middle + 5)], fill=INK
            )
    draw.text((20, height - 22), "diagram: blue boxes are nodes of this pack", fill=LINE, font=font(12))
    return page


def title(node: dict[str, Any], schemas: dict[str, Any]) -> str:
    return str(node.get("_meta", {}).get("title") or schemas[node["class_type"]]["display_name"])


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def clipped(draw: ImageDraw.ImageDraw, text: str, width: float, face: Any) -> str:
    if draw.textlength(text, face) <= width:
        return text
    while text and draw.textlength(text + "…", face) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def run(browser: Any, name: str) -> None:
    """Runs what is open as the Run button does; its main picture becomes the thumbnail, the whole view a document."""
    server = browser.server
    known = set(server.get("/history"))
    began = time.monotonic()
    browser.page.evaluate("app.queuePrompt(0, 1)")
    while not (new := set(server.get("/history")) - known):
        browser.page.wait_for_timeout(300)
        if time.monotonic() - began > 600:
            sys.exit(f"{name}: it did not end within ten minutes")
    (found,) = (server.get(f"/history/{key}")[key] for key in new)
    if found["status"]["status_str"] != "success":
        sys.exit(f"{name}: it failed: {found['status']['messages'][-1]}")
    seconds = time.monotonic() - began
    layout = graph_files.read_layout(name)
    shown = [found["outputs"][k]["images"][0] for k in layout.outputs if "images" in found["outputs"].get(k, {})]
    covered([Image.open(server.picture(s)) for s in shown]).save(WORKFLOWS / f"{name}.jpg", quality=88)
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    shot = browser.screenshot(IMAGES / f"{slug}.jpg", type="jpeg", quality=70)
    print(f"{name}: ran in {seconds:.0f} s, {shot.name} {shot.stat().st_size // 1024} KB", flush=True)


def covered(pictures: Iterable[Image.Image]) -> Image.Image:
    """The largest that fits, on the thumbnail's paper."""
    page = Image.new("RGB", THUMBNAIL, PAPER)
    picture = next(iter(pictures)).convert("RGB")
    scale = min((THUMBNAIL[0] - 20) / picture.width, (THUMBNAIL[1] - 20) / picture.height)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    page.paste(picture, ((THUMBNAIL[0] - picture.width) // 2, (THUMBNAIL[1] - picture.height) // 2))
    return page


if __name__ == "__main__":
    main()
