"""What a file is, what will go wrong with it, and a repaired copy. Reads headers; executes nothing from a file."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..families import FAMILIES, Names, by_name, layer_path, naming, spelled, split_key
from ..families.names import OTHERS
from .files import DTYPE_NAMES, Spec, free_path, open_tensors, write_streaming
from .header import Header, read_header, unwrapped
from .keys import slots
from .layouts import READ_BY_COMFYUI, Piece, convertible, native_pieces
from .lora import fit, lora_of, read_lora, save_lora
from .profiles import Evidence, Match, Profile, recognise_file
from .structure import Structure, identify

UNETS = ("sd15", "sd2", "sdxl")
LOADABLE = ("", "model.diffusion_model.", "model.")  # prefixes that ComfyUI's loaders strip by themselves
# ComfyUI knows PEFT's spelling of UNet layers except for those inside attention
DROPPED = ("_to_q", "_to_k", "_to_v", "_to_out_0")
SHOWN = 6  # examples in a sentence


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know, worst first: problem, warning, note. fix: what repair() would do about it, or ""."""

    level: str
    text: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    header: Header
    structure: Structure
    match: Match
    findings: tuple[Finding, ...]

    @property
    def repairable(self) -> bool:
        return any(f.fix for f in self.findings)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Keys of a LoRA on one model: which layers it reaches and which it silently does not."""

    reached: tuple[str, ...]
    dropped: tuple[str, ...]
    reason: str = ""


def diagnose(path: str | os.PathLike[str]) -> Diagnosis:
    """Raises header.Refused for a file that should not be opened."""
    header = read_header(path)
    structure = identify(header.shapes, header.dtypes)
    match = recognise_file(Evidence.look(Path(path)))
    found = _lora(Path(path), header, structure, match) if structure.kind == "lora" else _model(header, structure)
    order = ("problem", "warning", "note")
    return Diagnosis(
        header=header,
        structure=structure,
        match=match,
        findings=tuple(sorted(found, key=lambda f: order.index(f.level))),
    )


def _lora(path: Path, header: Header, structure: Structure, match: Match) -> list[Finding]:
    found = []
    keys = {k: split_key(k) for k in header.shapes if not OTHERS.match(k)}
    layers = {spelled(layer) for layer, _ in keys.values()}
    if structure.family in UNETS and structure.layout == "peft":
        lost = [n for n in layers if n.endswith(DROPPED)]
        if lost:
            text = (
                f"its keys are PEFT's: ComfyUI drops the {len(lost)} of {len(layers)} layers inside attention silently"
            )
            found.append(Finding(level="problem", text=text, fix="kohya keys"))
    if unread := _unreadable(structure.family, [layer for layer, _ in keys.values()]):
        text = (
            f"ComfyUI drops {len(unread)} of {len(layers)} layers silently: it knows no underscored diffusers names of "
            "transformers (sliders of the original trainers for Flux are such files)"
        )
        found.append(Finding(level="problem", text=text, fix="native keys; connect the model"))
    halves = {p: {layer for layer, part in keys.values() if part == p} for p in ("down", "up", "alpha")}
    alone = sorted((halves["down"] | halves["up"]) - (halves["down"] & halves["up"]))
    if alone and structure.layout != "lycoris":
        text = f"{len(alone)} layers have only one half, such as {alone[0]}: the file is incomplete, download it again"
        found.append(Finding(level="problem", text=text))
    parts = {part for _, part in keys.values()}
    if "dora_scale" in parts or any(p.startswith("lora_magnitude") for p in parts):
        found.append(Finding(level="warning", text="it is a DoRA: ComfyUI applies it, diffusers ignores that part"))
    if parts & {"diff", "diff_b"}:
        found.append(Finding(level="note", text="it carries whole differences (.diff), which only ComfyUI applies"))
    if others := [k for k in header.shapes if OTHERS.match(k)]:
        found.append(Finding(level="note", text=f"{len(others)} of its tensors are for text encoders"))
    scale = _alpha_over_rank(path, header, structure)
    if scale is not None and abs(scale - 1) > 1e-3:
        found.append(Finding(level="note", text=f"its alpha makes strength 1 act as {scale:g} (ComfyUI reads that)"))
    wanted = match.profile.lora_scale[0] if match.profile else 1.0
    if not halves["alpha"] and wanted != 1 and structure.layout != "lycoris":
        text = f"it has no alpha, so strength 1 is full strength, and {wanted:g} is the right one"
        found.append(Finding(level="warning", text=text, fix=f"scale {wanted:g} baked in"))
    if not structure.family:
        found.append(Finding(level="warning", text="which model it belongs to cannot be told from its names"))
    return found


def _unreadable(family: str, layers: Iterable[str]) -> set[str]:
    """lora_unet_ with diffusers' names of a transformer: ComfyUI maps that prefix to its own names alone."""
    if not family or family in UNETS or not by_name(family).same:  # without `same`, ComfyUI's names are diffusers'
        return set()
    found = {spelled(n) for n in layers if n.startswith("lora_unet_")}
    return found if found and naming(Names(found), by_name(family)) == "diffusers" else set()


def _alpha_over_rank(path: Path, header: Header, structure: Structure) -> float | None:
    """Of one layer of a safetensors LoRA; trainers use one value for all."""
    key = next((k for k in header.shapes if k.endswith(".alpha")), None)
    if key is None or header.format != "safetensors" or not structure.rank:
        return None
    layer = key.removesuffix(".alpha")
    down = next((s for k, s in header.shapes.items() if split_key(k) == (layer, "down")), None)
    with open_tensors(path) as get:
        alpha = get(key).float().reshape(-1)
    return alpha[0].item() / down[0] if down and len(alpha) else None


def _model(header: Header, structure: Structure) -> list[Finding]:
    found = []
    if structure.kind == "unknown":
        found.append(Finding(level="warning", text="its names and shapes are of no model known here"))
    if structure.prefix not in LOADABLE:
        text = f"every name begins with {structure.prefix!r}, which ComfyUI's loaders do not know"
        found.append(Finding(level="problem", text=text, fix="prefix removed"))
    if _foreign(structure):
        known = structure.family in READ_BY_COMFYUI
        text = "its names are diffusers', " + (
            "which ComfyUI reads when it is loaded as a diffusion model"
            if known
            else f"under which ComfyUI cannot load {by_name(structure.family).title}"
        )
        found.append(Finding(level="note" if known else "problem", text=text, fix="the network's own names"))
    if header.format == "pickle":
        inside = f", inside {header.wrapper!r}" if header.wrapper else ""
        text = f"it is a torch pickle{inside}; what it would call was checked and is harmless"
        level = "problem" if header.wrapper not in ("", "state_dict") else "note"
        found.append(Finding(level=level, text=text, fix="saved as .safetensors"))
    if structure.kind == "model":
        text = "it is the diffusion model alone: load it as a diffusion model, with text encoder and VAE from elsewhere"
        found.append(Finding(level="note", text=text))
    if structure.quantised:
        text = "it is quantised: LoRAs merged into it lose small changes, so load them with bypass"
        found.append(Finding(level="warning", text=text))
    if any(k.endswith("time_embedding.cond_proj.weight") for k in header.shapes):
        text = "it takes an embedded guidance scale (a full LCM model), which ComfyUI ignores silently"
        found.append(Finding(level="warning", text=text))
    if "v_pred" in header.shapes:
        extra = ", with zero terminal SNR" if "ztsnr" in header.shapes else ""
        found.append(Finding(level="note", text=f"it predicts v{extra}"))
    return found


def _foreign(structure: Structure) -> bool:
    """Is it a network under diffusers' names that can have its own ones? A full LCM UNet's guidance has none there."""
    lcm = structure.family in UNETS and structure.guidance
    known = structure.kind == "model" and structure.layout == "diffusers" and convertible(by_name(structure.family))
    return known and not lcm


def coverage(path: str | os.PathLike[str], names: Iterable[str]) -> Coverage:
    """Which layers of a LoRA file find a place on a model with these layer names in ComfyUI."""
    header = read_header(path)
    structure = identify(header.shapes, header.dtypes)
    names = list(names)
    model = identify(dict.fromkeys((f"{n}.weight" for n in names), ()))
    family = by_name(structure.family or model.family or "generic")
    table = slots(names, family, names)
    layers = {spelled(layer): layer for layer, _ in (split_key(k) for k in header.shapes if not OTHERS.match(k))}
    peft = structure.layout == "peft" and structure.family in UNETS
    unreadable = _unreadable(structure.family, layers.values())
    lost = {n for n in layers if n not in table or n in unreadable or (peft and n.endswith(DROPPED))}
    reason = ""
    if lost:
        absent = sum(n not in table for n in lost)
        spelling = "underscored diffusers names" if unreadable else "PEFT's names inside attention"
        why = "this model has no such layers" if absent else f"ComfyUI does not know {spelling}"
        reason = f"{len(lost)} of {len(layers)} layers are silently left out: {why}"
    return Coverage(
        reached=tuple(sorted(layers[n] for n in layers if n not in lost)),
        dropped=tuple(sorted(layers[n] for n in lost)),
        reason=reason,
    )


# --- repairs ----------------------------------------------------------------------------------------------------------


def repair(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    name: str,
    *,
    scale: float | None = None,
    network: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """A copy that loads in full, under a new name; the original stays. Returns its path.

    A LoRA gets the keys that ComfyUI, diffusers and others all load, alpha and scale baked into its weights (scale
    None: what its profile wants). A model gets the network's own names, without prefix, in a .safetensors. network:
    layer shapes of the model that a transformer LoRA with underscored names is for; without it such a file cannot be
    translated.
    """
    found = diagnose(path)
    if found.structure.kind == "lora":
        return _repair_lora(Path(path), found, folder, name, scale, network)
    if found.structure.kind not in ("model", "checkpoint"):
        raise ValueError(
            f"{found.header.name} is a file of kind {found.structure.kind}; LoRAs and diffusion models can be repaired "
            f"here, of {', '.join(f.title for f in FAMILIES.values() if f.name != 'generic')}"
        )
    return _repair_model(Path(path), found, folder, name)


def _repair_lora(
    path: Path,
    found: Diagnosis,
    folder: str | os.PathLike[str],
    name: str,
    scale: float | None,
    network: Mapping[str, tuple[int, ...]] | None,
) -> Path:
    is_pickle = found.header.format == "pickle"
    file = lora_of(_pickled(path), found.header.name) if is_pickle else read_lora(path)
    if file.text_keys:
        raise ValueError(
            f"{found.header.name} holds {len(file.text_keys)} tensors for text encoders, which a copy would lose; "
            "only LoRAs of the diffusion model alone are repaired"
        )
    if scale is None:
        no_alpha = not any(k.endswith(".alpha") for k in found.header.shapes)
        scale = found.match.profile.lora_scale[0] if found.match.profile and no_alpha else 1.0
    if network is not None:
        state, names = fit(file, network), list(network)
    else:
        paths = {spelled(layer): layer_path(layer) for layer, _ in map(split_key, found.header.shapes)}
        names = [paths[n] for n in file.modules]
        if file.family.lora != "kohya" and not any("." in n for n in names):
            raise ValueError(
                f"{found.header.name} spells its layers with underscores, which cannot be undone without the model; "
                f"connect a {file.family.title} model"
            )
        state = {}
        for n, (down, up) in file.modules.items():
            state |= {f"{paths[n]}.down": down, f"{paths[n]}.up": up}
    own = {k: v for k, v in file.metadata.items() if not k.startswith(("modelspec.", "ss_network_", "sshs_"))}
    return save_lora(folder, name, state, names, family=file.family, recipe=file.recipe, scale=scale, metadata=own)


def _repair_model(path: Path, found: Diagnosis, folder: str | os.PathLike[str], name: str) -> Path:
    pieces = _pieces(found)
    target = free_path(folder, name)
    with _tensors(path, found.header) as (specs, get):
        new = {n: piece.spec(specs) for n, piece in pieces.items()}
        write_streaming(target, new, lambda n: pieces[n].join([get(k) for k in pieces[n].keys]), found.header.metadata)
    return target


def _pieces(found: Diagnosis) -> dict[str, Piece]:
    """What the copy's tensors are made of: the network's own names where the file has diffusers', else no prefix."""
    if _foreign(found.structure):
        return native_pieces(found.header.shapes, by_name(found.structure.family))
    prefix = found.structure.prefix if found.structure.prefix not in LOADABLE else ""
    pieces = {k.removeprefix(prefix): Piece((k,)) for k in found.header.shapes}
    if len(pieces) != len(found.header.shapes):
        raise ValueError(f"{found.header.name} holds a name twice once {prefix!r} is removed; it cannot be repaired")
    return pieces


@contextmanager
def _tensors(path: Path, header: Header) -> Iterator[tuple[dict[str, Spec], Callable[[str], Tensor]]]:
    """Types, shapes and a reader; a pickle has passed read_header, and torch's restricted loader maps it lazily."""
    if header.format == "safetensors":
        unknown = {d for d in header.dtypes.values() if d not in DTYPE_NAMES}
        if unknown:
            raise ValueError(f"{header.name} holds numbers of type {', '.join(unknown)}, which cannot be copied here")
        with open_tensors(path) as get:
            yield {k: (DTYPE_NAMES[header.dtypes[k]], s) for k, s in header.shapes.items()}, get
    else:
        tensors = _pickled(path)
        yield {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, tensors.__getitem__


def _pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle that has passed read_header."""
    return unwrapped(torch.load(path, map_location="cpu", weights_only=True, mmap=True))[1]


# --- in words ---------------------------------------------------------------------------------------------------------


def describe(path: str | os.PathLike[str]) -> str:
    """What `inspect` prints: what the file is, how it is sampled, what is wrong with it. Raises Refused."""
    found = diagnose(path)
    lines = [f"{found.header.name} ({_size(found.header.size)}): {_kind(found)}", f"Few-step: {found.match.reason}."]
    if found.match.profile is not None:
        lines += [f"  {line}" for line in sampling(found.match.profile, found.structure.kind)]
    elif found.match.candidates:
        lines.append("  Candidates: " + ", ".join(p.id for p in found.match.candidates[:SHOWN]))
    for finding in found.findings:
        fix = f" (repair: {finding.fix})" if finding.fix else ""
        lines.append(f"{finding.level.capitalize()}: {finding.text}{fix}.")
    said = {k: found.header.metadata.get(k, "") for k in ("modelspec.title", "modelspec.usage_hint", "ss_output_name")}
    lines += [f"{k}: {v[:200]!r}" for k, v in said.items() if v]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"


def _kind(found: Diagnosis) -> str:
    s = found.structure
    family = s.title or "unknown family"
    types = sorted(set(found.header.dtypes.values()))
    if s.kind == "lora":
        more = ", trains convolutions and time embeddings as distillations do" if s.accelerator else ""
        return f"LoRA for {family}, {s.modules} layers, rank {s.rank}, {s.layout} keys{more}, {' '.join(types)}"
    if s.kind in ("model", "checkpoint"):
        what = "checkpoint" if s.kind == "checkpoint" else "diffusion model"
        return f"{what}, {family}, {s.layout} names, {len(found.header.shapes)} tensors, {' '.join(types)}"
    return f"{s.kind}, {len(found.header.shapes)} tensors, {' '.join(types)}"


def sampling(profile: Profile, kind: str = "lora") -> list[str]:
    """How to sample a file of that kind, in words, with what is known of the numbers."""
    unit = "timesteps" if profile.space == "vp" else "sigmas"
    levels = ", ".join(f"{v:.4g}" for v in profile.trained())
    where = " at 1024 x 1024" if profile.grid in ("flux", "flux2") else ""
    noise = {0.0: "no new noise", 1.0: "fresh noise at each step"}.get(
        profile.gamma if isinstance(profile.gamma, float) and profile.keep == "time" else -1.0,
        f"{profile.keep} noise, gamma {profile.gamma}",
    )
    low, high = profile.cfg[1:]
    cfg = f"cfg {profile.cfg[0]:g}" + (f" ({low:g} to {high:g})" if low != high else "")
    lines = [
        f"{profile.steps} steps, {unit} {levels}{where}; {noise}; {cfg}; prediction {profile.prediction or 'as base'}"
    ]
    stock = profile.stock.get("sampler"), profile.stock.get("scheduler")
    if all(stock):
        patch = f" with ModelSamplingDiscrete {profile.stock['patch']}" if profile.stock.get("patch") else ""
        lines.append(f"nearest stock settings: {stock[0]} + {stock[1]}{patch}")
    if kind == "lora" and "lora" in profile.kinds:
        lines.append(
            f"LoRA strength {profile.lora_scale[0]:g} ({profile.lora_scale[1]:g} to {profile.lora_scale[2]:g})"
        )
    if profile.guidance is not None:
        lines.append(f"embedded guidance {profile.guidance:g}")
    works = {"yes": "works", "weak": "has little effect", "no": "is ignored at cfg 1"}[profile.negative]
    lines.append(f"a negative prompt {works}")
    return [*lines, *profile.caveats()]
