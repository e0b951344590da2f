"""What goes wrong while a run goes on: kills, full disks, full devices, numbers that are none. For every method."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from einops import rearrange
from oracle import ring
from slider_worlds import world as slider_world
from test_runs import OFTEN, in_child, same, weights
from torch import Tensor, nn
from toy import LAYERS, MLP, ONE, copy_of, named

from dmd_core import objectives
from dmd_core.conditioning import Cond
from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.discriminators import Discriminator, FeatureReader
from dmd_core.drive import drive
from dmd_core.families import GENERIC
from dmd_core.inpaint.partial import cells
from dmd_core.objectives.diffusion2gan import Diffusion2GAN, Diffusion2GANConfig, Perceptual, noise_input
from dmd_core.objectives.dmd import DMD, DMDConfig
from dmd_core.objectives.dmd2 import DMD2, DMD2Config
from dmd_core.objectives.image_slider import ImageSlider, ImageSliderConfig
from dmd_core.objectives.image_slider import Pairs as PicturePairs
from dmd_core.objectives.ladd import LADD, LADDConfig
from dmd_core.objectives.lazy_inpaint import LazyInpaint, LazyInpaintConfig
from dmd_core.objectives.lazy_ladd import LazyLADD, LazyLADDConfig
from dmd_core.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from dmd_core.objectives.slider_space import SliderSpace, SliderSpaceConfig
from dmd_core.objectives.text_slider import TextSlider, TextSliderConfig, Words
from dmd_core.pairs import make_pairs
from dmd_core.prompts import PromptCache
from dmd_core.runs import Run, step_of
from dmd_core.schedule import Flow
from dmd_core.snapshots import Gallery
from dmd_core.train import NonFinite, TrainConfig
from dmd_core.trainstate import TrainState
from dmd_core.weights.checkpoint import save_model
from dmd_core.weights.lora import save_lora

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# --- every method, small; fresh and equal at every call


FEATURES = [f"mlp.{name}" for name in LAYERS]


class Told(nn.Module):
    """A velocity that depends on what it is told."""

    def __init__(self):
        super().__init__()
        self.mlp, self.told = MLP(16), nn.Linear(3, 2)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor | None) -> Tensor:
        out = self.mlp(x, timestep, cond)
        return out if cond is None else out + self.told(cond)


def net(seed: int = 0) -> NetDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NetDenoiser(Told().requires_grad_(False), Flow(), Prediction.FLOW)


def heads_on(model: NetDenoiser) -> Discriminator:
    reader, rng = FeatureReader(model, model.net, FEATURES), torch.Generator().manual_seed(0)
    return Discriminator.on(reader, torch.zeros(4, 2), torch.full((4,), 0.5), None, rng, width=16)


class At:
    """Batches whose position alone decides what they are; `harm` may change one."""

    def __init__(self, make: Callable[[int], object], harm: Callable[[int, object], object] = lambda i, b: b):
        self.make, self.harm = make, harm

    def seek(self, cursor: int) -> Iterator[object]:
        for i in count(cursor):
            yield self.harm(i, self.make(i))

    def __iter__(self) -> Iterator[object]:
        return self.seek(0)


def batch(i: int) -> Batch:
    g = torch.Generator().manual_seed(i)
    noise = torch.randn(8, 2, generator=g)
    return Batch(torch.randn(8, 3, generator=g), (8, 2), 0.5 * noise + 1, noise)


def as_tuple(i: int) -> tuple[Tensor, Tensor, Tensor]:
    b = batch(i)
    return b.latents, b.cond, b.noise


def dmd():
    student, critic = copy_of(net()), copy_of(net())
    settings = DMDConfig(sigmas=ONE, guidance=1.0)
    return DMD(net(1), student, critic, None, named(student), named(critic), settings), At(batch)


def dmd2_with_gan():
    student, critic = copy_of(net()), copy_of(net())
    gan = {"gan_weight": 0.01, "r1_weight": 0.1}
    config = DMD2Config(sigmas=(1.0, 0.5), guidance=2.0, critic_updates=2, synchronise=0.03, **gan)
    params = named(student), named(critic)
    return DMD2(net(1), student, critic, torch.zeros(1, 3), *params, config, heads_on(critic)), At(batch)


def ladd():
    student = copy_of(net())
    return LADD(student, named(student), heads_on(net(1)), LADDConfig(sigmas=(1.0, 0.5), early_steps=5)), At(batch)


def diffusion2gan():
    student, trunk, base = copy_of(net()), copy_of(net()), net(1)
    metric, noise = Perceptual(FeatureReader(base, base.net, FEATURES)), noise_input(2, maps=False)
    config = Diffusion2GANConfig(sigmas=ONE, r1_every=3)
    return Diffusion2GAN(student, named(student), metric, [heads_on(trunk)], named(trunk), noise, config), At(batch)


def reflow():
    student = copy_of(net())
    return RectifiedFlow(student, named(student), RectifiedFlowConfig(lr=1e-3)), At(as_tuple)


def slider():
    """A model to slide, its prompts, and the generator that its adapters start from."""
    model, cond = slider_world(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    return model, cond, torch.Generator().manual_seed(1)


def latents_and_row(i: int) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(i)), torch.zeros(8, dtype=torch.long)


def text_slider():
    model, cond, rng = slider()
    model.bank.new("s", 2, rng)
    return TextSlider(model, "s", Words(cond[:1], cond[1:2], cond[2:]), TextSliderConfig()), At(latents_and_row)


def image_slider():
    model, cond, rng = slider()
    model.bank.new("s", 2, rng)
    pictures = {s: torch.randn(4, 4, generator=torch.Generator().manual_seed(2)) + s for s in (1.0, -1.0)}
    pairs = PicturePairs(pictures, batch=2)
    return ImageSlider(model, "s", cond[:1], pairs.strengths, ImageSliderConfig()), pairs


def slider_space():
    model, cond, rng = slider()
    directions = {}
    for i, name in enumerate(("a", "b")):
        model.bank.new(name, 2, rng)
        directions[name] = (torch.eye(4)[i], 1.0)
    return SliderSpace(model, directions, lambda x: x, cond, SliderSpaceConfig()), At(latents_and_row)


class Patches(nn.Module):
    """One layer over the tokens of a picture, as a transformer has them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
        return rearrange(found, "b (h w) (c p q) -> b c (h p) (w q)", h=x.shape[-2] // 2, p=2, q=2)


class Holes:
    """Pictures of 4 x 4 tokens; the context goes through the same layer, which is beside the point here."""

    def __init__(self):
        (self.net, self.teacher), (own, student), (judge, self.critic) = (self.layer(i, i > 0) for i in range(3))
        self.params = dict(own.named_parameters()), dict(judge.named_parameters())

        @dataclass
        class Filled:
            canvas: Tensor
            hole: Tensor
            schedule = student.schedule

            def __call__(self, x: Tensor, sigma: Tensor, cond: object) -> Tensor:
                return torch.where(cells(self.hole, x, 2), student(x, sigma, cond), self.canvas)

        self.filler, self.batches = Filled, At(self.picture)

    @staticmethod
    def layer(seed: int, learns: bool) -> tuple[nn.Module, NetDenoiser]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = Patches().requires_grad_(learns)
        return net, NetDenoiser(lambda x, timestep, cond: net(x), Flow(), Prediction.FLOW)

    @staticmethod
    def picture(i: int) -> Batch:
        canvas = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(i))
        return Batch(torch.zeros(2, 3), (2, 2, 8, 8), canvas)


def lazy_inpaint():
    at = Holes()
    config = LazyInpaintConfig(sigmas=(1.0, 0.5), guidance=1.0, critic_updates=2, adapt=4)
    return LazyInpaint(at.teacher, at.filler, at.critic, None, *at.params, config), at.batches


def lazy_ladd():
    at = Holes()
    x, rng = torch.zeros(2, 2, 8, 8), torch.Generator().manual_seed(0)
    judge = Discriminator.on(
        FeatureReader(at.teacher, at.net, ["layer"]), x, torch.full((2,), 0.5), None, rng, width=16
    )
    config = LazyLADDConfig(sigmas=(1.0, 0.5), adapt=4, early_steps=2)
    return LazyLADD(at.teacher, at.filler, None, at.params[0], judge, config), at.batches


LAZY = (lazy_inpaint, lazy_ladd)
MAKERS = (dmd, dmd2_with_gan, ladd, diffusion2gan, reflow, text_slider, image_slider, slider_space, *LAZY)
METHODS = {make.__name__: make for make in MAKERS}


def go(made, run: Run, steps: int = 12, settings=OFTEN, pause: float = 0.0, **more):
    objective, batches = made
    reached = []
    for progress in drive(objective, batches, TrainConfig(steps=steps), run, settings, **more):
        reached.append(progress)
        time.sleep(pause)
    return reached


def test_no_method_is_left_out():
    folder = Path(objectives.__file__).parent
    methods = {p.stem for p in folder.glob("*.py")} - {
        "__init__",
        "generation",
        "holes",
        "sliding",
    }  # what several share
    methods -= {"hole_flow"}  # of a benchmark alone: no node and no run file; resumed in test_lazydiffusion
    tried = {type(make()[0]).__module__.rpartition(".")[2] for make in MAKERS}
    assert methods == tried


def averages(kind: str, run: Run, steps: int) -> dict[str, Tensor]:
    state = TrainState(METHODS[kind]()[0], TrainConfig(steps=steps))
    run.load(run.states()[0], state)
    return {f"{k}.{n}": v for k, ema in state.ema.items() for n, v in ema.items()}


# --- kill -9. DMD2 without a GAN, rectified flow and a plain objective are killed in test_runs


def lines(run: Run) -> int:
    path = run.path / "curves.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_after(child: int, run: Run, wanted: int, delay: float) -> bool:
    """Counts steps, not seconds: a busy machine kills in the same places. False where the child was done before."""
    end = time.monotonic() + 300
    while lines(run) < wanted:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        assert time.monotonic() < end, "the child neither trains nor ends"
        time.sleep(0.001)
    time.sleep(delay)  # into the middle of a step, a save, a snapshot
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.endurance])])
def test_whatever_the_method_a_run_that_is_killed_again_and_again_ends_bit_equal(tmp_path, kind, kills):
    steps, settings = (20 if kills == 5 else 150), replace(OFTEN, snapshot_every=4)
    whole = METHODS[kind]()
    go(whole, Run(tmp_path / "whole"), steps, settings)
    run, rng, lived = Run(tmp_path / "r"), torch.Generator().manual_seed(kills), 0
    for _ in range(kills):
        child = in_child(lambda: go(METHODS[kind](), run, steps, settings, pause=0.002))
        ahead, delay = int(torch.randint(7, (1,), generator=rng)), float(torch.rand(1, generator=rng))
        lived += killed_after(child, run, lines(run) + ahead, 0.006 * delay)
    assert lived > 0, "every child had finished before it was killed: the kills tested nothing"
    assert run.history(), "no child lived long enough to train: the kills tested nothing"
    killed = METHODS[kind]()
    go(killed, run, steps, settings)
    assert same(weights(killed[0]), weights(whole[0]))
    assert not same(weights(killed[0]), weights(METHODS[kind]()[0]))  # control: it has learned something
    assert same(averages(kind, run, steps), averages(kind, Run(tmp_path / "whole"), steps))
    assert [r["losses"] for r in run.history()] == [r["losses"] for r in Run(tmp_path / "whole").history()]
    assert not list(run.path.rglob("*.part"))


# --- numbers that are none


class Broken(torch.autograd.Function):
    """A loss that is sound, with a gradient that is not."""

    @staticmethod
    def forward(ctx, value, bad):
        ctx.bad = bad
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.bad, None


class Hurt:
    """A method that is hurt in one term of one player's update at one step."""

    def __init__(self, inner, step: int, hurt):
        self.inner, self.at, self.hurt, self.config = inner, step, hurt, inner.config
        self.players, self.step = inner.players, 0

    def turns(self, step):
        self.step = step
        return self.inner.turns(step)

    def terms(self, player, batch, rng):
        terms = self.inner.terms(player, batch, rng)
        return self.hurt(player, terms) if self.step == self.at else terms

    def updated(self, player):
        if hasattr(self.inner, "updated"):
            self.inner.updated(player)


def poisoned(tensor: Tensor, value: float) -> Tensor:
    out = tensor.clone()
    out.reshape(-1)[3] = value
    return out


BAD = [float("nan"), float("inf"), -float("inf")]
STEP = 7  # states are saved at 3 and 6


def stopped(made, run: Run, words: str, **more) -> None:
    """The run ends with these words, and what is on disk is sound: the state of step 6, and nothing later."""
    with pytest.raises(NonFinite, match=words):
        go(made, run, **more)
    assert [step_of(p) for p in run.states()] == [6, 3]
    fresh = TrainState(made[0], TrainConfig(steps=12))
    run.load(run.states()[0], fresh)
    kept = [v for ps in (*fresh.params.values(), *fresh.ema.values()) for v in ps.values()]
    assert all(v.isfinite().all() for v in kept)
    assert all(step_of(p) <= STEP for p in run.snapshots())
    assert "NaN or infinite" in (run.path / "report.txt").read_text()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["latents", "noise", "cond"])
def test_data_that_is_no_number_is_named_by_step_and_term(tmp_path, value, where):
    # DMD2 draws a batch for each of two critic updates, then one for the student; DMD one for each player
    made, draws, turn, term = {
        "latents": (dmd2_with_gan, 3, 1, "critic/gan"),
        "noise": (dmd, 2, 1, "student/regression"),
        "cond": (dmd2_with_gan, 3, 2, "student/dmd"),
    }[where]

    def harmed(i, given):
        bad = i == draws * STEP + turn
        return replace(given, **{where: poisoned(getattr(given, where), value)}) if bad else given

    stopped((made()[0], At(batch, harmed)), Run(tmp_path / "r"), rf"{term}.* at step {STEP}.*of step 6, is kept")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", METHODS)
def test_a_gradient_that_is_no_number_is_named_and_changes_nothing(tmp_path, kind, value):
    objective, batches = METHODS[kind]()
    player = objective.turns(STEP)[-1]
    before = {}

    def hurt(name, terms):
        if name != player:
            return terms
        before.update(weights(objective))
        first = next(k for k, v in terms.items() if v.requires_grad)
        return terms | {first: Broken.apply(terms[first], value)}

    run = Run(tmp_path / "r")
    with pytest.raises(NonFinite, match=rf"{player}/gradient became NaN or infinite at step {STEP}.*of step 6"):
        go((Hurt(objective, STEP, hurt), batches), run)
    assert same(weights(objective), before)
    assert [step_of(p) for p in run.states()] == [6, 3]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", METHODS)
def test_a_weight_that_is_no_number_is_noticed_in_the_next_term_that_reads_it(tmp_path, value, kind):
    """Of every player in turn. Who reads its weights once a step notices in the next one; a slider set that takes no
    turn before that is noticed when the state is to be saved."""
    for name in METHODS[kind]()[0].players:
        objective, batches = METHODS[kind]()

        def hurt(turn, terms, objective=objective, name=name):
            p = next(iter(objective.players[name].params.values()))
            p.data.copy_(poisoned(p.data, value))
            return terms

        run = Run(tmp_path / name)
        with pytest.raises(NonFinite, match=r"(at step [78]|update of step 9);.*of step 6, is kept"):
            go((Hurt(objective, STEP, hurt), batches), run)
        assert [step_of(p) for p in run.states()] == [6, 3]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("due", ["state", "snapshot", "cancelled"])
def test_a_weight_that_the_last_update_broke_is_never_saved(tmp_path, value, due):
    """The losses of step 9 are still sound, its weights are not any more, and they would be saved."""
    objective, batches = reflow()
    broken = Hurt(objective, -1, None)
    done = []

    def updated(player):
        done.append(player)
        if len(done) == 9:
            p = objective.players[player].params["mlp.out.weight"]
            p.data.copy_(poisoned(p.data, value))

    broken.updated = updated
    run, said = Run(tmp_path / "r"), []
    settings = replace(OFTEN, snapshot_every=9) if due == "snapshot" else OFTEN
    if due == "cancelled":
        settings = replace(OFTEN, save_every=6)
        steps = drive(broken, batches, TrainConfig(steps=12), run, settings, say=said.append)
        while next(steps).step < 9:
            pass
        steps.close()
        assert "student" in said[-1]
    else:
        with pytest.raises(NonFinite, match=r"weights of student.* step 9.*of step 6, is kept"):
            go((broken, batches), run, settings=settings)
    assert step_of(run.states()[0]) == 6
    assert not run.snapshots()
    assert len(go(reflow(), run)) == 6  # and from there it goes on


def test_control_without_the_injuries_these_runs_finish(tmp_path):
    for kind in METHODS:
        assert len(go(METHODS[kind](), Run(tmp_path / kind))) == 12


# --- a full device


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


class FullBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        full()


@pytest.mark.parametrize("where", ["forward", "backward", "update", "preview", "pictures"])
def test_a_full_device_is_caught_wherever_it_happens(tmp_path, monkeypatch, where):
    objective, batches = reflow()
    run, settings, more = Run(tmp_path / "r"), replace(OFTEN, preview_every=8), {}

    def hurt(name, terms):
        if where == "forward":
            full()
        return terms | {"flow": FullBackward.apply(terms["flow"])} if where == "backward" else terms

    if where in ("forward", "backward"):
        objective = Hurt(objective, STEP, hurt)
    if where == "update":
        apply = TrainState.apply
        monkeypatch.setattr(TrainState, "apply", lambda s, *a: full() if s.step == STEP else apply(s, *a))
    if where == "preview":
        more["preview"] = full
    if where == "pictures":
        pictures = torch.rand(2, 3, 8, 8)
        more["gallery"] = Gallery(["a", "b"], full, lambda: pictures)
        settings = replace(OFTEN, snapshot_every=8)
    words = r"out of memory at step \d.*batch of 1.*checkpointing.*smaller picture"
    with pytest.raises(torch.OutOfMemoryError, match=words):
        go((objective, batches), run, settings=settings, **more)
    monkeypatch.undo()
    reached = {"preview": 1, "pictures": 8}.get(where, STEP)  # the first preview is that of the first update
    assert step_of(run.states()[0]) == reached
    assert "out of memory" in (run.path / "report.txt").read_text()
    assert not run.snapshots()
    # the lock is free, and the run goes on to the student of an uninterrupted one
    rest, whole = reflow(), reflow()
    assert go(rest, run)[0].step == reached + 1
    go(whole, Run(tmp_path / "whole"))
    assert same(weights(rest[0]), weights(whole[0]))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_run_that_breaks_off_in_its_last_pictures_has_them_when_it_is_started_again(tmp_path, error):
    """Its last state is saved then, and no step is left that would take the snapshot."""

    def broken() -> None:
        raise error

    run, pictures = Run(tmp_path / "r"), torch.rand(2, 3, 8, 8)
    with pytest.raises(error):
        go(reflow(), run, gallery=Gallery(["a", "b"], broken, lambda: pictures))
    assert step_of(run.states()[0]) == 12
    assert not run.snapshots()
    assert go(reflow(), run, gallery=Gallery(["a", "b"], lambda: pictures, lambda: pictures)) == []
    assert [step_of(p) for p in run.snapshots()] == [12]
    assert "finished" in (run.path / "report.txt").read_text()


@pytest.mark.gpu
def test_a_full_gpu_is_caught_and_gives_its_memory_back(tmp_path):
    layer = nn.Linear(2, 2).cuda()
    student = NetDenoiser(lambda x, timestep, cond: layer(x), Flow(), Prediction.FLOW)
    objective = RectifiedFlow(student, dict(layer.named_parameters()), RectifiedFlowConfig())
    moved = At(lambda i: tuple(v.cuda() for v in as_tuple(i)))
    held = torch.cuda.memory_allocated()

    def hurt(name, terms):
        return terms | {"flow": terms["flow"] + torch.empty(1 << 45, device="cuda").sum()}

    with pytest.raises(torch.OutOfMemoryError, match="batch of 1"):
        go((Hurt(objective, STEP, hurt), moved), Run(tmp_path / "r"))
    assert step_of(Run(tmp_path / "r").states()[0]) == STEP
    assert torch.cuda.memory_allocated() < held + (1 << 24)
    assert torch.ones(8, device="cuda").sum() == 8


# --- a full disk, for everything that is written beside the states (those: test_runs)


def lora_state() -> dict[str, Tensor]:
    return {"blocks.0.down": torch.randn(4, 64), "blocks.0.up": torch.randn(64, 4)}


def write_pairs(folder: Path) -> None:
    list(make_pairs(ring(Flow()), [Batch(None, (256, 2))], [1.0, 0.5, 0.0], folder / "pairs", seed=0))


def write_picture(folder: Path) -> None:
    from PIL import Image

    noise = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Run(folder / "run").write_picture("previews/latest.png", Image.fromarray(noise.numpy()))


def write_snapshot(folder: Path) -> None:
    settings = replace(OFTEN, save_every=99, snapshot_every=4)
    go(reflow(), Run(folder / "run"), 4, settings)


def write_model(folder: Path) -> None:
    save_model(folder / "models", "mine", {"blocks.0.weight": torch.randn(64, 64)}, GENERIC)


WRITERS = {  # and the file that the disk has no room for
    "LoRA": (lambda f: save_lora(f, "mine", lora_state(), ["blocks.0"], family=GENERIC), "mine_00001.safetensors"),
    "model": (write_model, "mine_00001.safetensors"),
    "prompts": (lambda f: PromptCache(f, "clip").write("a cat", Cond(torch.randn(1, 64, 64))), "*.safetensors"),
    "pairs": (write_pairs, "pairs_000000.safetensors"),
    "picture": (write_picture, "latest.png"),
    "report": (lambda f: Run(f / "run").write_text("report.txt", "x" * 8000), "report.txt"),
    "snapshot": (write_snapshot, "student.safetensors"),
}


@needs_fork
@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_leaves_nothing_half_written(tmp_path, what):
    """A real limit of the system on the size of files, in a child process."""
    write, name = WRITERS[what]
    write(tmp_path / "control")
    (made,) = (tmp_path / "control").rglob(name)
    size = made.stat().st_size

    def starve():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        try:
            write(tmp_path / "full")
        except Exception as error:
            os._exit(0 if str(error) else 5)
        os._exit(4)  # by no means a success

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(starve), 0)[1]) == 0
    assert not [p for pattern in (name, "*.part", ".*.part") for p in (tmp_path / "full").rglob(pattern)]
    write(tmp_path / "full")  # with room again, in the same place
    (made,) = (tmp_path / "full").rglob(name)
    assert made.stat().st_size == size
