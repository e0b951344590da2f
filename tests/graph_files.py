"""The example graphs as files, and what can be said of them without a ComfyUI.

workflows/api/NAME.json    authored: ComfyUI's API form, every input written out
workflows/api/NAME.toml    what that form has no room for: the note, groups, inputs and outputs of the app view
workflows/api/models.toml  where each named file is found
workflows/NAME.json        made of these by scripts/graphs through the real frontend: what a user opens
workflows/NAME.jpg         its thumbnail in the template browser
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACK = Path(__file__).resolve().parents[1]
WORKFLOWS = PACK / "workflows"
AUTHORED = WORKFLOWS / "api"
GOLDEN = PACK / "tests" / "golden"
OURS, CORE = GOLDEN / "nodes.json", GOLDEN / "core_nodes.json"
DYNAMIC, GROWING = "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3"
# of core nodes: choices that are files of this machine
FILES = {
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "CLIPLoader": ("clip_name",),
    "DualCLIPLoader": ("clip_name1", "clip_name2"),
    "TripleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3"),
    "VAELoader": ("vae_name",),
    "LoraLoaderModelOnly": ("lora_name",),
    "CLIPVisionLoader": ("clip_name",),
    "LoadImage": ("image",),
}
FOLDERS = {"DMD_Doctor": "file", "DMD_Grid": "slider"}  # ours: inputs that name a model file
# what opens on a usual screen with its text readable: ComfyUI fits a template into three quarters of its window (1600
# wide on a laptop; 900 high of 1080, with the browser's own bars) and draws the text of nodes from a scale of 8/14
SCREEN = (0.75 * 1580 * 14 / 8, 0.75 * 900 * 14 / 8)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)

Api = dict[str, dict[str, Any]]
Schemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of a graph, what its API form does not say."""

    note: str  # Markdown: what it does, what to change; the list of its files is made, see note_of
    groups: list[dict[str, Any]]  # {"title", "columns": [["1", "2"], ["3"]]}, left to right
    inputs: list[list[str]] = field(default_factory=list)  # of the app view: [node, widget]
    outputs: list[str] = field(default_factory=list)  # of the app view: nodes
    sizes: dict[str, list[int]] = field(default_factory=dict)  # node or "note" -> [width, height]
    also: list[str] = field(default_factory=list)  # files that the note speaks of and no loader names


def names() -> list[str]:
    return sorted(p.stem for p in AUTHORED.glob("*.json"))


def read_api(name: str) -> Api:
    found: Api = json.loads((AUTHORED / f"{name}.json").read_text(encoding="utf-8"))
    return found


def write_api(name: str, api: Api) -> None:
    """One node per line, so that a change is read as a change of one node."""
    rows = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in api.items()]
    (AUTHORED / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def read_layout(name: str) -> Layout:
    return Layout(**tomllib.loads((AUTHORED / f"{name}.toml").read_text(encoding="utf-8")))


def read_models() -> dict[str, dict[str, str]]:
    """file name -> {"url", "directory"}"""
    return tomllib.loads((AUTHORED / "models.toml").read_text(encoding="utf-8"))


def note_of(name: str) -> str:
    """What the note of a graph says: the author's words, and where its files are found and go."""
    layout, models = read_layout(name), read_models()
    named = dict.fromkeys(file for _, _, file in named_files(read_api(name)))
    note = layout.note
    for head, files in (("Files", named), ("Files of the others", layout.also)):
        rows = [f"- [{f}]({models[f]['url']}) into `models/{models[f]['directory']}`\n" for f in files]
        note += "".join([f"\n**{head}**\n\n", *rows]) if rows else ""
    return note


def read_ui(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def read_schemas() -> dict[str, Any]:
    return {**json.loads(OURS.read_text(encoding="utf-8")), **json.loads(CORE.read_text(encoding="utf-8"))}


# --- schemas ----------------------------------------------------------------------------------------------------------


def core_schema(info: Mapping[str, Any]) -> dict[str, Any]:
    """Of /object_info, what graphs depend on; lists of files left out, old nodes' choices written as new ones'."""
    kept = {k: info[k] for k in ("display_name", "input", "input_order", "output", "output_name", "output_node")}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    for section in ("required", "optional"):
        for name, spec in found["input"].get(section, {}).items():
            kind, *more = spec
            options = {k: v for k, v in (more[0] if more else {}).items() if k not in ("tooltip", "multiselect")}
            if isinstance(kind, list):
                kind, options["options"] = "COMBO", kind
            if name in FILES.get(info["name"], ()):
                options.pop("options", None)
                options.pop("default", None)
            found["input"][section][name] = [kind, options]
    found["input"].pop("hidden", None)
    found["input_order"].pop("hidden", None)
    return found


def inputs_of(schema: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    """(id, type, options, required) in the order of a node's widgets; of a choice, the inputs of what is chosen."""
    yield from _inputs(schema["input"], schema.get("input_order"), values, "")


def _inputs(
    sections: Mapping[str, Any], order: Mapping[str, list[str]] | None, values: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    for section in ("required", "optional"):
        given = sections.get(section, {})
        for name in (order or {}).get(section) or given:
            kind, *more = given[name]
            options = more[0] if more else {}
            if kind == GROWING:  # as many inputs as are linked: images.image0, images.image1, ...
                yield from _grown(f"{prefix}{name}.", options["template"], values)
                continue
            yield prefix + name, kind, options, section == "required"
            if kind == DYNAMIC:
                chosen = values.get(prefix + name)
                inner = next((o["inputs"] for o in options["options"] if o["key"] == chosen), {})
                yield from _inputs(inner, None, values, f"{prefix}{name}.")


def _grown(
    prefix: str, template: Mapping[str, Any], values: Mapping[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any], bool]]:
    ((kind, *more),) = template["input"]["required"].values()
    for i in range(template["max"]):
        name = f"{prefix}{template['prefix']}{i}"
        if name in values or i < template["min"]:
            yield name, kind, more[0] if more else {}, i < template["min"]


def completed(api: Api, schemas: Schemas) -> Api:
    """With every widget that the author left at its default, in the schema's order."""
    return {key: {**node, "inputs": _completed(node, schemas)} for key, node in api.items()}


def _completed(node: Mapping[str, Any], schemas: Schemas) -> dict[str, Any]:
    given = dict(node["inputs"])
    schema = schemas.get(node["class_type"])
    if schema is None:
        return given
    found: dict[str, Any] = {}
    # a choice's own inputs appear once it is known, so look again until nothing new does
    while True:
        merged = {**found, **given}
        for name, kind, options, _ in inputs_of(schema, merged):
            if name not in merged and is_widget(kind, options):
                value = _default(kind, options)
                if value is not None:
                    found[name] = value
        if {**found, **given} == merged:
            break
    merged = {**found, **given}
    ordered = {name: merged[name] for name, *_ in inputs_of(schema, merged) if name in merged}
    return {**ordered, **{k: v for k, v in merged.items() if k not in ordered}}


def _default(kind: str, options: Mapping[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    choices = options.get("options") or []
    if kind == DYNAMIC:
        return choices[0]["key"] if choices else None
    return choices[0] if choices else {"STRING": "", "INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(kind)


# --- rung 1 -----------------------------------------------------------------------------------------------------------


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def complaints(api: Api, schemas: Schemas) -> list[str]:
    """What ComfyUI would refuse in this graph; nothing where all is well."""
    found = []
    for key, node in api.items():
        label = f"{key} ({node.get('class_type')})"
        schema = schemas.get(node.get("class_type", ""))
        if schema is None:
            found.append(f"{label}: there is no such node")
            continue
        inputs = dict(node["inputs"])
        for name, kind, options, required in inputs_of(schema, node["inputs"]):
            if name in inputs:
                found += [f"{label}.{name}: {why}" for why in _wrong(inputs.pop(name), kind, options, api, schemas)]
            elif required:
                found.append(f"{label}.{name}: it is missing")
        found += [f"{label}.{name}: there is no such input" for name in inputs]
    if not any(schemas.get(n.get("class_type", ""), {}).get("output_node") for n in api.values()):
        found.append("no node gives a result")
    return found + [f"{key}: nothing uses it" for key in _unused(api, schemas)]


def _wrong(value: Any, kind: str, options: Mapping[str, Any], api: Api, schemas: Schemas) -> list[str]:
    if is_link(value):
        source = schemas.get(api.get(value[0], {}).get("class_type", ""))
        if source is None:
            return [f"it is linked to {value[0]!r}, which is not there"]
        if not 0 <= value[1] < len(source["output"]):
            return [f"{value[0]!r} has no output {value[1]}"]
        given = source["output"][value[1]]
        fits = "*" in (given, kind) or bool(set(str(given).split(",")) & set(str(kind).split(",")))
        return [] if fits else [f"it wants {kind}, {value[0]!r} gives {given}"]
    types: dict[str, Any] = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": (str, int)}
    if kind == DYNAMIC:
        keys = [o["key"] for o in options["options"]]
        return [] if value in keys else [f"{value!r} is none of {keys}"]
    if kind not in types:
        return [f"{value!r} is no link, it wants {kind}"]
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return [f"{value!r} is no {kind}"]
    if kind == "COMBO" and "options" in options and value not in options["options"]:
        return [f"{value!r} is none of {options['options'][:12]}"]
    if kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return [f"{value!r} is outside of {options.get('min')} to {options.get('max')}"]
    return []


def _unused(api: Api, schemas: Schemas) -> list[str]:
    used = {v[0] for n in api.values() for v in n["inputs"].values() if is_link(v)}
    results = {k for k, n in api.items() if schemas.get(n.get("class_type", ""), {}).get("output_node")}
    return [k for k in api if k not in used | results]


# --- the UI form ------------------------------------------------------------------------------------------------------


def api_of(ui: Mapping[str, Any], schemas: Schemas) -> Api:
    """The API form of a saved graph, as the frontend makes it: widget values stand by position alone."""
    links = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    api = {}
    for node in ui["nodes"]:
        schema = schemas.get(node["type"])
        if node["type"] in ("MarkdownNote", "Note"):
            continue
        if schema is None:
            raise ValueError(f"{node['type']} is no node of the core or of this pack")
        linked = {i["name"]: links[i["link"]] for i in node.get("inputs", []) if i.get("link") is not None}
        values = dict(_positional(schema, node.get("widgets_values") or []))
        both = {**values, **linked}
        order = [name for name, *_ in inputs_of(schema, both)]
        api[str(node["id"])] = {"class_type": node["type"], "inputs": {k: both[k] for k in order if k in both}}
    return dict(sorted(api.items(), key=lambda item: int(item[0])))


def is_widget(kind: str, options: Mapping[str, Any]) -> bool:
    return kind in WIDGETS and not options.get("forceInput")


def _positional(schema: Mapping[str, Any], values: list[Any]) -> Iterator[tuple[str, Any]]:
    waiting, found = list(values), {}
    names_seen = 0
    while True:  # a choice adds its inputs right behind itself
        row = [(n, k, o) for n, k, o, _ in inputs_of(schema, found) if is_widget(k, o)]
        if names_seen == len(row):
            break
        name, kind, options = row[names_seen]
        names_seen += 1
        if not waiting:
            raise ValueError(f"there is no value for {name}")
        found[name] = waiting.pop(0)
        yield name, found[name]
        control = options.get("control_after_generate", name in ("seed", "noise_seed"))
        if kind == "INT" and control and waiting and waiting[0] in ("fixed", "increment", "decrement", "randomize"):
            waiting.pop(0)
        if options.get("image_upload") and waiting and waiting[0] == "image":
            waiting.pop(0)
    if waiting:
        raise ValueError(f"{len(waiting)} widget values are left over: {waiting[:4]}")


def plain(api: Api) -> Api:
    """Class and inputs alone, for comparison: titles and what a frontend adds are left out."""
    return {
        k: {"class_type": n["class_type"], "inputs": dict(n["inputs"])}
        for k, n in sorted(api.items(), key=lambda item: int(item[0]))
    }


def named_files(api: Api) -> Iterator[tuple[str, str, str]]:
    """(node, input, file name) of every model file that a graph names."""
    for key, node in api.items():
        kind = node["class_type"]
        for name in (*FILES.get(kind, ()), *([FOLDERS[kind]] if kind in FOLDERS else [])):
            value = node["inputs"].get(name)
            if kind != "LoadImage" and isinstance(value, str) and value not in ("", "none"):
                yield key, name, re.sub(r"^(loras|diffusion_models|checkpoints)/", "", value)
