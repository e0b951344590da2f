"""python -m dmd_core.shapes.build: makes every weight of the shapes world again, in order, with fixed seeds."""

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import shapes
from ..trainstate import TrainState, save_atomic
from . import autoencoder, stages, teacher

# name: (steps, seed), in the order in which each needs the ones before
PROCESSES = 2
RUN = "teacher_run"
STAGES = {"autoencoder": (6100, 11), "recogniser": (4800, 12), "text": (1500, 13), "teacher": (18000, 14)}
log = logging.getLogger(__name__)


def path(out: Path, default: Path) -> Path:
    return out / default.name


def save(state: Mapping[str, Tensor], file: Path, title: str, steps: int, seed: int) -> None:
    metadata = {
        "modelspec.title": title,
        "modelspec.license": "Apache-2.0",
        "modelspec.description": "ComfyUI-DMD shapes world; python -m dmd_core.shapes.build",
        "shapes.training": json.dumps({"steps": steps, "seed": seed}),
    }
    save_atomic({k: v.detach().half().contiguous() for k, v in state.items()}, file, metadata)
    log.info("wrote %s", file)


def build_autoencoder(out: Path, steps: int, seed: int) -> None:
    model = stages.train_autoencoder(steps, seed)
    save(autoencoder.full_state(model), path(out, shapes.AUTOENCODER), "Shapes autoencoder", steps, seed)


def build_recogniser(out: Path, steps: int, seed: int) -> None:
    model = stages.train_recogniser(shapes.load_autoencoder(path(out, shapes.AUTOENCODER)), steps, seed)
    save(model.state_dict(), path(out, shapes.RECOGNISER), "Shapes recogniser", steps, seed)


def build_text(out: Path, steps: int, seed: int) -> None:
    model = stages.train_text_encoder(steps, seed)
    save(model.state_dict(), path(out, shapes.TEXT_ENCODER), "Shapes text encoder", steps, seed)


def build_teacher(out: Path, steps: int, seed: int) -> None:
    """Two processes of one thread each: on small networks that is nearly twice as fast as one of two threads."""
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_teacher_process, (out, steps, seed, f"file://{meeting}/point"), PROCESSES)
    shutil.rmtree(out / RUN)  # only an interrupted build goes on from it


def _teacher_process(rank: int, out: Path, steps: int, seed: int, meeting: str) -> None:
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=PROCESSES)
    saved = out / RUN / "state.safetensors"

    def keep(state: TrainState) -> None:
        weights = state.ema["student"] | {"pos_embed": teacher.positions(teacher.HEAD * teacher.DEPTH)}
        save(weights, path(out, shapes.TEACHER), "Shapes teacher (SD3 layout)", state.step, seed)
        state.save(saved)

    vae = shapes.load_autoencoder(path(out, shapes.AUTOENCODER))
    encoder = shapes.load_text_encoder(path(out, shapes.TEXT_ENCODER))
    stages.train_teacher(vae, encoder, steps, seed, keep, saved, rank)
    torch.distributed.destroy_process_group()


BUILDERS = dict(zip(STAGES, (build_autoencoder, build_recogniser, build_text, build_teacher), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dmd_core.shapes.build", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=shapes.WEIGHTS, help="where the weights go and earlier ones are read"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, help="instead of the stage's own (for a quick look)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    for name in STAGES:
        if name in args.only:
            steps, seed = STAGES[name]
            steps = args.steps or steps
            log.info("building the %s: %d steps, seed %d", name, steps, seed)
            BUILDERS[name](args.out, steps, seed)


if __name__ == "__main__":
    main()
