"""Is this network a teacher? Guidance-distilled and few-step models are told by what they predict from pure noise.

There x carries nothing, so a true teacher can only predict the mean of what its prompt may become:
- the same for every noise. A few-step model already shows a different picture for each: `variety` near 1
  (told by the empty prompt, which leaves most open).
- and the step from the empty prompt's mean to the prompt's is that between the means of its own samples. A model that
  has guidance built in steps further, by about the guidance scale: `overshoot` is that factor.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conditioning import fit
from .denoiser import Denoiser
from .samplers import sample_euler, start
from .schedule import add_noise

VARIETY = 0.5  # above: few-step. A true teacher is below 0.2, a consistency model at 1
OVERSHOOT = 1.8  # above: guidance is built in. A true teacher is near 1, the factor is the built-in scale
RESPONSE = 0.01  # below: the prompt changes nothing


@dataclass(frozen=True, kw_only=True)
class Probed:
    variety: float  # of one-step predictions over noises, relative to that of samples
    overshoot: float
    response: tuple[float, ...]  # |cond - uncond| / |cond| of predicted x0, from noisy to clean
    seconds_per_call: float  # of one sample

    def words(self) -> str:
        return (
            f"one-step variety {self.variety:.2f} (few-step above {VARIETY}), guidance overshoot {self.overshoot:.2f} "
            f"(built in above {OVERSHOOT}), response to the prompt {', '.join(f'{r:.3f}' for r in self.response)}, "
            f"{1000 * self.seconds_per_call:.3g} ms per call"
        )


@torch.no_grad()
def probe(
    teacher: Denoiser,
    prompts: Any,
    negative: Any,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    *,
    noises: int = 4,
    steps: int = 16,
    seed: int = 0,
) -> Probed:
    """prompts: a batch of conditioning, two or more; negative: one for the empty prompt; shape: [c h w] of a latent."""
    n, schedule = len(prompts), teacher.schedule
    rng = torch.Generator(device).manual_seed(seed)
    sigmas = levels(teacher, steps, device)
    one: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    full: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    calls, began = 0, time.perf_counter()
    for _ in range(noises):
        x = start(schedule, torch.randn((n, *shape), generator=rng, device=device), sigmas[0])
        for name, cond in (("cond", prompts), ("uncond", fit(negative, n))):
            one[name].append(teacher(x, sigmas[0].expand(n), cond))
            full[name].append(sample_euler(teacher, x, sigmas, cond))
            calls += steps + 1
    spent = float(torch.stack(full["cond"]).sum()) * 0 + time.perf_counter() - began  # the sum waits for the device
    predicted, sampled = ({k: torch.stack(v) for k, v in d.items()} for d in (one, full))
    step = predicted["cond"].mean(0) - predicted["uncond"].mean(0)
    wanted = sampled["cond"].mean(0) - sampled["uncond"].mean(0)
    # <step, wanted> / |step|^2 has no bias from the few samples behind `wanted`
    agreement = (step * wanted).sum() / step.square().sum().clamp_min(1e-20)
    # of the empty prompt: built-in guidance would blow up what little a prompt's prediction varies
    variety = predicted["uncond"].std(0).square().mean().sqrt() / sampled["uncond"].std(0).square().mean().sqrt()
    return Probed(
        variety=float(variety),
        overshoot=float(1 / agreement.clamp_min(1e-3)),
        response=tuple(responses(teacher, sampled["cond"][0], prompts, fit(negative, n), sigmas, rng)),
        seconds_per_call=spent / calls / n,
    )


def levels(teacher: Denoiser, steps: int, device: torch.device | str) -> Tensor:
    """Evenly in the schedule's own time, from pure noise to 0."""
    schedule = teacher.schedule
    top = torch.tensor(schedule.sigma_max)
    t = float(schedule.timestep(top.reshape(1)))
    sigmas = schedule.sigma(torch.arange(steps, 0, -1, dtype=torch.float32) / steps * t)
    sigmas[0] = top
    return torch.cat([sigmas.float(), torch.zeros(1)]).to(device)


def responses(
    teacher: Denoiser, x0: Tensor, prompts: Any, negative: Any, sigmas: Tensor, rng: torch.Generator
) -> list[float]:
    found = []
    for i in (0, len(sigmas) // 4, len(sigmas) // 2, 3 * len(sigmas) // 4):
        eps = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        sigma = sigmas[i].expand(len(x0))
        x = add_noise(teacher.schedule, x0, eps, sigma)
        cond, uncond = teacher(x, sigma, prompts), teacher(x, sigma, negative)
        found.append(float((cond - uncond).norm() / cond.norm().clamp_min(1e-12)))
    return found


def complaints(found: Probed, guidance: float) -> list[str]:
    """Why this is no teacher for a run with that guidance (as in KSampler, 1: none); empty if it is one."""
    reasons = []
    if found.variety > VARIETY:
        reasons.append(
            f"it already draws whole pictures in one step (variety {found.variety:.2f}, a teacher is below {VARIETY}): "
            "a few-step model (Turbo, Lightning, Hyper, LCM, schnell). Distil the model that it was made from"
        )
    elif found.overshoot > OVERSHOOT and guidance != 1:
        reasons.append(
            f"guidance of about {found.overshoot:.1f} is built into it: more on top of it burns the pictures. "
            "Set guidance to 1, or use the model before its guidance was distilled"
        )
    if max(found.response) < RESPONSE and guidance != 1:
        reasons.append(
            f"it does not respond to the prompt (|cond - uncond| is {max(found.response):.4f} of the prediction): "
            "guidance would do nothing. Check that the text encoder fits, or set guidance to 1"
        )
    return reasons


def refuse(found: Probed, guidance: float) -> None:
    reasons = complaints(found, guidance)
    if reasons:
        raise ValueError(f"this model cannot be the teacher: {'; '.join(reasons)}")
