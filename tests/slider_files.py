"""Random sliders as files, for the host tests: ours with a card, others' in the key layouts of published trainers."""

from pathlib import Path

import comfy_host
import torch
from safetensors.torch import save_file

families = comfy_host.pack_module("dmd_core.families")
keys = comfy_host.pack_module("dmd_core.weights.keys")
lora = comfy_host.pack_module("dmd_core.weights.lora")
adapters = comfy_host.pack_module("dmd_core.adapters")
sliders = comfy_host.pack_module("dmd_core.sliders")

SIZE = 0.3  # of the random change, in units of the weights' own


def state(model, seed=0, rank=2, preset="attention"):
    """One random slider, as AdapterBank.state gives it."""
    net, rng = model.model.diffusion_model, torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        bank = adapters.AdapterBank(net, families.detect(net).targets(preset))
        bank.detach()
        bank.new("s", rank, rng)
        for adapter in bank.sets["s"].values():
            adapter.up.data = SIZE * torch.randn(adapter.up.shape, generator=rng)
        return bank.state("s")


def names(model):
    return [n for n, _ in model.model.diffusion_model.named_modules() if n]


def a_card(base_hash="", usable=(-1.5, 2.0), verdict="works", **facts):
    points = tuple(sliders.Point(s, s, 0.1, abs(s) / 10) for s in (-2.0, -1.0, 0.0, 1.0, 2.0))
    measured = sliders.Calibration(1.0, points, usable, 0.99, verdict)
    common = {"kind": "text", "name": "size", "prompts": {"neutral": "a dog"}, "encoder": "the model itself"}
    return sliders.card(
        measured, **(common | {"base": "tiny", "base_hash": base_hash, "rank": 2, "layers": "attention"} | facts)
    )


def write(folder: Path, name: str, model, seed=0, card=None, preset="attention") -> Path:
    """A slider of this pack."""
    found = state(model, seed, preset=preset)
    return lora.save_lora(
        folder, name, found, names(model), dtype="fp32", metadata=card.metadata() if card is not None else None
    )


def as_baulab(model, found, alpha=1.0):
    """lora_unet_ + diffusers' names with underscores, alpha 1: what both repositories save, for Flux too."""
    net = model.model.diffusion_model
    family, layout = families.detect(net), keys.unet_layout(names(model))
    shapes = {n: lora.layer_shape(m) for n, m in net.named_modules() if f"{n}.down" in found}
    tensors = {}
    for layer, shape in shapes.items():
        down, up = found[f"{layer}.down"], found[f"{layer}.up"]
        rank = len(down)
        for twin in keys.twins(layer, family, layout) or [keys.Twin(layer)]:
            key = "lora_unet_" + twin.name.replace(".", "_")
            rows = keys.part_rows(twin.fill, shape[0], shape[1])
            tensors[f"{key}.lora_down.weight"] = down.clone()
            tensors[f"{key}.lora_up.weight"] = up[rows].clone() * (rank / alpha)
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def write_baulab(path: Path, model, found) -> Path:
    """.pt or .safetensors, by the path's ending."""
    tensors = {k: v.contiguous() for k, v in as_baulab(model, found).items()}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path
