"""What takes seconds without a network can be cancelled: it asks often, stops at a yes, leaves no half of a file."""

import math

import pytest
import torch

from dmd_core import cancel
from dmd_core.inpaint import fade, masks
from dmd_core.weights import header
from dmd_core.weights.files import write_streaming


class Cancelled(Exception):
    pass


def spiral(side: int = 48) -> torch.Tensor:
    """A corridor that a sweep follows for one turn only."""
    mask = torch.zeros(1, side, side)
    for i in range(4000):
        turn, radius = i / 4000 * 6 * math.pi, (side / 2 - 2) * i / 4000
        mask[0, int(side / 2 + radius * math.sin(turn)), int(side / 2 + radius * math.cos(turn))] = 1
    return mask


def hashing(folder):
    path = folder / "large.bin"
    path.write_bytes(bytes(3 << 22))
    header._content_hash.cache_clear()
    return header.content_hash(path)


def copying(folder):
    tensors = {f"layer.{i}": torch.ones(4) for i in range(5)}
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_streaming(folder / "copy.safetensors", specs, tensors.__getitem__, {})


LONG = {
    "islands": (lambda folder: masks.islands(spiral()), 4),
    "fill_holes": (lambda folder: masks.fill_holes(spiral()), 2),
    "soften": (lambda folder: masks.soften(spiral(), 8), 3),
    "fade": (lambda folder: fade(spiral(), 16), 16),
    "a file's hash": (hashing, 3),
    "a copy of weights": (copying, 5),
}


@pytest.mark.parametrize("name", LONG)
def test_it_asks_all_along_and_stops_where_the_answer_is_yes(name, tmp_path, monkeypatch):
    work, least = LONG[name]
    asked = []
    monkeypatch.setattr(cancel, "ask", lambda: asked.append(1))
    work(tmp_path)
    assert len(asked) >= least
    before = sorted(p for p in tmp_path.iterdir() if p.suffix != ".safetensors")
    for left in tmp_path.glob("*.safetensors"):
        left.unlink()

    def no_more():
        asked.append(1)
        if len(asked) == 2:
            raise Cancelled

    asked.clear()
    monkeypatch.setattr(cancel, "ask", no_more)
    with pytest.raises(Cancelled):
        work(tmp_path)
    assert len(asked) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_a_hash_that_was_cancelled_is_taken_anew(tmp_path, monkeypatch):
    whole = hashing(tmp_path)

    def no():
        raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr(cancel, "ask", no)
        with pytest.raises(Cancelled):
            hashing(tmp_path)
    assert header.content_hash(tmp_path / "large.bin") == whole
