"""What a file's names and shapes prove: LoRA, model or checkpoint, of which family. What is not proven stays empty."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..families import GENERIC, Names, detect, layer_path, naming, split_key
from ..families.names import OTHERS
from .header import Shape

LORA_PARTS = re.compile(r"down|up|lora_mid|hada_|lokr_|oft_|dora_scale|lora_magnitude_vector|[ab][12]\.weight")
# what only distillation LoRAs of a UNet train besides attention
FAST = re.compile(r".*resnets_\d+_(conv1|time_emb_proj)|.*_(in_layers_2|emb_layers_1)$")
GUIDANCE = re.compile(r".*(guidance_in_in_layer|guidance_embedder_linear_1|time_embedding_cond_proj)$")


@dataclass(frozen=True, kw_only=True)
class Structure:
    kind: str  # lora, checkpoint (with text encoder or VAE), model (the network alone), vae, text encoder, unknown
    family: str = ""  # a name of families.FAMILIES, "" if not proven
    title: str = ""  # what that family is called; the shapes world has SD3's name and layout, and its own title
    layout: str = ""  # of a network: native or diffusers; of a LoRA: kohya, peft, diffusers, lycoris
    prefix: str = ""  # before every name of the network
    modules: int = 0  # layers of a LoRA
    rank: int = 0  # the most common one of a LoRA
    accelerator: bool = False  # a UNet LoRA that also moves convolutions and time embeddings, as distilled ones do
    guidance: bool = False  # the network is told a guidance scale (Flux dev, full LCM models)
    quantised: bool = False


def identify(shapes: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None) -> Structure:
    quantised = any(str(d).lower().startswith(("f8", "float8", "i8", "int8", "f4")) for d in (dtypes or {}).values())
    keys = {k: split_key(k) for k in shapes}
    if any(LORA_PARTS.match(part) for _, part in keys.values()):
        return _lora(shapes, keys)
    seen = Names(shapes)
    family = detect(seen)
    known = family is not GENERIC
    if (not known and not seen.has(r".*(blocks?|layers)_\d+_")) or _other(shapes):
        return Structure(kind=_other(shapes) or "unknown", quantised=quantised)
    first = next((k for k in shapes if not OTHERS.match(k)), "")
    return Structure(
        kind="checkpoint" if any(OTHERS.match(k) for k in shapes) else "model" if known else "unknown",
        family=family.name if known else "",
        title=family.title if known else "",
        layout=naming(seen, family) if known else "",
        prefix=first[: first.find(layer_path(first))] if layer_path(first) in first else "",
        guidance=seen.has(GUIDANCE.pattern),
        quantised=quantised,
    )


def _other(shapes: Mapping[str, Shape]) -> str:
    own = [k for k in shapes if not OTHERS.match(k)]
    if any(k.startswith(("decoder.conv_in.", "encoder.conv_in.", "decoder.conv1.", "decoder.layers.")) for k in own):
        return "vae"
    text = ("text_model.encoder.layers.0.", "encoder.block.0.layer.0.", "model.embed_tokens.")
    if not own or any(k.startswith(text) for k in own):
        return "text encoder" if shapes else ""
    return ""


def _lora(shapes: Mapping[str, Shape], keys: Mapping[str, tuple[str, str]]) -> Structure:
    seen = Names(shapes)
    family = detect(seen)
    unet = family.name in ("sd15", "sd2", "sdxl")
    ranks = [shapes[k][0] for k, (_, part) in keys.items() if part == "down" and len(shapes[k]) >= 2]
    if any(part.startswith(("hada_", "lokr_", "oft_")) for _, part in keys.values()):
        layout = "lycoris"
    elif any(k.endswith((".lora_down.weight", ".lora_up.weight")) for k in shapes):
        layout = "kohya"
    else:
        layout = "peft" if any(".lora_A." in k for k in shapes) else "diffusers"
    return Structure(
        kind="lora",
        family="" if family is GENERIC else family.name,
        title="" if family is GENERIC else family.title,
        layout=layout,
        modules=len({layer for layer, _ in keys.values()}),
        rank=max(set(ranks), key=ranks.count) if ranks else 0,
        accelerator=unet and seen.has(FAST.pattern),
    )
