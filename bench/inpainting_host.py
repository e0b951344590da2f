"""The measuring half of inpainting.py: a script for ComfyUI's interpreter, with tests/ on its path."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import comfy_host

ROUNDS, SHARES = int(sys.argv[1]), [float(v) for v in sys.argv[2:]]
comfy_host.start_comfy("--use-pytorch-cross-attention")

import comfy.model_base  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy_tiny  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402

TEXT, SIDE, STEPS, FAMILY = 64, 48, 2, "flux_bench"  # tokens, latent cells, steps


def record():
    """record.py, without the package around it: its name is taken in here."""
    spec = importlib.util.spec_from_file_location("record", Path(__file__).with_name("record.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["record"] = module
    spec.loader.exec_module(module)
    return module


def model():
    def build():
        config = comfy_tiny.flux_config(hidden_size=384, num_heads=3, depth=2, depth_single_blocks=3)
        return comfy.model_base.Flux(comfy.supported_models.Flux(config), device="cpu")

    options = (("guidance", 3.5),)
    comfy_tiny.FAMILIES[FAMILY] = comfy_tiny.Tiny(
        build=build, context=64, shape=(16, SIDE, SIDE), pooled=32, options=options
    )
    return comfy_tiny.patcher(FAMILY)


def sample(patched, latent):
    cond = comfy_tiny.conditioning(FAMILY, 1, TEXT)
    stock.common_ksampler(patched, 5, STEPS, 1.0, "euler", "simple", cond, cond, latent)


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    all_compared = record().all_compared
    lazy = comfy_host.pack_module("nodes.inpaint").LazyInpaint
    inpaint = comfy_host.pack_module("dmd_core.inpaint")
    base, rows = model(), []
    samples = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    tokens = (SIDE // 2) ** 2
    for share in SHARES:
        side = max(2, round(SIDE * share**0.5 / 2) * 2)
        first = (SIDE - side) // 4 * 2
        mask = torch.zeros(1, 1, SIDE, SIDE)
        mask[..., first : first + side, first : first + side] = 1
        latent = {"samples": samples, "noise_mask": mask}
        small = {"samples": samples[..., :side, :side].contiguous(), "noise_mask": torch.ones(1, 1, side, side)}
        computed = inpaint.select(inpaint.token_mask(mask, (1, 2, 2))).share

        def edit(forget: bool, latent=latent, name=str(share)):
            patched = lazy.execute(base, "session", 1, 3, 5, name, 0, forget, 8.0, 8.0)[0]
            sample(patched, latent)

        sides = {
            "later edit": partial(edit, False),
            "first edit": partial(edit, True),
            "crop": partial(sample, base, small),
        }
        # the bank is filled whenever the later edit comes: by the warm-up, and by every first edit
        found = all_compared(sides, partial(sample, base, latent), ROUNDS)
        row = {"m": round((side / SIDE) ** 2, 3), "computed": round(computed, 3)}
        row["law"] = round((computed * tokens + TEXT) / (tokens + TEXT), 3)
        rows.append(row | {k: round(v["ratio"], 3) for k, v in found.items()} | {"rounds": ROUNDS})
    settings = {"network": "ComfyUI's Flux, 384 wide, 2 + 3 blocks, random", "image tokens": tokens}
    print(json.dumps({"rows": rows, "settings": settings | {"text tokens": TEXT, "steps": STEPS, "cfg": 1}}))


main()
