"""Layer names as networks and files spell them, brought to one spelling, so that families can be told by them."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

# what loaders, trainers and compilers put in front of a layer's own path
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "unet.",
    "module.",
    "_orig_mod.",
    "generator.",
    "model.",
    "lora_unet__",  # musubi's spelling of Z-Image and Wan
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
# parts of a file that belong to other networks than the denoiser
OTHERS = re.compile(
    r"(lora_te\d?_|lora_prior_te_|text_encoders?(_\d)?\.|te\d?\.|text_model\.|cond_stage_model\.|conditioner\."
    r"|first_stage_model\.|vae\.|model_ema\.)"
)
# "processor." and a bare "to_out" are how diffusers named attention layers before PEFT
_OLD_DIFFUSERS = ((".processor.", "."), ("._checkpoint_wrapped_module", ""), ("._orig_mod", ""))
_PART = re.compile(
    r"(?:[._]lora(?:_linear_layer)?\.(?P<half>up|down)(?:\.weight)?"
    r"|\.lora_(?P<kohya>up|down|mid)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.(?!weight$)\w+)?(?:\.weight)?"
    r"|\.(?P<other>alpha|weight|bias|diff|diff_b|set_weight|reshape_weight|w_norm|b_norm|dora_scale"
    r"|lora_magnitude_vector(?:\.\w+)*|hada_\w+|lokr_\w+|oft_\w+|[ab][12]\.weight|lora_[AB](?:\.\w+)?\.bias))$"
)
_HALVES = {"up": "up", "down": "down", "mid": "lora_mid", "A": "down", "B": "up"}


def split_key(key: str) -> tuple[str, str]:
    """(layer, part) of a file's key; part is down, up, alpha, weight, ... or empty for a bare layer name."""
    match = _PART.search(key)
    if not match:
        return key, ""
    found = match["half"] or match["kohya"] or match["peft"]
    return key[: match.start()], _HALVES[found] if found else str(match["other"])


def layer_path(name: str) -> str:
    """A layer's own path, without what loaders and trainers put in front of it."""
    for old, new in _OLD_DIFFUSERS:
        name = name.replace(old, new)
    bare = False
    while not bare:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        bare = prefix is None
        name = name.removeprefix(prefix or "")
    return name + ".0" if re.search(r"attn\d\.to_out$", name) else name


def spelled(name: str) -> str:
    """The spelling in which every file format agrees: kohya's, without prefix."""
    return layer_path(name).replace(".", "_")


class Names:
    """The layers of a network or file, with the widths of their inputs and outputs where those are known."""

    def __init__(self, source: "Source"):
        if isinstance(source, nn.Module):
            source = dict(source.named_parameters())
        shapes: Mapping[str, Sequence[int] | Tensor | None]
        shapes = source if isinstance(source, Mapping) else dict.fromkeys(source, None)
        self.paths: set[str] = set()
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        for key, shape in shapes.items():
            if not isinstance(key, str) or not key or OTHERS.match(key):
                continue
            layer, part = split_key(key)
            name = spelled(layer)
            self.paths.add(name)
            shape = shape.shape if isinstance(shape, Tensor) else shape
            if shape is not None and len(shape) >= 2:
                if part in ("down", "weight", ""):
                    self.inputs[name] = int(shape[1])
                if part in ("up", "weight", ""):
                    self.outputs[name] = int(shape[0])

    def has(self, *patterns: str) -> bool:
        """Does each pattern match some layer, from its first letter on?"""
        return all(any(re.match(p, n) for n in self.paths) for p in patterns)

    def width(self, pattern: str) -> int | None:
        """Input width of the first layer that matches."""
        return next((w for n, w in self.inputs.items() if re.match(pattern, n)), None)

    def ratio(self, pattern: str) -> float | None:
        """Output width over input width of the first layer that matches."""
        return next(
            (self.outputs[n] / w for n, w in self.inputs.items() if n in self.outputs and re.match(pattern, n)), None
        )


Source = nn.Module | Mapping[str, Sequence[int]] | Mapping[str, Tensor] | Iterable[str]
