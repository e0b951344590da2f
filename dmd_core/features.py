"""Features of any network by hooks, with early exit: no forked forward passes."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class _Enough(Exception):
    """Raised inside the network once every wanted feature has been seen."""


def features(net: nn.Module, names: Sequence[str], call: Callable[[], Any]) -> list[Tensor]:
    """Outputs of the named submodules while call() runs; the forward pass stops as soon as all are there.

    A module that returns a tuple gives its first tensor. The hooks are gone afterwards, whatever happens.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            found[name] = out[0] if isinstance(out, tuple) else out
            if len(found) == len(names):
                raise _Enough

        return hook

    handles = [net.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        call()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [n for n in names if n not in found]
    if missing:
        raise ValueError(
            f"feature layers {missing} did not run in this network; choose layers that its forward pass uses"
        )
    return [found[n] for n in names]
