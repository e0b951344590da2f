"""The table of methods on the shapes world: all rows there, a stopped start loses none, one row comes out again."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from dmd_core import demo, shapes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "methods.cpu.json"
SHORT = ROOT / "tests" / "golden" / "short_row.json"
PROMISED = {
    *((name, 1) for name in ("DMD", "Diffusion2GAN", "reflow")),
    *((name, steps) for name in ("DMD2", "DMD2 + GAN", "LADD") for steps in (1, 2, 4)),
    *(("teacher", steps) for steps in (1, 2, 4, 40)),
}


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    yield importlib.import_module("bench.methods")
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        del sys.modules[name]


def test_every_method_and_step_count_has_its_row(methods):
    rows = {(r.name, r.steps) for r in methods.ROWS}
    assert rows >= PROMISED
    assert len(rows) == len(methods.ROWS) == len({methods.marked(r) for r in methods.ROWS})


def test_a_stopped_start_goes_on_and_other_settings_are_measured_again(methods, monkeypatch, tmp_path):
    asked = []

    def measured(_world, row, seed):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((row.key, seed))
        figures = dict.fromkeys(("accuracy", "coverage", "spread", "dark", "minutes"), 1.0) | {"frechet": float(seed)}
        return {"row": row.key, "seed": seed, "settings": methods.marked(row), "commit": "c", **figures}

    monkeypatch.setattr(methods, "PROGRESS", tmp_path / "bench" / "runs.json")
    monkeypatch.setattr(methods, "measured", measured)
    monkeypatch.setattr(methods.demo.World, "load", lambda device: None)
    one, two, *_ = [r for r in methods.ROWS if r.method]
    with pytest.raises(KeyboardInterrupt):
        methods.on_cpu((one, two), (0, 1))
    first = [(one.key, 0), (two.key, 0), (one.key, 1)]
    assert asked == first
    asked.clear()
    table = methods.on_cpu((one, two), (0, 1))
    assert asked == [(two.key, 1)]
    assert [(row["frechet"], row["seeds"]) for row in table.rows] == [(0.5, 2), (0.5, 2)]
    assert "Runs by commit: c 4." in table.notes
    asked.clear()
    with pytest.raises(KeyboardInterrupt):  # a whole table is measured anew
        methods.on_cpu((one, two), (0, 1))
    assert asked == first
    asked.clear()
    methods.on_cpu((methods.replace(one, updates=one.updates + 1), two), (0,))  # control: other settings
    assert asked == [(one.key, 0)]


def test_a_style_lies_on_the_student_it_belongs_to(methods):
    """Its row trains nothing of its own: the LoRA set of the plain row is read back."""
    rows = {r.name: r for r in methods.ROWS if r.steps == 4}
    style, plain = rows["DMD2, style LoRA"], rows["DMD2"]
    assert methods.trained_as(style) == methods.trained_as(plain)
    assert methods.marked(style) != methods.marked(plain)
    assert methods.trained_as(rows["DMD2, full critic"]) != methods.trained_as(rows["DMD2, full student"])  # control


@pytest.mark.parametrize("name", ["DMD", "Diffusion2GAN", "reflow", "DMD2", "DMD2 + GAN", "LADD", "DMD2, full critic"])
def test_a_row_trains_what_it_says(methods, monkeypatch, tmp_path, name):
    """Two updates of each kind: the student of a second start is the first one's, read back."""
    monkeypatch.setattr(methods, "CACHE", tmp_path)
    monkeypatch.setattr(methods, "NUM_PAIRS", 1)
    monkeypatch.setattr(methods, "PAIR_STEPS", 2)
    monkeypatch.setattr(methods, "NUM_REAL", 8)
    monkeypatch.setattr(methods, "BATCH", 4)
    row = methods.replace(next(r for r in methods.ROWS if r.name == name), updates=2)
    world = demo.World.load(torch.device("cpu"))
    cond = world.encode(["a red circle", "a blue star"])
    x, sigma = torch.randn(2, *demo.LATENT, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.9)
    made, again, other = (methods.student(world, r, 0)[0] for r in (row, row, methods.replace(row, updates=1)))
    with torch.no_grad():
        made, again, other, teacher = (view(x, sigma, cond) for view in (made, again, other, world.teacher))
    assert torch.equal(made, again)
    assert not torch.equal(made, teacher)
    assert not torch.equal(made, other)  # control


@pytest.mark.skipif(not RESULTS.is_file(), reason="the table was not run: python -m bench methods")
def test_a_row_of_the_table_comes_out_again(methods):
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    row = next(r for r in methods.ROWS if r.key == "teacher, 1")
    kept = next(r for r in runs if (r["row"], r["seed"]) == (row.key, 0))
    assert kept["settings"] == methods.marked(row), "the row has changed: measure the table again"
    found = methods.measured(demo.World.load(torch.device("cpu")), row, 0)
    assert found["frechet"] == pytest.approx(kept["frechet"], rel=0.01)
    assert found["accuracy"] == pytest.approx(kept["accuracy"], abs=0.005)
    assert found["coverage"] == kept["coverage"]
    assert not any(r["frechet"] == pytest.approx(kept["frechet"], rel=0.01) for r in runs if r["row"] != row.key)


def short(methods, steps, tmp_path, monkeypatch):
    """The table's one-step DMD2 for 12 updates (0: the teacher), judged on 256 pictures against 1024 renders."""
    monkeypatch.setattr(methods, "CACHE", tmp_path)
    world = demo.World.load(torch.device("cpu"))
    scene = shapes.world.sample(1024, torch.Generator().manual_seed(987_654))
    with torch.no_grad():
        features = [world.recogniser.features(shapes.world.render(scene.take(i))) for i in demo.split(1024)]
    monkeypatch.setitem(methods.REFERENCES, False, torch.cat(features))
    taught = methods.taught("DMD2", "dmd2", 1, steps, **methods.ONE)
    return methods.measured(world, taught if steps else methods.Row(name="teacher", steps=1), 0, judged=256)


def test_a_short_training_comes_out_again(methods, monkeypatch, tmp_path):
    """Made by the same: `short(methods, 12, ...)` written to the file."""
    kept = json.loads(SHORT.read_text(encoding="utf-8"))
    found, teacher = (short(methods, n, tmp_path, monkeypatch) for n in (12, 0))
    assert found["settings"] == kept["settings"], "the row has changed: measure it again"
    assert found["frechet"] == pytest.approx(kept["frechet"], rel=0.1)  # other processors round differently
    assert found["accuracy"] == pytest.approx(kept["accuracy"], abs=0.05)
    assert found["spread"] == pytest.approx(kept["spread"], abs=0.1)
    assert teacher["frechet"] > 1.5 * kept["frechet"]  # control: untrained, it is another row


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.skipif(not RESULTS.is_file(), reason="the table was not run: python -m bench methods")
def test_a_trained_row_of_the_table_comes_out_again(methods, monkeypatch, tmp_path):
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    row = next(r for r in methods.ROWS if r.key == "DMD2, 1")
    kept = next((r for r in runs if (r["row"], r["seed"]) == (row.key, 0)), None)
    if kept is None:
        pytest.skip("this row was not run yet")
    monkeypatch.setattr(methods, "CACHE", tmp_path)
    found = methods.measured(demo.World.load(torch.device("cpu")), row, 0)
    assert found["frechet"] == pytest.approx(kept["frechet"], rel=0.2)  # other processors round differently
    assert found["accuracy"] == pytest.approx(kept["accuracy"], abs=0.03)
