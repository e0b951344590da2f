"""python -m bench TABLE | all | cuda | reliability | page, from the repository's root. One command per table."""

import sys

import torch

TABLES = (
    *("methods", "training", "memory", "sampling", "guidance", "variety", "inpainting", "inpainting_quality"),
    *("sliders", "processes", "scaling", "start"),
)


def make(name: str):
    """The table, measured now."""
    from . import (
        guidance,
        inpainting,
        inpainting_quality,
        memory,
        methods,
        processes,
        sampling,
        sliders,
        start,
        training,
        variety,
    )

    return {
        "methods": methods.on_cpu,
        # the longest one: its rows are kept as they come
        "training": lambda: training.on_cpu(done=lambda table: table.write("cpu", "python -m bench training")),
        "memory": memory.on_paper,
        "sampling": sampling.on_cpu,
        "guidance": guidance.on_cpu,
        "variety": variety.on_cpu,
        "inpainting": inpainting.on_cpu,
        "inpainting_quality": inpainting_quality.on_cpu,
        "sliders": sliders.on_cpu,
        "processes": processes.on_cpu,
        "scaling": processes.on_paper,
        "start": start.on_cpu,
    }[name]()


def main(args: list[str]) -> None:
    torch.set_num_threads(1)
    match args:
        case ["work"]:
            from .processes import work

            work()
        case ["cuda"] | ["cuda", "--dry"]:
            from .cuda import main as on_cuda

            on_cuda(dry="--dry" in args)
        case ["settings"]:
            from .memory import settings

            print(settings())
        case ["page"]:
            from .page import write

            print(write())
        case ["reliability", *row] if len(row) < 2:
            from .reliability import on_cpu

            on_cpu(*row, done=lambda table: print(table.write("cpu", "python -m bench reliability")))
        case [chosen] if chosen in (*TABLES, "all"):
            for name in TABLES if chosen == "all" else args:
                print(make(name).write("cpu", f"python -m bench {name}"))
        case _:
            raise SystemExit(f"give one of {', '.join((*TABLES, 'all', 'cuda', 'reliability', 'settings', 'page'))}")


main(sys.argv[1:])
