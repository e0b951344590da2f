"""A folder of the user's own pictures in a run file: fine-tuning, LADD and a GAN without ComfyUI."""
# ruff: noqa: F401, F811 - fixtures of another file

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_headless import world, write

from dmd_core import headless, pictures

SIZES = ((64, 64), (96, 48), (64, 64))  # two shapes
QUIET = {"say": lambda line: None}


def folder_of(place, shade=200, sizes=SIZES):
    place.mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (shade, 40 * i, 20)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"a {('red', 'green', 'blue')[i % 3]} circle")
    return place


def pictured(place, method="rectified_flow", more="", steps=2, full=False, name="own", size=64):
    path = write(place, method, steps, more, size)
    text = path.read_text().replace("probe = false", "probe = false\nfull = true" if full else "probe = false")
    head, _, tail = text.partition("[data]\n")
    lines = [line for line in tail.splitlines() if not line.startswith("prompts")]
    path.write_text(head + f"[data]\npictures = '{name}'\n" + "\n".join(lines) + "\n")
    return path


def trained(path):
    run = headless.train_from(path, **QUIET)
    return run, load_file(next(p for part in ("lora", "model") for p in (run / part).glob("*.safetensors")))


@pytest.mark.parametrize(
    ("method", "more", "full"),
    [
        ("rectified_flow", "", False),
        ("rectified_flow", "", True),
        ("ladd", "", False),
        ("dmd2", "critic_updates = 1\ngan_weight = 0.01", False),
    ],
)
def test_they_take_the_place_of_the_teachers(world, method, more, full):
    folder_of(world / "own")
    run, _ = trained(pictured(world, method, more, full=full))
    assert not (run / "pairs").exists()


def test_they_are_encoded_each_in_its_shape_with_its_caption(world):
    folder_of(world / "own")
    job = headless.prepare(pictured(world), False, lambda line: None)
    assert job.prompts == ["a red circle", "a green circle", "a blue circle"]
    assert [tuple(x.shape[1:]) for x in job.pictures] == [(8, 8), (6, 12), (8, 8)]
    image = pictures.read(world / "own" / "0.png", 64).movedim(-1, 1)
    assert torch.equal(job.pictures[0], job.source.latents(image * 2 - 1)[0])
    assert not torch.equal(job.pictures[0], job.source.latents(image)[0])  # control


def test_the_student_is_theirs(world):
    """Other pictures, another fine-tune; the same ones, the same."""
    folder_of(world / "own")
    folder_of(world / "dark", shade=20)
    found = {}
    for run, name in (("a", "own"), ("b", "own"), ("c", "dark")):
        path = pictured(world, name=name)
        path.write_text(path.read_text().replace('name = "tiny"', f'name = "{run}"'))
        found[run] = trained(path)[1]
    assert all(torch.equal(v, found["b"][k]) for k, v in found["a"].items())
    assert any(not torch.equal(v, found["c"][k]) for k, v in found["a"].items())


def test_methods_that_look_at_none_do_not_encode_them(world, monkeypatch):
    folder_of(world / "own")
    monkeypatch.setattr(pictures, "encoded", lambda *_: pytest.fail("nothing looks at them"))
    assert headless.prepare(pictured(world, "dmd2"), False, lambda line: None).pictures == []


def test_what_is_wrong_is_said(world):
    path = pictured(world)
    with pytest.raises(ValueError, match="pictures is 'own': there is no folder"):
        headless.prepare(path, False, lambda line: None)
    (world / "own").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        headless.prepare(path, False, lambda line: None)
    path.write_text(path.read_text().replace("pictures = 'own'", "pictures = 'own'\nprompts = ['a red circle']"))
    with pytest.raises(ValueError, match="give one of the two"):
        headless.prepare(path, False, lambda line: None)
    path.write_text(path.read_text().replace("pictures = 'own'\nprompts = ['a red circle']", ""))
    with pytest.raises(ValueError, match="give one of them"):
        headless.prepare(path, False, lambda line: None)


def test_a_diffusers_model_is_fine_tuned_on_them(tmp_path):
    import diffusers_tiny

    folder_of(tmp_path / "own", sizes=((64, 64), (96, 48)))
    model = diffusers_tiny.save("sd15", tmp_path / "model").relative_to(tmp_path)
    path = pictured(tmp_path, size=64)
    path.write_text(path.read_text().replace('path = "shapes"', f"path = '{model.as_posix()}'\ndtype = 'fp32'"))
    job = headless.prepare(path, False, lambda line: None)
    vae = load_vae(tmp_path / model / "vae")
    for name, latents in zip(("0.png", "1.png"), job.pictures, strict=True):
        image = pictures.read(tmp_path / "own" / name, 64).movedim(-1, 1) * 2 - 1
        with torch.no_grad():
            wanted = vae.encode(image).latent_dist.mean[0] * vae.config.scaling_factor
        assert torch.allclose(latents, wanted, atol=1e-5)
    assert len({x.shape for x in job.pictures}) == 2
    path.write_text(path.read_text().replace('name = "tiny"', 'name = "again"'))
    _, found = trained(path)
    assert any(v.any() for k, v in found.items() if "up" in k)


def load_vae(folder):
    return pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(folder)
