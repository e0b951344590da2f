"""Is the half-hidden object completed as the picture around asks for? Shapes world; runs in ComfyUI's interpreter."""

import json
import sys
from pathlib import Path
from typing import Any

from .record import NOT_RUN, Table

ROOT = Path(__file__).parents[1]
WAYS = ("dense", "refresh", "session", "crop 1.5x", "tight crop", "no context")
LORAS = {4: "shapes_student_4.safetensors", 1: "shapes_student_1.safetensors"}  # beside the teacher
TEACHER: dict[str, Any] = {"model": "teacher", "lora": None, "few": False}
ROWS: list[dict[str, Any]] = [{**TEACHER, "steps": n, "ways": WAYS} for n in (1, 2, 4, 20)]
ROWS += [
    {"model": f"student, {n} step{'s' * (n > 1)}", "lora": file, "few": True, "steps": n, "ways": WAYS}
    for n, file in LORAS.items()
]


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
        seed="0 to 2",
        settings={"canvas": "128 x 128", "image tokens": 64, "text tokens": 12, "cfg": 1},
        notes=[
            "The teacher was trained on 64 x 64. A scene that fills a canvas of 128 it does not know (pictures fall "
            "apart there), so the scene stands in the middle as it was trained, with its background around it.",
            "refresh computes its first three steps whole, so up to three steps it is dense.",
            "The hole is filled from around it before the picture is encoded, as Prepare Inpaint does: otherwise known "
            "cells beside it carry a trace of what it hides.",
            "Outside the hole every column shows the given picture.",
            "tight crop is the hole's box in whole tokens, so a strip of at most a token beside the hole is in it.",
        ],
    )
    found = in_comfy(ROWS, pictures, seeds)
    if found is None:
        table.rows = [{"model": "teacher", "steps": steps, "dense": NOT_RUN} for steps in (1, 2, 4, 20)]
        return table
    table.rows = found["rows"]
    table.settings |= found["settings"]
    table.notes += [*found["notes"], losses(found["rows"])]
    return table


def losses(rows: list[dict[str, Any]]) -> str:
    """What the modes of the lazy patch cost in quality, row by row."""
    said = {m: ", ".join(f"{r['dense'] - r[m]:.3g}" for r in rows) for m in ("refresh", "session")}
    return f"Dense less the lazy patch, row by row: {'; '.join(f'{m} {v}' for m, v in said.items())}."


def in_comfy(rows: list[dict[str, Any]], pictures: int, seeds: int) -> dict[str, Any] | None:
    """What inpainting_quality_host.py says of these models and ways; None without a ComfyUI."""
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        return None
    script = str(ROOT / "bench" / "inpainting_quality_host.py")
    job = json.dumps({"pictures": pictures, "seeds": seeds, "rows": rows})
    out = comfy_host.run_in_comfy([script, job], timeout_s=4 * 3600)
    if out.returncode:
        raise RuntimeError(f"the measurement inside ComfyUI failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.splitlines()[-1])
