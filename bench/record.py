"""How a figure is taken and kept: both sides in turn in one run, with machine, versions, command, seed and the ratio.

On a CPU the clock counts what this process computed, so that a busy machine does not change a ratio, and only ratios
are kept. On CUDA it is wall time after a synchronisation, and milliseconds are kept too.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
NOT_RUN = "not run"
Work = Callable[[], object]


@dataclass
class Table:
    """One table of the page. Rows share their keys; a value is a number, a text, or NOT_RUN."""

    name: str
    title: str
    about: str  # what is compared with what
    seed: int | str = 0  # in words where there are several
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self, device: str, command: str, folder: Path | None = None) -> Path:
        tier, folder = "cuda" if device.startswith("cuda") else "cpu", folder or RESULTS
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.name}.{tier}.json"
        found = {"tier": tier, "command": command, "machine": machine(device), "versions": versions(), **asdict(self)}
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path


def machine(device: str) -> dict[str, Any]:
    found = {"processor": processor(), "system": platform.system(), "threads": torch.get_num_threads()}
    if hasattr(os, "getloadavg"):
        found |= {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "gpu_gib": round(about.total_memory / 2**30), "cuda": torch.version.cuda}
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    root = Path(__file__).parents[1]
    commit = git(root, "rev-parse", "--short", "HEAD")
    changed = git(root, "status", "--porcelain", "--", "bench/*.py", "dmd_core", "nodes")
    return found | {"commit": (commit or "unknown") + (" with changes" if changed else "")}


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()


def seconds(work: Work, device: str = "cpu") -> float:
    if not device.startswith("cuda"):
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def compared(
    ours: Work, other: Work, rounds: int, device: str = "cpu", warm: int = 1, milliseconds: bool = False
) -> dict[str, Any]:
    """ours / other: the median ratio, its quartiles, and milliseconds where they are asked for."""
    return all_compared({"ours": ours}, other, rounds, device, warm, milliseconds)["ours"]


def all_compared(
    works: Mapping[str, Work],
    other: Work,
    rounds: int,
    device: str = "cpu",
    warm: int = 1,
    milliseconds: bool = False,
) -> dict[str, dict[str, Any]]:
    """Each round runs everything, every other round backwards; ratios are taken within a round."""
    everything = {**works, "": other}
    for _ in range(warm):
        for work in everything.values():
            work()
    taken: list[dict[str, float]] = []
    for i in range(rounds):
        order = list(everything) if i % 2 else list(everything)[::-1]
        taken.append({name: seconds(everything[name], device) for name in order})
    found = {}
    for name in works:
        figures = spread([t[name] / t[""] for t in taken])
        if milliseconds:
            figures |= {"ours_ms": 1e3 * statistics.median(t[name] for t in taken)}
            figures |= {"other_ms": 1e3 * statistics.median(t[""] for t in taken)}
        found[name] = {k: round(v, 4) for k, v in figures.items()} | {"rounds": rounds}
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"ratio": middle, "low": low, "high": high}


def verdict(what: str, values: Sequence[float], bound: float, at_least: bool = False) -> str:
    """A line for a table's notes: the range of what was measured, what was asked, and whether all of it holds."""
    holds = min(values) >= bound if at_least else max(values) <= bound
    sign = ">=" if at_least else "<="
    return f"{what}: {min(values):.3g} to {max(values):.3g}, {sign} {bound:.3g} asked: {holding(holds)}."


def holding(holds: bool) -> str:
    return "holds" if holds else "**does not hold**"


def tensor_bytes(tensors: Mapping[str, torch.Tensor] | Sequence[torch.Tensor]) -> int:
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return sum(t.numel() * t.element_size() for t in values)
