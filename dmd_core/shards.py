"""Parameters of which every process holds a part (FSDP2's DTensors). Other tensors pass through all of this unchanged.

Nothing of torch.distributed is imported before a network is sharded: a torch without it runs everything else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def shard(net: nn.Module, blocks: Iterable[str], count: int) -> None:
    """Each of `count` processes keeps its part of every parameter, gradient and moment; blocks gather when they run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(net.parameters()).device.type, (count,))
    inner = sorted(blocks, key=lambda name: -name.count("."))
    # freed after every pass, those of the root too: what was gathered before an update must not be used after it
    for module in (*map(net.get_submodule, inner), net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def own(tensor: Any) -> Tensor:
    """The part that is here, as a plain tensor that shares its memory."""
    return tensor.to_local() if is_shard(tensor) else tensor


def gathered(tensor: Any) -> Tensor:
    """The whole of it; all processes have to ask."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def collected(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """All of them whole and on the CPU, one after another. keep False: only takes part, for the process that keeps."""
    found = {}
    for key, tensor in tensors.items():
        whole = gathered(tensor.detach())
        if keep:
            found[key] = whole.contiguous().cpu()
    return found


def part_of(value: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that every process has whole; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(param: Tensor, value: Tensor) -> None:
    param.copy_(part_of(value, param) if is_shard(param) and not is_shard(value) else value)


def gradients(total: Tensor, params: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """FSDP averages and shards gradients in a backward pass; it takes no notice of autograd.grad."""
    for p in params:
        p.grad = None  # that of a turn of somebody else
    total.backward()
    found = [p.grad for p in params]
    for p in params:
        p.grad = None
    return found


def clip(params: Sequence[nn.Parameter], bound: float) -> Tensor:
    """clip_grad_norm_ over shards and plain parameters (a discriminator's heads) as one vector."""
    groups = [g for g in ([p for p in params if is_shard(p)], [p for p in params if not is_shard(p)]) if g]
    norms = [gathered(nn.utils.get_total_norm([p.grad for p in g if p.grad is not None])) for g in groups]
    norm = torch.stack(norms).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, bound, norm)
    return norm
