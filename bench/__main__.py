"""python -m bench TABLE | all | cuda [--dry] | gpu_training [--dry] | settings | chart | page, from the repository."""

import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature

import torch

from .page import ORDER
from .record import Table

# where a table is not made by on_cpu of the module of its name
PLACES = {
    "memory": "memory.on_paper",
    "scaling": "processes.on_paper",
    "lazydiffusion_cost": "lazydiffusion.cost",
}
HOURS = "reliability"  # not among "all"


def place(name: str) -> Callable[..., Table]:
    module, function = PLACES.get(name, f"{name}.on_cpu").split(".")
    return getattr(import_module(f"{__package__}.{module}"), function)


def make(name: str, *chosen: str) -> Table:
    """The table, measured now."""
    work = place(name)
    if "done" not in signature(work).parameters:
        return work(*chosen)
    # the long ones: their rows are kept as they come
    return work(*chosen, done=lambda table: table.write("cpu", f"python -m bench {name}"))


def main(args: list[str]) -> None:
    torch.set_num_threads(1)
    match args:
        case ["work"]:
            from .processes import work

            work()
        case ["cuda"] | ["cuda", "--dry"]:
            from .cuda import main as on_cuda

            on_cuda(dry="--dry" in args)
        case ["gpu_training"] | ["gpu_training", "--dry"]:
            from .gpu_training import main as on_gpu

            on_gpu(dry="--dry" in args)
        case ["settings"]:
            from .memory import settings

            print(settings())
        case ["chart"]:
            from .chart import write

            print(write())
        case ["page"]:
            from .page import write

            print(write())
        case ["all"]:
            for name in ORDER:
                if name != HOURS:
                    print(make(name).write("cpu", f"python -m bench {name}"))
        case [name, *row] if name in ORDER and len(row) <= (name == HOURS):
            print(make(name, *row).write("cpu", f"python -m bench {name}"))
        case _:
            raise SystemExit(
                f"give one of {', '.join((*ORDER, 'all', 'cuda', 'gpu_training', 'settings', 'chart', 'page'))}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
