"""Can this MODEL be trained? Its gradient against central differences, once, for families that no test covers."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..dmd_core.conditioning import Cond
from .comfy_denoiser import ComfyDenoiser

PROBE = "_probe"
# native classes whose gradients the contract tests cover
TESTED = ("BaseModel", "SDXL", "SD3", "Flux", "Flux2", "Lumina2", "QwenImage", "WAN21", "Anima", "LTXV")
STEPS = (3e-3, 1e-2, 3e-2)  # of the parameters' norm
TOLERANCE_FP32, TOLERANCE_LOW = 0.02, 0.25  # half precision rounds the difference itself


def is_tested(denoiser: ComfyDenoiser) -> bool:
    cls = type(denoiser.model)
    return cls.__module__ == "comfy.model_base" and cls.__name__ in TESTED


def check_trainable(denoiser: ComfyDenoiser, shape: tuple[int, ...], cond: Cond) -> float:
    """The relative error of the gradient; a ValueError in one sentence where it is wrong. shape: [1 c ...], small."""
    failed = f"this MODEL ({type(denoiser.model).__name__}) cannot be trained: "
    advice = "; use a model of a family that the pack's documentation lists"
    checkpoint_blocks = denoiser.checkpoint_blocks
    try:
        # without recomputation autograd itself notices a saved tensor that was overwritten, in any precision
        denoiser.checkpoint_blocks = False
        error = probe(denoiser, shape, cond)
        denoiser.checkpoint_blocks = checkpoint_blocks
        if checkpoint_blocks:
            error = max(error, probe(denoiser, shape, cond))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as failure:
        why = str(failure).strip().splitlines()[0].rstrip(".")
        raise ValueError(f"{failed}its backward pass fails ({why}){advice}") from failure
    finally:
        denoiser.checkpoint_blocks = checkpoint_blocks
    if error == float("inf"):
        raise ValueError(f"{failed}no finite gradient reaches its layers{advice}")
    exact = denoiser.model.get_dtype_inference() == torch.float32
    if not error < (TOLERANCE_FP32 if exact else TOLERANCE_LOW):
        raise ValueError(f"{failed}its gradient is off by {error:.0%} from a finite difference{advice}")
    return error


def probe(denoiser: ComfyDenoiser, shape: tuple[int, ...], cond: Cond) -> float:
    """The largest relative error of dL/dp, L = <w, x0>, for a random adapter set p on a random latent."""
    rng = torch.Generator().manual_seed(0)
    params = list(denoiser.bank.new(PROBE, 1, rng).parameters())
    try:
        for adapter in denoiser.bank.sets[PROBE].values():
            adapter.up.data.copy_(0.05 * torch.randn(adapter.up.shape, generator=rng))
        x, w = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng, dtype=torch.float64)
        sigma = denoiser.schedule.sample(1, rng, 0.4, 0.6)

        def value() -> Tensor:
            with denoiser.bank.use(**{PROBE: 1.0}):
                return (denoiser(x, sigma, cond).double() * w).sum()

        grads = torch.autograd.grad(value(), params, allow_unused=True)
        reached = [(p, g.double()) for p, g in zip(params, grads, strict=True) if g is not None]
        norm = length([g for _, g in reached])
        if not 0 < norm < float("inf"):
            return float("inf")
        errors = [directional_error(value, reached, [g for _, g in reached], norm)]
        if denoiser.model.get_dtype_inference() == torch.float32:
            # what is orthogonal to g shows in a random direction only; in half precision that drowns in rounding
            random = [torch.randn(p.shape, generator=rng).to(p) for p, _ in reached]
            chance = norm / sum(p.numel() for p, _ in reached) ** 0.5
            errors.append(directional_error(value, reached, random, chance))
        return max(errors)
    finally:
        del denoiser.bank.sets[PROBE]


def length(tensors: list[Tensor]) -> float:
    return sum(t.detach().double().square().sum().item() for t in tensors) ** 0.5


def directional_error(
    value: Callable[[], Tensor], reached: list[tuple[Tensor, Tensor]], direction: list[Tensor], scale: float
) -> float:
    unit = [d / length(direction) for d in direction]
    expected = sum((g * d.double()).sum().item() for (_, g), d in zip(reached, unit, strict=True))
    params = [p for p, _ in reached]
    return min(abs(slope(value, params, unit, h * length(params)) - expected) for h in STEPS) / scale


@torch.no_grad()
def slope(value: Callable[[], Tensor], params: list[Tensor], unit: list[Tensor], h: float) -> float:
    """[L(p + h d) - L(p - h d)] / 2h"""
    before = [p.detach().clone() for p in params]
    ends = []
    for sign in (1, -1):
        for p, start, d in zip(params, before, unit, strict=True):
            p.data.copy_(start + sign * h * d)
        ends.append(value().item())
    for p, start in zip(params, before, strict=True):
        p.data.copy_(start)
    return (ends[0] - ends[1]) / (2 * h)
