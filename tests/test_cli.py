import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmd_core import demo
from dmd_core.__main__ import main
from dmd_core.runs import Run


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    path = tmp_path / "some_lora.safetensors"
    save_file(
        {"lora_unet_x.lora_down.weight": torch.zeros(4, 8), "lora_unet_x.lora_up.weight": torch.zeros(8, 4)}, path
    )
    assert main(["inspect", str(path)]) == 0
    assert "some_lora.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "name"), [("inspect", "x.safetensors"), ("inspect", "x.ckpt"), ("train", "x.toml")]
)
def test_a_missing_file_is_one_sentence_and_exit_code_two(tmp_path, capsys, command, name):
    with pytest.raises(SystemExit) as stop:
        main([command, str(tmp_path / name)])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert name in error
    assert "Traceback" not in error


def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path, capsys):
    marker = tmp_path / "ran"
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"\x80\x04cbuiltins\nopen\n(V" + str(marker).encode() + b"\nVw\ntR.")
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    assert "pickle" in capsys.readouterr().err
    assert not marker.exists()


def test_inspect_says_what_a_run_leaves_and_where_its_result_is(tmp_path, capsys):
    def inspected(path):
        assert main(["inspect", str(path)]) == 0
        return capsys.readouterr().out

    run = Run(tmp_path / "mine")
    run.describe({})
    weights = {"param/student/x": torch.zeros(2)}
    files = [run.path / "states" / "state_00000080.safetensors"]
    files += [run.path / "snapshots" / "step_00000080" / "student.safetensors", run.path / "lora" / "mine.safetensors"]
    for path in files[:2]:
        path.parent.mkdir(parents=True)
        save_file(weights, path)
    for path, what in zip((run.path, *files[:2]), ("the folder", "a training state", "a snapshot"), strict=True):
        told = inspected(path)
        assert f"{what} " in told
        assert "of the run 'mine'" in told
        assert "no file in there" in told
    files[2].parent.mkdir()
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}, files[2])
    assert f"Its result: {files[2]}." in inspected(run.path)
    assert "LoRA for" in inspected(files[2])  # the control: the result itself is described as any file
    (run.path / "run.json").unlink()
    assert "of the run" not in inspected(files[0])


@pytest.mark.parametrize(
    ("name", "text", "said"), [("README.md", "# ComfyUI-DMD\n\nText\n", "holds text"), ("out", None, "is a folder")]
)
def test_inspect_says_what_is_no_weight_file(tmp_path, capsys, name, text, said):
    path = tmp_path / name
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(SystemExit):
        main(["inspect", str(path)])
    error = capsys.readouterr().err
    assert f"{name} {said}" in error
    assert "announces" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_setup_says_that_it_installs_and_is_silent_when_there_is_nothing_to_do(tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "scripts", tmp_path / "scripts")
    python = tmp_path / "python"  # makes environments whose Python installs nothing
    python.write_text('#!/bin/sh\n[ "$2" = venv ] || exit 0\nmkdir -p "$3/bin"; cp "$0" "$3/bin/python"\n')
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python)}
    first, again = (
        subprocess.run([tmp_path / "scripts" / "setup"], env=env, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert "Installing into .venv" in first.stderr
    assert again.stdout + again.stderr == ""


def test_a_quick_demo_says_that_it_was_a_look_and_gives_no_distance_of_few_pictures(tmp_path, monkeypatch, capsys):
    small = {"accuracy": 0.9, "frechet": -71.42, "coverage": 1.0}
    pictures = {"student_4": torch.zeros(8, 3, 64, 64)}
    monkeypatch.setattr(demo, "distil", lambda *args: demo.Run(None, {}, {"student": [1.0]}))
    monkeypatch.setattr(demo, "export", lambda *args: None)
    monkeypatch.setattr(demo, "measure", lambda *args: ({"student_4": {**small, "ms_per_image": 1.0}}, pictures))
    told = []
    for flags in (["--quick"], []):  # the control is the whole demo
        assert main(["demo", "--out", str(tmp_path), "--device", "cpu", *flags]) == 0
        row = json.loads((tmp_path / "report.json").read_text())["rows"]["student_4"]
        told.append((row["frechet"], capsys.readouterr().out))
    (quick, said), (whole, plain) = told
    assert quick is None
    assert "-71.42" not in said
    assert "This was a look: 20 and 15 updates are too few" in said
    assert "64 pictures" in said
    assert whole == -71.42
    assert "-71.42" in plain
    assert "a look" not in plain


@pytest.mark.slow
def test_the_quick_demo_writes_its_report(tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--quick", "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["rows"]) == ["teacher_40", "teacher_4", "teacher_1", "student_4", "student_1"]
    for row in report["rows"].values():
        assert {"accuracy", "frechet", "coverage", "spread", "ms_per_image"} <= row.keys()
        assert row["frechet"] is None
    # even a few updates leave the one-step teacher behind; an untrained student equals it
    assert report["rows"]["student_1"]["accuracy"] > report["rows"]["teacher_1"]["accuracy"]
    names = {p.name for p in tmp_path.iterdir()}
    assert {"sheet.png", "curves_4.png", "curves_1.png", "report.json"} <= names
    assert main(["inspect", str(tmp_path / "shapes_student_4_00001.safetensors")]) == 0
