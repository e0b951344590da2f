"""The measuring half of inpainting_quality.py: a script for ComfyUI's interpreter, with tests/ on its path."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_host

# {"pictures": per place, "seeds": , "rows": [{"model": , "lora": file or null, "few": , "steps": , "ways": [...]}]}
JOB = json.loads(sys.argv[1])
PICTURES, SEEDS = JOB["pictures"], JOB["seeds"]
comfy_host.start_comfy("--use-pytorch-cross-attention")

import comfy.utils  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402

demo = comfy_host.pack_module("dmd_core.demo")
inpaint = comfy_host.pack_module("dmd_core.inpaint")
shapes = comfy_host.pack_module("dmd_core.shapes")
load = comfy_host.pack_module("nodes.load_shapes")
lazy = comfy_host.pack_module("nodes.lazy_inpaint")
sys.modules["dmd_core"] = comfy_host.pack_module("dmd_core")  # what half_hidden.py imports
sys.path.append(str(Path(__file__).parent))

from half_hidden import PROMPT, Group, cells, groups, judged, prefilled  # noqa: E402


def sampled(model: Any, latent: torch.Tensor, mask: torch.Tensor, seed: int, steps: int, few: bool) -> torch.Tensor:
    """few: fresh noise between the steps, as the students were trained; else Euler."""
    sampler = "lcm" if few else "euler"
    # the autoencoder speaks the model's scale, ComfyUI's samplers that of SD3's files
    given = {"samples": model.model.process_latent_out(latent), "noise_mask": mask[:, None]}
    made = stock.common_ksampler(model, seed, steps, 1.0, sampler, "simple", COND, COND, given)[0]["samples"]
    return model.model.process_latent_in(made)


def on_canvas(prepare: Callable[[Any], Any], context: bool = True) -> Callable[..., torch.Tensor]:
    def fill(world: Any, model: Any, group: Group, *how: Any) -> torch.Tensor:
        mask = cells(group.mask) if context else torch.ones_like(cells(group.mask))
        canvas = world.autoencoder.encode(prefilled(group.picture, group.mask))
        return world.pictures(sampled(prepare(model), canvas, mask, *how))

    return fill


def on_crop(factor: float) -> Callable[..., torch.Tensor]:
    """factor 0: the hole's tokens alone"""

    def fill(world: Any, model: Any, group: Group, *how: Any) -> torch.Tensor:
        boxes = inpaint.crops(group.mask, factor, 16) if factor else [snug(m, i) for i, m in enumerate(group.mask)]
        whole = prefilled(group.picture, group.mask)
        parts, holes = inpaint.crop.cut(whole, boxes), inpaint.crop.cut(group.mask, boxes)
        latent = sampled(model, world.autoencoder.encode(parts), cells(holes), *how)
        return inpaint.paste(group.picture, world.pictures(latent), boxes)

    return fill


def snug(mask: torch.Tensor, index: int) -> Any:
    """The hole's box in whole tokens."""
    tokens = inpaint.box_of(inpaint.token_mask(mask[None, None], (1, 16, 16))[0], index)
    return inpaint.Box(index, *(16 * v for v in (tokens.top, tokens.left, tokens.height, tokens.width)))


def patched(mode: str) -> Callable[[Any], Any]:
    return lambda model: lazy.Lazy(lazy.LazyConfig(mode=mode), tell=lambda text: None).patch(model)


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "dense": on_canvas(lambda model: model),
    "refresh": on_canvas(patched("refresh")),
    "session": on_canvas(patched("session")),
    "trained": on_canvas(patched("trained")),
    "crop 1.5x": on_crop(1.5),
    "tight crop": on_crop(0.0),
    "no context": on_canvas(lambda model: model, context=False),
}


@torch.inference_mode()
def main() -> None:
    global COND
    torch.set_num_threads(1)
    comfy.utils.set_progress_bar_enabled(False)
    world = demo.World.load(torch.device("cpu"))
    tokens, pooled = world.text.encode([PROMPT])
    COND = [[tokens, {"pooled_output": pooled}]]
    draws = {s: groups(PICTURES, s) for s in range(SEEDS)}
    models, rows = {None: load.load_model(None)}, []
    for asked in JOB["rows"]:
        found: dict[str, list[float]] = {}
        model = models.setdefault(asked["lora"], asked["lora"] and load.load_model(asked["lora"]))
        for way in asked["ways"]:
            for seed, drawn in draws.items():
                how = (1000 + seed, asked["steps"], asked["few"])
                value = judged(world, drawn, lambda g: WAYS[way](world, model, g, *how))  # noqa: B023
                found.setdefault(way, []).append(value)
        row = {k: asked[k] for k in ("model", "steps")} | {k: round(sum(v) / len(v), 3) for k, v in found.items()}
        rows.append(row | {"spread": round(max(max(v) - min(v) for v in found.values()), 3)})
        print(rows[-1], file=sys.stderr, flush=True)
    every = [g for drawn in draws.values() for g in drawn]
    empty = judged(world, every, lambda g: (g.scene.light.reshape(-1, 1, 1, 1) * 2 - 1).expand_as(g.picture))
    whole = judged(world, every, lambda g: world.pictures(world.autoencoder.encode(g.picture)))
    chosen = inpaint.select(inpaint.token_mask(cells(every[0].mask)[:, None], (1, 2, 2)))
    settings = {
        "computed tokens": int(chosen.computed.sum()),
        "tokens of the hole": int(chosen.hole.sum()),
        "pictures per figure": len(every) * PICTURES,
        "seeds": SEEDS,
    }
    notes = [
        f"Controls: with the background's colour in the hole {empty:.3f} are read as right, with the true picture "
        f"(through the autoencoder) {whole:.3f}."
    ]
    print(json.dumps({"rows": rows, "settings": settings, "notes": notes}))


main()
