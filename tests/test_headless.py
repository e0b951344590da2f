"""Run files, headless runs on a tiny shapes world, and several processes as one."""

import contextlib
import copy
import os
import shutil
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ring
from toy import MLP

from dmd_core import headless, shapes, snapshots, views
from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.drive import DriveConfig, drive
from dmd_core.objectives.diffusion2gan import Perceptual
from dmd_core.objectives.dmd2 import DMD2, DMD2Config
from dmd_core.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from dmd_core.processes import ALONE, Rows, Shared, SharedBatches
from dmd_core.runfile import parse_run_file, read_run_file
from dmd_core.runs import Run
from dmd_core.schedule import Flow
from dmd_core.train import TrainConfig, train
from dmd_core.trainstate import config_hash
from dmd_core.weights.lora import read_lora

ROOT = Path(__file__).resolve().parents[1]
LEAST = 'model = "shapes"\n[run]\nname = "a"\n[data]\nprompts = ["a red circle", "a blue star"]\n'


class TestRunFile:
    def test_defaults_are_those_of_the_classes(self):
        file = parse_run_file(LEAST)
        assert file.train == TrainConfig()
        assert file.model.path == "shapes"
        assert (file.method.name, file.method.steps, file.method.options) == ("dmd2", 4, {})
        assert parse_run_file(LEAST + '[method]\nname = "dmd"\n').method.steps == 1

    def test_every_field_of_a_method_is_accepted(self):
        text = (
            '[method]\nguidance = 3\nema = "none"\nstudent_betas = [0, 0.9]\nsigmas = [1.0, 0.5]\ntrajectory = true\n'
        )
        options = parse_run_file(LEAST + text).method.options
        assert options == {
            "guidance": 3.0,
            "ema": None,
            "student_betas": (0.0, 0.9),
            "sigmas": (1.0, 0.5),
            "trajectory": True,
        }
        assert isinstance(options["guidance"], float)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[train]\nstepz = 3", r"\[train\] has no 'stepz'; did you mean 'steps'\? settings: .*clip.*seed"),
            ("[trian]\n", r"has no 'trian'; did you mean 'train'"),
            ("[train]\nsteps = 'many'", r"\[train\] steps is 'many' \(a text\); a whole number is accepted"),
            ("[train]\nsteps = true", r"steps is True \(true or false\); a whole number"),
            ("[train]\nclip = '1'", "a number is accepted"),
            ("[train]\nsteps = 0", r"\[train\] steps is 0"),
            ("[method]\nname = 'dmd3'", "methods are dmd2, dmd, ladd, diffusion2gan, reflow"),
            ("[method]\nguidence = 3", "did you mean 'guidance'"),
            ("[method]\nname = 'ladd'\nguidance = 3", r"\[method\] has no 'guidance'"),
            ("[method]\nstudent_betas = [0.9]", "a list of 2 numbers is accepted"),
            ("[method]\nema = 'x'", "a number or 'none' is accepted"),
            ("[drive]\nkeep = 0", "keep is 0"),
            ("lora = 3", r"\[data\] has no 'lora'"),
            ("[x", "not TOML"),
        ],
    )
    def test_mistakes_are_named_with_what_is_accepted(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_run_file(LEAST + text)

    @pytest.mark.parametrize("lack", ["name", "model", "prompts"])
    def test_what_every_run_needs(self, lack):
        text = "\n".join(line for line in LEAST.splitlines() if not line.startswith(lack))
        with pytest.raises(ValueError, match=r"lacks (name|path)|takes prompts .* or pictures"):
            parse_run_file(text)

    @pytest.mark.parametrize("name", ["../x", "/x", "a/b", "CON", "C:x"])
    def test_names_cannot_lead_out_of_the_root(self, name):
        with pytest.raises(ValueError, match="run name"):
            parse_run_file(LEAST.replace('"a"', f"'{name}'"))

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=80) | st.sampled_from(LEAST.splitlines()).map(lambda s: s * 2))
    def test_any_text_gives_a_file_or_a_value_error(self, text):
        with contextlib.suppress(ValueError):
            parse_run_file(LEAST + text)

    def test_a_table_that_is_none_is_named(self):
        with pytest.raises(ValueError, match=r"lora is 3; it is a table, write \[lora\]"):
            parse_run_file("lora = 3\n" + LEAST)

    def test_unreadable_files_are_named(self, tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_run_file(tmp_path / "none.toml")
        (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match="not UTF-8"):
            read_run_file(tmp_path / "x.toml")

    @pytest.mark.parametrize("given", ["m.safetensors", "~/m.safetensors", "{here}/m.safetensors"])
    @pytest.mark.parametrize("place", ["beside", "home", "here"])
    def test_the_model_is_beside_the_file_at_home_or_where_one_stands(self, tmp_path, monkeypatch, place, given):
        for folder in ("beside", "home", "here"):
            (tmp_path / folder).mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path / "here")
        (tmp_path / place / "m.safetensors").touch()
        text = LEAST.replace("shapes", given.format(here=tmp_path / "here"))
        file = parse_run_file(text, tmp_path / "beside")
        found = {"m": ("beside", "here"), "~": ("home",)}.get(given[0], ("here",))
        if place in found:
            assert file.base_file.samefile(tmp_path / place / "m.safetensors")
        else:
            assert file.base_file is None

    def test_the_reproduction_kit_is_a_valid_run_file(self):
        file = read_run_file(ROOT / "scripts" / "sdxl_dmd2_24gb.toml")
        assert (file.method.name, file.method.steps, file.train.precision) == ("dmd2", 4, "bf16")
        assert "NOT YET RUN" in (ROOT / "scripts" / "sdxl_dmd2_24gb.toml").read_text()
        DMD2Config(sigmas=(1.0,), **file.method.options)


# --- runs on the shapes world, with untrained networks: what is tested is the wiring


def small_world(monkeypatch):
    def seeded(make):
        def build():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return make().eval().requires_grad_(False)

        return build

    monkeypatch.setattr(shapes, "load_teacher", seeded(lambda: shapes.teacher.Teacher(depth=2)))
    monkeypatch.setattr(shapes, "load_text_encoder", seeded(shapes.text.TextEncoder))
    monkeypatch.setattr(shapes, "load_autoencoder", seeded(shapes.autoencoder.Autoencoder))
    monkeypatch.setattr(shapes, "load_recogniser", seeded(shapes.recogniser.Recogniser))


@pytest.fixture
def world(monkeypatch, tmp_path):
    small_world(monkeypatch)
    return tmp_path


RUN = """
[run]
name = "tiny"
[model]
path = "shapes"
size = {size}
device = "cpu"
probe = false
[data]
prompts = ["a red circle", "a blue star", "a green square"]
batch = 2
pairs = 2
pair_steps = 2
[lora]
rank = 2
[method]
name = "{method}"
head_width = 8
features = 2
{more}
[train]
steps = {steps}
[drive]
save_every = 2
[samples]
count = 2
teacher_steps = 2
"""


def write(folder, method="dmd2", steps=3, more="", size=32):
    path = folder / "RUN.toml"
    path.write_text(RUN.format(method=method, steps=steps, more=more, size=size))
    return path


@pytest.mark.parametrize(
    ("method", "more", "size"),
    [
        ("dmd2", "critic_updates = 1", 32),
        ("dmd", "", 32),
        ("ladd", "", 32),
        ("reflow", "", 32),
        pytest.param("diffusion2gan", "", 64, marks=pytest.mark.slow),
        pytest.param("dmd2", "critic_updates = 1\ngan_weight = 0.01", 32, marks=pytest.mark.slow),
        ("dmd2", "critic_updates = 1\ngan_weight = 0.01\ngan_features = 'critic'", 32),
        ("dmd", "warm_up = 1", 32),
        ("dmd", "regression = 'perceptual'", 32),
    ],
)
def test_every_method_runs_from_a_file_and_leaves_a_lora(world, method, more, size):
    said = []
    folder = headless.train_from(write(world, method, 2, more, size), say=said.append)
    assert folder == world / "runs" / "tiny"
    run = Run(folder)
    assert len(run.history()) == 2
    assert any("2 steps of" in s for s in said), "the plan comes first"
    file = read_lora(next((folder / "lora").glob("*.safetensors")))
    assert file.recipe.objective == method
    assert len(file.recipe.sigmas) == file.recipe.steps + 1
    assert any(up.any() for _, up in file.modules.values()), "the student has learned nothing"
    assert (run.snapshots()[-1] / "sheet.png").exists()
    assert run.settings()["file"]["method"]["name"] == method
    assert len(list((folder / "pairs").glob("*.safetensors"))) == (0 if "gan" not in more and method == "dmd2" else 2)


def test_the_contact_sheet_says_who_drew_a_row_and_in_how_many_steps(world, monkeypatch):
    shown, make = [], snapshots.sheet
    monkeypatch.setattr(snapshots, "sheet", lambda *args: shown.append(args[1]) or make(*args))
    headless.train_from(write(world, steps=1), say=lambda s: None)
    assert shown == [["teacher, 2 steps", "student, 4 steps, update 1"]]


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_one_sentence(world, monkeypatch, device):
    path = write(world)
    path.write_text(path.read_text().replace('device = "cpu"', f'device = "{device}"'))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=rf"device is '{device}', but torch finds 0 CUDA devices; use 'auto' or 'cpu'"):
        headless.train_from(path, say=lambda s: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # control
    assert headless.fellows(headless.read_run_file(path))[1] == torch.device(device)


def test_a_method_knows_how_long_its_run_is(world):
    made = [headless.prepare(write(world, "ladd", n), True, lambda s: None).method.objective for n in (10, 30)]
    assert [m.early for m in made] == [2, 6]
    assert config_hash(made[0].config) == config_hash(made[1].config), "a longer run goes on with the same settings"


def test_a_run_that_stopped_goes_on_to_the_same_student(world, tmp_path):
    path = write(world, more="critic_updates = 1", steps=4)
    headless.train_from(path, say=lambda s: None)
    whole = (world / "runs" / "tiny").rename(world / "whole")
    steps = headless.prepare(path, False, lambda s: None).drive()
    for progress in steps:
        if progress.step == 3:
            steps.close()
    with pytest.raises(ValueError, match="has begun already; go on with --resume"):
        headless.train_from(path, say=lambda s: None)
    said = []
    headless.train_from(path, resume=True, say=said.append)
    assert "run 'tiny' goes on at step 3 of 4" in said
    assert not any("prompts encoded" in s for s in said), "they are on disk"
    for name in ("student.safetensors", "measures.json"):
        parts = [f / "snapshots" / "step_00000004" / name for f in (whole, world / "runs" / "tiny")]
        assert parts[0].read_bytes() == parts[1].read_bytes()


def reseeded(monkeypatch, seed):
    """Another teacher of the same family."""
    teacher = shapes.load_teacher()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for p in teacher.parameters():
            p.data = p.data + 0.1 * torch.randn_like(p)
    monkeypatch.setattr(shapes, "load_teacher", lambda: copy.deepcopy(teacher))


class Writer:
    """SummaryWriter, as much of it as is used."""

    def __init__(self, folder):
        self.folder, self.scalars, self.closed = folder, [], False
        WRITERS.append(self)

    def add_scalar(self, name, value, step):
        assert not self.closed
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


WRITERS: list[Writer] = []


def with_tensorboard(monkeypatch, found):
    made = types.ModuleType("torch.utils.tensorboard")
    made.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made if found else None)
    WRITERS.clear()


def test_tensorboard_gets_every_loss_and_norm_of_every_step(world, monkeypatch):
    with_tensorboard(monkeypatch, True)
    path = write(world, more="critic_updates = 1", steps=2)
    folder = headless.train_from(path, say=lambda s: None)
    (writer,) = WRITERS
    expected = []
    for record in Run(folder).history():
        values = record["losses"] | {f"norm/{k}": v for k, v in record["norms"].items()}
        expected += [(k, v, record["step"]) for k, v in values.items()]
    assert writer.scalars == expected
    assert {name for name, _, _ in expected} >= {"student/dmd", "critic/denoise", "norm/student", "norm/critic"}
    assert (writer.folder, writer.closed) == (str(folder / "tensorboard"), True)
    write(world, more="critic_updates = 1", steps=3)
    headless.train_from(path, resume=True, say=lambda s: None)
    assert {step for _, _, step in WRITERS[1].scalars} == {3}


def test_without_tensorboard_and_after_an_error_nothing_is_left_open(world, monkeypatch):
    with_tensorboard(monkeypatch, False)
    path = write(world, more="critic_updates = 1", steps=1)
    assert not (headless.train_from(path, say=lambda s: None) / "tensorboard").exists()
    with_tensorboard(monkeypatch, True)
    monkeypatch.setattr(headless, "line", lambda progress: 1 / 0)
    write(world, more="critic_updates = 1", steps=2)
    with pytest.raises(ZeroDivisionError):
        headless.train_from(path, resume=True, say=lambda s: None)
    assert [w.closed for w in WRITERS] == [True]


def test_a_run_does_not_go_on_with_another_model_or_rank(world, monkeypatch):
    """It would without a word: its states fit every model of the family."""
    path = write(world, more="critic_updates = 1", steps=2)
    folder = headless.train_from(path, say=lambda s: None)
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    write(world, more="critic_updates = 1", steps=4)
    with monkeypatch.context() as patch:
        reseeded(patch, 1)
        with pytest.raises(ValueError, match=r"another model \(shapes, of other weights.*choose another run"):
            headless.train_from(path, resume=True, say=lambda s: None)
    path.write_text(path.read_text().replace("rank = 2", "rank = 3"))
    with pytest.raises(ValueError, match=r"another rank \(2, this is 3\), another critic rank"):
        headless.train_from(path, resume=True, say=lambda s: None)
    assert kept == {p: p.read_bytes() for p in kept}, "a refused start leaves the run as it was"
    path.write_text(path.read_text().replace("rank = 3", "rank = 2"))
    headless.train_from(path, resume=True, say=lambda s: None)  # control
    assert len(Run(folder).history()) == 4


def test_a_start_that_came_to_nothing_leaves_no_pictures_of_its_teacher(world, monkeypatch):
    path, pictures = write(world, more="critic_updates = 1", steps=1), []
    for seed in (0, 1):
        reseeded(monkeypatch, seed)
        folder = headless.train_from(path, say=lambda s: None)
        pictures.append((folder / "reference.safetensors").read_bytes())
        for state in Run(folder).states():
            state.unlink()
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("method", "more", "rows"),
    [
        ("dmd2", "critic_updates = 1", 3),
        ("dmd2", "critic_updates = 1\nbackward_simulation = false", 3),
        ("dmd", "", 3),
        ("ladd", "early_steps = 0\nstudent_lr = 0.1\nloss = 'softplus'", 2),
        ("reflow", "lr = 0.1", 2),
        ("lazy_inpaint", "adapt = 1\ncritic_updates = 1\nstudent_lr = 0.1", 3),
        ("lazy_ladd", "adapt = 1\nearly_steps = 0\nstudent_lr = 0.1", 2),
        pytest.param("diffusion2gan", "", 2, marks=pytest.mark.slow),
    ],
)
def test_every_method_shows_the_student_as_it_is_now_and_who_looks_at_it(world, monkeypatch, method, more, rows):
    shown, make = [], views.sheet
    monkeypatch.setattr(views, "sheet", lambda *args: shown.append(args) or make(*args))
    path = write(world, method, 2, f"{more}\nema = 'none'", 64)
    path.write_text(path.read_text().replace("save_every = 2", "save_every = 2\npreview_every = 1"))
    job = headless.prepare(path, False, lambda s: None)
    drawn = [p.preview for p in job.drive() if p.preview is not None]
    (before, labels), (after, _) = shown
    assert len(drawn) == 2
    assert labels == ["student", "the teacher sees", "the critic sees"][:rows]
    assert len(before) == rows
    assert all(len(row) >= 2 for row in before)
    assert not torch.equal(before[0], after[0]), "it is not the student that learns"
    again = views.preview_of(job)()
    assert again.tobytes() == drawn[-1].tobytes(), "another start shows other noise"  # control: nothing was learned


def test_a_gan_reads_the_teacher_or_the_critic_which_then_learns_from_it(world):
    learned = {}
    for features in ("teacher", "critic"):
        more = f"critic_updates = 1\ngan_weight = 0.01\ngan_features = '{features}'"
        job = headless.prepare(write(world, more=more), True, lambda s: None)
        with job.run.locked():
            job.make_pairs(1)
        objective = job.method.objective
        batch, rng = next(job.batches().seek(0)), torch.Generator().manual_seed(0)
        gan = objective.terms("critic", batch, rng)["gan"]
        params = objective.players["critic"].params
        found = torch.autograd.grad(gan, list(params.values()), allow_unused=True)
        learned[features] = {k: g is not None and bool(g.any()) for k, g in zip(params, found, strict=True)}
    lora = [k for k in learned["teacher"] if not k.startswith("head.")]
    assert any(learned["critic"][k] for k in lora)
    assert not any(learned["teacher"][k] for k in lora)
    assert all(any(v for k, v in found.items() if k.startswith("head.")) for found in learned.values())
    write(world, more="gan_weight = 0.01\ngan_features = 'student'")
    with pytest.raises(ValueError, match="use 'teacher' or 'critic'"):
        headless.prepare(world / "RUN.toml", True, lambda s: None)


def test_dmd_reads_the_teacher_where_its_regression_is_perceptual(world):
    for regression, kind in (("perceptual", Perceptual), ("mse", types.FunctionType)):
        more = f"regression = '{regression}'"
        objective = headless.prepare(write(world, "dmd", more=more), True, lambda s: None).method.objective
        assert isinstance(objective.distance, kind)
        if regression == "perceptual":
            assert objective.distance.reader.denoiser.scales == {}


def test_an_untrained_network_is_refused_as_a_teacher(world):
    path = write(world)
    path.write_text(path.read_text().replace("probe = false", "probe = true"))
    with pytest.raises(ValueError, match="cannot be the teacher"):
        headless.train_from(path, say=lambda s: None)
    assert not Run(world / "runs" / "tiny").states()


def test_a_model_that_is_not_there_is_named(world):
    path = write(world)
    path.write_text(path.read_text().replace('path = "shapes"', 'path = "nowhere"'))
    with pytest.raises(ValueError, match="nowhere does not exist"):
        headless.train_from(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"), [("sd15", ""), ("sd15", "gan_weight = 0.01"), ("sdxl", ""), ("flux_schnell", "")]
)
def test_diffusers_models_run_from_a_file(tmp_path, family, more):
    import diffusers_tiny

    model = diffusers_tiny.save(family, tmp_path / "model").relative_to(tmp_path)  # beside the run file
    path = write(tmp_path, "dmd2", 2, f"critic_updates = 1\nguidance = 2\n{more}", 0)
    path.write_text(path.read_text().replace('path = "shapes"', f"path = '{model.as_posix()}'\ndtype = 'fp32'"))
    folder = headless.train_from(path, say=lambda s: None)
    file = read_lora(next((folder / "lora").glob("*.safetensors")))
    assert file.recipe.family == family.partition("_")[0]
    assert file.recipe.steps == 4
    assert any(up.any() for _, up in file.modules.values())


# --- several processes


class Threads:
    """Processes that are threads: the same collectives, no launcher."""

    def __init__(self, rank, shared):
        self.rank, self.count, self.shared = rank, len(shared["slots"]), shared

    def mean(self, tensors):
        values = self.exchange([t.clone() for t in tensors])
        for i, t in enumerate(tensors):
            t.copy_(torch.stack([v[i] for v in values]).mean(0))

    def share(self, value):
        return self.exchange(value)[0]

    def exchange(self, value):
        self.shared["slots"][self.rank] = value
        self.shared["barrier"].wait(60)
        found = list(self.shared["slots"])
        self.shared["barrier"].wait(60)
        return found


def objective(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [MLP(8).double() for _ in range(2)]
    models = [NetDenoiser(Doubled(n), Flow(), Prediction.FLOW, torch.float64) for n in nets]
    params = [dict(n.named_parameters()) for n in nets]
    if kind == "rectified_flow":
        return RectifiedFlow(models[0], params[0], RectifiedFlowConfig(lr=1e-2))
    config = DMD2Config(sigmas=(1.0, 0.5), guidance=1.0, critic_updates=2, student_lr=1e-2, critic_lr=1e-2)
    return DMD2(ring(Flow()), *models, None, *params, config)


class Doubled:
    """MLP's waves of the timestep are fp32 constants."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x, timestep, cond):
        return self.net(x, timestep.double(), cond)


def batches(kind, n=8):
    for i in range(1000):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(n, 2, generator=g, dtype=torch.float64)
        yield (x, None) if kind == "rectified_flow" else Batch(None, (n, 2))


CONFIG = TrainConfig(steps=5, clip=0.5)
DRIVE = DriveConfig(snapshot_every=0, preview_every=0)


def flat(own):
    return {f"{k}.{n}": p.detach().clone() for k, pl in own.players.items() for n, p in pl.params.items()}


def learn(kind, own, processes=None, n=8):
    data = batches(kind, n)
    if processes is not None:
        wrapped, data = Shared(own, processes), SharedBatches(data, processes)
    else:
        wrapped = own
    reports = list(train(wrapped, data, CONFIG, reduce=processes.mean if processes else None))
    return flat(own), [r.losses for r in reports]


def side_by_side(work):
    """What work(rank, processes) gives in each of two processes."""
    shared, found = {"slots": [None] * 2, "barrier": threading.Barrier(2, timeout=300)}, [None] * 2

    def one(rank):
        found[rank] = work(rank, Threads(rank, shared))

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(300)
    return found


def together(kind, work):
    own = [objective(kind) for _ in range(2)]  # not in the threads: they share the generator that networks start from
    return side_by_side(lambda rank, processes: work(own[rank], processes))


@pytest.mark.parametrize(("kind", "n"), [("dmd2", 8), ("dmd2", 2), ("rectified_flow", 8)])
def test_two_equal_one_with_the_double_batch(kind, n):
    expected, losses = learn(kind, objective(kind), n=n)
    for params, seen in together(kind, lambda own, processes: learn(kind, own, processes, n)):
        for k, v in expected.items():
            torch.testing.assert_close(params[k], v, rtol=1e-6, atol=1e-9)
        for a, b in zip(seen, losses, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_two_go_on_from_a_run_that_was_cancelled_in_its_first_step(tmp_path):
    """Its state is of step 0, and its critic has learned."""
    broken_off, run = objective("dmd2"), Run(tmp_path / "run")
    begun = flat(broken_off)
    terms = broken_off.terms
    broken_off.terms = lambda player, *rest: terms(player, *rest) if player == "critic" else cancel()
    with pytest.raises(KeyboardInterrupt):
        list(drive(broken_off, batches("dmd2"), CONFIG, run, DRIVE))
    assert [p.name for p in run.states()] == ["state_00000000.safetensors"]
    moved = {k for k, v in flat(broken_off).items() if not torch.equal(v, begun[k])}
    assert moved == {k for k in begun if k.startswith("critic")}, "else both processes would have it from the start"
    shutil.copytree(run.path, tmp_path / "alone")

    def go_on(own, processes=ALONE, folder=run.path):
        list(drive(own, batches("dmd2"), CONFIG, Run(folder), DRIVE, processes=processes))
        return flat(own)

    expected = go_on(objective("dmd2"), folder=tmp_path / "alone")
    for params in together("dmd2", go_on):
        for k, v in expected.items():
            torch.testing.assert_close(params[k], v, rtol=1e-6, atol=1e-9)


def cancel():
    raise KeyboardInterrupt


def test_without_its_rows_of_the_noise_it_would_not():
    """The control: two processes that draw the same noise for different rows."""
    whole = torch.randn(8, 2, generator=torch.Generator().manual_seed(3))
    for rank in (0, 1):
        with Rows(rank, 2, 4):
            mine = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
            level = torch.randint(9, (1,), generator=torch.Generator().manual_seed(3))
        assert torch.equal(mine, whole[4 * rank : 4 * rank + 4])
        assert torch.equal(level, torch.randint(9, (1,), generator=torch.Generator().manual_seed(3)))
    naive = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(naive, whole[4:])


@pytest.mark.parametrize(
    "draw",
    [
        lambda g, n: torch.rand(n, generator=g),
        lambda g, n: torch.rand((n, 1, 2), generator=g),
        lambda g, n: torch.randint(0, 9, (n,), generator=g),
        lambda g, n: torch.randint(9, size=(n,), generator=g),
        lambda g, n: torch.randn(size=(n, 3), generator=g),
        lambda g, n: torch.multinomial(torch.ones(5), n, replacement=True, generator=g),
        lambda g, n: torch.multinomial(torch.ones(5), num_samples=n, replacement=True, generator=g),
    ],
)
def test_each_kind_of_draw_is_shared_out(draw):
    whole = draw(torch.Generator().manual_seed(1), 6)
    parts = []
    for rank in range(3):
        with Rows(rank, 3, 2):
            parts.append(draw(torch.Generator().manual_seed(1), 2))
    assert torch.equal(torch.cat(parts), whole)


def test_a_batch_that_cannot_be_shared_is_named():
    shared = {"slots": [None] * 3, "barrier": None}
    with pytest.raises(ValueError, match="batch of 8 cannot be shared by 3"):
        next(iter(SharedBatches(batches("dmd2"), Threads(0, shared))))


# breaks off after three steps, then goes on from the folder
SCRIPT = """
import sys
sys.path.insert(0, r"{tests}")
import conftest, torch, test_headless as t
from safetensors.torch import save_file
from accelerate import Accelerator
from dmd_core.processes import Accelerated
from dmd_core.drive import DriveConfig, drive
from dmd_core.runs import Run
from pathlib import Path
p = Accelerated(Accelerator(cpu=True))
assert p.count == 2
own = t.objective("dmd2")
run = Run(Path(r"{out}") / "run")
settings = DriveConfig(save_every=2, snapshot_every=0)
steps = drive(own, t.batches("dmd2"), t.CONFIG, run, settings, processes=p)
for progress in steps:
    if progress.step == 3: break
steps.close()
p.share(0)
own = t.objective("dmd2")
for progress in drive(own, t.batches("dmd2"), t.CONFIG, run, settings, processes=p): pass
save_file(t.flat(own), r"{out}/rank%d.safetensors" % p.rank)
"""


@pytest.mark.slow
def test_two_launched_processes_equal_one_and_resume(tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "job.py").write_text(SCRIPT.format(tests=ROOT / "tests", out=tmp_path))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # accelerate's own launcher starts several CPU processes only through MPI; torchrun sets the same variables
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    launch += ["--master_port", str(port)]
    out = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "job.py")], capture_output=True, text=True, env=env, timeout=1500
    )
    assert out.returncode == 0, out.stderr[-3000:]
    expected, _ = learn("dmd2", objective("dmd2"))
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        for k, v in expected.items():
            torch.testing.assert_close(found[k], v, rtol=1e-6, atol=1e-9)
