"""Time against the share of the picture that is masked, on ComfyUI's own classes. Runs in ComfyUI's interpreter."""

import json
import sys
from pathlib import Path
from typing import Any

from .record import NOT_RUN, Table

ROOT = Path(__file__).parents[1]
SHARES = (0.02, 0.05, 0.10, 0.25, 0.50, 1.0)


LINES = ("later edit", "first edit", "tight crop", "crop 1.5x")
KNEE = (165, 200)  # computed tokens under which a GPU reads its weights for longer than it computes with them


def on_cpu(rounds: int = 3) -> Table:
    made = table()
    made.notes.append("The time is of the whole sampling call, so what a run costs once counts against a single step.")
    found = curve("mid", "cpu", rounds)
    made.rows = found["rows"] if found else [{"m": m, **dict.fromkeys(LINES, NOT_RUN)} for m in SHARES]
    made.settings |= found["settings"] if found else {}
    return made


def table() -> Table:
    return Table(
        "inpainting",
        "Inpainting",
        "time of sampling one step with Lazy Inpaint over that without, against the masked share m of the picture. "
        "later edit: the session's bank is filled. first edit: it records what later ones save. tight crop: only the "
        "box of the hole, which sees nothing else. crop 1.5x: that box, half as large again",
        notes=[
            "law = (m' N + T) / (N + T), m' the computed share of N image tokens (hole and ring, rounded), T of text."
        ],
    )


def on_cuda() -> Table:
    """Without rows yet: cuda.py takes them as its time allows."""
    made = table()
    made.about += ". ours: the later edit (SDXL, which is not lazy: the tight crop)"
    made.notes.append(
        f"The floor: with fewer than about {KNEE[0]} to {KNEE[1]} computed tokens, text included, a step takes as "
        "long as reading the weights does, whatever the hole is; the law does not hold below it."
    )
    return made


def curve(sizes: str, device: str, rounds: int, timeout_s: float = 2 * 3600) -> dict[str, Any] | None:
    """Rows and settings, from ComfyUI's interpreter; None without a ComfyUI."""
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        return None
    script = str(ROOT / "bench" / "inpainting_host.py")
    job = json.dumps({"sizes": sizes, "device": device, "rounds": rounds, "shares": SHARES})
    out = comfy_host.run_in_comfy([script, job], timeout_s)
    if out.returncode:
        raise RuntimeError(f"the measurement inside ComfyUI failed:\n{out.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found
