"""Sliders that work at some steps of a run only: forward hooks, switched on and off around each call of the network.

ComfyUI attaches them when it loads the MODEL and takes them off when it loads another clone of it. While no run is
under way nothing is active, so a cancelled run leaves nothing behind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor

from ..dmd_core.adapters import AdapterBank
from .comfy_denoiser import HostBank

KEY = "dmd_sliders"
LAST_STEP = 10000
SAME_LEVEL = 1e-4  # relative; levels pass through fp32 and timesteps


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where in a run something works: both as shares of the sampling and as numbers of steps; where they overlap."""

    start: float = 0.0
    end: float = 1.0
    first: int = 0  # counted from 0, as KSampler (Advanced) does
    last: int = LAST_STEP  # the first step where it does not work any more

    @property
    def whole(self) -> bool:
        return self == Span()

    @property
    def empty(self) -> bool:
        return self.start >= self.end or self.first >= self.last

    def works(self, sampling: Any, options: Mapping[str, Any]) -> bool:
        """sampling: the MODEL's model_sampling; options: the transformer_options of a call."""
        sigma = float(options["sigmas"].max())
        high, low = (float(sampling.percent_to_sigma(p)) for p in (self.start, self.end))
        inside = sigma <= high * (1 + SAME_LEVEL) and (self.end >= 1 or sigma > low * (1 + SAME_LEVEL))
        return inside and self.first <= step_of(sigma, options.get("sample_sigmas")) < self.last

    def words(self) -> str:
        parts = [f"{self.start:.0%} to {self.end:.0%} of the sampling"] if (self.start, self.end) != (0, 1) else []
        if (self.first, self.last) != (0, LAST_STEP):
            until = f" to {self.last - 1}" if self.last < LAST_STEP else " on"
            parts.append(f"steps {self.first}{until}")
        return " and ".join(parts)


def step_of(sigma: float, levels: Tensor | None) -> int:
    """Number of the step that a call belongs to: a call between two levels is still part of the upper one's step."""
    if levels is None or levels.numel() < 2:
        return 0
    return max(0, int((levels[:-1] >= sigma * (1 - SAME_LEVEL)).sum()) - 1)


@dataclass(frozen=True, kw_only=True)
class Timed:
    state: Mapping[str, Tensor]  # as AdapterBank.load takes it
    strength: float
    span: Span


def with_hooks(model: Any, sliders: Sequence[Timed]) -> Any:
    """A clone of the MODEL on which these run beside the weights; several nodes in a row add up."""
    model = model.clone()
    layers = {k.rpartition(".")[0] for s in sliders for k in s.state}
    bank = HostBank(model.model.diffusion_model, lambda name, _: name in layers, torch.device(model.load_device))
    for i, slider in enumerate(sliders):
        bank.load(str(i), slider.state)
    key = f"{KEY}_{sum(k.startswith(KEY) for k in model.injections)}"
    attach = PatcherInjection(inject=lambda _: bank.attach(), eject=lambda _: bank.detach())
    model.set_injections(key, [attach])
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, at_their_steps(bank, sliders))
    return model


def at_their_steps(bank: AdapterBank, sliders: Sequence[Timed]) -> Callable[..., Tensor]:
    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        sampling = executor.class_obj.model_sampling
        scales = {str(i): s.strength for i, s in enumerate(sliders) if s.span.works(sampling, options)}
        with bank.use(**scales):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    return apply
