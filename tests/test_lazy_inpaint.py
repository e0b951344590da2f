"""The trained lazy student: what it sees, what it is taught on, and who learns. On the embedded teacher."""

from dataclasses import replace

import pytest
import torch

from dmd_core import headless, methods, shapes
from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.conditioning import Cond
from dmd_core.data import Batch
from dmd_core.families.joint import SHAPES
from dmd_core.inpaint import MaskConfig, OnCanvas, draw_holes, strokes
from dmd_core.inpaint.partial import cells, inside, places
from dmd_core.objectives.lazy_inpaint import LazyInpaint, LazyInpaintConfig
from dmd_core.runs import Run
from dmd_core.samplers import sample_restart
from dmd_core.schedule import add_noise
from dmd_core.shapes.teacher import Partial, denoiser
from dmd_core.train import TrainConfig, train
from dmd_core.weights.lora import read_lora

LEVELS = (1.0, 0.75)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


@pytest.fixture(scope="module")
def net():
    return shapes.load_teacher()


@pytest.fixture(scope="module")
def cond():
    return Cond(*shapes.load_text_encoder().encode(["a red circle", "a large blue square on light"]))


@pytest.fixture(scope="module")
def negative():
    return Cond(*shapes.load_text_encoder().encode([""]))


@pytest.fixture
def hole():
    """Another place in each of the two pictures."""
    chosen = torch.zeros(2, 16, dtype=torch.bool)
    chosen[0, [0, 1, 4, 5]] = chosen[1, [5, 6, 7, 15]] = True
    return chosen


def x_of(seed: int) -> torch.Tensor:
    return draw(2, 16, 8, 8, seed=seed)


def sigmas(level: float) -> torch.Tensor:
    return torch.full((2,), level)


@torch.no_grad()
def test_with_all_other_keys_at_its_own_level_a_part_is_the_whole(net, cond, hole):
    x, partial, everything = x_of(1), Partial(net), torch.arange(16).expand(2, -1)
    whole, rows = partial(x, sigmas(0.7), cond, everything)
    assert torch.equal(whole, denoiser(net)(x, sigmas(0.7), cond))
    context = [r.take_along_dim(places(~hole)[..., None], 1) for r in rows]
    part, kept = partial(x, sigmas(0.7), cond, places(hole), context)
    where = cells(hole, x, 2).expand_as(x)
    assert (part - whole)[where].abs().max() < 1e-5
    assert [k.shape[1] for k in kept] == [4, 4, 4]
    blind, _ = partial(x, sigmas(0.7), cond, places(hole))
    assert (blind - whole)[where].abs().max() > 1e-2  # control


@torch.no_grad()
def test_the_context_never_sees_the_hole_and_the_hole_sees_the_context(net, cond, hole):
    canvas, other = x_of(2), x_of(3)
    mask = cells(hole, canvas, 2)
    first = OnCanvas(Partial(net), canvas, hole)
    painted = OnCanvas(Partial(net), torch.where(mask, other, canvas), hole)
    around = OnCanvas(Partial(net), torch.where(mask, canvas, other), hole)
    for a, b in zip(first.context(cond), painted.context(cond), strict=True):
        assert torch.equal(a, b)
    x = x_of(4)
    made = first(x, sigmas(1.0), cond)
    assert torch.equal(painted(x, sigmas(1.0), cond)[mask.expand_as(x)], made[mask.expand_as(x)])
    assert (around(x, sigmas(1.0), cond) - made)[mask.expand_as(x)].abs().max() > 1e-2  # control


@torch.no_grad()
def test_outside_the_hole_the_state_is_never_read_and_the_answer_is_the_canvas(net, cond, hole):
    canvas, x = x_of(2), x_of(4)
    mask = cells(hole, x, 2)
    student = OnCanvas(Partial(net), canvas, hole)
    made = student(x, sigmas(0.9), cond)
    assert torch.equal(student(torch.where(mask, x, 7.0), sigmas(0.9), cond), made)
    assert torch.equal(made[~mask.expand_as(x)], canvas[~mask.expand_as(x)])
    assert not torch.equal(student(torch.where(mask, 7.0, x), sigmas(0.9), cond), made)  # control
    out = sample_restart(student, x, torch.tensor([1.0, 0.5, 0.0]), cond, generator())
    assert torch.equal(out[~mask.expand_as(x)], canvas[~mask.expand_as(x)])


@torch.no_grad()
def test_a_hole_everywhere_is_the_plain_network(net, cond):
    x, all_of_it = x_of(4), torch.ones(2, 16, dtype=torch.bool)
    made = OnCanvas(Partial(net), x_of(2), all_of_it)(x, sigmas(0.9), cond)
    assert torch.equal(made, denoiser(net)(x, sigmas(0.9), cond))


@torch.no_grad()
def test_samples_do_not_see_each_other_and_the_context_is_computed_once(net, cond, hole):
    canvas, x = x_of(2), x_of(4)
    calls = []
    handle = net.x_embedder.register_forward_hook(lambda *a: calls.append(1))
    student = OnCanvas(Partial(net), canvas, hole)
    together = student(x, sigmas(0.9), cond)
    student(x, sigmas(0.5), cond)
    handle.remove()
    assert len(calls) == 3  # context, hole, hole
    second = slice(1, 2)
    alone = OnCanvas(Partial(net), canvas[second], hole[second])(x[second], sigmas(0.9)[second], cond.take(second))
    torch.testing.assert_close(together[second], alone, atol=1e-5, rtol=0)


def test_holes_of_different_sizes_are_refused(net, hole):
    ragged = hole.clone()
    ragged[0, 9] = True
    with pytest.raises(ValueError, match=r"\[5, 4\] tokens"):
        OnCanvas(Partial(net), x_of(2), ragged)


def test_the_gradient_goes_through_the_context_too(cond, hole):
    """Against finite differences, in float64."""
    net, wide = shapes.load_teacher().double(), cond.to(torch.float64)
    bank = AdapterBank(net, SHAPES.targets())
    bank.new("student", 4, generator())
    for adapter in bank.sets["student"].values():
        adapter.double()
        adapter.up.data = 0.02 * torch.randn(adapter.up.shape, generator=generator(1), dtype=torch.float64)
    params = list(bank.parameters("student").values())
    canvas, x, weight = (x_of(s).double() for s in (2, 4, 6))

    def loss(blind: bool = False) -> torch.Tensor:
        student = OnCanvas(Partial(net), canvas, hole)
        with bank.use(student=1.0):
            if blind:
                with torch.no_grad():
                    kept = student.context(wide)
                student.context = lambda _cond: kept
            return (student(x, sigmas(0.9).double(), wide) * weight).sum()

    way = [torch.randn(p.shape, generator=generator(7), dtype=torch.float64) for p in params]

    def along(grads) -> float:
        return sum((g * w).sum() for g, w in zip(grads, way, strict=True) if g is not None).item()

    slope = along(torch.autograd.grad(loss(), params, allow_unused=True))
    without = along(torch.autograd.grad(loss(blind=True), params, allow_unused=True))
    ends, step = [], 1e-5
    for sign in (1, -2):
        for p, w in zip(params, way, strict=True):
            p.data += sign * step * w
        ends.append(loss().item())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    assert abs(without - slope) > 1e-3 * abs(slope)  # control: the context is a part of it
    bank.detach()


def lazy(net, negative, **options):
    bank = AdapterBank(net, SHAPES.targets())
    for name in ("student", "critic"):
        bank.new(name, 4, generator())
    teacher = denoiser(net)
    settings = {"sigmas": LEVELS, "guidance": 2.0, "critic_updates": 1, "adapt": 0, "text_dropout": 0.0, **options}
    objective = LazyInpaint(
        Adapted(teacher, bank, {}),
        lambda canvas, hole: Adapted(OnCanvas(Partial(net), canvas, hole), bank, {"student": 1.0}),
        Adapted(teacher, bank, {"critic": 1.0}),
        negative,
        bank.parameters("student"),
        bank.parameters("critic"),
        LazyInpaintConfig(**settings),
    )
    return objective, bank


def test_each_players_loss_reaches_its_own_set_alone(net, cond, negative):
    objective, bank = lazy(net, negative)
    batch = Batch(cond, (2, 16, 8, 8), x_of(2))
    own = {name: list(bank.parameters(name).values()) for name in ("student", "critic")}
    for player, other in (("student", "critic"), ("critic", "student")):
        total = sum(objective.terms(player, batch, generator()).values())
        reached = torch.autograd.grad(total, own[player] + own[other], allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in reached[: len(own[player])])
        assert all(g is None for g in reached[len(own[player]) :])
    assert not any(p.requires_grad for p in net.parameters())
    bank.detach()


def test_the_losses_are_those_of_the_hole_alone(net, cond, negative, hole):
    objective, bank = lazy(net, negative)
    objective.hole = hole
    batch = Batch(cond, (2, 16, 8, 8), x_of(2))
    x0 = x_of(5).requires_grad_()
    outside = ~cells(hole, x0, 2).expand_as(x0)
    for terms in (objective.student_terms, objective.critic_terms):
        total = sum(terms(x0, batch, generator()).values())
        # what the judges say outside must not matter either
        judges = {"teacher": objective.teacher, "critic": objective.critic}

        class Shouting:
            schedule = objective.teacher.schedule

            def __init__(self, judge):
                self.judge = judge

            def __call__(self, *args):
                return self.judge(*args) + 100 * outside

        objective.teacher, objective.critic = Shouting(objective.teacher), Shouting(objective.critic)
        assert torch.equal(sum(terms(x0, batch, generator()).values()), total)
        objective.teacher, objective.critic = judges["teacher"], judges["critic"]
    (grad,) = torch.autograd.grad(sum(objective.student_terms(x0, batch, generator()).values()), x0)
    assert grad[outside].abs().max() == 0
    assert grad[~outside].abs().min() > 0
    bank.detach()


def test_the_judges_see_the_canvas_under_the_same_noise(net, cond, negative):
    """At the same level everywhere: a known part that is cleaner would be another problem than the teacher's own."""
    objective, bank = lazy(net, negative)
    seen = []
    teacher = objective.teacher

    class Spy:
        schedule = teacher.schedule

        def __call__(self, x, sigma, cond):
            seen.append((x, sigma))
            return teacher(x, sigma, cond)

    objective.teacher = Spy()
    x0 = x_of(5)
    objective.hole = torch.zeros(2, 16, dtype=torch.bool)
    objective.hole[:, 3] = True
    objective.student_terms(x0, Batch(cond, (2, 16, 8, 8), x0), generator())
    rng = generator()
    sigma = teacher.schedule.sample(2, rng, 0.02, 0.98)
    noise = torch.randn(x0.shape, generator=rng)
    assert torch.equal(seen[0][0], add_noise(teacher.schedule, x0, noise, sigma))
    bank.detach()


def test_first_it_denoises_then_it_matches(net, cond, negative):
    objective, bank = lazy(net, negative, adapt=2, critic_updates=2, student_lr=1e-3, critic_lr=1e-3, ema=None)
    before = bank.state("critic")

    def batches():
        while True:
            yield Batch(cond, (2, 16, 8, 8), x_of(2))

    reports = list(train(objective, batches(), TrainConfig(steps=4)))
    assert [sorted(r.losses) for r in reports] == [["student/adapt"]] * 2 + [["critic/denoise", "student/dmd"]] * 2
    assert reports[1].counters == {"critic": 0, "student": 2}
    assert reports[3].counters == {"critic": 4, "student": 4}
    assert any(not torch.equal(v, before[k]) for k, v in bank.state("critic").items())
    bank.detach()


def test_latents_and_sound_settings_are_asked_for(net, cond, negative):
    objective, bank = lazy(net, negative)
    with pytest.raises(ValueError, match="lazy inpainting needs latents"):
        objective.terms("student", Batch(cond, (2, 16, 8, 8)), generator())
    bank.detach()
    mistakes = [({"smallest": 0.7}, "must rise"), ({"whole": 1.0}, "whole 1.0"), ({"adapt": -1}, "adapt is")]
    for wrong, words in [*mistakes, ({"one_sample": True}, "draws its own holes")]:
        with pytest.raises(ValueError, match=words):
            lazy(net, negative, **wrong)


def test_some_samples_lose_their_prompt(net, cond, negative):
    objective, bank = lazy(net, negative, text_dropout=0.5)
    many = cond.take(torch.arange(400) % 2)
    spoken = objective.spoken(many, generator())
    lost = (spoken.cross == negative.cross).flatten(1).all(1)
    kept = (spoken.cross == many.cross).flatten(1).all(1)
    assert (lost ^ kept).all()
    assert 0.4 < lost.float().mean() < 0.6
    bank.detach()


def test_holes_of_a_batch_have_one_size_and_many_shapes():
    sizes = []
    for seed in range(40):
        holes = draw_holes(6, 8, 8, generator(seed))
        counts = holes.sum(1)
        assert (counts == counts[0]).all()
        assert counts[0] >= 1
        assert torch.equal(holes, draw_holes(6, 8, 8, generator(seed)))
        sizes.append(int(counts[0]))
        if counts[0] < 60:
            assert len({tuple(h.tolist()) for h in holes}) > 1
    assert len(set(sizes)) > 10
    assert 1 <= sizes.count(64) <= 15  # all hole: text-to-image
    small = [
        int(draw_holes(2, 8, 8, generator(s), MaskConfig(outpaint=0, crops=0, all=0)).sum(1)[0]) for s in range(40)
    ]
    assert max(small) < 64
    assert sum(s <= 8 for s in small) >= 5  # small holes are as frequent as their logarithm says


def test_sized_masks_keep_their_place():
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 8:20] = 1  # tokens 2 to 4, each way
    inner = strokes._sized(mask, 1, generator()).reshape(8, 8)
    assert inner[3, 3]
    grown = strokes._sized(mask, 25, generator()).reshape(8, 8)
    assert grown[1:6, 1:6].all()


def test_the_crop_mask_leaves_one_box_of_a_tenth_to_a_half():
    for seed in range(20):
        known = strokes._crop(64, 64, 0.5, generator(seed)) == 0
        assert 0.05 < known.float().mean() < 0.55
        rows, columns = known.any(1), known.any(0)
        assert known.sum() == rows.sum() * columns.sum()


def test_inside_is_what_the_hole_holds(hole):
    x = torch.arange(2 * 16 * 64).reshape(2, 16, 8, 8).float()
    cut = inside(x, hole, 2)
    assert cut.shape == (2, 4 * 4 * 16)
    assert set(cut[0].tolist()) == set(x[0, :, :4, :4].flatten().tolist())


RUN = """
[run]
name = "lazy"
plan = false
[model]
path = "shapes"
probe = false
[data]
prompts = ["a red circle", "a blue star", "a large green ring"]
batch = 2
pairs = 2
pair_steps = 2
[method]
name = "lazy_inpaint"
steps = 2
adapt = 2
critic_updates = 1
guidance = 2.0
[lora]
rank = 2
[train]
steps = 4
[drive]
preview_every = 1
snapshot_every = 4
[samples]
count = 2
teacher_steps = 2
"""


def test_a_run_file_makes_a_lora_that_says_what_it_is(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(RUN.replace("guidance = 2.0", "guidance = 2.0\ngan_weight = 0.01"))
    said: list[str] = []
    folder = headless.train_from(file, say=said.append)
    (lora,) = (folder / "lora").glob("*.safetensors")
    recipe = read_lora(lora).recipe
    assert (recipe.objective, recipe.steps, recipe.cfg) == ("lazy_inpaint", 2, 1.0)
    snapshot = Run(folder).snapshots()[-1]
    assert (snapshot / "sheet.png").is_file()
    assert (folder / "previews" / "latest.png").is_file()  # of the data, with holes
    assert any("student/adapt" in line for line in said)
    assert any("student/dmd" in line and "student/gan" in line for line in said)


def test_the_sheets_show_the_teachers_pictures_with_a_hole_filled(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    job = headless.prepare(file, False, lambda _line: None)
    job.source = replace(job.source, pictures=lambda latents: latents)
    gallery = job.gallery()
    teacher, student = gallery.teacher(), gallery.student()
    filled = (teacher != student).any(1).float().mean((1, 2)).tolist()
    assert all(0.1 < share < 0.7 for share in filled)
    assert torch.equal(gallery.student(), student)


def test_the_plan_measures_updates_that_match(tmp_path):
    """Not the first, cheaper ones."""
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    job = headless.prepare(file, False, lambda _line: None)
    asked: list[int] = []
    turns = job.method.objective.turns
    job.method.objective.turns = lambda step: asked.append(step) or turns(step)
    with job.run.locked():
        job.make_pairs(2)
        job.plan()
    assert asked == [2, 3]


def test_a_network_that_cannot_be_computed_in_parts_is_refused():
    class Bench:
        class source:
            partial = None

        @staticmethod
        def config():
            return None

    with pytest.raises(ValueError, match="UNets are cropped instead"):
        methods.lazy_inpaint(Bench())
