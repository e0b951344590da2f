"""The schemas of all nodes as /object_info gives them, and the English strings in them.

    python tests/node_schemas.py      rewrites tests/golden/nodes.json and locales/en/nodeDefs.json from a ComfyUI

The golden lets everything else be checked without a ComfyUI: help, languages, graphs. Saved graphs are protected by
tests/golden/shipped.json, to which this only adds: ids of nodes and inputs are permanent, outputs keep their places.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_host

PACK = Path(__file__).resolve().parents[1]
GOLDEN = PACK / "tests" / "golden" / "nodes.json"
SHIPPED = PACK / "tests" / "golden" / "shipped.json"
LOCALES = PACK / "locales"
# choices that are files of this machine or lists of this ComfyUI: anything may stand there in a graph
OPEN = {
    "DMD_LoadShapes": ("model",),
    "DMD_EncodePrompts": ("file",),
    "DMD_Grid": ("slider", "slider_2"),
    "DMD_InspectRun": ("run",),
    "DMD_Doctor": ("file",),
    "DMD_Inpaint": ("sampler_name", "scheduler"),
    "DMD_MixSliders": tuple(f"slider_{i}" for i in range(1, 9)),
}
KEPT = [
    *("display_name", "description", "category", "search_aliases", "input", "input_order", "is_input_list"),
    *("output", "output_name", "output_is_list", "output_tooltips", "output_node", "deprecated", "experimental"),
]

Schemas = dict[str, dict[str, Any]]
Shipped = dict[str, dict[str, list[str]]]  # node -> inputs (those inside of a choice as `method.steps`) and outputs


def live() -> Schemas:
    """Inside ComfyUI only."""
    return {n.GET_SCHEMA().node_id: schema(n) for n in comfy_host.pack_module("nodes").NODES}


def schema(node: Any) -> dict[str, Any]:
    """As JSON has it."""
    info = node.GET_NODE_INFO_V1()
    found: dict[str, Any] = json.loads(json.dumps({k: info[k] for k in KEPT}))
    for name, spec in walk(found["input"]):
        if name in OPEN.get(info["name"], ()):
            spec[1].pop("options", None)
            spec[1].pop("default", None)
    return found


def golden() -> Schemas:
    found: Schemas = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


def walk(inputs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """(id, [type, options]) of every input that a user sees, with those inside of a choice: `method.steps`."""
    for section in ("required", "optional"):
        for name, spec in inputs.get(section, {}).items():
            spec[1:] = spec[1:] or [{}]
            yield prefix + name, spec
            if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                for option in spec[1]["options"]:
                    yield from walk(option["inputs"], f"{prefix}{name}.")


def shipped() -> Shipped:
    found: Shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return found


def grown(known: Shipped, schemas: Schemas) -> Shipped:
    """Never less than before."""
    found = {node: {k: list(v) for k, v in names.items()} for node, names in known.items()}
    for node, now in schemas.items():
        names = found.setdefault(node, {"inputs": [], "outputs": []})
        names["inputs"] += sorted({name for name, _ in walk(now["input"])} - set(names["inputs"]))
        names["outputs"] += now["output_name"][len(names["outputs"]) :]
    return found


def lost(known: Shipped, schemas: Schemas) -> list[str]:
    """What saved graphs may name and this pack has no more."""
    found = []
    for node, names in known.items():
        if node not in schemas:
            found.append(node)
            continue
        there = {name for name, _ in walk(schemas[node]["input"])}
        found += [f"{node}.{name}" for name in names["inputs"] if name not in there]
        outputs = schemas[node]["output_name"]
        found += [f"{node} -> {name}" for i, name in enumerate(names["outputs"]) if outputs[i : i + 1] != [name]]
    return found


def english(schemas: Schemas) -> dict[str, Any]:
    """ComfyUI's nodeDefs.json; dots of ids become underscores there."""
    return {node: strings(found) for node, found in sorted(schemas.items())}


def strings(found: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for name, spec in walk(found["input"]):
        words = {"name": name.rpartition(".")[2].replace("_", " "), "tooltip": spec[1].get("tooltip", "")}
        if words != inputs.setdefault(name.replace(".", "_"), words):
            raise ValueError(f"{name} has two tooltips in one node; a language file has room for one")
    outputs = {}
    for i, (name, kind) in enumerate(zip(found["output_name"], found["output"], strict=True)):
        # an output that is called like its type has the type's own translation
        named = {} if name == kind else {"name": name.replace("_", " ")}
        outputs[str(i)] = named | {"tooltip": found["output_tooltips"][i] or ""}
    return {
        "display_name": found["display_name"],
        "description": found["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    if not comfy_host.in_comfy():
        done = comfy_host.run_in_comfy([__file__])
        sys.exit(done.stdout + (done.stderr if done.returncode else ""))
    comfy_host.start_comfy()
    schemas = live()
    write(GOLDEN, schemas)
    write(LOCALES / "en" / "nodeDefs.json", english(schemas))
    rows = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(grown(shipped(), schemas).items())]
    SHIPPED.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"{len(schemas)} nodes")


if __name__ == "__main__":
    main()
