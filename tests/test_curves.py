import pytest

from dmd_core.curves import PANEL, curves, running_mean


def test_the_running_mean_starts_at_the_first_value_and_follows():
    assert running_mean([4.0, 4.0, 4.0]) == pytest.approx([4, 4, 4])
    assert 1 < running_mean([0.0] * 5 + [10.0] * 5)[-1] < 10


def test_one_panel_per_series_and_the_line_follows_the_values():
    rising, falling = curves({"loss": list(range(50))}), curves({"loss": list(range(50))[::-1]})
    assert rising.size == PANEL
    assert rising.tobytes() != falling.tobytes()
    assert curves({c: [1.0, 2.0] for c in "abcd"}).size == (3 * PANEL[0], 2 * PANEL[1])


def test_flat_and_empty_series_are_drawn():
    assert curves({"flat": [1.0] * 4, "empty": [], "one": [3.0]}).size == (3 * PANEL[0], PANEL[1])
