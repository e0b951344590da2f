"""Sliders from files and from sets, what is known of them, and whether they belong onto a MODEL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..dmd_core.adapters import is_linear
from ..dmd_core.families import detect, split_key
from ..dmd_core.families.names import OTHERS
from ..dmd_core.sliders.card import SliderCard, describe, from_metadata
from ..dmd_core.weights.checkpoint import base_hash
from ..dmd_core.weights.lora import Shape, fit, lora_of, lora_tensors

SliderSet = io.Custom("SLIDER_SET")  # list[Slider]
NONE = "none"
FROM_SET = "set "
MOST = 32  # entries of a set that can be chosen
_hashes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # of networks, so that dragging a slider stays quick


@dataclass(frozen=True, kw_only=True)
class Slider:
    """One slider as a LoRA file holds it. Without a card it is somebody else's: nobody measured it."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    card: SliderCard | None = None

    @property
    def usable(self) -> tuple[float, float]:
        return self.card.usable if self.card else (-1.0, 1.0)

    def about(self) -> str:
        """Its unit and range, in a few words."""
        if self.card is None:
            return "not calibrated: nobody measured it, strength 1 means what its maker made of it"
        return f"measured from {describe(self.card.usable)}"

    def beyond(self, strength: float) -> bool:
        return self.card is not None and not self.usable[0] - 1e-6 <= strength <= self.usable[1] + 1e-6


def choices() -> list[str]:
    """Files first; the entries of a set that another node gives can be chosen before they exist."""
    return [NONE, *folder_paths.get_filename_list("loras"), *(f"{FROM_SET}{i}" for i in range(1, MOST + 1))]


def slider_of(choice: str, sliders: Sequence[Slider] | None) -> Slider:
    number = choice.removeprefix(FROM_SET)
    if choice.startswith(FROM_SET) and number.isdigit():
        if not sliders:
            raise ValueError(f"{choice!r} is chosen but no slider set is connected; connect one, or choose a file")
        if not 1 <= int(number) <= len(sliders):
            raise ValueError(f"{choice!r} is chosen, the slider set has {len(sliders)}; choose one of them")
        return sliders[int(number) - 1]
    path = folder_paths.get_full_path("loras", choice)
    if path is None:
        raise ValueError(
            f"the slider file {choice!r} is not in ComfyUI's loras folders; put it there, or choose another one"
        )
    return read(choice, path)


def read(name: str, path: str) -> Slider:
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:  # each format fails in its own way
        raise ValueError(f"{name} cannot be read ({str(error).splitlines()[0]}); download or copy it again") from error
    metadata = dict(metadata or {})
    return Slider(name=name, tensors=tensors, metadata=metadata, card=from_metadata(metadata))


# --- does it belong here? ---------------------------------------------------------------------------------------------


def network(model: Any) -> dict[str, Shape]:
    """Weight shapes of all layers that a LoRA can change; quantised storage may look different."""
    found: dict[str, Shape] = {}
    for name, m in model.model.diffusion_model.named_modules():
        if is_linear(m):
            found[name] = (m.out_features, m.in_features)
        elif isinstance(m, nn.Conv2d):
            found[name] = (m.out_channels, m.in_channels, *m.kernel_size)
    return found


def left_out(model: Any, tensors: Mapping[str, Tensor]) -> tuple[list[str], int]:
    """Layers of a file that ComfyUI finds no place for on this MODEL, and how many there are in all."""
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    converted = comfy.lora_convert.convert_lora(dict(tensors))
    layers = sorted({split_key(k)[0] for k in converted if not OTHERS.match(k)})
    return [n for n in layers if n not in places], len(layers)


def fitting(model: Any, slider: Slider) -> tuple[Slider, list[str]]:
    """The slider with keys that load in full here, and what has to be said of it."""
    lost, total = left_out(model, slider.tensors)
    if not lost:
        return slider, wrong_base(model, slider)
    try:
        spelling = f"ComfyUI does not know the spelling of {len(lost)} of its {total} layers; they were translated"
        return translated(model, slider), [spelling, *wrong_base(model, slider)]
    except ValueError as error:
        if len(lost) == total:
            raise ValueError(
                f"{slider.name} does not belong on this MODEL ({type(model.model).__name__}): none of its {total} "
                f"layers has a place here. {error}"
            ) from error
    return slider, [f"wrong base: {len(lost)} of its {total} layers have no place on this model, such as {lost[0]}"]


def translated(model: Any, slider: Slider) -> Slider:
    """With the pack's own keys; a ValueError where it does not fit in full."""
    state, names = state_of(model, slider), [n for n, _ in model.model.diffusion_model.named_modules()]
    family = detect(model.model.diffusion_model)
    return replace(slider, tensors=lora_tensors(state, family, names, dtype=torch.float32))


def state_of(model: Any, slider: Slider) -> dict[str, Tensor]:
    """As AdapterBank.load takes it. Text encoders' tensors stay behind, as they do in a loader for the model only."""
    file = replace(lora_of(slider.tensors, slider.name, slider.metadata), text_keys=())
    shapes = network(model)
    return fit(file, shapes, [n for n, _ in model.model.diffusion_model.named_modules()])


def wrong_base(model: Any, slider: Slider) -> list[str]:
    if slider.card is None or slider.card.base_hash in ("", identity(model)):
        return []
    return [
        f"made on {slider.card.base or 'another model'}, which is not this MODEL: its unit and range may differ here"
    ]


def identity(model: Any) -> str:
    """base_hash of the MODEL as it was loaded: weights that LoRAs have changed in place are read from their backup."""
    net = model.model.diffusion_model
    if net not in _hashes:
        weights = {f"diffusion_model.{k}": v for k, v in net.state_dict().items()}
        weights |= {k: v.weight for k, v in model.backup.items() if k in weights}
        _hashes[net] = base_hash(weights)
    return _hashes[net]
