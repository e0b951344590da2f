"""The shapes world: pictures, captions, autoencoder, recogniser, teacher, files."""

import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmd_core import shapes
from dmd_core.adapters import AdapterBank
from dmd_core.conditioning import Cond
from dmd_core.denoiser import Guided
from dmd_core.samplers import sample_euler, sample_restart
from dmd_core.shapes import autoencoder, captions, teacher, text, world
from dmd_core.shapes.build import STAGES
from dmd_core.shapes.stages import Latents
from dmd_core.sigmas import ending, shifted
from dmd_core.weights.lora import load_lora, read_lora


@pytest.fixture
def scene(rng):
    return world.sample_wide(96, rng, textured=0.5)


@pytest.fixture(scope="module")
def vae():
    return shapes.load_autoencoder()


@pytest.fixture(scope="module")
def recogniser():
    return shapes.load_recogniser()


def one(**changes):
    """A red circle in the middle of a light background, but for the changes."""
    plain = {"count": 1, "shape": 0, "colour": 0, "texture": 0, "radius": 0.4, "x": 0.0, "y": 0.0, "angle": 0.0}
    values = plain | {"light": 0.9} | changes
    whole = ("count", "light")
    return world.Scene(**{k: torch.tensor([v] if k in whole else [[v, v]]) for k, v in values.items()})


# pictures


def test_a_seed_gives_the_same_scenes_and_pictures():
    first, again, other = (world.sample(8, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(world.render(first), world.render(again))
    assert not torch.equal(world.render(first), world.render(other))


def test_the_global_random_state_is_untouched(rng):
    before = torch.get_rng_state()
    captions.describe(world.sample(4, rng), rng)
    assert torch.equal(before, torch.get_rng_state())


def test_pictures_stay_in_range_at_any_size(scene):
    for size in ((128, 128), (64, 96), (33, 20)):
        image = world.render(scene.take(slice(12)), *size)
        assert image.shape == (12, 3, *size)
        assert image.min() >= -1
        assert image.max() <= 1


def test_a_larger_canvas_shows_the_same_picture(scene):
    small = world.render(scene.take(slice(16)), 64)
    large = torch.nn.functional.avg_pool2d(world.render(scene.take(slice(16)), 256), 4)
    assert (small - large).abs().mean() < 0.004


@pytest.mark.parametrize("shape", range(len(world.SHAPES)))
def test_distances_are_true_near_the_edge(shape):
    # anti-aliasing needs |gradient| = 1 where the distance is small; corners may be off
    grid = torch.linspace(-1.3, 1.3, 400, dtype=torch.float64)
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    d = world.distance(shape, u, v)
    slope = torch.hypot(*torch.gradient(d, spacing=(float(grid[1] - grid[0]),) * 2))
    near = slope[d.abs() < 0.02]
    assert (near - 1).abs().median() < 1e-3
    assert len(near) > 500


def test_rotation_turns_clockwise_and_position_moves_right_and_down():
    tall = one(shape=5, angle=math.radians(20.0), radius=0.5)
    image = world.render(tall, 128)[0, 1]  # the cross is red, the background light: low green marks it
    top = (image[36:46] < 0).float().nonzero()[:, 1].float().mean()
    assert top > 64
    ink = (world.render(one(x=0.3, y=0.2), 128)[0, 1] < 0).nonzero().float().mean(0)
    assert torch.allclose(ink, torch.tensor([0.2, 0.3]) * 64 + 63.5, atol=0.5)


# captions


@pytest.mark.parametrize("sample", [world.sample, world.sample_wide])
def test_every_scene_shows_what_its_caption_says_and_not_what_another_says(sample, rng):
    scene = sample(1500, rng)
    said = captions.describe(scene, rng)
    assert captions.accuracy(said, scene) == 1
    assert captions.accuracy(said[1:] + said[:1], scene) < 0.05


def test_captions_use_the_vocabulary_and_leave_every_factor_free_at_times(rng):
    said = captions.describe(world.sample(1500, rng), rng)
    assert text.UNKNOWN not in [text.VOCABULARY[i] for i in text.tokenize(said).unique().tolist()]
    assert max(len(c.split()) for c in said) <= text.LENGTH
    assert len(text.VOCABULARY) <= 64
    named = captions.named(said)
    for factor, options in captions.FACTORS.items():
        seen = set(named[factor].tolist())
        assert seen >= set(range(len(options))), factor
        assert captions.FREE in seen or factor == "count", factor


def test_right_of_is_left_of_seen_from_the_other_side():
    left = captions.named(["a red circle left of a blue square"])
    right = captions.named(["a blue square right of a red circle"])
    swapped = captions.named(["a blue square left of a red circle"])
    assert left == right
    assert left != swapped


def test_sentences_of_people_are_read_too():
    named = captions.named(["A small RED star, at the top; please!", ""])
    assert captions.FACTORS["colour"][named["colour"][0]] == "red"
    assert named["size"][0] == 0
    assert all(v[1] == captions.FREE for v in named.values())


# text


def test_unknown_words_become_the_unknown_token_and_long_prompts_are_cut():
    ids = text.tokenize(["a red elephant", "", " ".join(["red"] * 40)])
    assert ids.shape == (3, text.LENGTH)
    assert text.VOCABULARY[ids[0, 2]] == text.UNKNOWN
    assert (ids[1] == 0).all()
    assert (ids[2] == text.VOCABULARY.index("red")).all()


def test_the_encoder_tells_apart_what_only_word_order_tells_apart():
    encoder = shapes.load_text_encoder()
    tokens, pooled = encoder.encode(
        [
            "a red circle left of a blue square",
            "a blue circle left of a red square",
            "a red circle left of a blue square",
        ]
    )
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(pooled[0], pooled[2])
    assert (pooled[0] - pooled[1]).abs().max() > 0.2


# autoencoder


def test_skipped_parts_of_the_layout_compute_nothing(vae, scene):
    images = world.render(scene.take(slice(4)))
    whole = autoencoder.Autoencoder(full=True)
    state = autoencoder.full_state(vae)
    whole.load_state_dict({k: v for k, v in state.items() if not k.startswith("vae_")})
    latents = vae.encode(images)
    assert torch.allclose(whole.encode(images), latents, atol=1e-5)
    assert torch.allclose(whole.decode(latents), vae.decode(latents), atol=1e-5)


def test_a_file_that_uses_the_whole_layout_is_computed_whole(vae):
    state = autoencoder.full_state(vae)
    state["taesd_decoder.18.conv.4.bias"][50] = 1.0
    assert sum(p.numel() for p in autoencoder.from_state(state).parameters()) > 2e6
    assert sum(p.numel() for p in vae.parameters()) < 1.3e6


def test_the_file_has_the_tiny_vae_layout():
    state = shapes.read(shapes.AUTOENCODER)
    assert state["taesd_decoder.1.weight"].shape == (64, 16, 3, 3)
    assert state["taesd_encoder.14.weight"].shape == (16, 64, 3, 3)
    assert state["taesd_decoder.18.conv.4.weight"].shape == (64, 64, 3, 3)
    assert {"vae_scale", "vae_shift"} < state.keys()
    blocks = {k.rpartition(".conv.")[0] for k in state if ".conv." in k}
    assert len(blocks) == 20
    assert sum(v.numel() for v in state.values()) > 2.4e6


def test_latents_are_unit_sized_for_the_model_and_decode_to_the_picture(vae, rng):
    images = world.render(world.sample(96, rng))
    latents = vae.encode(images)
    assert abs(latents.mean()) < 0.15
    assert 0.8 < latents.std() < 1.2
    error = (vae.decode(latents).clamp(-1, 1) - images).square().mean()
    assert 10 * math.log10(4 / error) > 31.5  # dB
    shifted = (vae.decode(latents.roll(1, 0)).clamp(-1, 1) - images).square().mean()
    assert shifted > 20 * error


# recogniser


def test_the_recogniser_reads_pictures_and_not_other_captions(recogniser, vae):
    rng = torch.Generator().manual_seed(4321)
    scene = world.sample(256, rng)
    said, images = captions.describe(scene, rng), world.render(scene)
    read = recogniser.read(images)
    assert captions.accuracy(said, read) >= 0.985
    assert captions.accuracy(said[1:] + said[:1], read) < 0.1
    through = recogniser.read(vae.decode(vae.encode(images[:96])))
    assert captions.accuracy(said[:96], through) >= 0.97
    assert (read.x - scene.x)[:, 0].square().mean().sqrt() < 0.04
    assert recogniser.features(images[:4]).shape == (4, 64)


def test_pictures_of_other_sizes_are_read(recogniser, scene):
    said = captions.describe(scene, torch.Generator().manual_seed(1))
    assert captions.accuracy(said[:32], recogniser.read(world.render(scene.take(slice(32)), 160))) > 0.9


# teacher


def test_training_batches_go_on_where_a_run_stopped(vae):
    def batches(cursor):
        found = Latents(vae, shapes.load_text_encoder(), batch=8, seed=5, chunk=32, reuse=2).seek(cursor)
        return [next(found) for _ in range(3)]

    first, later = batches(6), batches(7)
    for (x0, cond), (again, cond_again) in zip(first[1:], later[:2], strict=True):
        assert torch.equal(x0, again)
        assert torch.equal(cond.cross, cond_again.cross)
    assert not torch.equal(first[0][0], first[1][0])


def test_a_new_teacher_has_the_names_and_size_that_hosts_expect():
    state = teacher.Teacher().state_dict()
    assert state["joint_blocks.0.context_block.attn.proj.weight"].shape == (192, 192)
    assert state["x_embedder.proj.weight"].shape == (192, 16, 2, 2)
    assert "joint_blocks.2.context_block.attn.proj.weight" not in state  # nobody reads the text after the last block
    assert 3.7e6 < sum(v.numel() for v in state.values()) < 3.9e6


def test_positions_are_those_of_the_published_models():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    # there the grid is scaled to its base size, here one token is one unit
    theirs = get_2d_sincos_pos_embed(192, 16, base_size=16, output_type="pt")
    torch.testing.assert_close(teacher.positions(192)[0], theirs.float(), atol=1e-5, rtol=0)


def test_text_order_does_not_matter_but_picture_positions_do(rng):
    model = teacher.Teacher().double()
    x, t = torch.randn(1, 16, 4, 6, generator=rng).double(), torch.tensor([0.4]).double()
    tokens, pooled = torch.randn(1, 16, 64, generator=rng).double(), torch.randn(1, 64, generator=rng).double()
    out = model(x, t, tokens, pooled)
    assert out.shape == x.shape
    assert torch.allclose(model(x, t, tokens.flip(1), pooled), out)
    assert not torch.allclose(model(x.flip(3), t, tokens, pooled), out.flip(3), atol=1e-3)


def test_odd_latents_are_refused(rng):
    for shape, said in (((1, 16, 5, 4), r"\[1, 16, 5, 4\].*even"), ((1, 16, 4, 34), "at most 32")):
        with pytest.raises(ValueError, match=said):
            teacher.Teacher()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 2, 64), torch.zeros(1, 64))


def drawn(prompts, seed, steps, guidance, vae):
    encoder, model = shapes.load_text_encoder(), teacher.denoiser(shapes.load_teacher())
    noise = torch.randn(len(prompts), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    guided = Guided(model, guidance, Cond(*encoder.encode([""])))
    levels = ending(shifted(steps, teacher.SCHEDULE.shift))
    return vae.decode(sample_euler(guided, noise, levels, Cond(*encoder.encode(prompts))))


def test_the_teacher_draws_everything_that_the_prompt_says(recogniser, vae):
    rng = torch.Generator().manual_seed(77)
    prompts = captions.describe(world.sample(128, rng), rng)
    read = recogniser.read(drawn(prompts, 78, 20, 2.0, vae))
    assert captions.accuracy(prompts, read) > 0.93
    assert captions.accuracy(prompts[1:] + prompts[:1], read) < 0.1


@pytest.mark.parametrize(("steps", "least", "untrained"), [(4, 0.9, 0.89), (1, 0.75, 0.5)])
def test_the_shipped_students_draw_what_the_teacher_cannot_in_as_few_steps(steps, least, untrained, recogniser, vae):
    rng = torch.Generator().manual_seed(77)
    prompts = captions.describe(world.sample(256, rng), rng)
    net = shapes.load_teacher()
    bank = AdapterBank(net)
    cond = Cond(*shapes.load_text_encoder().encode(prompts))

    def right():
        noise = torch.randn(len(prompts), 16, 8, 8, generator=torch.Generator().manual_seed(78))
        levels = ending(shifted(steps, teacher.SCHEDULE.shift))
        with torch.no_grad():
            x = sample_restart(teacher.denoiser(net), noise, levels, cond, torch.Generator().manual_seed(79))
            return captions.accuracy(prompts, recogniser.read(vae.decode(x)))

    assert right() < untrained  # the control: the teacher itself, without guidance as the student is used
    path = shapes.WEIGHTS / f"shapes_student_{steps}.safetensors"
    assert read_lora(path).recipe.steps == steps
    bank.load("student", load_lora(path, bank))
    with bank.use(student=1.0):
        assert right() > least


# files


LOADERS = {
    "shapes_teacher": shapes.load_teacher,
    "shapes_vae": shapes.load_autoencoder,
    "shapes_text": shapes.load_text_encoder,
    "shapes_recogniser": shapes.load_recogniser,
}


@pytest.mark.parametrize("name", LOADERS)
def test_missing_damaged_and_foreign_files_are_refused_with_advice(name, tmp_path):
    load = LOADERS[name]
    with pytest.raises(ValueError, match=r"absent\.safetensors is missing.*build"):
        load(tmp_path / "absent.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes((shapes.WEIGHTS / f"{name}.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half\.safetensors is not a sound safetensors file.*build"):
        load(half)
    other = tmp_path / "other.safetensors"
    shutil.copy(shapes.TEXT_ENCODER if name != "shapes_text" else shapes.RECOGNISER, other)
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold"):
        load(other)


def test_all_weights_together_are_small_and_every_stage_has_its_file():
    files = list(shapes.WEIGHTS.glob("*.safetensors"))
    assert len(files) >= len(STAGES)
    assert sum(f.stat().st_size for f in files) < 20e6


def test_a_scene_can_be_taken_apart(scene):
    part = scene.take(torch.tensor([5, 2]))
    assert len(part) == 2
    assert all(torch.equal(getattr(part, f.name)[1], getattr(scene, f.name)[2]) for f in fields(scene))


@pytest.mark.slow
@pytest.mark.endurance
def test_one_command_builds_every_weight_that_ships(tmp_path):
    """With three steps a stage: nothing is learned, but every stage finds what the ones before it wrote."""
    command = [sys.executable, "-m", "dmd_core.shapes.build", "--out", str(tmp_path), "--steps", "3", "--threads", "1"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True)
    built = {path.name: load_file(path) for path in tmp_path.iterdir()}
    for path in (shapes.AUTOENCODER, shapes.RECOGNISER, shapes.TEXT_ENCODER, shapes.TEACHER):
        shipped = load_file(path)
        assert {k: v.shape for k, v in built[path.name].items()} == {k: v.shape for k, v in shipped.items()}, path.name
        assert any(not torch.equal(v, shipped[k]) for k, v in built[path.name].items())  # made, not copied
