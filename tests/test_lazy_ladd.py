"""LADD on the hole, in a world of four cells that are all 1 or all -1: what the hole holds can be read around it."""

import contract
import diffusers_tiny
import pytest
import torch
from torch import nn

from dmd_core import shapes
from dmd_core.backends import diffusers as backend
from dmd_core.conditioning import Cond
from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.discriminators import Discriminator, FeatureReader
from dmd_core.families import by_name
from dmd_core.families.joint import SHAPES
from dmd_core.inpaint import OnCanvas
from dmd_core.inpaint.partial import places
from dmd_core.objectives.lazy_ladd import InHole, LazyLADD, LazyLADDConfig
from dmd_core.schedule import Flow
from dmd_core.shapes import teacher as shapes_teacher
from dmd_core.train import TrainConfig, train

WIDTH = 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Mixer(nn.Module):
    """Each of four tokens with the mean of all: [b 1 2 2] -> velocity; `mix` is the feature layer, [b 4 w]."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Sequential(nn.Linear(3, WIDTH), nn.SiLU()), nn.Linear(WIDTH, 1)

    def forward(self, x, timestep, cond):
        values = x.flatten(1)
        seen = [values, values.mean(1, keepdim=True).expand_as(values), (timestep / 1000)[:, None].expand_as(values)]
        return self.out(self.mix(torch.stack(seen, -1))).reshape(x.shape)


class Reader(nn.Module):
    """x0 of some cells from their own state and the mean of the others', as `inpaint.partial` asks for it."""

    schedule, patch = Flow(), 1

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, x, sigma, cond, rows, context=None):
        values = x.flatten(1).gather(1, rows)
        around = torch.zeros(len(x), 1) if context is None else context.mean(1, keepdim=True)
        seen = [values, around.expand_as(values), sigma[:, None].expand_as(values)]
        found = self.body(torch.stack(seen, -1)).squeeze(-1)
        return torch.zeros(len(x), 4).scatter(1, rows, found).reshape(x.shape), values


def worlds(n: int, rng: torch.Generator) -> torch.Tensor:
    sign = 2.0 * torch.randint(2, (n, 1, 1, 1), generator=rng) - 1
    return sign + 0.05 * torch.randn(n, 1, 2, 2, generator=rng)


def batches(seed: int = 1, n: int = 64):
    rng = generator(seed)
    while True:
        yield Batch(None, (n, 1, 2, 2), worlds(n, rng))


def lazy(steps: int = 0, **options) -> tuple[LazyLADD, Reader]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, student = NetDenoiser(Mixer().requires_grad_(False), Flow(), Prediction.FLOW), Reader()
    x, sigma = torch.zeros(2, 1, 2, 2), torch.full((2,), 0.5)
    judge = Discriminator.on(FeatureReader(teacher, teacher.net, ["mix"]), x, sigma, None, generator(), 32)
    settings = {"sigmas": (1.0,), "adapt": 0, "whole": 0.0, "smallest": 0.2, "largest": 0.6, "noise_mean": 0.0}
    settings |= {"student_lr": 2e-3, "discriminator_lr": 5e-3, "ema": None, "early_steps": 0, **options}
    params = dict(student.named_parameters())

    def filler(canvas, hole):
        return OnCanvas(student, canvas, hole)

    return LazyLADD(teacher, filler, None, params, judge, LazyLADDConfig(**settings), steps, 1), student


@torch.no_grad()
def right(student: Reader) -> float:
    """Share of holes (of one cell) that hold what stands around them."""
    canvas, rng = worlds(400, generator(9)), generator(10)
    hole = torch.zeros(400, 4, dtype=torch.bool).scatter(1, torch.randint(4, (400, 1), generator=rng), True)
    x = torch.randn(canvas.shape, generator=rng)
    made = OnCanvas(student, canvas, hole)(x, torch.ones(400), None)
    return ((made - canvas.mean((1, 2, 3), keepdim=True)).flatten(1)[hole].abs() < 0.4).float().mean().item()


def learned(**options) -> float:
    objective, student = lazy(**options)

    def task(batch, canvas, rng):
        """Of one cell: drawing strokes would be most of the time."""
        hole = torch.zeros(len(canvas), 4, dtype=torch.bool)
        hole = hole.scatter(1, torch.randint(4, (len(canvas), 1), generator=rng), True)
        return hole, objective.filler(canvas, hole)

    objective.task = task
    for _ in train(objective, batches(), TrainConfig(steps=800, clip=1.0, cooldown=0.3)):
        pass
    return right(student)


def test_the_student_learns_from_heads_that_are_taught():
    assert learned() > 0.9
    assert learned(discriminator_lr=1e-12) < 0.3  # control: heads that stay as they were


def test_only_the_tokens_of_the_hole_are_heard():
    objective, _ = lazy()
    batch = next(batches(2, 4))
    objective.terms("student", batch, generator())
    logits = objective.judge(batch.latents, torch.full((4,), 0.5), None)
    whole = Discriminator(objective.judge.reader, objective.judge.heads)(batch.latents, torch.full((4,), 0.5), None)
    rows = places(objective.hole)
    assert [d.shape for d in logits] == [rows.shape]
    assert torch.equal(logits[0], whole[0].take_along_dim(rows, 1))
    # a layer that does not hold the picture's tokens is refused
    other = InHole(objective.judge.reader, objective.judge.heads)
    other.hole = torch.ones(4, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="does not hold the 9 tokens"):
        other(batch.latents, torch.full((4,), 0.5), None)


@pytest.mark.parametrize("family", ["flux_dev", "sd3", "shapes"])
def test_the_networks_hold_the_picture_where_the_heads_listen(family, tmp_path, monkeypatch):
    """ComfyUI's, with Z-Image among them, in test_comfy_lazy_train."""
    if family == "shapes":
        monkeypatch.setattr(shapes_teacher, "attend", lambda qkv, more=None: qkv.chunk(3, -1)[2])
        net = shapes.load_teacher()
        denoiser, layers = shapes_teacher.denoiser(net), SHAPES
        cond = Cond(*shapes.load_text_encoder().encode(["a red circle", "a large blue square on light"]))
    else:
        bundle = backend.load(diffusers_tiny.save(family, tmp_path))
        net, denoiser, layers = bundle.net, bundle.denoiser, by_name(bundle.family)
        cond = bundle.encode(list(diffusers_tiny.PROMPTS))
    names = layers.feature_layers([n for n, _ in net.named_modules()])
    x = torch.randn(2, 16, 8, 12, generator=generator())
    hole = torch.zeros(2, 4, 6, dtype=torch.bool)
    hole[0, :2, 1:3] = hole[1, 1:3, 4:] = True
    judge = InHole(FeatureReader(denoiser, net, names), nn.ModuleList())
    contract.only_the_hole_is_heard(judge, x, cond, hole.flatten(1), 2)


def test_the_judges_see_the_canvas_around_the_hole_whatever_the_student_was_shown():
    objective, _ = lazy()
    batch, task, seen = next(batches(2, 8)), objective.task, []

    def blanked(batch, canvas, rng):
        hole, _ = task(batch, canvas, rng)
        return hole, objective.filler(torch.zeros_like(canvas), hole)

    objective.task, judged = blanked, objective.judged
    objective.judged = lambda x, rng: seen.append(x.detach().flatten(1)) or judged(x, rng)
    canvas = batch.latents.flatten(1)
    for player, shown in (("student", 1), ("discriminator", 2)):
        seen.clear()
        objective.terms(player, batch, generator())
        assert len(seen) == shown
        outside = ~objective.hole
        assert all(torch.equal(x[outside], canvas[outside]) for x in seen)
        assert not torch.equal(seen[-1][~outside], canvas[~outside])  # control: the hole is the student's


def test_first_it_denoises_then_it_plays_and_each_learns_its_own():
    objective, student = lazy(adapt=1)
    reports = list(train(objective, batches(n=8), TrainConfig(steps=2)))
    assert list(reports[0].losses) == ["student/adapt"]
    assert {"student/gan", "discriminator/gan"} <= set(reports[1].losses)
    heads, own = list(objective.judge.parameters.values()), list(student.parameters())
    for player, learns, stays in (("student", own, heads), ("discriminator", heads, own)):
        loss = objective.terms(player, next(batches(n=8)), generator())["gan"]
        grads = torch.autograd.grad(loss, learns, allow_unused=True, retain_graph=True)
        assert max(g.abs().max() for g in grads if g is not None) > 0
        if player == "discriminator":
            assert all(g is None for g in torch.autograd.grad(loss, stays, allow_unused=True))


@pytest.mark.parametrize(("steps", "early", "meant"), [(100, -1, 20), (500, -1, 50), (500, 30, 30), (500, 0, 0)])
def test_the_curriculum_begins_when_the_denoising_is_over(steps, early, meant):
    objective, _ = lazy(steps, sigmas=(1.0, 0.5), adapt=50, early_steps=early)
    cleaner = []
    for step in range(steps):
        if "discriminator" in objective.turns(step):
            cleaner.append(objective.shares().tolist() == [0, 1])
    assert len(cleaner) == steps - 50
    assert cleaner == [True] * meant + [False] * (steps - 50 - meant)


def test_latents_and_sound_holes_are_asked_for():
    objective, _ = lazy()
    with pytest.raises(ValueError, match="lazy inpainting needs latents"):
        objective.terms("student", Batch(None, (4, 1, 2, 2)), generator())
    with pytest.raises(ValueError, match="must rise"):
        lazy(smallest=0.7)
