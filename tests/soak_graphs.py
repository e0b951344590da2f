"""Three small graphs for a long queue: together every node of ours that needs no training. Import only inside ComfyUI.

They take turns, so ComfyUI's cache answers for loaded models and an empty LATENT alone; all else is done anew.
"""

from collections.abc import Callable, Iterator
from typing import Any

import comfy_host

variety, slider_files = comfy_host.pack_module("nodes.variety"), comfy_host.pack_module("nodes.slider_files")

SIDE, CANVAS = 64, 96  # pixels
STUDENT = "student, 4 steps"
Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def loaded(seed: int) -> Graph:
    """The teacher stays from prompt to prompt."""
    return {
        "teacher": node("DMD_LoadShapes", model="teacher"),
        "text": node("CLIPTextEncode", clip=["teacher", 1], text=f"a red circle {seed}"),
        "other": node("CLIPTextEncode", clip=["teacher", 1], text=f"a blue square {seed}"),
        "empty": node("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1),
    }


def patched(seed: int, slider: str, run: str) -> Graph:
    """A student under every patch of ours, each changing what is sampled."""
    rows = {"slider_1": slider, "strength_1": 0.2 + 0.1 * (seed % 3)}
    rows |= {"slider_2": slider, "strength_2": -0.3, "start_step_2": 0, "end_step_2": 1}
    words = {"positive": f"a large red circle {seed}", "negative": f"a small red circle {seed}"}
    return loaded(seed) | {
        "student": node("DMD_LoadShapes", model=STUDENT),
        "mixed": node("DMD_MixSliders", model=["student", 0], **rows),
        "steered": node("DMD_InstantSlider", model=["mixed", 0], clip=["student", 1], **words, strength=0.5),
        "varied": node("DMD_Variety", model=["steered", 0], how=variety.PROMPT, strength=0.3, end=0.25),
        "guided": node("DMD_NegativeGuidance", model=["varied", 0], negative=["other", 0]),
        "sampled": node("DMD_FewStepSampler", model=["guided", 0], positive=["text", 0], latent=["empty", 0],
                        seed=seed),
        "pictures": node("VAEDecode", samples=["sampled", 0], vae=["student", 2]),
        "shown": node("PreviewImage", images=["pictures", 0]),
    }  # fmt: skip


def switched(seed: int, slider: str, run: str) -> Graph:
    """A teacher's step before the student's, the same without the node for it, and what can be asked of files."""
    both = {"positive": ["text", 0], "negative": ["other", 0]}
    return loaded(seed) | {
        "student": node("DMD_LoadShapes", model=STUDENT),
        "settings": node("DMD_FewStep", model=["student", 0], latent=["empty", 0]),
        "sampled": node("SamplerCustom", model=["settings", 0], add_noise=True, noise_seed=seed, cfg=1.0, **both,
                        sampler=["settings", 1], sigmas=["settings", 2], latent_image=["empty", 0]),
        "switched": node("DMD_SwitchModels", first=["teacher", 0], last=["settings", 0], **both, first_steps=1),
        "noise": node("RandomNoise", noise_seed=seed),
        "handed": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["switched", 0], sampler=["switched", 1],
                       sigmas=["switched", 2], latent_image=["sampled", 0]),
        "pictures": node("VAEDecode", samples=["handed", 0], vae=["student", 2]),
        "shown": node("PreviewImage", images=["pictures", 0]),
        "grid": node("DMD_Grid", model=["student", 0], **both, vae=["student", 2], latent=["empty", 0], cell=SIDE,
                     seeds=f"{seed}", slider=slider, strengths="0, 0.5"),
        "sheet": node("PreviewImage", images=["grid", 0]),
        "prompts": node("DMD_EncodePrompts", clip=["teacher", 1], prompts=f"a red circle\na blue square {seed % 7}"),
        "doctor": node("DMD_Doctor", file=f"loras/{slider}", model=["student", 0], name=f"copy {seed}"),
        "inspected": node("DMD_InspectRun", run=run, snapshot="last"),
    }  # fmt: skip


def inpainted(seed: int, slider: str, run: str) -> Graph:
    """The three nodes one after another, on a session that edits go into; and all of it in one node."""
    drawn = {"seed": seed, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    both = {"positive": ["text", 0], "negative": ["other", 0]}
    lazily = {"mode": "session", "ring": 1, "warm": 1, "every": 2, "session": "soak", "accepted": seed // 3 % 2}
    return loaded(seed) | {
        "image": node("EmptyImage", width=CANVAS, height=CANVAS, batch_size=1, color=seed // 6 * 0x010305 % 2**24),
        "none": node("SolidMask", value=0.0, width=CANVAS, height=CANVAS),
        "hole": node("SolidMask", value=1.0, width=16, height=16),
        "mask": node("MaskComposite", destination=["none", 0], source=["hole", 0], x=8 * (seed % 5), y=32,
                     operation="add"),
        "prepared": node("DMD_PrepareInpaint", image=["image", 0], mask=["mask", 0], vae=["teacher", 2],
                         model=["teacher", 0], area="canvas", context=1.5, grow=2, soften=2, fill_holes=True,
                         prefill="push-pull", left=0, top=0, right=0, bottom=0, steps=2, local=True),
        "lazy": node("DMD_LazyInpaint", model=["teacher", 0], **lazily, forget=False, memory=1.0, spill=1.0),
        "sampled": node("KSampler", model=["lazy", 0], **both, latent_image=["prepared", 0], **drawn),
        "put": node("DMD_CompositeInpaint", region=["prepared", 1], samples=["sampled", 0], vae=["teacher", 2],
                    feather=2.0, match_colours=True, local=True),
        "shown": node("PreviewImage", images=["put", 0]),
        "at once": node("DMD_Inpaint", image=["put", 0], mask=["mask", 0], model=["teacher", 0], vae=["teacher", 2],
                        **both, **drawn, mode="auto", prefill="push-pull", grow=2, soften=2),
        "again": node("PreviewImage", images=["at once", 0]),
    }  # fmt: skip


TURNS: tuple[Callable[[int, str, str], Graph], ...] = (patched, switched, inpainted)


def graph(seed: int, slider: str, run: str) -> Graph:
    return TURNS[seed % len(TURNS)](seed, slider, run)


def ends(given: Graph) -> list[str]:
    """What is asked for: the nodes that nothing is connected to."""
    used = {value[0] for n in given.values() for value in links(n)}
    return [name for name in given if name not in used]


def links(of: dict[str, Any]) -> Iterator[list[Any]]:
    return (v for v in of["inputs"].values() if isinstance(v, list))
