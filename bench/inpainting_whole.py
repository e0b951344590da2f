"""Inpainting from picture to picture: encode, sample, decode and composite, by the nodes. Runs in ComfyUI's process."""

import json
import sys
from typing import Any

from .inpainting import ROOT
from .record import NOT_RUN, Table

STEPS = (1, 4, 20)
WAYS = ("refresh", "session, later edit", "session, first edit", "crop 1.5x", "tight crop")


def on_cpu(rounds: int = 2) -> Table:
    table = Table(
        "inpainting_whole",
        "Inpainting, end to end",
        "time from picture to picture (Prepare Inpaint, sampler, Composite Inpaint; no text encoder) over that of the "
        "same with the whole canvas encoded, sampled and decoded. later edit: two holes in turn in one session, only "
        "what changed is encoded. Decoding is local in all but dense",
        notes=[
            "The first three steps of refresh are whole, so with one step only the local decoding is saved.",
            "A later edit computes more tokens than its hole's: a hole elsewhere is filled again, and the autoencoder "
            "carries that into cells beside it, whose context is read anew (in two steps 0.30 of a dense run's tokens, "
            "where the law says 0.24).",
            "How much the autoencoder weighs depends on both networks: see its cost in dense steps, above.",
        ],
    )
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        table.rows = [{"steps": n, **dict.fromkeys(WAYS, NOT_RUN)} for n in STEPS]
        return table
    job = json.dumps({"rounds": rounds, "steps": STEPS, "ways": WAYS})
    out = comfy_host.run_in_comfy([str(ROOT / "bench" / "inpainting_whole_host.py"), job], timeout_s=2 * 3600)
    if out.returncode:
        raise RuntimeError(f"the measurement inside ComfyUI failed:\n{out.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    table.rows = found["rows"]
    table.settings |= found["settings"]
    return table
