"""The benchmarks: the page is what the results say, CPU results hold no absolute times, both sides train."""

import importlib
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy_host
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmd_core import demo, train
from dmd_core.data import Batch
from dmd_core.shapes import world

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "bench" / "results").glob("*.json"))
TIMES = ("_ms", "seconds", "s per", "milliseconds")  # in the name of a column


@pytest.fixture
def bench(monkeypatch):
    """The package beside dmd_core; the root must not stay on the path, where nodes/ would shadow ComfyUI's nodes.py."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in (
        "cuda",
        "gpu_training",
        "inpainting_quality",
        "lazy_canvas",
        "memory",
        "models",
        "page",
        "parts",
        "record",
        "reliability",
        "sampling",
        "training",
        "variety",
    ):
        importlib.import_module(f"bench.{name}")
    yield sys.modules["bench"]
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        del sys.modules[name]


def test_the_page_is_what_the_results_say(bench, tmp_path):
    assert bench.page.PAGE.read_text(encoding="utf-8") == bench.page.render()
    assert "Not run" in bench.page.render(tmp_path)  # control: without results there are no figures
    assert "| --- |" not in bench.page.render(tmp_path)


def test_every_table_of_the_page_has_its_command(bench):
    command = importlib.import_module("bench.__main__")
    for name in bench.page.ORDER:
        assert callable(command.place(name))
    with pytest.raises(SystemExit, match="give one of"):
        command.main(["nothing"])


def test_the_clocks_of_a_step_miss_nothing(bench):
    size = bench.models.TINY["flux"]
    made = bench.training.Ours(size, 1, rank=2)
    with bench.parts.clocks(made.net) as (spent, calls):
        made.update()
    # five updates of the critic (student, critic), one of the student: itself, twice the teacher, the critic
    assert calls == {
        "forward without gradient": 8, "forward with gradient": 6, "backward": 6, "optimiser": 6, "clipping": 6,
    }  # fmt: skip
    assert all(v > 0 for v in spent.values())
    before = dict(spent)
    made.update()
    assert dict(spent) == before  # control: the clocks are gone


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_result_says_where_it_comes_from(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"].startswith("python -m bench ")
    assert found["machine"]["processor"]
    assert {"python", "torch", "diffusers", "commit"} <= found["versions"].keys()
    assert re.fullmatch(r"\d+( to \d+)?", str(found["seed"]))
    assert found["rows"]
    assert path.name == f"{found['name']}.{found['tier']}.json"
    if found["tier"] == "cpu":
        assert not [k for row in found["rows"] for k in row if any(t in k for t in TIMES)]


def test_a_ratio_is_that_of_the_work(bench):
    def turns(n):
        x = torch.randn(64, 64)

        def work():
            for _ in range(n):
                x @ x

        return work

    found = bench.record.compared(turns(600), turns(200), rounds=9)
    assert 2.2 < found["ratio"] < 4.2
    assert 0.7 < bench.record.compared(turns(300), turns(300), rounds=9)["ratio"] < 1.4  # control


def test_both_sides_of_the_training_table_train_the_same_network(bench):
    training = bench.training
    size = bench.models.TINY["sd15"]
    ours, plain = training.Ours(size, 1, rank=2), training.ThreeCopies(size, 1)
    x, sigma = torch.randn(1, *size.shape), torch.full((1,), 3.0)
    # before the first update both students are the teacher
    expected = size.denoiser(plain.teacher)(x, sigma, plain.cond)
    torch.testing.assert_close(plain.predict(plain.student, x, sigma, plain.cond)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.objective.student(x, sigma, plain.cond), expected, rtol=1e-4, atol=1e-4)
    for side in (ours, plain, training.ThreeCopies(size, 1, rank=2)):
        params = list(side.params["student"]) if side is not ours else list(ours.state.params["student"].values())
        before = [p.detach().clone() for p in params]
        side.update()
        assert all(p.isfinite().all() for p in params)
        assert any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert ours.state.counters == {"critic": 5, "student": 1}
    assert ours.kept() < plain.kept() / 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_cuda_tier_writes_nothing(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.record, "RESULTS", tmp_path)
    for work in (bench.cuda, bench.gpu_training):
        with pytest.raises(SystemExit, match="not run"):
            work.main()
    assert not list(tmp_path.iterdir())


def test_a_training_on_one_gpu_goes_through_on_a_cpu_and_keeps_nothing(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.record, "RESULTS", tmp_path)
    features = demo.held_out_features
    monkeypatch.setattr(demo, "held_out_features", lambda world: features(world, 128))
    bench.gpu_training.main(dry=True)
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert all(f"'what': '{name}'" in said for name in ("teacher_40", "teacher_4", "student_4"))
    assert "frechet over teacher's 4" in said
    # what it says holds where the student is no further away than the teacher in as many steps, and else not
    for far, word in ((1.0, "asked: holds"), (1.1, "does not hold")):
        rows = {k: {"frechet": v} for k, v in (("teacher_4", 10.0), ("student_4", 10 * far))}
        assert word in bench.gpu_training.claim(rows)


# --- memory on paper


def test_what_is_counted_on_paper_is_what_a_run_keeps(bench):
    size, rank = bench.models.TINY["flux"], 2
    ours = bench.training.Ours(size, 1, rank=rank)
    ours.update()
    plan = bench.memory.kept(size.net("meta"), rank, base_bytes=4)
    steps = 4 * sum(len(o.state) for o in ours.state.optimizers.values())  # AdamW counts per tensor, in fp32
    buffers = bench.record.tensor_bytes(list(ours.net.buffers()))
    assert ours.kept() == plan.base + plan.trained + plan.optimizer + steps + buffers
    assert plan.averages == plan.trained // 2  # the student's
    eight = bench.memory.kept(size.net("meta"), rank, 4, eight_bit=True)
    assert eight.optimizer * 4 == plan.optimizer  # control


@pytest.mark.slow
@pytest.mark.endurance
def test_a_compiled_network_trains_the_same_without_a_break_in_its_graphs(bench):
    """Adapters' mixes are part of the graph: one each for the bare network, student and critic, by gradient."""
    made = [bench.training.Ours(bench.models.TINY["flux"], 1, rank=2) for _ in range(2)]
    torch._dynamo.utils.counters.clear()
    made[1].net.compile(backend="eager")
    for side in made:
        side.update()
        side.update()
    for player in ("critic", "student"):
        eager, compiled = (list(side.state.params[player].values()) for side in made)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


# --- reliability


def test_what_pytest_says_is_what_the_row_says(bench, tmp_path):
    report = tmp_path / "report.xml"
    soak = '<testcase name="soak"><properties><property name="growth" value="0.01"/></properties></testcase>'
    left_out = '<testcase name="c"><skipped/></testcase>'
    report.write_text(f"<testsuite>{soak}{left_out}</testsuite>")
    found = bench.reliability.read(report)
    assert (found["tests"], found["failed"], found["figures"]) == (1, 0, "growth 0.01")
    report.write_text(f'<testsuite>{soak}<testcase name="b"><failure/></testcase></testsuite>')
    assert bench.reliability.read(report)["failed"] == "b"
    report.write_text(f"<testsuite>{left_out}</testsuite>")
    with pytest.raises(RuntimeError, match="none of the row"):
        bench.reliability.read(report)


# --- the CUDA tier, where there is no CUDA


def test_a_row_that_fails_says_how_and_costs_no_other(bench):
    tier = bench.cuda.Tier.dry()

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken():
        raise RuntimeError("no kernel\nfor this")

    assert tier.attempt(full, 60) == "does not fit"
    assert "RuntimeError" in tier.attempt(broken, 60)
    assert "no kernel" in tier.attempt(broken, 60)
    assert tier.attempt(lambda: time.sleep(30), 0.1).startswith("not run: over")
    assert tier.attempt(lambda: 5, 60) == 5
    assert tier.attempt(lambda: time.sleep(0.2) or 5, 0.1) == 5  # a dry run is patient, the real one is not
    assert bench.cuda.Tier(device="cpu").attempt(lambda: time.sleep(30), 0.1).startswith("not run: over")
    tier.budget_s = 10
    assert tier.attempt(lambda: 5, 60) == "not run"


@pytest.mark.slow
@pytest.mark.endurance
def test_the_cuda_tier_goes_through_all_of_its_rows_on_a_cpu(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.record, "RESULTS", tmp_path / "never")
    tier = bench.cuda.Tier.dry()
    sampling, training, holes = bench.cuda.go(tier, lambda table: table.write("cpu", "dry", tmp_path))
    written = json.loads((tmp_path / "sampling.cpu.json").read_text())["rows"]
    assert written == sampling.rows
    assert not (tmp_path / "never").exists()
    # two networks, eager and compiled: sampler, text, both decoders, both whole images
    assert len(sampling.rows) == 4 * 6
    assert all(row["ours_ms"] > 0 for row in sampling.rows)
    assert [row["network"] for row in training.rows] == ["sd15", "sdxl", "sd3", "flux"]
    for row in training.rows:
        assert row["ours, s per update"] > 0
        assert row["three copies, s per update"] > 0
        assert row["speed"] > 0
        assert all(row[f"{side}, s per update"] > 0 for side in bench.cuda.LATE)
    assert training.rows[0][bench.cuda.COMPILED] > 0
    if comfy_host.comfy_path() is not None:
        lazy = [row for row in holes.rows if "law" in row]
        assert {row["network"] for row in lazy} == {"SD3.5 medium", "Flux"}
        assert len(holes.rows) == 3 * len(lazy) / 2 == 3 * len(bench.inpainting.SHARES)
        assert all(row["later edit"] > 0 for row in lazy)
        assert all(row["tight crop"] > 0 for row in holes.rows)


def test_without_a_comfyui_or_where_it_fails_the_curve_says_so(bench, monkeypatch):
    def broken(*args):
        raise RuntimeError("the measurement inside ComfyUI failed")

    for curve, said in ((lambda *args: None, "not run: there is no ComfyUI"), (broken, "failed: RuntimeError")):
        monkeypatch.setattr(bench.inpainting, "curve", curve)
        table = bench.inpainting.on_cuda()
        bench.cuda.inpainting_rows(bench.cuda.Tier.dry(), table)
        assert [row["later edit"].startswith(said) for row in table.rows] == [True]
    monkeypatch.setattr(bench.inpainting, "curve", lambda *args: {"rows": [{"m": 0.1}], "settings": {"steps": 1}})
    bench.cuda.inpainting_rows(bench.cuda.Tier.dry(), table)
    assert (table.rows, table.settings) == ([{"m": 0.1}], {"steps": 1})  # control


# --- the trained lazy student on the canvas of inpainting_quality


def lazy_rows(dense: float, bare: float, taught: tuple[float, ...]) -> list[dict[str, Any]]:
    """As inpainting_quality_host.py gives them: one in ten less right with one step."""
    rows = [{"model": "teacher", "steps": n, "dense": dense - 0.1 * (n == 1)} for n in (1, 2, 4, 20)]
    every = ((f"{kind}student {i}", v) for kind in ("", "whole ") for i, v in enumerate(taught))
    for name, right in (("teacher", bare), *every):
        rows += [{"model": name, "steps": n, "trained": right} for n in (1, 2, 4)]
    return rows


def test_students_are_judged_by_the_worst_of_them(bench):
    rows = bench.lazy_canvas.merged(lazy_rows(0.5, 0.4, (0.7, 0.6, 0.65)))
    assert [(r["steps"], r["dense"], r.get("trained"), r.get("trained, range")) for r in rows] == [
        (1, 0.4, 0.65, [0.6, 0.7]), (2, 0.5, 0.65, [0.6, 0.7]), (4, 0.5, 0.65, [0.6, 0.7]), (20, 0.5, None, None),
    ]  # fmt: skip
    assert all(line.endswith(": holds.") for line in bench.lazy_canvas.verdicts(rows))
    worse = bench.lazy_canvas.merged(lazy_rows(0.5, 0.44, (0.7, 0.44, 0.65)))
    assert all("does not hold" in line for line in bench.lazy_canvas.verdicts(worse))


def test_the_other_students_are_trained_as_distill_does(bench):
    """Their batches hold nothing that the method did not have to draw itself."""
    place = demo.World.load(torch.device("cpu"))
    canvas = bench.lazy_canvas
    shown, whole = (next(iter(canvas.Renders(place, 0, kind))) for kind in (canvas.SHOWN, canvas.WHOLE))
    assert type(whole) is Batch
    assert torch.equal(whole.latents, shown.latents)
    assert isinstance(shown, canvas.Shown)  # control


def test_students_are_shown_no_trace_of_what_the_hole_hides(bench):
    """The target is the true picture; what the student reads is the same whatever stands in the hole."""
    canvas = bench.lazy_canvas
    place = demo.World.load(torch.device("cpu"))
    prompts, whole, shown, mask = canvas.Renders(place, 0).drawn(torch.Generator().manual_seed(3))
    assert len(prompts) == len(whole) == canvas.TRAIN["batch"]
    hidden = (mask > 0)[:, None].expand_as(whole)
    assert (whole - shown)[hidden].abs().mean() > 0.1
    half = bench.half_hidden
    pixels = mask.repeat_interleave(half.CELL, 1).repeat_interleave(half.CELL, 2)
    scene = world.sample(len(mask), torch.Generator().manual_seed(3), pairs=0.0)
    picture = half.framed(scene)
    other = torch.where(pixels[:, None] > 0, -picture, picture)
    again = canvas.encoded(place, half.prefilled(other, pixels))
    assert torch.equal(again, shown)
    assert not torch.equal(canvas.encoded(place, other), whole)  # control


class Elsewhere(TorchDispatchMode):
    """Notes what would make a host wait for its device, and refuses operands on two devices. The device is "meta"."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        where = {v.device.type for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.ndim}
        if func is torch.ops.aten._to_copy.default and to is not None and to.type not in where:
            self.copies += 1
        elif len(where) > 1:
            raise RuntimeError(f"{func} of tensors on {sorted(where)}")
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """One that says it is on the device; nothing is drawn there."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.where = torch.device(device)

    @property
    def device(self):
        return self.where


@pytest.fixture
def elsewhere(monkeypatch):
    """reads: how often a value was asked for on the host."""
    reads = []

    def read(self):
        reads.append(1)
        return 0

    def refuse(name, terms, norm, step):
        torch.stack([v.isfinite() for v in (*terms.values(), norm)])
        reads.append(1)  # .tolist()

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.Tensor, "__int__", read)
    monkeypatch.setattr(torch.Tensor, "__float__", read)
    monkeypatch.setattr(train, "refuse_nonfinite", refuse)
    monkeypatch.setattr(train, "numbers", lambda values: reads.append(1) or {})
    return reads


@pytest.mark.parametrize("name", ["flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd15", "sdxl", "sd3"))])
def test_a_training_step_lives_on_the_device_and_waits_for_it_once_per_update(bench, elsewhere, name):
    size, training = bench.models.TINY[name], bench.training
    for side in (training.Ours(size, 1, "meta", rank=2), training.ThreeCopies(size, 1, "meta")):
        side.update()  # tables of the schedule go to the device in the first step
        elsewhere.clear()
        with Elsewhere() as seen:
            side.update()
        assert seen.copies == 0
        # six updates, then losses and norms for the report; the published loop reads nothing
        assert len(elsewhere) == (8 if isinstance(side, training.Ours) else 0)


def test_control_another_device_would_be_noticed(bench, elsewhere):
    size = bench.models.TINY["flux"]
    with pytest.raises(RuntimeError, match="cpu"), Elsewhere():
        size.net("meta")(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8, device="meta"))
    with Elsewhere() as seen:
        torch.zeros(3).to("meta")
    assert seen.copies == 1


def spin(seconds):
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


@pytest.mark.parametrize(("inside", "outside"), [(0.04, 0.0), (0.04, 0.004), (0.04, 0.02)])
def test_what_is_spent_outside_of_a_network_is_told_to_half_a_percent(bench, inside, outside):
    """By processor time, so that a busy machine changes nothing: 2 % can be seen."""

    class Net(torch.nn.Module):
        def forward(self):
            spin(inside)

    net = Net()

    def run():
        net()
        spin(outside)

    with bench.sampling.clock_on(net) as clock:
        found = bench.sampling.outside(run, clock, 3)
    assert found["overhead, %"] == pytest.approx(100 * outside / inside, abs=0.5)
    assert not net._forward_hooks


def test_only_the_first_call_is_another(bench):
    schedule = SimpleNamespace(sigma_max=1.0)

    class Inner:
        def __init__(self):
            self.schedule = schedule

        def __call__(self, x, sigma, cond):
            return "inner"

    model = bench.variety.First(Inner(), lambda x, sigma, cond: "first")
    assert [model(None, torch.tensor([s]), None) for s in (1.0, 0.9, 0.5)] == ["first", "inner", "inner"]


def test_the_demos_student_reaches_what_its_controls_miss():
    found = json.loads((ROOT / "bench" / "results" / "students.cpu.json").read_text(encoding="utf-8"))["rows"]
    right = {row["what"]: [float(v) for v in row["accuracy, seeds"].split(",")] for row in found}
    wanted = [0.98 * v for v in right["teacher_40"]]
    assert all(len(values) == 3 for values in right.values())
    assert all(a >= b for a, b in zip(right["student_4"], wanted, strict=True))
    for control in ("untrained", "student as its own critic", "wrong sign of the guidance"):
        assert all(a < b for a, b in zip(right[control], wanted, strict=True)), control


@pytest.mark.parametrize("name", ["training", "sampling"])
def test_targets_are_judged_from_the_rows_that_are_written(bench, name):
    found = json.loads((ROOT / "bench" / "results" / f"{name}.cpu.json").read_text(encoding="utf-8"))
    notes = getattr(bench, name).verdicts(found["rows"])
    assert notes
    assert set(notes) <= set(found["notes"])
    for row in found["rows"]:  # control: worse figures are judged otherwise
        row.update({k: 0.5 * v for k, v in row.items() if k.startswith(("speed", "one sample"))})
        row.update({k: 9.0 for k in row if "memory" in k or "overhead" in k})
    worse = getattr(bench, name).verdicts(found["rows"])
    assert all("does not hold" in note for note in worse)


def test_the_table_of_variety_judges_the_default_of_its_node_and_the_help_page_quotes_it(bench):
    found = json.loads((ROOT / "bench" / "results" / "variety.cpu.json").read_text(encoding="utf-8"))
    schema = json.loads((ROOT / "tests" / "golden" / "nodes.json").read_text(encoding="utf-8"))["DMD_Variety"]
    default = tuple(schema["input"]["required"][k][1]["default"] for k in ("how", "strength"))
    assert default == bench.variety.DEFAULT
    verdict = bench.variety.verdict(found["rows"])
    assert verdict in found["notes"]
    rows = {(r["what"], r["strength"]): r["distance over the teacher's"] for r in found["rows"]}
    page = (ROOT / "nodes" / "web" / "docs" / "DMD_Variety.md").read_text(encoding="utf-8")
    for key in (("student", ""), default, (default[0], 2.0)):
        assert f"{rows[key]:.1%}".replace("%", " %") in page, key
    better = [r | {"distance over the teacher's": 1.0} if r["what"] == default[0] else r for r in found["rows"]]
    worse = [r | {"prompts right": 0.5} if r["what"] == default[0] else r for r in better]
    assert bench.variety.verdict(better).endswith(": holds.")  # controls
    assert bench.variety.verdict(worse).endswith("does not hold**.")


def test_the_chart_has_whole_runs_below_the_steps_where_they_were_measured(bench, tmp_path):
    chart = importlib.import_module("bench.chart")
    both = chart.draw()
    shutil.copy(chart.RESULTS / "inpainting.cpu.json", tmp_path)
    assert both.size == (chart.draw(tmp_path).width, 2 * chart.draw(tmp_path).height)
