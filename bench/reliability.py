"""The tests that repeat for hours, and what became of them: `python -m bench reliability`, or one row of it by name.

Kills, cancels, harmed files and a long queue. Each row is written when it is done; a row that was not run says so.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from .record import NOT_RUN, RESULTS, Table, versions

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    what: str
    times: str
    file: str
    chosen: str  # pytest's -k
    where: str = "here"  # host: in ComfyUI's interpreter; guided: not pytest but guided.py; gpu: where there is CUDA


ROWS = {
    "kills": Row("kill -9 in training, every method: ends bit-equal", "50 each", "test_reliability.py", "killed"),
    "saving": Row("kill -9 while saving: a loadable state is left", "200", "test_train.py", "kills"),
    "fuzz": Row("harmed or odd headers, keys, files, names, masks", "3000 each", "test_fuzz.py", "many"),
    "guided": Row("files made up by atheris, guided by what they make the readers do", "50000", "", "", "guided"),
    "cancels": Row(
        "cancel at any moment of each of the 20 nodes in ComfyUI: as a fresh start",
        "7 a node",
        "test_reliability_comfy.py",
        "hundred",
        "host",
    ),
    "memory": Row("out of memory on CUDA, really: caught, saved, given back", "1", "test_reliability.py", "gpu", "gpu"),
    "soak": Row(
        "prompts through ComfyUI's queue, the 16 nodes without training: memory flat within 2 %; a control that leaks",
        "2000",
        "test_reliability_comfy.py",
        "flat",
        "host",
    ),
}


def on_cpu(chosen: str = "", done: Callable[[Table], object] = lambda table: None) -> Table:
    table = Table(
        "reliability",
        "Reliability",
        "the tests marked `endurance`, which are in no other command: how many ran, how many of them failed",
        notes=["The default tests do each of them less often: 5 kills, 20 in saving, one cancel a node, 60 examples."],
    )
    if chosen not in ("", *ROWS):
        raise SystemExit(f"give one of {', '.join(ROWS)}, or none for all of them")
    found = {row["row"]: row for row in earlier()}
    for name in ROWS:
        found.setdefault(name, {"tests": NOT_RUN, "failed": NOT_RUN, "figures": ""})
    for name in ROWS if not chosen else (chosen,):
        found[name] = measured(ROWS[name])
        table.rows = [{"row": n, "what": r.what, "times": r.times} | found[n] for n, r in ROWS.items()]
        done(table)
    return table


def earlier() -> list[dict[str, Any]]:
    path = RESULTS / "reliability.cpu.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def measured(row: Row) -> dict[str, Any]:
    """Runs the row's tests and reads what pytest says of them."""
    if row.where == "guided":
        return guided(int(row.times))
    if row.where == "gpu" and not torch.cuda.is_available():
        return {"tests": NOT_RUN, "failed": NOT_RUN, "figures": "no CUDA device"}
    with tempfile.TemporaryDirectory() as aside:
        report = Path(aside) / "report.xml"
        marked = {"host": "endurance and comfy", "gpu": "gpu"}.get(row.where, "endurance")
        flags = ["-q", "-p", "no:cacheprovider", "-m", marked, "-k", row.chosen, f"--junitxml={report}"]
        if row.where == "host" and not run_in_host(row, flags):
            return {"tests": NOT_RUN, "failed": NOT_RUN, "figures": "no ComfyUI found"}
        if row.where != "host":
            subprocess.run([sys.executable, "-m", "pytest", *flags, str(ROOT / "tests" / row.file)], cwd=ROOT)
        return read(report)


def guided(runs: int) -> dict[str, Any]:
    """The first input that is neither read nor refused in a sentence ends it, and is kept in the temporary folder."""
    if importlib.util.find_spec("atheris") is None:
        return {"tests": NOT_RUN, "failed": NOT_RUN, "figures": "atheris is not installed"}
    aside = f"-artifact_prefix={tempfile.gettempdir()}/guided_"
    command = [sys.executable, "-m", f"{__package__}.guided", f"-runs={runs}", "-seed=1", "-max_len=4096", aside]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(out.stderr[-3000:])
    done = re.search(r"Done (\d+) runs", out.stderr)
    covered = re.findall(r"cov: (\d+)", out.stderr)
    figures = f"{done[1] if done else 'stopped'} files, {covered[-1] if covered else 0} branches reached"
    failed: str | int = "a reader crashed" if out.returncode else 0
    return {"tests": 1, "failed": failed, "figures": figures, "commit": versions()["commit"]}


def run_in_host(row: Row, flags: list[str]) -> bool:
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    if comfy_host.comfy_path() is None:
        return False
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-o", "addopts=--strict-markers"]
    out = comfy_host.run_in_comfy(["-m", "pytest", *config, *flags, str(ROOT / "tests" / row.file)], 6 * 3600)
    print(out.stdout[-3000:])
    return True


def read(report: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(report).iter("testcase"))
    ran = [c for c in cases if c.find("skipped") is None]
    failed = [c.get("name") for c in ran if c.find("failure") is not None or c.find("error") is not None]
    if not ran:
        raise RuntimeError("pytest ran none of the row's tests; its output above says why")
    found = {"tests": len(ran), "failed": ", ".join(map(str, failed)) or 0}
    figures = ", ".join(f"{k} {v}" for case in ran for k, v in properties(case))
    return found | {"figures": figures, "commit": versions()["commit"]}


def properties(case: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for found in case.iter("property"):
        yield str(found.get("name")), str(found.get("value"))
