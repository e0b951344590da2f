"""python -m dmd_core demo | train | inspect"""

import argparse
import sys
from pathlib import Path

import torch


def demo(args: argparse.Namespace) -> None:
    from . import demo

    config = demo.quick(args.seed) if args.quick else demo.DemoConfig(seed=args.seed)
    report = demo.run_demo(args.out, config, torch.device(args.device), say)
    print("\n" + demo.words(report))
    print(
        f"{report['wall_seconds']:.0f} s. Look at {args.out / 'sheet.png'}; figures are in {args.out / 'report.json'}."
    )


def train(args: argparse.Namespace) -> None:
    from .headless import train_from

    print(f"the run is in {train_from(args.file, args.resume, say)}")


def inspect(args: argparse.Namespace) -> None:
    from .runs import about
    from .weights.doctor import describe

    print(about(args.file) or describe(args.file))


def say(line: str) -> None:
    # one line that rewrites itself on a terminal, plain lines in a log
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dmd_core", description="The engine of ComfyUI-DMD, headless.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("demo", help="distil the embedded shapes teacher and measure the students")
    command.add_argument("--out", type=Path, required=True, help="folder for sheets, curves, LoRA files, report.json")
    command.add_argument("--quick", action="store_true", help="a look in 90 seconds; too short for good students")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.set_defaults(run=demo)
    command = commands.add_parser("train", help="distil as a TOML run file says; also under `accelerate launch -m`")
    command.add_argument("file", type=Path, metavar="RUN.toml")
    command.add_argument("--resume", action="store_true", help="go on with the run of that name")
    command.set_defaults(run=train)
    command = commands.add_parser("inspect", help="what a checkpoint or LoRA is, and how to sample it")
    command.add_argument("file", type=Path, metavar="FILE")
    command.set_defaults(run=inspect)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
