"""Distill in a real, headless ComfyUI that is interrupted and killed: queued again, it ends as the whole run does."""

import json
import os
import signal
import time
from pathlib import Path

import comfy_host
import graph_files
import pytest
from comfy_server import Server, serving
from safetensors.torch import load_file

from dmd_core.runs import Run

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.slow,
    pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing())),
]
UPDATES = 20
SMALL = {
    **{"mode": "train", "updates": UPDATES, "size": 64, "batch": 1, "accumulate": 1, "rank": 2, "count": 2},
    **{"teacher_steps": 2, "check_teacher": False, "save_every": 2, "preview_every": 0, "snapshot_every": 0},
    **{"method.steps": 2, "method.critic_updates": 2, "method.student_lr": 1e-3},
}


def graph(family: str, run: str) -> dict:
    """The SDXL graph's own Distill, on a tiny model of a family."""
    authored = graph_files.read_api("Distill your checkpoint (SDXL)")
    (distill,) = (n["inputs"] for n in authored.values() if n["class_type"] == "DMD_Distill")
    links = {"model": ["1", 0], "prompts": ["2", 0], "negative": ["2", 1], "vae": ["1", 2]}
    prompts = {"clip": ["1", 1], "prompts": "a fox\na ship\na bowl", "file": "none", "negative": ""}
    return {
        "1": {"class_type": "StandinCheckpoint", "inputs": {"family": family, "file": "base.safetensors"}},
        "2": {"class_type": "DMD_EncodePrompts", "inputs": prompts},
        "3": {"class_type": "DMD_Distill", "inputs": {**distill, **SMALL, **links, "run_name": run}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 4]}},
    }


def steps_of(server: Server, run: str) -> int:
    return len(Run(server.base / "output" / "dmd" / run).history())


def until(server: Server, run: str, wanted: int, patience_s: float = 600) -> None:
    began = time.monotonic()
    while steps_of(server, run) < wanted:
        assert time.monotonic() - began < patience_s, server.log[-3000:]
        time.sleep(0.02)


def student(base: Path, run: str) -> dict:
    return load_file(Run(base / "output" / "dmd" / run).snapshots()[-1] / "student.safetensors")


@pytest.mark.parametrize("family", ["sd15_eps", "sdxl", "sd3", "flux", "z_image"])
def test_interrupted_and_killed_it_ends_as_the_whole_run(tmp_path, family):
    base = tmp_path / "comfy"
    with serving(base) as server:
        key = server.post("/prompt", {"prompt": graph(family, "cut")})["prompt_id"]
        until(server, "cut", 4)
        server.post("/interrupt", {})
        while key not in (history := server.get(f"/history/{key}")):
            time.sleep(0.1)
        assert "execution_interrupted" in json.dumps(history[key]["status"])
        stopped = steps_of(server, "cut")
        assert 4 <= stopped < UPDATES, "the run was over before it was interrupted"
        server.post("/prompt", {"prompt": graph(family, "cut")})
        until(server, "cut", stopped + 4)
        os.kill(server.pid, signal.SIGKILL)
    killed = steps_of(server, "cut")
    assert killed < UPDATES, "the run was over before it was killed"
    with serving(base) as server:
        (said,) = server.execute(graph(family, "cut"))["4"]["text"]
        assert "finished" in said
        assert "goes on at step" in said
        server.execute(graph(family, "whole"))
        other = graph(family, "other")
        other["3"]["inputs"]["seed"] = 1
        server.execute(other)
        assert "lora key not loaded" not in server.log
    cut, whole = student(base, "cut"), student(base, "whole")
    assert cut.keys() == whole.keys()
    assert all(cut[k].equal(whole[k]) for k in cut)
    assert not all(cut[k].equal(v) for k, v in student(base, "other").items())  # control: another seed
