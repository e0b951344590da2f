"""Several low-rank adapter sets on one frozen network; any weighted mix of them can be active."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .denoiser import Denoiser, apart
from .schedule import Schedule

Targets = Callable[[str, nn.Module], bool]


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """ComfyUI's quantised Linear has the members of one and is none."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Linear" and hasattr(module, "in_features"))


def linear_layers(name: str, module: nn.Module) -> bool:
    return is_linear(module)


class LowRank(nn.Module):
    """up @ down beside a Linear or a Conv2d. up starts at zero, so a new set changes nothing."""

    def __init__(self, layer: nn.Module, rank: int, rng: torch.Generator | None = None):
        super().__init__()
        device = layer.weight.device if isinstance(layer.weight, Tensor) else None
        down: tuple[int, ...]
        up: tuple[int, ...]
        self.conv: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1:
                raise ValueError(
                    f"grouped convolution (groups={layer.groups}) cannot carry an adapter; leave it out of the targets"
                )
            down, up = (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
            self.conv = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        elif is_linear(layer):
            down, up = (rank, layer.in_features), (layer.out_features, rank)
        else:
            raise TypeError(f"adapters sit on Linear and Conv2d layers, not on {type(layer).__name__}")
        fan_in = torch.Size(down[1:]).numel()
        # kaiming_uniform(a=sqrt(5)), as kohya and PEFT start: published learning rates apply
        noise = torch.rand(down, generator=rng, device=rng.device if rng else None)
        self.down = nn.Parameter(((noise * 2 - 1) / fan_in**0.5).to(device))
        self.up = nn.Parameter(torch.zeros(up, device=device))

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.conv is None:
            return F.linear(F.linear(x, down), up)
        return F.conv2d(F.conv2d(x, down, **self.conv), up)


class AdapterBank:
    """Named LoRA sets on the target layers of one network, added by forward hooks while attached."""

    def __init__(self, net: nn.Module, targets: Targets = linear_layers):
        self.layers = {n: m for n, m in net.named_modules() if targets(n, m)}
        if not self.layers:
            raise ValueError(f"no layer of {type(net).__name__} is a target; choose other LoRA targets")
        self.sets: dict[str, dict[str, LowRank]] = {}
        self.active: dict[str, float] = {}
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        if not self._handles:
            self._handles = [m.register_forward_hook(self._hook(n)) for n, m in self.layers.items()]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def add_adapters(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            for key, scale in self.active.items():
                adapter = self.sets[key].get(name)
                if adapter is not None and scale != 0:
                    change = adapter(args[0]).to(out.dtype)
                    out = out + (change if scale == 1 else scale * change)
            return out

        return add_adapters

    def new(
        self, name: str, rank: int, rng: torch.Generator | None = None, layers: Targets | None = None
    ) -> nn.ModuleList:
        """A fresh set on all target layers, or on those that `layers` accepts."""
        if rank < 1:
            raise ValueError(f"LoRA rank is {rank}; it must be 1 or more (4 to 128 are usual)")
        chosen = {n: m for n, m in self.layers.items() if layers is None or layers(n, m)}
        if not chosen:
            raise ValueError(f"no target layer is left for the adapter set {name!r}; choose a wider layer preset")
        self.sets[name] = {n: LowRank(m, min(rank, _full_rank(m)), rng) for n, m in chosen.items()}
        return nn.ModuleList(self.sets[name].values())

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The set's parameters by name, as a Player takes them."""
        return {f"{n}.{part}": p for n, a in self.sets[name].items() for part, p in a.named_parameters()}

    def state(self, name: str) -> dict[str, Tensor]:
        return {k: p.detach().clone() for k, p in self.parameters(name).items()}

    def load(self, name: str, state: Mapping[str, Tensor]) -> nn.ModuleList:
        """A set from what state() gave (ranks are read from the tensors); replaces a set of the same name."""
        names = sorted({k.rpartition(".")[0] for k in state})
        unknown = [n for n in names if n not in self.layers]
        if unknown:
            raise ValueError(
                f"adapter set {name!r} has {len(unknown)} layers that this network lacks, such as {unknown[0]!r}; "
                "load it on the model family it was made for"
            )
        rng = torch.Generator()  # its draws are overwritten; the global one belongs to the host
        loaded = {n: LowRank(self.layers[n], state[f"{n}.down"].shape[0], rng) for n in names}
        for n, adapter in loaded.items():
            for part, p in adapter.named_parameters():
                given = state[f"{n}.{part}"]
                if given.shape != p.shape:
                    raise ValueError(
                        f"adapter {name!r}: {n}.{part} is {tuple(given.shape)}, the layer needs {tuple(p.shape)}; "
                        "it belongs to another model"
                    )
                p.data = given.to(p).clone()
        self.sets[name] = loaded
        return nn.ModuleList(loaded.values())

    @contextmanager
    def use(self, **scales: float) -> Iterator[None]:
        """Inside, exactly this mix is active; none at all is the bare network."""
        before, self.active = self.active, scales
        try:
            yield
        finally:
            self.active = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For torch.utils.checkpoint(context_fn=...): backward's recompute must see the mix of the forward."""
        return nullcontext(), _Mix(self, self.active)


@dataclass
class _Mix(AbstractContextManager[None]):
    """use() that can be entered again: with retain_graph every further backward recomputes once more."""

    bank: AdapterBank
    scales: dict[str, float]
    before: list[dict[str, float]] = field(default_factory=list)

    def __enter__(self) -> None:
        self.before.append(self.bank.active)
        self.bank.active = self.scales

    def __exit__(self, *error: object) -> None:
        self.bank.active = self.before.pop()


def _full_rank(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return min(weight.shape[0], weight.shape[1:].numel())


@dataclass
class Adapted:
    """The same network with a mix of adapters switched on; still a denoiser."""

    inner: Denoiser
    bank: AdapterBank
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        with self.bank.use(**self.scales):
            return self.inner(x, sigma, cond)

    def apart(self, cond: Any, n: int) -> list[list[int]]:
        return apart(self.inner, cond, n)
