"""Pictures and their latents as data: captions, buckets of one size, batches that can be sought."""

import pytest
import torch
from PIL import Image

from dmd_core import pictures
from dmd_core.conditioning import Cond
from dmd_core.data import Latents

SIZES = {(100, 100): (512, 512), (300, 100): (704, 384), (100, 300): (384, 704), (130, 100): (576, 448)}


@pytest.mark.parametrize(("given", "wanted"), SIZES.items())
def test_a_picture_goes_to_the_nearest_shape_of_about_the_same_area(given, wanted):
    assert pictures.bucket(*given, 512) == wanted
    assert all(0.8 < w * h / 512**2 < 1.25 for w, h in pictures.sizes(512))
    assert all(w % 64 == h % 64 == 0 for w, h in pictures.sizes(512))


def test_pictures_are_scaled_to_cover_and_cut_evenly(tmp_path):
    # three equal bands; a square keeps the middle one whole
    wide = Image.new("RGB", (300, 100))
    for i, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        wide.paste(colour, (100 * i, 0, 100 * i + 100, 100))
    wide.save(tmp_path / "wide.png")
    image = pictures.read(tmp_path / "wide.png", 64)
    assert image.shape == (1, 48, 96, 3)
    assert image[0, 24, 48].tolist() == [0, 1, 0]
    torch.testing.assert_close(image[0, :, :20, 0].mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    torch.testing.assert_close(image[0, :, -20:, 2].mean(), torch.tensor(1.0), atol=0.05, rtol=0)


def test_captions_stand_in_text_files_beside_the_pictures(tmp_path):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa red\n circle \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no picture")
    assert [(p.path.name, p.caption) for p in pictures.listed(tmp_path)] == [("a.jpg", "a red circle"), ("b.png", "")]


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        pictures.listed(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        pictures.read(tmp_path / "broken.png", 64)
    with pytest.raises(ValueError, match="multiple of 16"):
        pictures.bucket(1, 1, 100)


def pool(n: int) -> Cond:
    return Cond(torch.arange(n, dtype=torch.float32)[:, None, None])


def test_a_batch_holds_one_size_and_every_latent_is_equally_likely():
    # latent i is filled with i: five of one shape, one of another
    shapes = [(1, 2, 2)] * 5 + [(1, 2, 3)]
    data = Latents(pool(6), [torch.full(s, float(i)) for i, s in enumerate(shapes)], batch=4, seed=3)
    counts = torch.zeros(6)
    for _, batch in zip(range(3000), data, strict=False):
        assert batch.latents.shape == batch.shape
        index = batch.latents[:, 0, 0, 0].long()
        assert torch.equal(batch.cond.cross[:, 0, 0].long(), index)
        counts += torch.bincount(index, minlength=6)
    share = counts / counts.sum()
    assert share.min() > 0.15, share  # 1 / 6 each
    assert share.max() < 0.19, share


def test_a_cursor_gives_the_same_batch_again():
    data = Latents(pool(6), [torch.full((1, 2, 2), float(i)) for i in range(6)], batch=4, seed=3)
    fifth = [b for _, b in zip(range(5), data, strict=False)][-1]
    assert torch.equal(next(data.seek(4)).latents, fifth.latents)
    assert not torch.equal(next(data.seek(5)).latents, fifth.latents)  # control


def test_every_prompt_has_one_latent():
    with pytest.raises(ValueError, match="2 latents were given for 3 prompts"):
        Latents(pool(3), [torch.zeros(1, 2, 2)] * 2, batch=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_are_refused_before_a_run(value):
    latents = [torch.zeros(1, 2, 2) for _ in range(3)]
    assert Latents(pool(3), latents, batch=2)  # control
    latents[1][0, 0, 1] = value
    with pytest.raises(ValueError, match=r"latents \[1\] of 3 hold NaN or infinite"):
        Latents(pool(3), latents, batch=2)
