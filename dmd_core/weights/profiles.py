"""How few-step models in the wild want to be sampled (profiles.json), and which of them a file is.

Nothing is guessed silently: a match says how sure it is and why, and an unsure file has no profile.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import sigmas as grids
from ..families import FAMILIES
from ..families.family import TRAIN_TIMESTEPS
from ..schedule import Schedule, shift_time
from .header import Header, Shape, content_hash, read_header
from .recipe import RECIPE_KEY, Recipe
from .structure import Structure, identify

DATA = Path(__file__).with_suffix(".json")
GRIDS = ("trailing", "lcm", "turbo", "list", "shift", "flux", "flux2")
SURE = ("certain", "likely", "guess", "unsure")  # from our own metadata, a published name, a hint; no profile
TOKEN = 16  # pixels per token of Flux, each way
MAX_STEPS = 100
# what repackers append to a published name
PRECISION = re.compile(r"([-_.]+(fp16|fp32|fp8|bf16|e4m3fn|e5m2|scaled|int8|convrot|mixed|comfyui|pruned))+$")
ENDINGS = re.compile(r"\.(safetensors|sft|bin|pt|pth|ckpt)$")
# names that speak of a distilled model without being one
VETO = re.compile(r"(de|un)[-_ ]?(turbo|distill|lightning)|(?<![a-z])base(?![a-z])|adapter|control|vae|encoder")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One way of sampling. cfg as in KSampler (1 = none); ranges are (default, lowest, highest sensible)."""

    id: str
    title: str
    base: str  # a name of families.FAMILIES where the engine knows the family
    kinds: tuple[str, ...]
    steps: int
    allowed: tuple[int, ...]
    space: str  # vp: levels are timesteps; flow: levels are sigmas; sigma: levels are sigmas of a VP model
    prediction: str
    grid: str
    levels: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # without the final 0; win over the grid
    shift: float | None = None
    keep: str = "time"
    gamma: float | tuple[float, ...] = 1.0
    cfg: tuple[float, float, float] = (1.0, 1.0, 1.0)
    guidance: float | None = None  # embedded in the network, not CFG
    negative: str = "no"  # does a negative prompt work: yes, weak, no
    lora_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stock: Mapping[str, str] = field(default_factory=dict)  # ComfyUI's nearest sampler, scheduler, model patch
    size: int = 0  # pixels it was trained at, 0 for video
    pair: int = 0  # steps of the high-noise model of a pair
    part: str = ""  # high or low, of a pair
    supported: bool = True
    why: str = ""  # not supported
    notes: str = ""
    recompute: str = ""  # how a test recomputes the levels
    sources: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # number -> (status, where)
    files: tuple[str, ...] = ()  # published names, as patterns
    hints: tuple[str, ...] = ()  # what merges and renamed files carry in their names
    sha256: Mapping[str, int] = field(default_factory=dict)  # of a whole file -> its steps
    bytes: Mapping[str, int] = field(default_factory=dict)  # sha256 -> size of that file, where a list has both
    embedding: bool = False  # proven by a guidance embedding in a UNet

    @property
    def verified(self) -> bool:
        """Are the noise levels recomputed from independent code by a test?"""
        return bool(self.recompute)

    def at(self, steps: int) -> "Profile":
        if steps not in self.allowed:
            raise ValueError(f"{self.title} takes {_numbers(self.allowed)} steps, not {steps}; choose one of those")
        return replace(self, steps=steps)

    def shift_at(self, width: int = 1024, height: int = 1024) -> float:
        tokens = (width // TOKEN) * (height // TOKEN)
        if self.grid == "flux":
            return grids.flux_shift(tokens)
        if self.grid == "flux2":
            return grids.flux2_shift(tokens, self.steps)
        return self.shift or 1.0

    def trained(self, width: int = 1024, height: int = 1024) -> list[float]:
        """The levels of a whole run: timesteps (vp) or sigmas (flow), without the final 0."""
        if self.steps in self.levels:
            return list(self.levels[self.steps])
        if self.grid == "trailing":
            return list(grids.trailing(self.steps))
        if self.grid == "turbo":
            return list(grids.turbo(self.steps))
        if self.grid == "lcm":
            return self._consistency(1.0)
        if self.grid == "list":
            raise ValueError(f"{self.title} has no levels for {self.steps} steps; use {_numbers(self.allowed)}")
        return grids.shifted(self.steps, self.shift_at(width, height))

    def _consistency(self, denoise: float) -> list[float]:
        """Of the 50 timesteps of consistency training, which flow models (PCM) shift."""
        found = grids.lcm(self.steps, denoise)
        if self.space == "vp":
            return list(found)
        times = (torch.tensor(found, dtype=torch.float64) + 1) / TRAIN_TIMESTEPS
        return list(shift_time(times, self.shift_at()).tolist())

    def kept(self, denoise: float = 1.0, width: int = 1024, height: int = 1024) -> list[float]:
        """The levels that redo about `denoise` of the work (img2img, inpainting): trained ones, never others."""
        if self.grid == "lcm" and denoise < 1 and not self.levels:
            return self._consistency(denoise)
        levels, shift = self.trained(width, height), self.shift_at(width, height)
        if self.space == "vp":
            shares = [(v + 1) / 1000 for v in levels]
        elif self.space == "flow":
            shares = [grids.unshift(v, shift) for v in levels]
        else:  # sigmas of a VP model: nothing tells their times
            shares = [1 - i / len(levels) for i in range(len(levels))]
        return grids.tail(levels, shares, denoise)

    def sigmas(self, schedule: Schedule, denoise: float = 1.0, width: int = 1024, height: int = 1024) -> Tensor:
        """What the sampler takes, ending in 0."""
        levels = self.kept(denoise, width, height)
        return grids.at_timesteps(schedule, levels) if self.space == "vp" else grids.ending(levels)

    def gammas(self, steps: int) -> list[float]:
        """One for each of the last `steps` steps."""
        given = [self.gamma] * self.steps if isinstance(self.gamma, int | float) else list(self.gamma)
        return given[len(given) - steps :]

    def caveats(self) -> list[str]:
        """What the user has to know of these numbers."""
        said = [] if self.supported else [f"{self.title} cannot be sampled here: {self.why}."]
        if not self.verified:
            said.append(f"The noise levels of {self.title} are unverified ({': '.join(self.sources['levels'])}).")
        weak = [k for k, (status, _) in self.sources.items() if status in ("memory", "third-party") and k != "levels"]
        if weak:
            said.append(f"From memory or third parties, not from its authors: {', '.join(weak)}.")
        return [*said, self.notes] if self.notes else said


@cache
def profiles() -> dict[str, Profile]:
    return {row["id"]: _profile(row) for row in json.loads(DATA.read_text(encoding="utf-8"))["profiles"]}


@cache
def stock_grids() -> dict[str, list[int]]:
    """Timesteps that ComfyUI's schedulers give at 4 steps on SD1.5 and SDXL."""
    table = json.loads(DATA.read_text(encoding="utf-8"))["stock_grids"]
    return {k: v for k, v in table.items() if isinstance(v, list)}


def _profile(row: Mapping[str, Any]) -> Profile:
    values = dict(row)
    if "mu" in values:  # the exponential unit of the same shift
        values["shift"] = math.exp(values.pop("mu"))
    for k in ("kinds", "files", "hints", "allowed", "cfg", "lora_scale"):
        if k in values:
            values[k] = tuple(values[k])
    values["levels"] = {int(k): tuple(v) for k, v in values.get("levels", {}).items()}
    values["sources"] = {k: tuple(v) for k, v in values.get("sources", {}).items()}
    return Profile(**values)


def _numbers(allowed: Sequence[int]) -> str:
    run = list(range(allowed[0], allowed[-1] + 1))
    return f"{allowed[0]} to {allowed[-1]}" if len(run) > 3 and list(allowed) == run else ", ".join(map(str, allowed))


# --- recognition ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a file: any part may be missing. strength is that of a LoRA in use."""

    name: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, Shape] | None = None  # None: nobody looked into the file
    dtypes: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""  # of the whole file, where someone has computed it
    bytes: int = 0  # 0: not known
    strength: float = 1.0

    @classmethod
    def of(cls, header: Header, sha256: str = "", strength: float = 1.0) -> "Evidence":
        return cls(
            name=header.name,
            metadata=header.metadata,
            shapes=header.shapes,
            dtypes=header.dtypes,
            sha256=sha256,
            bytes=header.size,
            strength=strength,
        )

    @classmethod
    def look(cls, path: Path, strength: float = 1.0) -> "Evidence":
        """Its header; the whole file is hashed only where that may help: a LoRA that tells neither kind nor trainer."""
        found = cls.of(read_header(path), strength=strength)
        signed = any(k.startswith(("ss_", "modelspec.")) for k in found.metadata)
        structure = identify(found.shapes or {}, found.dtypes)
        if structure.kind != "lora" or signed or not _listed(found.bytes, structure):
            return found
        if recognise_file(found).profile is not None:
            return found
        return replace(found, sha256=content_hash(path))


@dataclass(frozen=True, kw_only=True)
class Match:
    """profile is None exactly when sure is "unsure"; candidates are then what it might be."""

    profile: Profile | None = None
    sure: str = "unsure"
    reason: str = ""
    candidates: tuple[Profile, ...] = ()
    strength: float = 1.0
    source: str = ""  # the file the answer came from


def recognise(model: Evidence | None, loras: Iterable[Evidence] = ()) -> Match:
    """What a model with all its LoRAs is. Two different distillations on one model are no answer."""
    used = [e for e in loras if e.strength != 0]
    found = [recognise_file(e) for e in ([model] if model else []) + used]
    known = [m for m in found if m.profile]
    ids = {m.profile.id for m in known if m.profile}
    if len(ids) > 1:
        names = " and ".join(f"{m.profile.title} ({m.source or 'recipe'})" for m in known if m.profile)
        return Match(
            reason=f"two distillations at once: {names}; remove one of them or choose the profile by hand",
            candidates=tuple(m.profile for m in known if m.profile),
        )
    if known:
        best = min(known, key=lambda m: SURE.index(m.sure))
        base = identify(model.shapes, model.dtypes).family if model and model.shapes else ""
        if best.profile and base and best.profile.base in FAMILIES and base != best.profile.base:
            return Match(
                reason=f"{best.profile.title} is made for {FAMILIES[best.profile.base].title}, this model is "
                f"{FAMILIES[base].title}; use a LoRA of its own family",
                candidates=(best.profile,),
            )
        return best
    reasons = [m.reason for m in found]
    candidates = tuple({p.id: p for m in found for p in m.candidates}.values())
    return Match(
        reason="; ".join(reasons) or "nothing is known of this model; choose the profile", candidates=candidates
    )


def recognise_file(file: Evidence) -> Match:
    """Our own recipe, else a known hash, a published name, a proof in the shapes, a hint in the name."""
    found = _by_recipe(file) or _by_content(file)
    return replace(found, strength=file.strength, source=file.name)


def _by_recipe(file: Evidence) -> Match | None:
    if RECIPE_KEY not in file.metadata:
        return None
    try:
        recipe = Recipe.from_json(file.metadata[RECIPE_KEY])
        name = file.name or "the file"
        if not recipe.steps:
            return Match(reason=f"{name} was trained here as {recipe.objective}; it is no few-step model")
        profile = _of_recipe(recipe)
    except (ValueError, TypeError) as error:
        return Match(reason=f"the recipe in {file.name or 'the file'} cannot be used: {error}")
    return Match(profile=profile, sure="certain", reason="its recipe is in the file, written by this trainer")


def _of_recipe(recipe: Recipe) -> Profile:
    """A recipe is data from a file: every number is checked before anything is sampled with it."""
    levels: tuple[float, ...] = recipe.timesteps or recipe.sigmas[:-1]
    space = "vp" if recipe.timesteps else "flow"
    top = 999 if space == "vp" else 1.0
    # a VP recipe may carry sigmas alone, beyond 1: those are levels of a Discrete schedule, not of a flow
    if not recipe.timesteps and levels and max(levels) > 1:
        space, top = "sigma", 2000.0
    numbers = [*levels, recipe.gamma, recipe.cfg, recipe.strength_max, recipe.strength_min, recipe.shift or 1.0]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ValueError("it holds something else than numbers")
    falling = all(a > b for a, b in pairwise(levels))
    if not (
        0 < recipe.steps <= MAX_STEPS
        and len(levels) == recipe.steps
        and falling
        and 0 <= levels[-1] <= levels[0] <= top
    ):
        raise ValueError(f"{recipe.steps} steps at {list(levels)[:8]}; the levels must fall, from at most {top:g}")
    if not 0 <= recipe.gamma <= 1 or not 0 < recipe.cfg <= 100 or (recipe.shift is not None and recipe.shift <= 0):
        raise ValueError(f"gamma {recipe.gamma:g}, cfg {recipe.cfg:g} or shift {recipe.shift} is out of range")
    title = f"{recipe.objective or 'distilled'} student, {recipe.steps} step{'s' * (recipe.steps > 1)}"
    own = ("read", "the recipe in the file")
    return Profile(
        id=f"dmd-{recipe.objective}-{recipe.steps}",
        title=title,
        base=recipe.family,
        kinds=("lora", "model", "checkpoint"),
        steps=recipe.steps,
        allowed=(recipe.steps,),
        space=space,
        prediction=recipe.prediction,
        grid="list",
        levels={recipe.steps: levels},
        shift=recipe.shift,
        gamma=recipe.gamma,
        cfg=(recipe.cfg, min(1.0, recipe.cfg), max(1.0, recipe.cfg)),
        negative="no" if recipe.cfg == 1 else "yes",
        lora_scale=(recipe.strength_max, recipe.strength_min, recipe.strength_max),
        notes=recipe.notes,
        recompute="recipe",
        sources={"levels": own, "gamma": own, "cfg": own, "lora_scale": own},
    )


def _by_content(file: Evidence) -> Match:
    structure = identify(file.shapes, file.dtypes) if file.shapes is not None else None
    digest = file.sha256.lower()
    for profile in profiles().values():
        if digest in profile.sha256 and file.bytes in (0, profile.bytes.get(digest, file.bytes)):
            steps = profile.sha256[digest]
            reason = "its sha256 is in a public list of model files, which was not checked against the file"
            return _agreed(profile.at(steps), structure, "likely", reason)
    for source, name in _names(file):
        for profile in profiles().values():
            if (named := _published(profile, name)) is not None:
                return _agreed(named, structure, "likely", f"{source} is the published name {name!r}")
    return _by_proof(structure) or _by_hint(file, structure)


def _listed(size: int, structure: Structure) -> bool:
    """May a file of this size and make have a known hash? To take one costs a second or two for each gigabyte."""
    able = (p for p in profiles().values() if p.sha256 and not disagreement(p, structure))
    return any(p.bytes.get(digest, size) == size for p in able for digest in p.sha256)


def _names(file: Evidence) -> list[tuple[str, str]]:
    """(where from, bare name): the file's own first, then what its trainer called it."""
    given = [("the file name", file.name)]
    given += [(f"the metadata entry {k}", file.metadata.get(k, "")) for k in ("ss_output_name", "modelspec.title")]
    return [(source, bare_name(name)) for source, name in given if name]


def bare_name(name: str) -> str:
    """Lower case, without folder, ending and what repackers append."""
    last = re.split(r"[/\\]", name)[-1].lower()
    return PRECISION.sub("", ENDINGS.sub("", last))


def _published(profile: Profile, name: str) -> Profile | None:
    for pattern in profile.files:
        if match := re.fullmatch(pattern, name):
            found = match.groupdict()
            steps = int(found.get("steps") or profile.steps)
            shift = float(found["shift"]) if found.get("shift") else profile.shift
            return replace(profile.at(steps), part=found.get("part") or "", shift=shift)
    return None


def _agreed(profile: Profile, structure: Structure | None, sure: str, reason: str) -> Match:
    """The match, unless the names and shapes in the file speak against it."""
    if structure is None:
        return Match(profile=profile, sure=sure, reason=f"{reason}; the file itself was not looked into")
    against = disagreement(profile, structure)
    if against:
        return Match(reason=f"{reason}, but {against}; it may be mislabelled", candidates=(profile,))
    proof = "its shapes agree" if structure.family else "its shapes are of no family known here"
    return Match(profile=profile, sure=sure, reason=f"{reason}, {proof}")


def disagreement(profile: Profile, structure: Structure) -> str:
    """Why a file cannot be this profile, "" if it can."""
    if structure.kind not in (*profile.kinds, "unknown"):
        return f"the file is a {structure.kind}, not a {' or '.join(profile.kinds)}"
    if structure.family and structure.family != profile.base:
        wanted = FAMILIES[profile.base].title if profile.base in FAMILIES else profile.base
        return f"the file is for {FAMILIES[structure.family].title}, not for {wanted}"
    if not structure.family and profile.base in FAMILIES:
        return f"nothing in the file shows that it is for {FAMILIES[profile.base].title}"
    if profile.id == "flux-schnell" and structure.guidance:
        return "the network takes a guidance scale, which schnell does not"
    return ""


def _by_proof(structure: Structure | None) -> Match | None:
    """Shapes that only one profile has."""
    if structure is None or structure.kind not in ("model", "checkpoint") or not structure.guidance:
        return None
    for profile in profiles().values():
        if profile.embedding and profile.base == structure.family:
            return Match(
                profile=profile, sure="likely", reason="the UNet takes a guidance embedding, as only full LCM models do"
            )
    return None


def _by_hint(file: Evidence, structure: Structure | None) -> Match:
    name = bare_name(file.name)
    hinted = [p for p in profiles().values() if _hints(p, name)]
    if structure is None:
        what = (
            f"the name {file.name!r} hints at {_titles(hinted)}" if hinted else f"the name {file.name!r} says nothing"
        )
        return Match(reason=f"{what}, and the file was not looked into; choose the profile", candidates=tuple(hinted))
    fitting = [p for p in hinted if not disagreement(p, structure)]
    if structure.kind == "lora":
        # a style made for a fast model carries its name too; only an accelerator moves the convolutions
        fitting = [p for p in fitting if structure.accelerator]
        hinted = hinted or ([p for p in profiles().values() if _like(p, structure)] if structure.accelerator else [])
    if len(fitting) == 1 and not VETO.search(name):
        profile, said = _steps_in(fitting[0], name)
        if profile is not None:
            reason = f"a guess: the name {file.name!r} hints at {profile.title} and the shapes agree{said}"
            return Match(profile=profile, sure="guess", reason=reason, candidates=tuple(fitting))
    family = f"{structure.title} " if structure.title else ""
    looks = "a file of unknown kind" if structure.kind == "unknown" else f"a {family}{structure.kind}"
    extra = " that moves convolutions and time embeddings, as distillation LoRAs do" if structure.accelerator else ""
    might = f"; it might be {_titles(hinted)}" if hinted else ""
    return Match(
        reason=f"{file.name or 'the file'} is {looks}{extra}, but nothing in it says how it is sampled{might}",
        candidates=tuple(hinted),
    )


def _like(profile: Profile, structure: Structure) -> bool:
    return profile.base == structure.family and structure.kind in profile.kinds


def _hints(profile: Profile, name: str) -> bool:
    """A hint counts as a word of its own: dmd2 in myModel_dmd2_v3, not turbo in turbocharged."""
    return any(re.search(rf"(?<![a-z])(?:{p})(?![a-z])", name) for p in profile.hints)


def _steps_in(profile: Profile, name: str) -> tuple[Profile | None, str]:
    """The profile at the steps that the name tells; None if it tells steps that do not exist."""
    told = re.search(r"(\d+)[-_ ]?steps?(?![a-z])", name)
    if told is None:
        several = len(profile.allowed) > 1
        return profile, f" (steps are not in the name, {profile.steps} assumed)" if several else ""
    steps = int(told[1])
    return (profile.at(steps), "") if steps in profile.allowed else (None, "")


def _titles(found: Sequence[Profile]) -> str:
    names = [p.title for p in found]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names)
