"""What a model family is: everything that differs between architectures, as data."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..adapters import Targets, is_linear
from ..denoiser import Prediction
from ..schedule import Discrete, Flow, Schedule, shift_time
from .names import Names, layer_path

Preset = Literal["all", "attention", "self-attention", "cross-attention", "kv", "no-cross-attention"]
PRESETS: tuple[str, ...] = get_args(Preset)
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Same:
    """Native and diffusers names of one layer, or of one native layer that diffusers keeps as several.

    `{}` stands for a block number. Two parts are halves (k, v), three are thirds (q, k, v) of the native rows; four are
    q, k, v, each as high as the layer is wide, and the rest (Flux's single blocks). Where swap is set, the two halves
    of the rows stand in the other order (scale and shift of the last modulation). {last} stands for the last block.
    """

    native: str
    diffusers: tuple[str, ...]
    swap: bool = False


@dataclass(frozen=True)
class Layers:
    """Patterns over layer paths, native and diffusers names alike; each is matched against the whole path.

    Where text and image tokens attend jointly, the text stream's projections stand for cross-attention; where one
    stream carries both, all attention layers are self- and cross-attention.
    """

    self_attention: str
    cross_attention: str
    kv: str
    rest: str  # feed-forward; on UNets convolutions and time projections too


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str
    title: str
    recognises: Callable[[Names], bool]
    diffusers_mark: str  # a layer that only the diffusers layout has
    layers: Layers
    blocks: str  # modules worth a gradient checkpoint
    features: tuple[str, ...]  # modules whose output holds the image tokens, shallow to deep
    prediction: Prediction
    latent_channels: int
    downscale: int  # pixels per latent pixel, each way
    cfg: tuple[float, float]  # guidance to distil with, as in KSampler; (1, 1): none
    embedded_guidance: float | None = None
    betas: tuple[str, float, float] | None = None  # VP families
    shift: float = 1.0  # flow families: what ComfyUI samples with when no node says otherwise
    student_shift: float | None = None  # where published few-step students use another one
    text_tokens: int = 64  # beside the image's, in ComfyUI; where a prompt is not padded 64, some 45 words
    one_step: int = 999  # VP families: the timestep of a one-step student
    lora: Literal["kohya", "transformer", "diffusion_model"] = "diffusion_model"  # key style of our LoRA files
    same: tuple[Same, ...] = ()
    whole: tuple[Same, ...] = ()  # what no LoRA carries: norms, embedders, tables; () where not all of it is known
    architecture: str = ""  # modelspec.architecture
    base_version: str = ""  # ss_base_model_version

    def schedule(self, shift: float | None = None) -> Schedule:
        if self.betas is not None:
            return Discrete.from_betas(*self.betas, TRAIN_TIMESTEPS)
        return Flow(self.shift if shift is None else shift)

    def timesteps(self, steps: int) -> tuple[int, ...]:
        """What a VP student of that many steps is trained and sampled at: 4 -> 999 749 499 249 (DMD2)."""
        if self.betas is None:
            raise ValueError(f"{self.title} is a flow model and has sigmas, not timesteps; ask for sigmas({steps})")
        _check_steps(steps)
        if steps == 1:
            return (self.one_step,)
        return tuple(TRAIN_TIMESTEPS * (steps - i) // steps - 1 for i in range(steps))

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        """Noise levels of a student of that many steps, ending in 0. [steps + 1]"""
        _check_steps(steps)
        if self.betas is not None:
            levels = self.schedule().sigma(torch.tensor(self.timesteps(steps)))
        else:
            shift = shift or self.student_shift or self.shift
            levels = shift_time(1 - torch.arange(steps, dtype=torch.float64) / steps, shift).float()
        return torch.cat([levels, torch.zeros(1)])

    def targets(self, preset: Preset = "all") -> Targets:
        """Which layers carry an adapter, for AdapterBank."""
        pattern, without = self._pattern(preset)

        def is_target(name: str, module: nn.Module) -> bool:
            if not (is_linear(module) or isinstance(module, nn.Conv2d)) or getattr(module, "groups", 1) != 1:
                return False
            path = layer_path(name)
            return bool(pattern.fullmatch(path)) and not (without and without.fullmatch(path))

        return is_target

    def _pattern(self, preset: str) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
        own, cross, kv, rest = (
            self.layers.self_attention,
            self.layers.cross_attention,
            self.layers.kv,
            self.layers.rest,
        )
        patterns = {
            "all": (own, cross, rest),
            "attention": (own, cross),
            "self-attention": (own,),
            "cross-attention": (cross,),
            "kv": (kv,),
            "no-cross-attention": (own, rest),
        }
        if preset not in patterns:
            raise ValueError(f"layer preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
        joined = "|".join(f"(?:{p})" for p in patterns[preset] if p)
        # in a single-stream model every attention layer is cross-attention too
        without = re.compile(cross) if preset == "no-cross-attention" else None
        return re.compile(joined), without

    def block_names(self, names: Iterable[str]) -> list[str]:
        """The modules to wrap in a gradient checkpoint, of those that the network has."""
        return [n for n in names if re.fullmatch(self.blocks, layer_path(n))]

    def feature_layers(self, names: Iterable[str], count: int | None = None) -> list[str]:
        """Layers whose outputs discriminators and perceptual losses read, shallow to deep; evenly spread if counted."""
        listed = list(names)
        found = [
            n
            for pattern in self.features
            for n in sorted((n for n in listed if re.fullmatch(pattern, layer_path(n))), key=_numbers)
        ]
        if not found:
            raise ValueError(
                f"no feature layer of the family {self.title} is among the {len(listed)} layers of this network; "
                "name the layers to read yourself"
            )
        if count is None or count >= len(found):
            return found
        if count < 1:
            raise ValueError(f"{count} feature layers were asked for; 1 to {len(found)} are possible here")
        # the middle of each of `count` equal parts: neither the first nor the last layer of a deep network
        return [found[math.floor((i + 0.5) * len(found) / count)] for i in range(count)]


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(d) for d in re.findall(r"\d+", name))


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= 100:
        raise ValueError(f"{steps} steps were asked for; students take 1 to 100, usually 1, 2, 4 or 8")
