"""The benchmarks: the page is what the results say, CPU results hold no absolute times, both sides train."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "bench" / "results").glob("*.json"))
TIMES = ("_ms", "seconds", "s per", "milliseconds")  # in the name of a column


@pytest.fixture
def bench(monkeypatch):
    """The package beside dmd_core; the root must not stay on the path, where nodes/ would shadow ComfyUI's nodes.py."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("cuda", "models", "page", "record", "training"):
        importlib.import_module(f"bench.{name}")
    yield sys.modules["bench"]
    for name in [n for n in sys.modules if n == "bench" or n.startswith("bench.")]:
        del sys.modules[name]


def test_the_page_is_what_the_results_say(bench, tmp_path):
    assert bench.page.PAGE.read_text(encoding="utf-8") == bench.page.render()
    assert "Not run" in bench.page.render(tmp_path)  # control: without results there are no figures
    assert "| --- |" not in bench.page.render(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_result_says_where_it_comes_from(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"].startswith("python -m bench ")
    assert found["machine"]["processor"]
    assert {"python", "torch", "diffusers", "commit"} <= found["versions"].keys()
    assert isinstance(found["seed"], int)
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
    size = replace(
        training.SMALL["sd15"],
        build=lambda: bench.models.unet(
            block_out_channels=(32, 32),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        shape=(4, 8, 8),
        width=16,
    )
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
    with pytest.raises(SystemExit, match="not run"):
        bench.cuda.main()
    assert not list(tmp_path.iterdir())
