"""Can this MODEL be trained? One forward and backward, and the gradient against a finite difference."""

import torch
from torch import Tensor

from ..dmd_core.conditioning import Cond
from .comfy_denoiser import ComfyDenoiser

PROBE = "_probe"
# native classes whose gradients the contract tests cover
TESTED = ("BaseModel", "SDXL", "SD3", "Flux", "Flux2", "Lumina2", "QwenImage", "WAN21")
STEPS = (3e-3, 1e-2, 3e-2)  # of the parameters' norm
TOLERANCE_FP32, TOLERANCE_LOW = 0.03, 0.25  # half precision rounds the difference itself


def is_tested(denoiser: ComfyDenoiser) -> bool:
    cls = type(denoiser.model)
    return cls.__module__ == "comfy.model_base" and cls.__name__ in TESTED


def check_trainable(denoiser: ComfyDenoiser, shape: tuple[int, ...], cond: Cond) -> float:
    """The relative error of the gradient; a ValueError in one sentence where it is wrong. shape: [1 c ...], small."""
    name = type(denoiser.model).__name__
    rng = torch.Generator().manual_seed(0)
    params = list(denoiser.bank.new(PROBE, 1, rng).parameters())
    try:
        for adapter in denoiser.bank.sets[PROBE].values():
            adapter.up.data.copy_(0.05 * torch.randn(adapter.up.shape, generator=rng))
        x = torch.randn(shape, generator=rng)
        w = torch.randn(shape, generator=rng, dtype=torch.float64) / x.numel() ** 0.5
        sigma = denoiser.schedule.sample(1, rng, 0.4, 0.6)
        error = gradient_error(denoiser, params, x, sigma, cond, w)
    except (RuntimeError, NotImplementedError) as failure:
        if isinstance(failure, torch.OutOfMemoryError):
            raise
        why = str(failure).strip().splitlines()[0]
        raise ValueError(
            f"this MODEL ({name}) cannot be trained: its backward pass fails ({why}); use a model of a supported family"
        ) from failure
    finally:
        del denoiser.bank.sets[PROBE]
    exact = denoiser.model.get_dtype() == torch.float32
    if not error < (TOLERANCE_FP32 if exact else TOLERANCE_LOW):
        raise ValueError(
            f"this MODEL ({name}) cannot be trained: its gradient is off by {error:.0%} from a finite difference; "
            "use a model of a supported family"
        )
    return error


def gradient_error(
    denoiser: ComfyDenoiser, params: list[Tensor], x: Tensor, sigma: Tensor, cond: Cond, w: Tensor
) -> float:
    """| |g| - dL/dg | / |g| along the gradient of L = <w, x0>; infinite where there is none or it is not finite."""

    def value() -> Tensor:
        with denoiser.bank.use(**{PROBE: 1.0}):
            return (denoiser(x, sigma, cond).double() * w).sum()

    grads = torch.autograd.grad(value(), params, allow_unused=True)
    reached = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
    norm = sum(g.double().square().sum() for _, g in reached) ** 0.5 if reached else torch.zeros(())
    if not (norm > 0 and norm.isfinite()):
        return float("inf")
    size = sum(p.detach().double().square().sum() for p, _ in reached) ** 0.5
    return min(abs(slope(value, reached, float(s * size / norm)) / norm - norm).item() / norm.item() for s in STEPS)


@torch.no_grad()
def slope(value, reached: list[tuple[Tensor, Tensor]], step: float) -> Tensor:
    """[L(p + step g) - L(p - step g)] / (2 step): <g, g> where g is right."""
    before = [p.detach().clone() for p, _ in reached]
    ends = []
    for sign in (1, -1):
        for (p, g), start in zip(reached, before, strict=True):
            p.data.copy_(start + sign * step * g)
        ends.append(value())
    for (p, _), start in zip(reached, before, strict=True):
        p.data.copy_(start)
    return (ends[0] - ends[1]) / (2 * step)
