"""A LoRA from the difference of two checkpoints: distilled minus base, one layer at a time.

Singular vectors are not clamped: the quantile clamp of older scripts is known to hurt. Distillation differences are not
of low rank, so the kept energy is reported for every layer, and what a LoRA cannot hold (norms, biases) is counted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..families import layer_path
from ..families.names import OTHERS
from .files import open_tensors
from .header import Shape, read_header

NOISE = 1e-6  # singular values below this share of the largest are rounding
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """rank is the most a layer gets; with energy it gets the fewest singular values that keep that share of |D|^2."""

    rank: int = 128
    energy: float | None = None
    oversample: int = 16  # further directions of the random sketch
    iterations: int = 5  # power iterations: 4 to 7 leave no visible loss
    seed: int = 0
    device: str = "cpu"
    smallest: float = 1e-5  # layers that changed less than this (relative) are left out

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; use 1 or more (64 to 256 are usual for a distillation)")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy is {self.energy}; use a share above 0 and up to 1, such as 0.95, or none")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What was found of one layer; down [r in ...] and up [out r ...] are None where it is not carried."""

    name: str  # the layer's own path
    done: int
    total: int
    change: float  # |D| / |W|
    kept: float  # share of |D|^2, 1 is all of it
    down: Tensor | None = None
    up: Tensor | None = None
    reason: str = ""  # why it is not carried

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]


@dataclass(frozen=True)
class Weights:
    """Shapes known, tensors read one at a time."""

    shapes: Mapping[str, Shape]
    get: Callable[[str], Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Weights":
        return cls({k: tuple(v.shape) for k, v in tensors.items()}, lambda k: tensors[k])


@contextmanager
def open_weights(path: str | Path) -> Iterator[Weights]:
    """The tensors of a .safetensors file, read lazily."""
    header = read_header(path)
    if header.format != "safetensors":
        raise ValueError(f"{header.name} is a pickle; convert it to .safetensors first (Doctor does that)")
    with open_tensors(Path(path)) as get:
        yield Weights(header.shapes, get)


def extract_files(base: str | Path, tuned: str | Path, config: ExtractConfig) -> Iterator[Layer]:
    with ExitStack() as files:
        yield from extract(files.enter_context(open_weights(base)), files.enter_context(open_weights(tuned)), config)


def extract(base: Weights, tuned: Weights, config: ExtractConfig) -> Iterator[Layer]:
    """One Layer per weight of the diffusion model; never holds more than one layer of each model.

    Collect with `state`; the names are the layers' own paths, in the layout of the checkpoints.
    """
    pairs = matched(base.shapes, tuned.shapes)
    for i, (name, (ours, theirs)) in enumerate(pairs.items()):
        yield _layer(name, i + 1, len(pairs), base.get(ours), tuned.get(theirs), base.shapes[ours], config)


def state(layers: Iterator[Layer]) -> dict[str, Tensor]:
    """What AdapterBank.load and weights.lora.save_lora take."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        if layer.down is not None and layer.up is not None:
            found |= {f"{layer.name}.down": layer.down, f"{layer.name}.up": layer.up}
    if not found:
        raise ValueError("the two checkpoints do not differ in any layer that a LoRA can carry; choose two others")
    return found


def matched(base: Mapping[str, Shape], tuned: Mapping[str, Shape]) -> dict[str, tuple[str, str]]:
    """Own path -> (key in base, key in tuned) of all weights of the network, or the reason why they do not match."""
    ours, theirs = _network(base), _network(tuned)
    common = [n for n in theirs if n in ours]
    if not common or len(common) < 0.9 * max(len(ours), len(theirs)):
        odd = next((n for n in theirs if n not in ours), next(iter(ours), "nothing"))
        raise ValueError(
            f"the checkpoints do not match: {len(common)} of {len(theirs)} layers share a name, {odd!r} does not; "
            "take two files of one family in one key layout (Doctor's copies have the network's own names)"
        )
    wrong = next((n for n in common if base[ours[n]] != tuned[theirs[n]]), None)
    if wrong is not None:
        raise ValueError(
            f"the checkpoints are of different models: {wrong} is {base[ours[wrong]]} in one and "
            f"{tuned[theirs[wrong]]} in the other; take two files of one family"
        )
    if any(k.endswith((".scale_weight", ".weight_scale")) for k in (*base, *tuned)):
        raise ValueError("one of the checkpoints is in scaled fp8; take the bf16 or fp16 file of it")
    return {n: (ours[n], theirs[n]) for n in common}


def _network(shapes: Mapping[str, Shape]) -> dict[str, str]:
    found = {}
    for key in shapes:
        if not OTHERS.match(key) and key.endswith((".weight", ".bias")):
            path = layer_path(key)
            found[path.removesuffix(".weight") if path.endswith(".weight") else path] = key
    return found


def _layer(
    name: str, done: int, total: int, before: Tensor, after: Tensor, shape: Shape, config: ExtractConfig
) -> Layer:
    for tensor in (before, after):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is stored as {tensor.dtype}; take the bf16 or fp16 file of that checkpoint")
    difference = after.to(config.device, torch.float32) - before.to(config.device, torch.float32)
    size = torch.linalg.vector_norm(before.float()).item()
    change = torch.linalg.vector_norm(difference).item() / max(size, 1e-30)
    at = {"name": name, "done": done, "total": total, "change": change}
    if change <= config.smallest:
        return Layer(**at, kept=1.0, reason="unchanged")
    if difference.ndim not in (2, 4):
        return Layer(**at, kept=0.0, reason="a norm or bias, which a LoRA cannot hold")
    down, up, kept = factors(difference.flatten(1), config)
    if difference.ndim == 4:
        down, up = down.reshape(len(down), *shape[1:]), up[..., None, None]
    return Layer(**at, kept=kept, down=down.cpu(), up=up.cpu())


def factors(difference: Tensor, config: ExtractConfig) -> tuple[Tensor, Tensor, float]:
    """down [r n], up [m r] and the kept share of |D|^2, sqrt(S) on both sides. difference: [m n]"""
    u, s, v = _svd(difference, config)
    total = difference.double().square().sum().item()
    energy = s.double().square().cumsum(0) / max(total, 1e-300)
    rank = min(config.rank, int((s > NOISE * s[0]).sum()))
    if config.energy is not None:
        enough = (energy >= config.energy * (1 - 1e-7)).nonzero()
        rank = min(rank, int(enough[0]) + 1) if len(enough) else rank
    root = s[:rank].sqrt()
    down, up = root[:, None] * v[:, :rank].T, u[:, :rank] * root
    return down.contiguous(), up.contiguous(), min(1.0, energy[rank - 1].item())


def _svd(difference: Tensor, config: ExtractConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Exact where the sketch would not be smaller, else randomised (Halko et al. 2011, algorithms 4.4 and 5.1)."""
    width = config.rank + config.oversample
    if width >= min(difference.shape):
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
        return u, s, vh.T
    rng = torch.Generator().manual_seed(config.seed)
    sketch = torch.randn(difference.shape[1], width, generator=rng).to(difference)
    basis = torch.linalg.qr(difference @ sketch).Q
    for _ in range(config.iterations):  # orthonormal in between, or the small directions drown in rounding
        basis = torch.linalg.qr(difference @ torch.linalg.qr(difference.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ difference, full_matrices=False)
    return basis @ u, s, vh.T
