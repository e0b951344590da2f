"""Is the half-hidden object completed as the picture around asks for? Shapes world; runs in ComfyUI's interpreter."""

import json
import sys
from pathlib import Path

from .record import NOT_RUN, Table

ROOT = Path(__file__).parents[1]


def on_cpu(pictures: int = 16, seeds: int = 3) -> Table:
    """pictures: per place of the object, of which there are four."""
    table = Table(
        "inpainting_quality",
        "Inpainting quality",
        "share of pictures whose object, half hidden by the hole, was completed right: one object, its shape and "
        "colour as in the visible half, its radius within 0.06. The prompt says `a thing` and no more, so only the "
        "picture around the hole can tell. dense: all of the canvas at every step. refresh, session: Lazy Inpaint. "
        "crop 1.5x and tight crop: only that box is sampled. no context: a picture from the prompt alone, put into "
        "the hole. spread: the largest difference between two seeds in a row",
        settings={"canvas": "128 x 128", "image tokens": 64, "text tokens": 12, "cfg": 1},
        notes=[
            "The teacher was trained on 64 x 64. A scene that fills a canvas of 128 it does not know (pictures fall "
            "apart there), so the scene stands in the middle as it was trained, with its background around it.",
            "refresh computes its first three steps whole, so up to three steps it is dense.",
            "The picture is encoded whole, so known cells beside the hole carry a trace of what it hides. Where the "
            "hole is filled from around it before that, as in LazyDiffusion's table, dense gets less right.",
            "Outside the hole every column shows the given picture.",
            "tight crop is the hole's box in whole tokens, so a strip of at most a token beside the hole is in it.",
        ],
    )
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        table.rows = [{"model": "teacher", "steps": steps, "dense": NOT_RUN} for steps in (1, 2, 4, 20)]
        return table
    script = str(ROOT / "bench" / "inpainting_quality_host.py")
    out = comfy_host.run_in_comfy([script, str(pictures), str(seeds)], timeout_s=4 * 3600)
    if out.returncode:
        raise RuntimeError(f"the measurement inside ComfyUI failed:\n{out.stderr[-3000:]}")
    found = json.loads(out.stdout.splitlines()[-1])
    table.rows = found["rows"]
    table.settings |= found["settings"]
    table.notes += found["notes"]
    return table
