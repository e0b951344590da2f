"""The measuring half of guidance.py: a script for ComfyUI's interpreter, with tests/ on its path."""

import json
import sys
from functools import partial
from pathlib import Path

import comfy_host

ROUNDS = int(sys.argv[1])
comfy_host.start_comfy("--use-pytorch-cross-attention")  # takes argv for its own
sys.path.append(str(Path(__file__).parent))

import comfy.model_base  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy_tiny  # noqa: E402
import torch  # noqa: E402
from record import all_compared  # noqa: E402

import nodes as stock  # noqa: E402

TEXT, STEPS = 77, 2
SIDE = 16  # latent cells


def unet():
    """SD1.5's layout at 0.4 of its width."""
    sizes = {"model_channels": 128, "context_dim": 768, "channel_mult": [1, 2, 4, 4], "num_res_blocks": [2, 2, 2, 2]}
    depths = {"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3}
    config = comfy.supported_models.SD15(comfy_tiny.unet(**sizes, **depths))
    config.unet_config.update(num_heads=8)
    return comfy.model_base.BaseModel(config, device="cpu")


def flux():
    config = comfy_tiny.flux_config(hidden_size=384, num_heads=3, depth=2, depth_single_blocks=3)
    return comfy.model_base.Flux(comfy.supported_models.Flux(config), device="cpu")


TINY = {
    "unet": comfy_tiny.Tiny(build=unet, context=768, shape=(4, SIDE, SIDE)),
    "flux": comfy_tiny.Tiny(build=flux, context=64, shape=(16, SIDE, SIDE), pooled=32, options=(("guidance", 3.5),)),
}


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    guidance = comfy_host.pack_module("nodes.negative_guidance").NegativeGuidance
    comfy_tiny.FAMILIES.update(TINY)
    rows = []
    for name, tiny in TINY.items():
        model = comfy_tiny.patcher(name)
        positive, negative = (comfy_tiny.conditioning(name, i, TEXT) for i in (1, 2))
        latent = {"samples": torch.zeros(1, *tiny.shape)}

        def sample(patched, cfg, conds=(positive, negative), latent=latent):
            stock.common_ksampler(patched, 5, STEPS, cfg, "euler", "simple", *conds, latent)

        guided = guidance.execute(model, negative, 2.0)[0]
        works = {"Negative Guidance, cfg 1": partial(sample, guided, 1.0), "cfg 3": partial(sample, model, 3.0)}
        found = all_compared(works, partial(sample, model, 1.0), ROUNDS)
        rows += [{"network": name, "what": what} | row for what, row in found.items()]
    settings = {"unet": "SD1.5's layout at 0.4 of its width", "flux": "384 wide, 2 + 3 blocks", "text tokens": TEXT}
    print(json.dumps({"rows": rows, "settings": settings | {"latent": f"{SIDE} x {SIDE}", "steps": STEPS, "batch": 1}}))


main()
