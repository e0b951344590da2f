"""Run files that are written say what they were written from."""

from dataclasses import replace
from pathlib import Path

import pytest

from dmd_core.runfile import MethodSettings, parse_run_file, write_run_file

LEAST = 'model = "shapes"\n[run]\nname = "a"\n[data]\nprompts = ["a red circle"]\n'
METHOD = '[method]\nname = "dmd2"\nema = "none"\nsigmas = [14.6, 0.5]\nstudent_betas = [0, 0.9]\ntrajectory = true\n'
TEXTS = ['quotes " and \\ strokes', "lines\nand\ttabs", "\x7f \x01 control", "ümläut 赤", "C:\\models\\new.safetensors"]


@pytest.mark.parametrize("more", ["", METHOD, '[method]\nname = "reflow"\n', "[train]\nclip = 1e-7\nseed = 12\n"])
def test_a_written_file_reads_back_as_it_was(more):
    file = parse_run_file(LEAST + more, Path("x"))
    assert parse_run_file(write_run_file(file), Path("x")) == file


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(text):
    file = parse_run_file(LEAST)
    file = replace(file, data=replace(file.data, prompts=(text, "b")), model=replace(file.model, path=text))
    assert parse_run_file(write_run_file(file)) == file


def test_control_another_setting_reads_back_as_another():
    file = parse_run_file(LEAST)
    other = replace(file, method=MethodSettings(name="dmd2", steps=4, options={"guidance": 2.5}))
    assert parse_run_file(write_run_file(other)) != file
