"""What is known of a MODEL: its file, every LoRA on it, and what the graph around it says.

ComfyUI keeps little: the path of the checkpoint, the patches of all LoRAs, the metadata of those that have some. The
names of LoRA files stand in the graph alone, so that is read too; what it does not explain is taken from the patches.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.model_sampling
import folder_paths
import torch
from comfy.weight_adapter import WeightAdapterBase

from ..dmd_core.weights.header import read_header
from ..dmd_core.weights.pairings import Setup
from ..dmd_core.weights.profiles import Evidence

Graph = Mapping[str, Mapping[str, Any]]  # ComfyUI's prompt: id -> {"class_type", "inputs"}


def graph_of(hidden: Any) -> tuple[Graph, str]:
    """The prompt and this node's id in it; nothing where a node is called outside of a graph."""
    prompt, unique_id = getattr(hidden, "prompt", None), getattr(hidden, "unique_id", None)
    return (prompt or {}), str(unique_id or "")


def evidence(model: Any, graph: Graph, node: str, name: str = "model") -> tuple[Evidence, list[Evidence]]:
    """The checkpoint and all LoRAs of the MODEL wired to input `name` of a node."""
    named = [(e, keys) for source in upstream(graph, node, name) for e, keys in lora_files(source)]
    loras = [e for e, _ in named]
    for found, keys in patched_loras(model):
        if not any(keys <= known for _, known in named):
            loras.append(found)
    return checkpoint(model), loras


def checkpoint(model: Any) -> Evidence:
    """From the file that the loader noted, else from the shapes in memory."""
    noted = getattr(model, "cached_patcher_init", None)
    path = noted[1][0] if noted and noted[1] and isinstance(noted[1][0], str) else ""
    try:
        if path and Path(path).is_file():
            return Evidence.of(read_header(path))
    except ValueError:  # a format without a header (GGUF, old pickles): what is in memory still has shapes
        pass
    state = model.model.diffusion_model.state_dict()
    return Evidence(
        name=Path(path).name,
        shapes={k: tuple(v.shape) for k, v in state.items()},
        dtypes={k: str(v.dtype).removeprefix("torch.") for k, v in state.items()},
    )


def patched_loras(model: Any) -> list[tuple[Evidence, frozenset[str]]]:
    """One Evidence per LoRA that was merged into the MODEL, oldest first, with the keys it had in its file.

    Every loader clones and then patches, so what a clone has beyond its parent is one loader's work; within that,
    patches of one file share their set of keys.
    """
    chain = [model]
    while getattr(chain[-1], "parent", None) is not None:
        chain.append(chain[-1].parent)
    found = []
    for clone, parent in zip(reversed(chain), [None, *reversed(chain[1:])], strict=True):
        metadata = clone.get_attachment("lora_metadata")
        if parent is not None and metadata is parent.get_attachment("lora_metadata"):
            metadata = None
        files = new_patches(clone, parent)
        for i, layers in enumerate(files.values()):
            # one loader, one metadata: it belongs to the last file that this loader patched in
            found.append(lora_evidence(layers, metadata if i == len(files) - 1 else None))
    return found


def new_patches(clone: Any, parent: Any) -> dict[int, dict[str, tuple[float, Any]]]:
    files: dict[int, dict[str, tuple[float, Any]]] = {}
    for key, patches in clone.patches.items():
        for strength, adapter, *_ in patches[len(parent.patches.get(key, [])) if parent is not None else 0 :]:
            if isinstance(adapter, WeightAdapterBase):
                files.setdefault(id(adapter.loaded_keys), {})[key] = (strength, adapter)
    return files


def lora_evidence(
    layers: Mapping[str, tuple[float, Any]], metadata: Mapping[str, str] | None
) -> tuple[Evidence, frozenset[str]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for key, (_, adapter) in layers.items():
        name = key.removesuffix(".weight")
        parts = [w for w in adapter.weights[:2] if isinstance(w, torch.Tensor)] if adapter.name == "lora" else []
        for part, weight in zip(("lora_up", "lora_down"), parts, strict=False):
            shapes[f"{name}.{part}.weight"] = tuple(weight.shape)
    strength, adapter = next(iter(layers.values()))
    name = "a LoRA without a name"
    for entry in ("modelspec.title", "ss_output_name"):
        name = str((metadata or {}).get(entry) or name) if name.startswith("a LoRA") else name
    text = {k: v for k, v in (metadata or {}).items() if isinstance(v, str)}
    return Evidence(name=name, metadata=text, shapes=shapes, strength=float(strength)), frozenset(adapter.loaded_keys)


# --- the graph --------------------------------------------------------------------------------------------------------


def upstream(graph: Graph, node: str, name: str) -> Iterator[Mapping[str, Any]]:
    """The nodes that a MODEL came through, nearest first: what feeds input `name`, and so on along MODEL links."""
    waiting, seen = [graph.get(node, {}).get("inputs", {}).get(name)], set()
    while waiting:
        link = waiting.pop(0)
        source = graph.get(str(link[0])) if is_link(link) else None
        if source is None or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        yield source
        waiting += [v for v in source.get("inputs", {}).values() if is_link(v) and carries(graph, v, ("MODEL", "*"))]


def is_link(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], int)


def carries(graph: Graph, link: Any, kinds: tuple[str, ...]) -> bool:
    from nodes import NODE_CLASS_MAPPINGS  # ComfyUI's table, filled while packs load

    cls = NODE_CLASS_MAPPINGS.get(graph.get(str(link[0]), {}).get("class_type", ""))
    types = getattr(cls, "RETURN_TYPES", ())
    return link[1] < len(types) and types[link[1]] in kinds


def lora_files(source: Mapping[str, Any]) -> Iterator[tuple[Evidence, frozenset[str]]]:
    """The LoRA files that a loader node names, whichever pack it is of."""
    present = set(folder_paths.get_filename_list("loras"))
    inputs = source.get("inputs", {})
    for key, value in inputs.items():
        if isinstance(value, Mapping):  # rows of a stack: {"on": true, "lora": "x.safetensors", "strength": 1}
            name, strength = value.get("lora"), value.get("strength", 1.0) if value.get("on", True) else 0.0
        else:
            is_file = "lora" in key.lower() or key.startswith("slider_")  # rows of Mix Sliders take any LoRA
            name, strength = (value, strength_beside(inputs, key)) if is_file else (None, 0.0)
        if isinstance(name, str) and name in present:
            yield lora_file(name, strength)


def strength_beside(inputs: Mapping[str, Any], key: str) -> float:
    number = "".join(re.findall(r"\d+", key))
    if number and inputs.get(f"on_{number}") is False:
        return 0.0
    names = [f"{n}_{number}" for n in ("strength", "strength_model", "model_str")] if number else []
    for other in (*names, "strength_model", "strength"):
        if isinstance(inputs.get(other), int | float):
            return float(inputs[other])
    return 1.0


def lora_file(name: str, strength: float) -> tuple[Evidence, frozenset[str]]:
    path = folder_paths.get_full_path("loras", name)
    try:
        found = Evidence.look(Path(path), strength) if path else None
    except (OSError, ValueError):
        found = None
    if found is None:
        return Evidence(name=Path(name).name, strength=strength), frozenset()
    return found, frozenset(found.shapes or {})


def texts(graph: Graph, node: str, name: str) -> list[str]:
    """All written text upstream of an input: the words of a prompt, whatever encodes them."""
    waiting, seen, found = [graph.get(node, {}).get("inputs", {}).get(name)], set(), []
    while waiting:
        link = waiting.pop()
        if not is_link(link) or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        for key, value in graph.get(str(link[0]), {}).get("inputs", {}).items():
            if is_link(value):
                waiting.append(value)
            elif isinstance(value, str) and key.startswith(("text", "prompt", "clip_l", "clip_g", "t5xxl")):
                found.append(value)
    return [t for t in found if t.strip()]


def wired(graph: Graph, node: str) -> list[dict[str, Any]]:
    """What samples with this node's MODEL, straight or through other nodes: fields of Setup for each of them."""
    found, waiting, seen = [], [(node, False)], {node}
    while waiting:
        source, nag = waiting.pop(0)
        for other, inputs, name in consumers(graph, source):
            about = settings(graph, other, inputs) if name in ("model", "guider") else {}
            if about:
                found.append({**about, "nag": True} if nag else about)
            if other not in seen:
                seen.add(other)
                guided = graph[other].get("class_type") == "DMD_NegativeGuidance" and inputs.get("scale") != 0
                waiting.append((other, nag or guided))
    return found


def consumers(graph: Graph, node: str) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """(id, inputs, input) of every node that takes a MODEL or GUIDER of this one."""
    for other, data in graph.items():
        inputs = data.get("inputs", {})
        for name, link in inputs.items():
            if is_link(link) and str(link[0]) == node and carries(graph, link, ("MODEL", "GUIDER", "*")):
                yield other, inputs, name


def settings(graph: Graph, node: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a stock sampler, guider or scheduler, and of what is wired to its `sampler` and `sigmas`."""
    if graph[node].get("class_type", "").startswith("DMD_"):  # ours set themselves, and say so themselves
        return {}
    known = {"cfg": "cfg", "sampler_name": "sampler", "scheduler": "scheduler"}
    beside = [str(inputs[k][0]) for k in ("sampler", "sigmas") if is_link(inputs.get(k))]
    sources = [graph.get(n, {}).get("inputs", {}) for n in beside]
    found = {v: i[k] for i in (*sources, inputs) for k, v in known.items() if isinstance(i.get(k), int | float | str)}
    return {**found, "negative": bool(texts(graph, node, "negative"))} if found else {}


def controlnet_end(conditioning: Any) -> float | None:
    """Where the first of its ControlNets stops, as a share of the sampling; None without one."""
    waiting, ends = [options.get("control") for _, options in conditioning], []
    for control in waiting:
        if control is not None:
            ends.append(float(control.timestep_percent_range[1]))
            waiting.append(control.previous_controlnet)
    return min(ends, default=None)


def setup(model: Any, loras: list[Evidence], strength: float | None, **more: Any) -> Setup:
    """What can go wrong with a MODEL as it stands."""
    dtypes = {p.dtype for p in model.model.diffusion_model.parameters()}
    fp8 = any("float8" in str(d) for d in dtypes)
    merged = bool(model.patches)
    return Setup(
        strength=strength, fp8_base=fp8, has_lora=merged and bool(loras), patch=sampling_patch(model), **more
    )  # fmt: skip


def sampling_patch(model: Any) -> str | None:
    """What a ModelSamplingDiscrete node has set; None where there is none."""
    patch = model.object_patches.get("model_sampling")
    if not isinstance(patch, comfy.model_sampling.ModelSamplingDiscrete):
        return None
    if patch.sigma_max.numel() and len(patch.sigmas) <= 100:
        return "lcm"
    return "x0" if isinstance(patch, comfy.model_sampling.X0) else None
