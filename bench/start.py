"""What the pack costs before anything is done with it: time to import, memory at idle."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from .record import NOT_RUN, Table

ROOT = Path(__file__).parents[1]
MODULES = {
    "engine (dmd_core)": "dmd_core",
    "what a training run needs": "dmd_core.headless",
    "what `inspect` needs": "dmd_core.weights.doctor",
}
PROBE = """
import json, sys, time
began = time.process_time()
{before}
middle, memory = time.process_time(), resident()
{after}
print(json.dumps({{"seconds": [middle - began, time.process_time() - middle], "bytes": [memory, resident()]}}))
"""
RESIDENT = """
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
"""
HOST = """
import importlib
import comfy_host
comfy_host.start_comfy()
import comfy.model_management, comfy.sd, nodes, server
from comfy_api.latest import io
"""


def probe(python: str, before: str, after: str, env: dict[str, str], cwd: Path) -> dict[str, list[float]]:
    code = RESIDENT + PROBE.format(before=before, after=after)
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, env=env, cwd=cwd)
    if out.returncode:
        raise RuntimeError(f"the probe failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def row(what: str, base: str, python: str, before: str, after: str, env: dict, cwd: Path, rounds: int) -> dict:
    found = [probe(python, before, after, env, cwd) for _ in range(rounds)]
    time = statistics.median(f["seconds"][1] / f["seconds"][0] for f in found)
    memory = statistics.median(f["bytes"][1] / f["bytes"][0] - 1 for f in found)
    added = statistics.median(f["bytes"][1] - f["bytes"][0] for f in found)
    mib = round(added / 2**20, 1)
    return {"what": what, "over": base, "time": round(time, 3), "memory": round(memory, 3), "MiB": mib}


def on_cpu(rounds: int = 3) -> Table:
    table = Table(
        "start",
        "Start",
        "time: seconds to import over those of what is there already (torch, or ComfyUI). "
        "memory: what it adds to the process, as a share of that",
        settings={"rounds": rounds, "clock": "processor time"},
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for what, module in MODULES.items():
        args = (sys.executable, "import torch", f"import {module}", env, ROOT, rounds)
        table.rows.append(row(what, "import torch", *args))
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    where = comfy_host.comfy_path()
    if where is None:
        table.rows.append({"what": "the pack in ComfyUI", "over": "ComfyUI", "time": NOT_RUN, "memory": NOT_RUN})
        return table
    python = comfy_host.comfy_python(where)
    env |= {"COMFYUI_PATH": str(where), "PYTHONPATH": os.pathsep.join([str(where), str(ROOT / "tests")])}
    env |= {"DMD_IN_COMFY": "1"}
    load = 'comfy_host.load_pack(); comfy_host.pack_module("nodes")'
    table.rows.append(row("the pack in ComfyUI", "ComfyUI's own start", python, HOST, load, env, where, rounds))
    return table
