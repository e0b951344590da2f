"""What the history of a run says about its health, in plain words: pure functions, each silent when all is well."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import discriminators
from .snapshots import Measures

Record = Mapping[str, Any]  # one line of the curves: step, losses, norms, counters, seconds

WINDOW = 50  # steps over which a loss is averaged before it is judged
CRITIC_RISE = 1.5  # a critic's loss above its own best mean by this factor
LEAST = 0.05  # brightness and saturation (0 to 1) may move by at least this much
SPREADS = 1.0  # and by this many standard deviations of the teacher's pictures
DIVERSITY = (0.7, 1.5)  # of the teacher's own


def alarms(history: Sequence[Record], measures: Sequence[Measures] = ()) -> list[str]:
    """Everything that is wrong now; the measures are those of the snapshots, oldest first."""
    found = nonfinite(history) + critic_behind(history) + discriminator_saturated(history)
    return found + (range_left(measures[-1]) if measures else [])


def nonfinite(history: Sequence[Record]) -> list[str]:
    """In a run folder a loss that is no number is null."""
    for record in history[-1:]:
        bad = [k for k, v in record.get("losses", {}).items() if v is None or not math.isfinite(v)]
        if bad:
            return [
                f"{', '.join(bad)} became NaN or infinite at step {record.get('step')}: the run stops and keeps its "
                "last good state; lower the learning rate"
            ]
    return []


def critic_behind(history: Sequence[Record]) -> list[str]:
    """The student moves on and the critic no longer describes it: its loss climbs above what it had reached."""
    losses = series(history, "critic/denoise")
    window = min(WINDOW, len(losses) // 3)
    if window < 10:
        return []
    # the first window is the critic finding its feet
    means = [mean(losses[i : i + window]) for i in range(window, len(losses) - window + 1, window)]
    now = mean(losses[-window:])
    if now > CRITIC_RISE * min(means):
        return [
            f"the critic falls behind: its loss is {now / min(means):.1f} times its best; raise critic_lr or "
            "critic_updates, or lower student_lr"
        ]
    return []


def discriminator_saturated(history: Sequence[Record]) -> list[str]:
    """Judged by running means; the first hundred steps are its own start."""
    found = []
    names = sorted({k.rpartition("/")[0] for r in history[-1:] for k in r.get("losses", {}) if k.endswith("/gap")})
    for name in names:
        accuracy, gap = (series(history, f"{name}/{k}") for k in ("accuracy", "gap"))
        if len(history) >= 2 * WINDOW and min(len(accuracy), len(gap)) >= WINDOW:
            found += discriminators.alarms(mean(accuracy[-WINDOW:]), mean(gap[-WINDOW:]))
    return found


def range_left(now: Measures) -> list[str]:
    """Compared with the teacher's pictures of the same prompts, never with a fixed number."""
    found = []
    for what, value, (centre, spread) in (
        ("brightness", now.brightness, now.teacher_brightness),
        ("saturation", now.saturation, now.teacher_saturation),
    ):
        if abs(value - centre) > max(LEAST, SPREADS * spread):
            found.append(
                f"{what} left the teacher's range: {value:.2f}, the teacher's is {centre:.2f}; "
                "lower the guidance or the learning rate, or pick an earlier snapshot"
            )
    low, high = DIVERSITY
    if now.diversity < low:
        found.append(
            f"the samples look alike: diversity is {now.diversity:.0%} of the teacher's; "
            "pick an earlier snapshot, or lower student_lr"
        )
    if now.diversity > high:
        found.append(
            f"the samples fall apart: diversity is {now.diversity:.0%} of the teacher's; "
            "pick an earlier snapshot, or lower student_lr"
        )
    return found


def series(history: Sequence[Record], name: str) -> list[float]:
    values = [r.get("losses", {}).get(name) for r in history]
    return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
