"""What stands between ComfyUI's networks and a correct backward pass, each as something that can be undone.

Found with finite differences on every family (tests/test_contract_comfy.py): see CONTRIBUTING, "gradients through
native models".
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

ROPE = [f"{norm}_rope{layout}{n}" for norm in ("apply", "rms") for layout in ("", "_split_half") for n in ("", "1")]
UNET_LAYERS = ("ResBlock", "SpatialTransformer", "SpatialVideoTransformer")
ADALN = ["adaln", "rms_adaln"]
_registered: set[str] = set()


NORMS = (F.layer_norm, F.rms_norm)


class KeepInputs(TorchFunctionMode):
    """Flux and LTX add residuals in place, onto tensors that the functions before have saved for their backward."""

    def __init__(self, functions: tuple[Callable[..., Any], ...] = NORMS):
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.functions and args and args[0].requires_grad and torch.is_grad_enabled():
            args = (args[0].clone(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def training_mode() -> Iterator[None]:
    """ComfyUI's networks take differentiable paths where in_training is set."""
    mm = comfy.model_management
    before = getattr(mm, "in_training", False)
    mm.in_training = True
    try:
        yield
    finally:
        mm.in_training = before


def own_weights(model: nn.Module, device: torch.device) -> None:
    """Loaders run in inference mode, and autograd cannot save what they made. Offloaded weights are copied anyway."""
    with torch.inference_mode(False):
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is not None and p.is_inference() and p.device == device:
                    module._parameters[key] = nn.Parameter(p.clone(), requires_grad=False)
            for key, b in module._buffers.items():
                if b is not None and b.is_inference():
                    module._buffers[key] = b.clone()


def register_kitchen_backward() -> list[str]:
    """A backward for comfy-kitchen's fused rope and adaln operators, by its own eager versions; once per process."""
    for file, names in (("rope", ROPE), ("adaln", ADALN)):
        try:
            eager = importlib.import_module(f"comfy_kitchen.backends.eager.{file}")
        except ImportError:
            continue  # a ComfyUI from before the fused operators
        for name in names:
            op = f"comfy_kitchen::{name}"
            known = hasattr(eager, name) and hasattr(torch.ops.comfy_kitchen, name)
            if known and op not in _registered and not has_backward(op):
                register_backward(op, getattr(eager, name))
                _registered.add(op)
    return sorted(_registered)


def input_savers(net: nn.Module) -> tuple[Callable[..., Any], ...]:
    """Whose inputs this network overwrites: LTX hands its residual stream to projections too, with no norm between."""
    return (*NORMS, F.linear) if ".lightricks." in type(net).__module__ else NORMS


def has_backward(op: str) -> bool:
    """Another pack, or ComfyUI itself one day, may have been here first."""
    definition = torch._library.custom_ops.OPDEFS.get(op)
    return getattr(definition, "_backward_fn", None) is not None


def register_backward(op: str, eager: Callable[..., Any]) -> None:
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.where = [i for i, v in enumerate(inputs) if isinstance(v, Tensor)]
        ctx.values = [None if isinstance(v, Tensor) else v for v in inputs]
        ctx.save_for_backward(*[v for v in inputs if isinstance(v, Tensor)])

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        values, leaves = list(ctx.values), {}
        for i, saved in zip(ctx.where, ctx.saved_tensors, strict=True):
            values[i] = saved.detach()
            if ctx.needs_input_grad[i]:
                leaves[i] = values[i] = values[i].requires_grad_()
        with torch.enable_grad():
            out = eager(*values)
        pairs = [(o, g) for o, g in zip(out if isinstance(out, tuple | list) else (out,), grads, strict=True)]
        pairs = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
        outs, outer = [o for o, _ in pairs], [g for _, g in pairs]
        inner = torch.autograd.grad(outs, list(leaves.values()), outer, allow_unused=True)
        found = dict(zip(leaves, inner, strict=True))
        return tuple(found.get(i) for i in range(len(values)))

    torch.library.register_autograd(op, backward, setup_context=setup)


def blocks(net: nn.Module) -> list[nn.Module]:
    """What to recompute in backward: the elements of the network's block lists."""
    if hasattr(net, "input_blocks"):
        # a UNet walks through its blocks without calling them
        return [m for m in net.modules() if type(m).__name__ in UNET_LAYERS]
    lists = [m for m in net.children() if isinstance(m, nn.ModuleList)]
    return [block for group in lists for block in group if any(True for _ in block.children())]


@contextmanager
def checkpointed(modules: list[nn.Module], contexts: Contexts, wanted: Callable[[], bool]) -> Iterator[None]:
    """The blocks keep only their inputs and run again in backward, under `contexts` (the forward's adapter mix)."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced_forward(module, contexts, wanted))
        yield


@contextmanager
def replaced_forward(module: nn.Module, contexts: Contexts, wanted: Callable[[], bool]) -> Iterator[None]:
    inner, before = module.forward, vars(module).get("forward")

    def run(*args: Any, **kwargs: Any) -> Any:
        # the block may write into its inputs, which the recompute needs as they were
        return inner(*map(fresh, args), **{k: fresh(v) for k, v in kwargs.items()})

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and wanted()):
            return inner(*args, **kwargs)
        # options are dicts that the network goes on changing (block_index and the like)
        args = tuple(dict(v) if isinstance(v, dict) else v for v in args)
        kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]


def fresh(value: Any) -> Any:
    # also where no gradient is needed yet: a residual added in place can bring one in
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value
