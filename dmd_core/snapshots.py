"""Snapshots of a student: how it compares with its teacher on fixed prompts, and which of them is the best."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .metrics import pairwise_distance
from .sheet import sheet
from .trainstate import save_atomic

DIVERSE = (0.8, 1.25)  # of the teacher's diversity: within it, fidelity alone decides


@dataclass(frozen=True)
class Gallery:
    """Fixed prompts and noise: student() and teacher() each give pictures [n 3 h w] in -1..1, always for the same n.

    features(pictures) -> [n d] is what they are compared in; None: small colour pictures, which is crude.
    """

    prompts: Sequence[str]
    student: Callable[[], Tensor]
    teacher: Callable[[], Tensor]
    features: Callable[[Tensor], Tensor] | None = None
    shown: int = 8  # columns of the contact sheet
    labels: tuple[str, str] = ("teacher", "student")  # of its rows: who draws, and in how many steps


@dataclass(frozen=True)
class Measures:
    """fidelity: 1 is the teacher's own picture of each prompt, 0 that of any other one; diversity: 1 is its own."""

    fidelity: float
    diversity: float
    brightness: float
    saturation: float
    teacher_brightness: tuple[float, float]  # mean, standard deviation over pictures
    teacher_saturation: tuple[float, float]


@dataclass
class Reference:
    """The teacher's side of the comparison, made once per run."""

    images: Tensor
    features: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, gallery: Gallery) -> "Reference":
        images = gallery.teacher().float().cpu()
        if len(images) < 2 or len(images) != len(gallery.prompts):
            raise ValueError(
                f"{len(images)} pictures for {len(gallery.prompts)} sample prompts; give at least two prompts, "
                "one picture each"
            )
        return cls(images, features_of(gallery, images))

    @classmethod
    def at(cls, path: Path, gallery: Gallery) -> "Reference":
        """The one kept at path, or a new one where there is none, or one of other prompts."""
        key = hashlib.sha256("\n".join(gallery.prompts).encode()).hexdigest()
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("prompts") == key:
                    return cls(file.get_tensor("images"), file.get_tensor("features"))
        except (SafetensorError, OSError):
            pass
        made = cls.of(gallery)
        save_atomic(
            {"images": made.images.contiguous(), "features": made.features.contiguous()}, path, {"prompts": key}
        )
        return made


@torch.no_grad()
def measure(images: Tensor, gallery: Gallery, reference: Reference) -> Measures:
    images = images.float().cpu()
    own, teacher = features_of(gallery, images), reference.features
    between = max(pairwise_distance(teacher), 1e-12)
    matched = (own.double() - teacher.double()).norm(dim=1).mean().item()
    light, colour = brightness(images), saturation(images)
    return Measures(
        fidelity=1 - matched / between,
        diversity=pairwise_distance(own) / between,
        brightness=light.mean().item(),
        saturation=colour.mean().item(),
        teacher_brightness=mean_std(brightness(reference.images)),
        teacher_saturation=mean_std(saturation(reference.images)),
    )


def best(rows: Sequence[Measures]) -> int | None:
    """The most faithful of those about as diverse as the teacher; if none is, the one that misses both by the least.

    Of equals the earlier one: few-step students are at their best early and wear out.
    """
    if not rows:
        return None

    def rank(i: int) -> tuple[float, float, int]:
        low, high = DIVERSE
        miss = max(low - rows[i].diversity, rows[i].diversity - high, 0.0)
        return (0.0, rows[i].fidelity, -i) if miss == 0 else (-1.0, rows[i].fidelity - miss, -i)

    return max(range(len(rows)), key=rank)


def features_of(gallery: Gallery, images: Tensor) -> Tensor:
    found = (gallery.features or small_pictures)(images).float().cpu()
    return found.flatten(1)


def small_pictures(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, 8).flatten(1)


def brightness(images: Tensor) -> Tensor:
    """0 to 1 per picture."""
    return (images.clamp(-1, 1).mean((1, 2, 3)) + 1) / 2


def saturation(images: Tensor) -> Tensor:
    """Mean distance of the strongest from the weakest colour channel, 0 to 1 per picture."""
    images = images.clamp(-1, 1)
    return (images.amax(1) - images.amin(1)).mean((1, 2)) / 2


def mean_std(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item()


def fill(
    folder: Path, state: Mapping[str, Tensor], step: int, images: Tensor, gallery: Gallery, reference: Reference
) -> Measures:
    """Writes student.safetensors (as AdapterBank.load takes it), sheet.png and measures.json into a snapshot folder."""
    found = measure(images, gallery, reference)
    write_student(folder, state, step)
    n = gallery.shown
    rows = [reference.images[:n], images.float().cpu()[:n]]
    labels = [gallery.labels[0], f"{gallery.labels[1]}, update {step}"]
    sheet(rows, labels, list(gallery.prompts[:n])).save(folder / "sheet.png")
    (folder / "measures.json").write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found


def write_student(folder: Path, state: Mapping[str, Tensor], step: int) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(tensors, folder / "student.safetensors", {"step": str(step)})


def read_measures(folder: Path) -> Measures | None:
    """None where the snapshot was not judged, or its file is damaged."""
    try:
        given: dict[str, Any] = json.loads((folder / "measures.json").read_text(encoding="utf-8"))
        for key in ("teacher_brightness", "teacher_saturation"):
            given[key] = tuple(float(v) for v in given[key])
        return Measures(**given)
    except (OSError, ValueError, TypeError, KeyError):
        return None
