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
import comfy.utils  # noqa: E402
import comfy_tiny  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402

TEXT, STEPS = 256, 1  # one step: what sampling costs once counts in full


def record():
    """record.py, without the package around it: its name is taken in here."""
    spec = importlib.util.spec_from_file_location("record", Path(__file__).with_name("record.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["record"] = module
    spec.loader.exec_module(module)
    return module


def flux():
    config = comfy_tiny.flux_config(hidden_size=384, num_heads=3, depth=2, depth_single_blocks=3)
    return comfy.model_base.Flux(comfy.supported_models.Flux(config), device="cpu")


def sd3():
    small, depth = comfy_tiny.sd3().model_config.unet_config, 6
    text = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 64 * depth}}
    changes = {"depth": depth, "context_embedder_config": text}
    return comfy.model_base.SD3(comfy.supported_models.SD3(small | changes), device="cpu")


def tiny(build, side, **options):
    return comfy_tiny.Tiny(build=build, context=64, shape=(16, side, side), pooled=32, **options)


comfy_tiny.FAMILIES["bench_flux"] = tiny(flux, 128, options=(("guidance", 3.5),))
comfy_tiny.FAMILIES["bench_sd3"] = tiny(sd3, 128)
NETWORKS = {"Flux, 384 wide, 2 + 3 blocks": "bench_flux", "SD3, 384 wide, 6 blocks": "bench_sd3"}


def sample(patched, latent, family):
    cond = comfy_tiny.conditioning(family, 1, TEXT)
    stock.common_ksampler(patched, 5, STEPS, 1.0, "euler", "simple", cond, cond, latent)


def even(cells: float, side: int) -> int:
    return min(side, max(2, round(cells / 2) * 2))


def measured(name: str, family: str) -> list[dict[str, object]]:
    """All shares in one run, so that the dense pass is measured once per round."""
    lazy = comfy_host.pack_module("nodes.inpaint").LazyInpaint
    inpaint = comfy_host.pack_module("dmd_core.inpaint")
    base, side = comfy_tiny.patcher(family), comfy_tiny.FAMILIES[family].shape[-1]
    samples = torch.randn(1, 16, side, side, generator=torch.Generator().manual_seed(5))
    tokens = (side // 2) ** 2

    def crop(cells):
        part = samples[..., :cells, :cells].contiguous()
        return partial(sample, base, {"samples": part, "noise_mask": torch.ones(1, 1, cells, cells)}, family)

    def edit(latent, key, forget):
        sample(lazy.execute(base, "session", 1, 3, 5, key, 0, forget, 8.0, 8.0)[0], latent, family)

    works, rows = {}, []
    for share in SHARES:
        hole = even(side * share**0.5, side)
        first = (side - hole) // 4 * 2
        mask = torch.zeros(1, 1, side, side)
        mask[..., first : first + hole, first : first + hole] = 1
        latent = {"samples": samples, "noise_mask": mask}
        computed = inpaint.select(inpaint.token_mask(mask, (1, 2, 2))).share
        law = (computed * tokens + TEXT) / (tokens + TEXT)
        rows.append({"network": name, "m": round((hole / side) ** 2, 3), "computed": round(computed, 3)})
        rows[-1]["law"] = round(law, 3)
        # the warm-up fills the bank
        works[share, "later edit"] = partial(edit, latent, f"{family} {share}", False)
        works[share, "tight crop"] = crop(hole)
        works[share, "crop 1.5x"] = crop(even(1.5 * hole, side))
        if share == 0.1:
            works[share, "first edit"] = partial(edit, latent, f"{family} first", True)
    dense = {"samples": samples, "noise_mask": torch.ones(1, 1, side, side)}
    found = sys.modules["record"].all_compared(works, partial(sample, base, dense, family), ROUNDS)
    for share, row in zip(SHARES, rows, strict=True):
        for what in ("later edit", "first edit", "tight crop", "crop 1.5x"):
            row[what] = round(found[share, what]["ratio"], 3) if (share, what) in found else "not run"
        row |= {"over the law": round(row["later edit"] / row["law"], 2), "rounds": ROUNDS}
    return rows


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    comfy.utils.set_progress_bar_enabled(False)
    record()
    rows = []
    for name, family in NETWORKS.items():
        rows += measured(name, family)
        print(rows, file=sys.stderr, flush=True)
    settings = {"networks": "ComfyUI's own classes, random", "image tokens": 4096}
    print(json.dumps({"rows": rows, "settings": settings | {"text tokens": TEXT, "steps": STEPS, "cfg": 1}}))


main()
