"""The measuring half of inpainting_quality.py: a script for ComfyUI's interpreter, with tests/ on its path."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy_host

PICTURES, SEEDS = (int(v) for v in sys.argv[1:3])
comfy_host.start_comfy("--use-pytorch-cross-attention")

import comfy.utils  # noqa: E402
import torch  # noqa: E402

import nodes as stock  # noqa: E402

SIDE, CELL = 128, 8  # pixels of the canvas, of a latent cell
EDGE = 32  # where the scene begins: it stands in the middle, 64 pixels wide
PLACES = ((-1, -1), (-1, 1), (1, -1), (1, 1))  # the object is left or right, top or bottom
# the pixels of a scene that are hidden: right half of the object, whichever its radius
COLUMNS, ROWS = {-1: (24, 48), 1: (40, 64)}, {-1: (0, 40), 1: (24, 64)}
MODELS = {"teacher": None, "student, 4 steps": 4, "student, 1 step": 1}
STEPS = {"teacher": (1, 2, 4, 20), "student, 4 steps": (4,), "student, 1 step": (1,)}
PROMPT = "a thing"

demo = comfy_host.pack_module("dmd_core.demo")
inpaint = comfy_host.pack_module("dmd_core.inpaint")
shapes = comfy_host.pack_module("dmd_core.shapes")
load = comfy_host.pack_module("nodes.load_shapes")
lazy = comfy_host.pack_module("nodes.lazy_inpaint")


@dataclass
class Group:
    """Pictures with the object at one place, so that one hole serves them all."""

    scene: Any
    picture: torch.Tensor  # [b 3 h w] in -1..1
    mask: torch.Tensor  # [b h w]


def group(place: tuple[int, int], seed: int) -> Group:
    rng = torch.Generator().manual_seed(seed)
    scene = shapes.world.sample(PICTURES, rng, pairs=0.0)
    # within the trained places, but near one edge between cells: about half of the object is hidden
    centre = torch.tensor(place) * 0.30 + 0.12 * (torch.rand(PICTURES, 2, generator=rng) - 0.5)
    scene = replace(scene, x=centre[:, :1].repeat(1, 2), y=centre[:, 1:].repeat(1, 2))
    picture = (scene.light.reshape(-1, 1, 1, 1) * 2 - 1).repeat(1, 3, SIDE, SIDE)
    picture[..., EDGE : EDGE + 64, EDGE : EDGE + 64] = shapes.world.render(scene)
    mask = torch.zeros(PICTURES, SIDE, SIDE)
    (left, right), (top, bottom) = COLUMNS[place[0]], ROWS[place[1]]
    mask[:, EDGE + top : EDGE + bottom, EDGE + left : EDGE + right] = 1
    return Group(scene, picture, mask)


def right(world: Any, group: Group, result: torch.Tensor) -> torch.Tensor:
    """Which objects are whole again. [b] bool"""
    seen = demo.read(world, result[..., EDGE : EDGE + 64, EDGE : EDGE + 64])
    same = [getattr(seen, k)[:, 0] == getattr(group.scene, k)[:, 0] for k in ("shape", "colour")]
    near = (seen.radius[:, 0] - group.scene.radius[:, 0]).abs() < 0.06
    return torch.stack([*same, near, seen.count == 1]).all(0)


def sampled(model: Any, latent: torch.Tensor, mask: torch.Tensor, seed: int, steps: int, few: bool) -> torch.Tensor:
    """few: fresh noise between the steps, as the students were trained; else Euler."""
    sampler = "lcm" if few else "euler"
    given = {"samples": latent, "noise_mask": mask[:, None]}
    return stock.common_ksampler(model, seed, steps, 1.0, sampler, "simple", COND, COND, given)[0]["samples"]


def on_canvas(prepare: Callable[[Any], Any], context: bool = True) -> Callable[..., torch.Tensor]:
    def fill(world: Any, model: Any, group: Group, *how: Any) -> torch.Tensor:
        mask = cells(group.mask) if context else torch.ones_like(cells(group.mask))
        return world.pictures(sampled(prepare(model), world.autoencoder.encode(group.picture), mask, *how))

    return fill


def on_crop(factor: float) -> Callable[..., torch.Tensor]:
    """factor 0: the hole's tokens alone"""

    def fill(world: Any, model: Any, group: Group, *how: Any) -> torch.Tensor:
        boxes = inpaint.crops(group.mask, factor, 16) if factor else [snug(m, i) for i, m in enumerate(group.mask)]
        parts, holes = inpaint.crop.cut(group.picture, boxes), inpaint.crop.cut(group.mask, boxes)
        latent = sampled(model, world.autoencoder.encode(parts), cells(holes), *how)
        return inpaint.paste(group.picture, world.pictures(latent), boxes)

    return fill


def snug(mask: torch.Tensor, index: int) -> Any:
    """The hole's box in whole tokens."""
    tokens = inpaint.box_of(inpaint.token_mask(mask[None, None], (1, 16, 16))[0], index)
    return inpaint.Box(index, *(16 * v for v in (tokens.top, tokens.left, tokens.height, tokens.width)))


def cells(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.max_pool2d(mask[:, None], CELL)[:, 0]


def patched(mode: str) -> Callable[[Any], Any]:
    return lambda model: lazy.Lazy(lazy.LazyConfig(mode=mode), tell=lambda text: None).patch(model)


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "dense": on_canvas(lambda model: model),
    "refresh": on_canvas(patched("refresh")),
    "session": on_canvas(patched("session")),
    "crop 1.5x": on_crop(1.5),
    "tight crop": on_crop(0.0),
    "no context": on_canvas(lambda model: model, context=False),
}


def completed(group: Group, generated: torch.Tensor) -> torch.Tensor:
    return inpaint.composite(group.picture, generated, group.mask)


def judged(world: Any, groups: list[Group], fill: Callable[[Group], torch.Tensor]) -> float:
    found = [right(world, g, completed(g, fill(g))) for g in groups]
    return torch.cat(found).float().mean().item()


@torch.inference_mode()
def main() -> None:
    global COND
    torch.set_num_threads(1)
    comfy.utils.set_progress_bar_enabled(False)
    world = demo.World.load(torch.device("cpu"))
    tokens, pooled = world.text.encode([PROMPT])
    COND = [[tokens, {"pooled_output": pooled}]]
    draws = {s: [group(place, 100 * s + i) for i, place in enumerate(PLACES)] for s in range(SEEDS)}
    rows = []
    for name, student in MODELS.items():
        model = load.load_model(load.FILES.get(name))
        for steps in STEPS[name]:
            found: dict[str, list[float]] = {}
            for column, fill in WAYS.items():
                for seed, groups in draws.items():
                    how = (1000 + seed, steps, student is not None)
                    value = judged(world, groups, lambda g: fill(world, model, g, *how))  # noqa: B023
                    found.setdefault(column, []).append(value)
            row = {"model": name, "steps": steps} | {k: round(sum(v) / len(v), 3) for k, v in found.items()}
            rows.append(row | {"spread": round(max(max(v) - min(v) for v in found.values()), 3)})
            print(rows[-1], file=sys.stderr, flush=True)
    every = [g for groups in draws.values() for g in groups]
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
