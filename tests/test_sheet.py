"""Contact sheets."""

import pytest
import torch

from dmd_core.sheet import GAP, picture, sheet


def test_a_sheet_has_a_cell_per_picture_in_its_place():
    rows = [torch.full((3, 3, 32, 32), v) for v in (-1.0, 1.0)]
    rows[1][2] = 0.0
    page = sheet(rows, cell=32)
    assert page.size == (GAP + 3 * (32 + GAP), GAP + 2 * (32 + GAP))
    assert page.getpixel((GAP + 5, GAP + 5)) == (0, 0, 0)
    assert page.getpixel((GAP + 2 * (32 + GAP) + 5, GAP + 32 + GAP + 5)) == (128, 128, 128)


def test_labels_take_room_and_leave_ink():
    rows = [torch.ones(2, 3, 16, 16)]
    bare = sheet(rows, cell=64)
    page = sheet(rows, ["teacher, 40 steps"], ["a small red star at the top left", "b"], cell=64, title="Title")
    assert page.width > bare.width + 60
    assert page.height > bare.height + 40
    assert min(page.crop((0, 20, page.width, page.height - 70)).getdata())[0] < 100


def test_pictures_that_are_not_square_keep_their_proportions():
    page = sheet([torch.full((1, 3, 16, 32), -1.0)], cell=64)
    assert page.getpixel((GAP + 32, GAP + 32)) == (0, 0, 0)
    assert page.getpixel((GAP + 32, GAP + 4))[0] > 200


def test_values_outside_the_range_are_cut():
    assert picture(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 8, 8\]"):
        sheet([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        sheet([torch.zeros(1, 3, 8, 8)], ["a", "b"])
