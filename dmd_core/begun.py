"""What a run was begun with, and what of that may not change when it goes on."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .runs import Run, finite

SETTLED = ("method", "train")  # tables of the run file whose fields the states depend on
FREE = ("train.steps",)  # a longer run goes on


def refuse_other(run: Run, fixed: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    """Before anything is written: a refused run stays as it was. fixed: what was noted as begun_with.

    Another model of the same family would go on from these states, and be judged by the old one's pictures.
    """
    noted = run.settings()
    before, then = (found if isinstance(found := noted.get(k), dict) else {} for k in ("begun_with", "file"))
    changes = [named_change(k, before[k], v) for k, v in fixed.items() if before.get(k, v) != v]
    old, new = dict(flat(then)), dict(flat(json.loads(json.dumps(finite(file), default=str))))
    # what an older version did not note cannot be compared
    other = [name for name in old if name in new and old[name] != new[name]]
    if "steps" in other and "sigmas" in other:
        other.remove("sigmas")  # they follow from the steps
    changes += [named_change(name, old[name], new[name]) for name in other]
    if changes := [c for c in changes if c]:
        raise ValueError(
            f"the run {run.name!r} was begun with {', '.join(changes)}; go on with the same, choose another run name, "
            "or begin a new run (resume: new)"
        )


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
    if name != "model":
        return f"{'other' if name.endswith('s') else 'another'} {name} ({before}, this is {now})"
    if before["hash"] == now["hash"]:
        return ""
    this = f"this is {now['name']}" if before["name"] != now["name"] else "of other weights than this one"
    return f"another model ({before['name']}, {this})"
