"""Whole copies of the network instead of LoRA sets: what they train, leave and refuse."""
# ruff: noqa: F401, F811 - fixtures of another file

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_headless import world, write
from test_layouts import BACK, NETS

from dmd_core import copies, drive, headless, shapes
from dmd_core.families import by_name
from dmd_core.plan import size
from dmd_core.processes import ALONE
from dmd_core.runs import Run
from dmd_core.weights.checkpoint import CHECKPOINT_PREFIX, base_hash, replace_weights
from dmd_core.weights.layouts import native_pieces
from dmd_core.weights.recipe import Recipe, read_recipe

QUIET = {"say": lambda line: None}


def full(folder, method="dmd2", steps=2, more="", size=32, model=""):
    """A run file as test_headless writes it, for whole copies."""
    path = write(folder, method, steps, more, size)
    path.write_text(path.read_text().replace("probe = false", f"probe = false\nfull = true\n{model}"))
    return path


@pytest.mark.parametrize(
    ("method", "more", "size", "copies"),
    [
        ("dmd2", "critic_updates = 1", 32, 2),
        ("dmd2", "critic_updates = 1\ngan_weight = 0.01\ngan_features = 'critic'", 32, 2),
        ("dmd", "", 32, 2),
        ("ladd", "", 32, 1),
        ("reflow", "", 32, 1),
        pytest.param("diffusion2gan", "", 64, 2, marks=pytest.mark.slow),
    ],
)
def test_every_method_trains_copies_and_leaves_a_model(world, method, more, size, copies):
    said, path = [], full(world, method, 2, more, size)
    folder = headless.train_from(path, say=said.append)
    assert any(f"{copies} whole cop" in line for line in said), "the plan says so"
    base = shapes.load_teacher().state_dict()
    made = next((folder / "model").glob("*.safetensors"))
    found = load_file(made)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in base.items()}
    changed = {k for k in base if not torch.equal(found[k], base[k])}
    assert len(changed) > 0.8 * len(base), "LoRA targets alone would be fewer"
    assert any(k.endswith("bias") for k in changed)
    with safe_open(made, "pt") as file:
        recipe = read_recipe(file.metadata())
    assert (recipe.objective, recipe.rank, recipe.base_hash) == (method, 0, base_hash(base))
    assert not (folder / "lora").exists()


def test_the_teacher_stays_and_every_player_has_its_own_weights(world):
    job = headless.prepare(full(world, more="critic_updates = 1", steps=2), False, lambda s: None)
    before = {k: v.clone() for k, v in job.source.net.state_dict().items()}
    players = job.method.objective.players
    addresses = [{p.data_ptr() for p in player.params.values()} for player in players.values()]
    addresses.append({p.data_ptr() for p in job.source.net.parameters()})
    assert sum(map(len, addresses)) == len(set.union(*addresses))
    assert set(players["student"].params) == {n for n, _ in job.source.net.named_parameters()}
    for _ in job.drive():
        pass
    assert all(torch.equal(v, before[k]) for k, v in job.source.net.state_dict().items())
    moved = {k: not torch.equal(p, before[k]) for k, p in players["student"].params.items()}
    assert all(moved[k] for k in moved if "joint_blocks" in k and "x_block" in k)


def test_a_copy_begins_as_the_teacher_and_an_adapter_of_the_base_does_not_reach_it(world):
    job = headless.prepare(full(world), False, lambda s: None)
    objective, cond = job.method.objective, job.pool.take(slice(0, 2))
    x, sigma = torch.randn(2, *job.source.shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.7)
    views = (objective.teacher, objective.student, objective.critic)
    with torch.no_grad():
        teacher, student, critic = (view(x, sigma, cond) for view in views)
        assert torch.equal(teacher, student)
        assert torch.equal(teacher, critic)
        job.bank.new("style", 2)
        for p in job.bank.parameters("style").values():
            p.fill_(0.1)
        with job.bank.use(style=1.0):
            assert not torch.equal(job.source.denoiser(x, sigma, cond), teacher)  # control
            assert torch.equal(objective.student(x, sigma, cond), teacher)


def test_a_copy_that_finds_no_memory_leaves_the_network_with_its_adapters(world, monkeypatch):
    job = headless.prepare(write(world), False, lambda s: None)
    hooks = [len(m._forward_hooks) for m in job.bank.layers.values()]
    monkeypatch.setattr(copies.copy, "deepcopy", lambda net: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        copies.copied(job.source, job.bank, False, ALONE)
    assert min(hooks) == 1
    assert hooks == [len(m._forward_hooks) for m in job.bank.layers.values()]


def test_a_run_of_copies_goes_on_to_the_same_bits(world):
    path = full(world, more="critic_updates = 1", steps=4)
    headless.train_from(path, **QUIET)
    whole = (world / "runs" / "tiny").rename(world / "whole")
    steps = headless.prepare(path, False, lambda s: None).drive()
    for progress in steps:
        if progress.step == 3:
            steps.close()
    headless.train_from(path, resume=True, **QUIET)
    at = Path("snapshots") / "step_00000004" / "student.safetensors"
    assert (whole / at).read_bytes() == (world / "runs" / "tiny" / at).read_bytes()
    path.write_text(path.read_text().replace("full = true", "full = false").replace("steps = 4", "steps = 5"))
    with pytest.raises(ValueError, match=r"another training \(whole copies, this is LoRA sets\)"):
        headless.train_from(path, resume=True, **QUIET)


def test_the_plan_says_what_states_and_snapshots_take(world, monkeypatch):
    """At most: while one more of each is written, with a best snapshot that is older than those that are kept."""
    path = full(world, more="critic_updates = 1", steps=5)
    path.write_text(
        path.read_text().replace("save_every = 2", "save_every = 1\nkeep = 2\nsnapshot_every = 1\nkeep_snapshots = 2")
    )
    job = headless.prepare(path, False, lambda s: None)
    made, most = job.plan(), {"states": 0, "snapshots": 0}
    monkeypatch.setattr(drive, "best_snapshot", lambda run: next(iter(run.snapshots()), None))

    def watch(kind):
        find = getattr(Run, kind)

        def found(run):
            paths = find(run)
            most[kind] = max(most[kind], len(paths))
            return paths

        monkeypatch.setattr(Run, kind, found)

    watch("states")
    watch("snapshots")
    assert list(job.drive())
    state, snapshot = job.run.states()[0], job.run.snapshots()[-1] / "student.safetensors"
    assert state.stat().st_size == pytest.approx(made.state, rel=0.03)  # its header has a name for every tensor
    assert snapshot.stat().st_size == pytest.approx(made.snapshot, rel=0.03)
    assert made.disk == most["states"] * made.state + most["snapshots"] * made.snapshot
    assert most == {"states": 3, "snapshots": 4}
    assert f"a saved state takes {size(made.state)} of disk" in made.words()
    assert f"a snapshot {size(made.snapshot)}, all of them up to {size(made.disk)} " in made.words()


class Two:
    """As a run of two processes is told of them, before it talks to anybody."""

    rank, count = 0, 2


@pytest.mark.parametrize(
    ("more", "method", "processes", "message"),
    [
        ("", "lazy_inpaint", None, "as a LoRA on the model.*LoRA sets are trained then"),
        ("gan_weight = 0.01\ngan_features = 'critic'", "dmd2", Two(), "use gan_features 'teacher'"),
        ("", "diffusion2gan", Two(), "reads a network that learns"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_copied(world, monkeypatch, more, method, processes, message):
    from dmd_core import methods

    monkeypatch.setattr(methods, "copied", lambda *args: pytest.fail("copied"))
    if processes is not None:
        build = methods.build
        monkeypatch.setattr(methods, "build", lambda *args: build(*args[:-1], processes))
    with pytest.raises(ValueError, match=message):
        headless.prepare(full(world, method, more=more, size=64), False, lambda s: None)


def test_a_quantised_base_is_refused(world, tmp_path):
    job = headless.prepare(write(world), False, lambda s: None)
    assert copies.quantised(job.file, job.source) == ""
    weight = next(p for p in job.source.net.parameters() if p.ndim == 2)
    weight.data = weight.data.to(torch.float8_e4m3fn)
    assert copies.quantised(job.file, job.source) == "float8_e4m3fn"
    weight.data = weight.data.float()
    # loading widens a file's weights: it is the file that tells
    state = {f"{CHECKPOINT_PREFIX}a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}
    save_file(state, tmp_path / "base.safetensors")
    job.file = replace(job.file, model=replace(job.file.model, path="base.safetensors"))
    assert copies.quantised(job.file, job.source) == "F8_E4M3"
    text = {f"{CHECKPOINT_PREFIX}a.weight": torch.zeros(4, 4), "cond_stage_model.b.weight": state.popitem()[1]}
    save_file(text, tmp_path / "base.safetensors")  # control: a quantised text encoder beside it learns nothing
    assert copies.quantised(job.file, job.source) == ""


def test_a_file_that_cannot_be_written_again_is_refused_before_the_training(world, tmp_path):
    job = headless.prepare(write(world), False, lambda s: None)
    state = {f"{CHECKPOINT_PREFIX}{k}": v.contiguous() for k, v in job.source.net.state_dict().items()}
    file = replace(job.file, model=replace(job.file.model, path="base.safetensors", full=True))
    base = tmp_path / "base.safetensors"
    save_file({**state, "cond_stage_model.x": torch.zeros(3, dtype=torch.int32)}, base)
    copies.refuse_copies(file, job.source, ALONE)  # control
    save_file({**state, "cond_stage_model.x": torch.zeros(3, dtype=torch.uint16)}, base)
    message = r"base\.safetensors holds tensors of type U16, which cannot be written"
    with pytest.raises(ValueError, match=message):
        copies.refuse_copies(file, job.source, ALONE)
    with pytest.raises(ValueError, match=message):
        replace_weights(tmp_path / "made", "m", base, job.source.net.state_dict(), job.source.family)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_a_model_goes_back_into_the_file_that_it_came_from(tmp_path, name):
    """diffusers' own converters undo it; VAE, text encoders and metadata of the file stay."""
    net = NETS[name]()
    state, family = {k: v.detach() for k, v in net.state_dict().items()}, by_name(name)
    pieces = native_pieces({k: tuple(v.shape) for k, v in state.items()}, family)
    native = {p: piece.join([state[k] for k in piece.keys]).half() for p, piece in pieces.items()}
    others = {"first_stage_model.x.weight": torch.randn(3, 3)}
    base = {f"{CHECKPOINT_PREFIX}{k}": v.contiguous() for k, v in native.items()} | others
    save_file(base, tmp_path / "base.safetensors", {"kept": "yes"})
    trained = {k: v + 1 for k, v in state.items()}
    recipe = Recipe(family=name, objective="dmd2")
    path = replace_weights(tmp_path, "m", tmp_path / "base.safetensors", trained, family, recipe=recipe)
    found = load_file(path)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}
    assert torch.equal(found["first_stage_model.x.weight"], others["first_stage_model.x.weight"])
    bare = {k.removeprefix(CHECKPOINT_PREFIX): v for k, v in found.items() if k not in others}
    back = BACK[name](bare)
    assert all(torch.equal(back[k].reshape(v.shape), v.half()) for k, v in trained.items())
    with safe_open(path, "pt") as file:
        assert file.metadata()["kept"] == "yes"
        assert read_recipe(file.metadata()).objective == "dmd2"
    more = trained | {"more.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place for 'more\.weight'"):
        replace_weights(tmp_path, "m", tmp_path / "base.safetensors", more, family)
    lost = next(k for k in base if k.startswith(CHECKPOINT_PREFIX))
    save_file({k: v for k, v in base.items() if k != lost}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"no place for.*that the training began with"):
        replace_weights(tmp_path, "m", tmp_path / "short.safetensors", trained, family)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "more"), [("sd15", "gan_weight = 0.01\ngan_features = 'critic'"), ("sd3", "")])
def test_diffusers_models_train_in_full_from_a_file(tmp_path, family, more):
    import diffusers_tiny

    model = diffusers_tiny.save(family, tmp_path / "model").relative_to(tmp_path)
    path = full(tmp_path, "dmd2", 2, f"critic_updates = 1\nguidance = 2\n{more}", 0)
    path.write_text(path.read_text().replace('path = "shapes"', f"path = '{model.as_posix()}'"))  # bf16, checkpointed
    folder = headless.train_from(path, **QUIET)
    found = load_file(next((folder / "model").glob("*.safetensors")))
    assert {v.dtype for v in found.values()} == {torch.bfloat16}
    state = load_file(Run(folder).states()[0])
    assert {v.dtype for k, v in state.items() if k.startswith("param/")} == {torch.float32}
    base = headless.prepare(path, True, lambda s: None).source.net.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in base.items()}
    assert any(not torch.equal(v, found[k]) for k, v in base.items())
