"""Few-step models sampled as they want to be: what the model is, read from its files, becomes SAMPLER and SIGMAS."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_sampling
from comfy_api.latest import io, ui
from torch import Tensor

from ..dmd_core.families import FAMILIES
from ..dmd_core.weights.doctor import sampling
from ..dmd_core.weights.pairings import wrong_pairings
from ..dmd_core.weights.profiles import Evidence, Match, Profile, profiles, recognise
from ..dmd_core.weights.structure import identify
from .comfy_denoiser import schedule_of
from .evidence import Graph, controlnet_end, evidence, graph_of, sampling_patch, setup, texts, wired
from .fast_path import OFF, fast_input, faster, tiny_vae, tiny_vae_output
from .negative_guidance import KEY
from .sampler import RestartSampler, guider_of, sample_latent

AUTO = "automatic"
ALIASES = ["few step", "turbo", "lightning", "lcm", "dmd2", "hyper", "tcd", "schnell", "distilled", "scheduler", "dmd"]
LOGGED: set[str] = set()
log = logging.getLogger(__name__)


class Unrecognised(ValueError):
    """It is not known how a model is sampled in few steps; who can sample it slowly goes on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a MODEL is sampled, and the words for it."""

    model: Any
    profile: Profile
    sampler: RestartSampler
    sigmas: Tensor
    why: str

    @property
    def cfg(self) -> float:
        return self.profile.cfg[0]


def plan(
    model: Any,
    latent: Mapping[str, Any] | None,
    *,
    steps: int = 0,
    denoise: float = 1.0,
    profile: str = AUTO,
    graph: Graph | None = None,
    node: str = "",
    name: str = "model",
    fast: str = OFF,
    samplers: Sequence[Mapping[str, Any]] = (),
    **wiring: Any,
) -> Plan:
    """wiring: what else is known of the setup (fields of pairings.Setup), for warnings; samplers: of each sampler."""
    base, loras = evidence(model, graph or {}, node, name)
    match = chosen(profile, recognise(base, loras))
    found = match.profile.at(steps) if steps else match.profile
    if not found.supported:
        raise ValueError(f"{found.title} cannot be sampled here: {found.why}; use a pack made for it")
    model, notes = with_sampling(model, found)
    schedule = schedule_of(model.get_model_object("model_sampling"))
    refuse_other_space(found, schedule.sigma_max)
    size = pixels(model, latent)
    sigmas = found.sigmas(schedule, denoise, *size)
    kept = len(sigmas) - 1
    sampler = RestartSampler(
        sigmas[:-1].tolist(), found.gammas(kept), found.keep, top=float(sigmas[0]) if denoise == 1 else None
    )
    known = {"steps": found.steps, "denoise": denoise, **wiring}
    known |= {"width": size[0], "height": size[1]} if latent is not None else {}
    strength = match.strength if any(e.name == match.source for e in loras) else None
    setups = [setup(model, loras, strength, **{**known, **own}) for own in samplers or ({},)]
    wrong = [sentence for each in setups for sentence in wrong_pairings(found, each)]
    warnings = notes + other_family(found, base) + list(dict.fromkeys(wrong))
    model, said = faster(model, fast)
    why = "\n".join([words(match, found, sigmas, warnings), *said])
    return Plan(model=model, profile=found, sampler=sampler, sigmas=sigmas, why=why)


def chosen(profile: str, match: Match) -> Match:
    """The user's choice, else what was recognised; an unsure answer is no answer."""
    if profile != AUTO:
        if profile not in profiles():
            raise ValueError(f"profile is {profile!r}; use {AUTO} or one of {', '.join(profiles())}")
        by_hand = profiles()[profile]
        against = match.profile is not None and match.profile.id != profile
        doubt = f"; the model itself looks like {match.profile.title} ({match.reason})" if against else ""
        return replace(match, profile=by_hand, sure="certain", reason=f"chosen by hand{doubt}")
    if match.profile is None:
        might = f" ({', '.join(p.id for p in match.candidates[:6])})" if match.candidates else ""
        raise Unrecognised(
            f"it is not known how this model is sampled in few steps: {match.reason}. Choose a profile by hand{might}; "
            "a model that was never distilled belongs into a KSampler with 20 steps or more"
        )
    return match


def other_family(profile: Profile, base: Evidence) -> list[str]:
    """Recognition refuses this by itself; a choice by hand is followed, and told."""
    family = identify(base.shapes or {}, base.dtypes).family
    if not family or profile.base not in FAMILIES or family == profile.base:
        return []
    return [f"{profile.title} is made for {FAMILIES[profile.base].title}, this model is {FAMILIES[family].title}."]


def with_sampling(model: Any, profile: Profile) -> tuple[Any, list[str]]:
    """The MODEL with the parametrisation that the profile asks for; the one that came in stays as it is."""
    patch, wanted, notes = sampling_patch(model), profile.stock.get("patch", ""), []
    if patch == "lcm" and wanted != "lcm":
        model = model.clone()
        del model.object_patches["model_sampling"]
        notes.append(f"ModelSamplingDiscrete (lcm) was taken off again: it is wrong for {profile.title}.")
    if profile.prediction == "x0" and patch != "x0":
        base = comfy.model_sampling

        class CleanImage(base.ModelSamplingDiscrete, base.X0):
            pass

        model = model.clone()
        model.add_object_patch("model_sampling", CleanImage(model.model.model_config))
        notes.append(f"{profile.title} predicts the clean image: the MODEL that comes out is set so.")
    return model, notes


def refuse_other_space(profile: Profile, top: float) -> None:
    flow = profile.space == "flow"
    if flow != (top <= 1.5):
        kinds = ("flow", "noise-predicting (VP)")
        mine, theirs = kinds if flow else kinds[::-1]
        raise ValueError(
            f"{profile.title} is for {mine} models, this MODEL is a {theirs} one (its highest sigma is {top:g}); "
            "choose another profile or the model that belongs to it"
        )


def pixels(model: Any, latent: Mapping[str, Any] | None) -> tuple[int, int]:
    """Width and height of the image to come; some shifts depend on them."""
    if latent is None:
        return 1024, 1024
    ratio = latent.get("downscale_ratio_spacial") or model.get_model_object("latent_format").spacial_downscale_ratio
    height, width = latent["samples"].shape[-2:]
    return int(width * ratio), int(height * ratio)


def words(match: Match, profile: Profile, sigmas: Tensor, warnings: list[str]) -> str:
    """What was recognised, why, how sure; then how it is sampled; then what will hurt. Warnings go to the log too."""
    lines = [f"{profile.title} ({match.sure}): {match.reason}.", *sampling(profile)]
    if len(sigmas) - 1 < profile.steps:
        lines.append(f"{len(sigmas) - 1} of its {profile.steps} steps are left at this denoise, on the trained levels")
    lines.append("sigmas " + ", ".join(f"{s:.4g}" for s in sigmas.tolist()))
    if profile.pair:
        lines.append(
            f"one half of a pair: the high-noise model does the first {profile.pair} of {profile.steps} steps; "
            "Switch Models wires both"
        )
    for warning in warnings:
        if warning not in LOGGED:  # once, however often the graph is queued; the text always has it
            log.warning(warning)
            LOGGED.add(warning)
    return "\n".join([*lines, *(f"Warning: {w}" for w in warnings)])


def profile_input() -> io.Combo.Input:
    return io.Combo.Input(
        "profile",
        options=[AUTO, *(p.id for p in profiles().values() if p.supported)],
        default=AUTO,
        tooltip="Automatic reads the checkpoint, every LoRA on it and their names. Choose by hand where it is unsure "
        "or wrong.",
        advanced=True,
    )


def steps_input() -> io.Int.Input:
    return io.Int.Input(
        "steps",
        default=0,
        min=0,
        max=100,
        tooltip="0 takes the number of steps that the model was made for. Others are refused if it has none for them.",
    )


def denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        tooltip="1 makes a new image. Below 1 (image to image) the last part of the trained levels is used, never "
        "levels in between; so the effect goes in as many stages as there are steps.",
    )


class FewStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_FewStep",
            display_name="Few-Step Settings",
            category="DMD/sample",
            description="Reads which few-step model this is (DMD2, Lightning, LCM, Turbo, schnell, own students, ...) "
            "and gives the sampler, noise levels and cfg that it was trained for, with the reason.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The distilled model, or a base model with a few-step LoRA on it."),
                steps_input(),
                denoise_input(),
                profile_input(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The LATENT that will be sampled. Flux and its relatives want other noise levels for other "
                    "image sizes; without it 1024 x 1024 is assumed.",
                ),
                fast_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, corrected where its prediction type was set wrong."),
                io.Sampler.Output(tooltip="For SamplerCustom or SamplerCustomAdvanced."),
                io.Sigmas.Output(tooltip="The noise levels that it was trained on."),
                io.Float.Output("cfg", display_name="cfg", tooltip="The cfg that it was trained for; 1 is none."),
                io.String.Output("why", display_name="why", tooltip="What was recognised, why, and what will hurt."),
                tiny_vae_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        steps: int = 0,
        denoise: float = 1.0,
        profile: str = AUTO,
        latent: Mapping[str, Any] | None = None,
        fast: str = OFF,
    ) -> io.NodeOutput:
        graph, node = graph_of(cls.hidden)
        found = plan(
            model, latent, steps=steps, denoise=denoise, profile=profile, graph=graph, node=node, fast=fast,
            samplers=wired(graph, node), nag=KEY in model.attachments,
        )  # fmt: skip
        small = tiny_vae(model, graph, node, 5)
        return io.NodeOutput(
            found.model, found.sampler, found.sigmas, found.cfg, found.why, small, ui=ui.PreviewText(found.why)
        )


class FewStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_FewStepSampler",
            display_name="Few-Step Sampler",
            category="DMD/sample",
            description="A KSampler for few-step models that sets itself: it reads which model this is and samples it "
            "as it was trained. Batches, image to image, masks and ControlNet work as in a KSampler.",
            search_aliases=["ksampler", *ALIASES],
            inputs=[
                io.Model.Input("model", tooltip="The distilled model, or a base model with a few-step LoRA on it."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Latent.Input("latent", tooltip="An empty LATENT, or one to change (denoise below 1, or a mask)."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Decides the noise: the same seed gives the same image.",
                ),
                steps_input(),
                denoise_input(),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="0 takes the cfg that the model was made for, which is 1 (none) for most.",
                    advanced=True,
                ),
                profile_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the image should not show. It counts only at a cfg above 1; for models that run at 1 "
                    "use the Negative Guidance node.",
                ),
                fast_input(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The sampled image, for VAE Decode."),
                io.String.Output("why", display_name="why", tooltip="What was recognised, why, and what will hurt."),
                tiny_vae_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int = 0,
        denoise: float = 1.0,
        cfg: float = 0.0,
        profile: str = AUTO,
        negative: Any = None,
        fast: str = OFF,
    ) -> io.NodeOutput:
        graph, node = graph_of(cls.hidden)
        wiring = {"negative": bool(texts(graph, node, "negative")), "nag": KEY in model.attachments}
        wiring |= {"controlnet_end": controlnet_end(positive)}
        wiring |= {"cfg": cfg} if cfg else {}
        found = plan(
            model, latent, steps=steps, denoise=denoise, profile=profile, graph=graph, node=node, fast=fast, **wiring
        )
        scale = cfg or found.cfg
        if negative is None and not math.isclose(scale, 1.0):
            raise ValueError(f"cfg {scale:g} needs a negative prompt; connect one (an empty text will do) or set cfg 1")
        guider = guider_of(found.model, positive, positive if negative is None else negative, scale)
        out = sample_latent(found.model, guider, found.sampler, found.sigmas, latent, seed)
        return io.NodeOutput(out, found.why, tiny_vae(model, graph, node, 2), ui=ui.PreviewText(found.why))
