"""Time against the share of the picture that is masked, on ComfyUI's own classes. Runs in ComfyUI's interpreter."""

import json
import sys
from pathlib import Path

from .record import NOT_RUN, Table

ROOT = Path(__file__).parents[1]
SHARES = (0.02, 0.05, 0.10, 0.25, 0.50, 1.0)


def on_cpu(rounds: int = 3) -> Table:
    table = Table(
        "inpainting",
        "Inpainting",
        "time of sampling one step with Lazy Inpaint over that without, against the masked share m of the picture. "
        "later edit: the session's bank is filled. first edit: it records what later ones save. tight crop: only the "
        "box of the hole, which sees nothing else. crop 1.5x: that box, half as large again",
        notes=[
            "law = (m' N + T) / (N + T), m' the computed share of N image tokens (hole and ring, rounded), T of text.",
            "The time is of the whole sampling call, so what a run costs once counts against a single step.",
        ],
    )
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        table.rows = [{"m": m, "later edit": NOT_RUN, "first edit": NOT_RUN, "tight crop": NOT_RUN} for m in SHARES]
        return table
    script = str(ROOT / "bench" / "inpainting_host.py")
    out = comfy_host.run_in_comfy([script, str(rounds), *map(str, SHARES)], timeout_s=2 * 3600)
    if out.returncode:
        raise RuntimeError(f"the measurement inside ComfyUI failed:\n{out.stderr[-3000:]}")
    found = json.loads(out.stdout.splitlines()[-1])
    table.rows = found["rows"]
    table.settings |= found["settings"]
    return table
