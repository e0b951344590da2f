"""Time against the share of the picture that is masked, on ComfyUI's own Flux class. Runs in ComfyUI's interpreter."""

import json
import sys
from pathlib import Path

from .record import NOT_RUN, Table

ROOT = Path(__file__).parents[1]
SHARES = (0.04, 0.10, 0.25, 0.50, 0.80)


def on_cpu(rounds: int = 3) -> Table:
    table = Table(
        "inpainting",
        "Inpainting",
        "time of sampling with Lazy Inpaint over that without, against the masked share m of the picture. later edit: "
        "the session's bank is filled. first edit: it records what later ones save. crop: only the box of the hole",
        notes=["law = (m' N + T) / (N + T), m' the computed share of N image tokens, T text tokens."],
    )
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        table.rows = [{"m": m, "later edit": NOT_RUN, "first edit": NOT_RUN, "crop": NOT_RUN} for m in SHARES]
        return table
    out = comfy_host.run_in_comfy([str(ROOT / "bench" / "inpainting_host.py"), str(rounds), *map(str, SHARES)])
    if out.returncode:
        raise RuntimeError(f"the measurement inside ComfyUI failed:\n{out.stderr[-3000:]}")
    found = json.loads(out.stdout.splitlines()[-1])
    table.rows, table.settings = found["rows"], found["settings"]
    return table
