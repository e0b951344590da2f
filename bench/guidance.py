"""What a negative prompt costs: NAG at cfg 1 against CFG, in ComfyUI. Runs in ComfyUI's interpreter."""

import json
import sys
from pathlib import Path

from .record import NOT_RUN, Table

ROOT = Path(__file__).parents[1]


def on_cpu(rounds: int = 3) -> Table:
    table = Table(
        "guidance",
        "Negative prompts",
        "time of sampling with a negative prompt over that without, at the same steps: by Negative Guidance at cfg 1, "
        "and by cfg 3",
        notes=[
            "UNets ask only their cross-attention twice; transformers compute the negative prompt's rows as CFG does."
        ],
    )
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        table.rows = [{"network": n, "what": NOT_RUN} for n in ("UNet", "Flux")]
        return table
    out = comfy_host.run_in_comfy([str(ROOT / "bench" / "guidance_host.py"), str(rounds)])
    if out.returncode:
        raise RuntimeError(f"the measurement inside ComfyUI failed:\n{out.stderr[-3000:]}")
    found = json.loads(out.stdout.splitlines()[-1])
    table.rows, table.settings = found["rows"], found["settings"]
    return table
