"""What every backend must do: checks on a real network behind the Denoiser protocol, the same for all backends.

A backend builds a `Case` per family and calls each of CHECKS on it (pytest.mark.parametrize("check", CHECKS)).
Checks leave the bank as they found it, so one Case serves all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network. Conditioning is opaque: whatever its denoiser takes."""

    name: str
    denoiser: Any  # the Denoiser; adapters of `bank` sit on its network
    bank: Any  # AdapterBank
    shape: tuple[int, ...]  # of a batch of two, [2 c ...]
    sigmas: tuple[float, float]  # a high and a low noise level, one per sample
    conds: tuple[Any, Any]  # two different prompts, one sample each
    both: Any  # the same two as one batch of two
    host: Callable[[Tensor, Tensor, Any], Tensor]  # x0 as the host computes it, adapters off: (x, sigma, cond) -> x0
    host_tolerance: float = 0.0  # largest difference to the host, relative to the largest x0; 0: to the bit
    batch_tolerance: float = 1e-4  # batch of two against two single runs: other matrix kernels, other rounding
    gradient_tolerance: float = 3e-3  # against a central difference in fp32, relative to the gradient's norm

    def x(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(11))

    def sigma(self) -> Tensor:
        return torch.tensor(self.sigmas)

    @torch.no_grad()
    def x0(self, **scales: float) -> Tensor:
        """Of both prompts, with a mix of adapter sets."""
        with self.bank.use(**scales):
            return self.denoiser(self.x(), self.sigma(), self.both)

    @contextmanager
    def sets(self, *names: str, rank: int = 2, up: float = 0.05) -> Iterator[dict[str, list[Tensor]]]:
        """Fresh adapter sets with random up matrices (all zero where up = 0); gone afterwards."""
        params = {}
        for seed, name in enumerate(names):
            rng = torch.Generator().manual_seed(seed)
            params[name] = list(self.bank.new(name, rank, rng).parameters())
            for adapter in self.bank.sets[name].values():
                adapter.up.data.normal_(0, 1, generator=rng).mul_(up)
        try:
            yield params
        finally:
            for name in names:
                del self.bank.sets[name]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def shape_and_dtype(case: Case) -> None:
    x0 = case.x0()
    assert x0.shape == case.shape
    assert x0.dtype == torch.float32
    assert x0.isfinite().all()


def agrees_with_the_host(case: Case) -> None:
    x, sigma = case.x(), case.sigma()
    for i, cond in enumerate(case.conds):
        with torch.no_grad():
            ours = case.denoiser(x[i : i + 1], sigma[i : i + 1], cond)
            host = case.host(x[i : i + 1], sigma[i : i + 1], cond)
        assert relative(ours, host) <= case.host_tolerance


def conditions_each_sample_on_its_own_prompt(case: Case) -> None:
    x, sigma = case.x(), case.sigma()
    with torch.no_grad():
        single = [case.denoiser(x[i : i + 1], sigma[i : i + 1], c) for i, c in enumerate(case.conds)]
        swapped = case.denoiser(x[:1], sigma[:1], case.conds[1])
    assert relative(case.x0(), torch.cat(single)) <= case.batch_tolerance
    # the control: another prompt must change the result, or the check above says nothing
    assert relative(swapped, single[0]) > 10 * case.batch_tolerance


def a_new_set_changes_nothing_to_the_bit(case: Case) -> None:
    bare = case.x0()
    with case.sets("new", up=0.0):
        assert torch.equal(case.x0(new=1.0), bare)
    with case.sets("learned"):
        assert torch.equal(case.x0(), bare)
        assert torch.equal(case.x0(learned=0.0), bare)
        assert relative(case.x0(learned=1.0), bare) > 1e-4


def a_mix_is_linear_in_up(case: Case) -> None:
    with case.sets("a", "b", "c"):
        for a, b, c in zip(*(case.bank.sets[k].values() for k in "abc"), strict=True):
            b.down.data.copy_(a.down.data)
            b.up.data.copy_(a.up.data * -0.5)
            c.down.data.copy_(a.down.data)
            c.up.data.copy_(a.up.data * 0.25)
        scaled = case.x0(a=0.5)
        assert relative(case.x0(b=-1.0), scaled) < 1e-5
        assert relative(case.x0(a=1.0, c=-2.0), scaled) < 1e-4
        assert relative(case.x0(a=1.0), scaled) > 1e-4


def gradients_reach_only_the_active_set(case: Case) -> None:
    with case.sets("on", "off") as params:
        with case.bank.use(on=1.0):
            loss = case.denoiser(case.x(), case.sigma(), case.both).square().sum()
        grads = torch.autograd.grad(loss, params["on"] + params["off"], allow_unused=True)
        on, off = grads[: len(params["on"])], grads[len(params["on"]) :]
        assert all(g is None for g in off)
        reached = [g for g in on if g is not None and g.abs().max() > 0]
        assert len(reached) >= 0.7 * len(on)  # the text branch of a last block is computed and not used
        assert all(g.isfinite().all() for g in reached)


def gradient_is_the_finite_difference(case: Case) -> None:
    with case.sets("on") as params:
        errors = gradient_errors(case, params["on"], active={"on": 1.0})
    assert max(errors) < case.gradient_tolerance, errors


def gradient_survives_another_set_at_backward(case: Case) -> None:
    with case.sets("on", "other") as params:
        errors = gradient_errors(case, params["on"], active={"on": 1.0}, at_backward={"other": 1.0})
    assert max(errors) < case.gradient_tolerance, errors


def gradient_reaches_the_input(case: Case) -> None:
    x = case.x().requires_grad_()
    errors = gradient_errors(case, [x], active={}, x=x)
    assert max(errors) < case.gradient_tolerance, errors


CHECKS = (
    shape_and_dtype,
    agrees_with_the_host,
    conditions_each_sample_on_its_own_prompt,
    a_new_set_changes_nothing_to_the_bit,
    a_mix_is_linear_in_up,
    gradients_reach_only_the_active_set,
    gradient_is_the_finite_difference,
    gradient_survives_another_set_at_backward,
    gradient_reaches_the_input,
)


def gradient_errors(
    case: Case,
    params: list[Tensor],
    active: dict[str, float],
    at_backward: dict[str, float] | None = None,
    x: Tensor | None = None,
) -> list[float]:
    """How far the gradient g of L = <w, x0> is from central differences, along itself and two random directions d.

    |g.d - (L(p + hd) - L(p - hd)) / 2h| over the size of g.d that chance gives. A difference along g alone would miss
    what is orthogonal to it: Flux's in-place residuals are 5 % wrong, and 0.3 % that way.
    `at_backward` is the mix that is active while autograd runs.
    """
    x = case.x() if x is None else x
    w = torch.randn(case.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def value() -> Tensor:
        with case.bank.use(**active):
            return (case.denoiser(x, case.sigma(), case.both).double() * w).sum()

    loss = value()
    with case.bank.use(**(active if at_backward is None else at_backward)):
        found = torch.autograd.grad(loss, params, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
    rng = torch.Generator().manual_seed(6)
    chance = length(grads) / sum(p.numel() for p in params) ** 0.5
    assert chance > 0
    errors = [directional_error(value, params, grads, grads, length(grads))]
    for _ in range(2):
        random = [torch.randn(p.shape, generator=rng).to(p) for p in params]
        errors.append(directional_error(value, params, grads, random, chance))
    return errors


def length(tensors: list[Tensor]) -> float:
    return sum(t.detach().double().square().sum().item() for t in tensors) ** 0.5


def directional_error(
    value: Callable[[], Tensor], params: list[Tensor], grads: list[Tensor], direction: list[Tensor], scale: float
) -> float:
    unit = [d / length(direction) for d in direction]
    expected = sum((g.double() * d.double()).sum().item() for g, d in zip(grads, unit, strict=True))
    # the best of three steps: too small drowns in fp32 rounding, too large in curvature; a wrong gradient fits none
    slopes = [slope(value, params, unit, h * length(params)) for h in (3e-3, 1e-2, 3e-2)]
    return min(abs(s - expected) for s in slopes) / scale


@torch.no_grad()
def slope(value: Callable[[], Tensor], params: list[Tensor], unit: list[Tensor], h: float) -> float:
    before = [p.detach().clone() for p in params]
    ends = []
    for sign in (1, -1):
        for p, start, d in zip(params, before, unit, strict=True):
            p.data.copy_(start + sign * h * d)
        ends.append(value().item())
    for p, start in zip(params, before, strict=True):
        p.data.copy_(start)
    return (ends[0] - ends[1]) / (2 * h)


# --- heads that hear the hole alone


def only_the_hole_is_heard(judge, x: Tensor, cond, hole: Tensor, patch: int) -> None:
    """Where attention gives each token its own value, features are made of a token's own cells: no other is heard.

    judge: an InHole; hole: tokens, bool [b n].
    """
    grid = hole.reshape(len(x), x.shape[-2] // patch, x.shape[-1] // patch)
    inside = grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    inside = inside.reshape(len(x), *(1 for _ in x.shape[1:-2]), *x.shape[-2:]).expand_as(x)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x)
    sigma = torch.full((len(x),), 0.5).to(x)
    judge.hole = hole
    attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda query, key, value, *args, **kwargs: value
    try:
        with torch.no_grad():
            states = x, torch.where(inside, x, other), torch.where(inside, other, x)
            heard, around, within = (judge.heard(state, sigma, cond) for state in states)
            whole = [judge.reader(state, sigma, cond) for state in states[:2]]
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    assert [f.shape[:2] for f in heard] == [(len(x), int(hole[0].sum()))] * len(judge.reader.layers)
    for a, b, c in zip(heard, around, within, strict=True):
        assert torch.equal(a, b), "what stands around the hole is heard"
        assert ((a - c).abs().amax(-1) > 0).all(), "a token of the hole is not heard"
    assert all(not torch.equal(a, b) for a, b in zip(*whole, strict=True))  # control: heard whole
