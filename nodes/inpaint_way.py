"""How the node Inpaint samples: as it is told, or as the model was made for."""

from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ..dmd_core.families import detect
from ..dmd_core.sliders.settings import SLOW_STEPS
from .evidence import Graph
from .few_step import AUTO, Unrecognised, plan
from .sampler import RestartSampler


@dataclass(frozen=True, kw_only=True)
class Way:
    model: Any
    sampler: Any
    sigmas: Tensor
    cfg: float
    why: str = ""

    @property
    def steps(self) -> int:
        return max(1, len(self.sigmas) - 1)


def way_of(
    model: Any,
    size: tuple[int, int],
    vae: Any,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float,
    at: tuple[Graph, str],
) -> Way:
    """size: rows, columns of the picture; at: the graph and this node. 0 steps and cfg 0 are left to `automatic`."""
    if sampler_name != AUTO:
        if steps < 1 or cfg <= 0:
            raise ValueError(
                f"steps is {steps} and cfg {cfg:g}; 0 is only for the sampler {AUTO!r}: give both, or choose that"
            )
        return plain(model, steps, cfg, sampler_name, scheduler, denoise)
    ratio = vae.spacial_compression_encode()
    latent = {"samples": torch.empty(1, 1, *(s // ratio for s in size)), "downscale_ratio_spacial": ratio}
    try:
        found = plan(model, latent, steps=steps, denoise=denoise, graph=at[0], node=at[1])
    except Unrecognised:
        pass
    else:
        sampler = seeing(found.sampler, found.sigmas, found.model.get_model_object("model_sampling").sigma_max)
        return Way(model=found.model, sampler=sampler, sigmas=found.sigmas, cfg=cfg or found.cfg, why=found.why)
    steps, cfg = steps or SLOW_STEPS, cfg or sum(detect(model.model.diffusion_model).cfg) / 2
    why = f"not recognised as a few-step model: {steps} steps of euler at cfg {cfg:g}"
    return plain(model, steps, cfg, "euler", "simple", denoise, why)


def seeing(sampler: RestartSampler, sigmas: Tensor, top: Tensor) -> RestartSampler:
    """Begins with the prefill under noise, as training states hold pictures: the first guess takes colours from it.

    Not where a model was taught to begin with pure noise below the highest level, as one-step DMD2 is.
    """
    if float(sigmas[0]) < 0.9 * float(top):
        return sampler
    return RestartSampler(sampler.levels, sampler.gammas, sampler.keep)


def plain(model: Any, steps: int, cfg: float, sampler: str, scheduler: str, denoise: float, why: str = "") -> Way:
    """As KSampler does it."""
    kind = comfy.samplers.KSampler
    levels = kind(model, steps, model.load_device, sampler, scheduler, denoise, model_options=model.model_options)
    return Way(model=model, sampler=comfy.samplers.sampler_object(sampler), sigmas=levels.sigmas, cfg=cfg, why=why)
