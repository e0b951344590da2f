import json

import pytest
import torch
from safetensors.torch import save_file

from dmd_core.__main__ import main


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


@pytest.mark.slow
def test_the_quick_demo_writes_its_report(tmp_path):
    assert main(["demo", "--out", str(tmp_path), "--quick", "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["rows"]) == ["teacher_40", "teacher_4", "teacher_1", "student_4", "student_1"]
    for row in report["rows"].values():
        assert {"accuracy", "frechet", "coverage", "spread", "ms_per_image"} <= row.keys()
    # even a few updates leave the one-step teacher behind; an untrained student equals it
    assert report["rows"]["student_1"]["frechet"] < report["rows"]["teacher_1"]["frechet"]
    names = {p.name for p in tmp_path.iterdir()}
    assert {"sheet.png", "curves_4.png", "curves_1.png", "report.json"} <= names
    assert main(["inspect", str(tmp_path / "shapes_student_4_00001.safetensors")]) == 0
