"""The embedded world: pictures of shapes, captions, small trained networks. Everything here runs with no download."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import autoencoder, recogniser, teacher, text

WEIGHTS = Path(__file__).parent / "weights"
TEACHER, AUTOENCODER = WEIGHTS / "shapes_teacher.safetensors", WEIGHTS / "shapes_vae.safetensors"
TEXT_ENCODER, RECOGNISER = WEIGHTS / "shapes_text.safetensors", WEIGHTS / "shapes_recogniser.safetensors"


def load_teacher(path: Path = TEACHER) -> teacher.Teacher:
    return _load(teacher.from_state, path)


def load_autoencoder(path: Path = AUTOENCODER) -> autoencoder.Autoencoder:
    return _load(autoencoder.from_state, path)


def load_text_encoder(path: Path = TEXT_ENCODER) -> text.TextEncoder:
    return _load(text.from_state, path)


def load_recogniser(path: Path = RECOGNISER) -> recogniser.Recogniser:
    return _load(recogniser.from_state, path)


def _load(build, path: Path):
    state = read(path)
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global generator, the host's
            return build(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold what {build.__module__.rpartition('.')[2]} of the shapes world needs ({error}); "
            "restore the file, or make it again with python -m dmd_core.shapes.build"
        ) from error


def read(path: Path) -> Mapping[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; it comes with this package: reinstall it, or run python -m dmd_core.shapes.build"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a sound safetensors file ({error}); reinstall the package, "
            "or run python -m dmd_core.shapes.build"
        ) from error
