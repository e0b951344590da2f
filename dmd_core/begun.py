"""What a run was begun with, and what of that may not change when it goes on."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .runs import Run, finite

SETTLED = ("method", "train")  # tables of the run file whose fields the states depend on
FREE = ("train.steps",)  # a longer run goes on
LONG = 80  # letters of two values beyond which only their name is said


def refuse_other(
    run: Run, fixed: Mapping[str, Any], file: Mapping[str, Any] | None = None, noted: str = "begun_with"
) -> None:
    """Before anything is written: a refused run stays as it was. fixed: what run.json holds under `noted`.

    Another model of the same family would go on from these states, and be judged by the old one's pictures.
    """
    before, then = (found if isinstance(found := run.settings().get(k), dict) else {} for k in (noted, "file"))
    other = differing(before, plain(fixed))
    written = differing(dict(flat(then)), dict(flat(plain(file or {}))))
    if "steps" in written:
        written.pop("sigmas", None)  # they follow from the steps
    if changes := [c for name, values in [*other.items(), *written.items()] if (c := named_change(name, *values))]:
        raise ValueError(
            f"the run {run.name!r} was begun with {', '.join(changes)}; go on with the same, choose another run name, "
            "or begin a new run (resume: new)"
        )


def plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """As run.json gives it back."""
    return json.loads(json.dumps(finite(given), default=str))


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What an older version did not note cannot be compared."""
    return {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}


def flat(file: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settled fields of a run file, by their own names."""
    for table in SETTLED:
        values = file.get(table)
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, dict):
                yield from value.items()
            elif f"{table}.{name}" not in FREE:
                yield (table if name == "name" else name), value


def named_change(name: str, before: Any, now: Any) -> str:
    """In words; empty where a model has another name but the same weights."""
    if not (name == "model" and isinstance(before, Mapping)):
        values = f" ({before}, this is {now})"
        several = name.endswith("s") and not name.endswith("ss")
        return f"{'other' if several else 'another'} {name}{values if len(values) < LONG else ''}"
    if before["hash"] == now["hash"]:
        return ""
    this = f"this is {now['name']}" if before["name"] != now["name"] else "of other weights than this one"
    return f"another model ({before['name']}, {this})"
