"""One forward pass of a native transformer over some of its image tokens, by hooks that live as long as the call.

A family is a list of sites: which modules are its blocks, where the image tokens stand in their inputs, and which of
their attention calls hold image keys. The first site of a stack gathers the tokens and the last scatters them back, so
the rest of the network sees sequences of full length. Keys are taken after the rotation: a row is valid wherever it is.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.ldm.chroma.model
import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.pixart.pixartms
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import torch
from torch import Tensor, nn

OVERRIDE = "optimized_attention_override"


class NotLazy(Exception):
    """Why a call must be computed whole, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Site:
    block: nn.Module
    image: int | str  # the argument with the image tokens [b n c], text tokens before them or not
    output: int | None  # where they are in the result; None: it is the result
    rope: int | str | None = None
    rope_axis: int = 2
    calls: tuple[int, ...] = (0,)  # the attention calls over image keys
    vector: str | None = None  # the modulation, where it can have a row per token
    first: bool = False
    last: bool = False


def stack(blocks: Any, **options: Any) -> list[Site]:
    return [Site(block=b, first=i == 0, last=i == len(blocks) - 1, **options) for i, b in enumerate(blocks)]


def flux(net: Any) -> list[Site]:
    double = stack(net.double_blocks, image="img", output=0, rope="pe")
    single = stack(net.single_blocks, image=0, output=None, rope="pe")
    if not double or not single:
        raise NotLazy("this Flux lacks one of its two kinds of blocks")
    return _joined(double, single)


def _joined(*stacks: list[Site]) -> list[Site]:
    sites = [s for part in stacks for s in part]
    return [
        Site(**{**vars(s), "first": i == 0, "last": i == len(sites) - 1})  # one gather and one scatter for all
        for i, s in enumerate(sites)
    ]


def sd3(net: Any) -> list[Site]:
    # the second call, where a block has one, is over the image alone
    return stack(net.joint_blocks, image=1, output=1, calls=(0, 1))


def qwen_image(net: Any) -> list[Site]:
    return stack(net.transformer_blocks, image="hidden_states", output=1, rope="image_rotary_emb")


def lumina(net: Any) -> list[Site]:
    common: dict[str, Any] = {"image": 0, "output": None, "rope": 2, "rope_axis": 1}
    if not len(net.noise_refiner):
        raise NotLazy("this Lumina has no noise refiner")
    return stack(net.noise_refiner, **common) + stack(net.layers, **common)


def chroma(net: Any) -> list[Site]:
    if type(net) is not comfy.ldm.chroma.model.Chroma:
        raise NotLazy(f"{type(net).__name__} paints pixels with a network of its own behind the blocks")
    return flux(net)


def wan(net: Any) -> list[Site]:
    if type(net) is not comfy.ldm.wan.model.WanModel:
        raise NotLazy(f"{type(net).__name__} adds to every token between its blocks")
    # the calls after the first are over the text, or over the features of a start picture
    return stack(net.blocks, image=0, output=None, rope="freqs", rope_axis=1, vector="e")


def pixart(_net: Any) -> list[Site]:
    raise NotLazy("PixArt's attention takes no override, so the context's keys cannot be given to it")


FAMILIES: dict[type, Callable[[Any], list[Site]]] = {
    comfy.ldm.flux.model.Flux: flux,
    comfy.ldm.modules.diffusionmodules.mmdit.MMDiT: sd3,
    comfy.ldm.qwen_image.model.QwenImageTransformer2DModel: qwen_image,
    comfy.ldm.lumina.model.NextDiT: lumina,
    comfy.ldm.chroma.model.Chroma: chroma,
    comfy.ldm.wan.model.WanModel: wan,
    comfy.ldm.pixart.pixartms.PixArtMS: pixart,
}
# blocks after which a ControlNet's residuals are added, and the list they come in; the last stack of each family
RESIDUALS = {"single_blocks": "output", "joint_blocks": "output", "transformer_blocks": "input"}


def sites_of(net: nn.Module) -> list[Site]:
    for kind, sites in FAMILIES.items():
        if isinstance(net, kind):
            return sites(net)
    raise NotLazy(
        f"{type(net).__name__} is not among the lazy families (Flux, Flux.2, Chroma, SD3, Qwen-Image, Z-Image, Wan)"
    )


def patch_of(net: Any) -> tuple[int, int, int]:
    """Latent cells per token: frames, rows, columns."""
    if isinstance(net.patch_size, int):
        return (1, net.patch_size, net.patch_size)
    frames, rows, columns = net.patch_size
    return (frames, rows, columns)


def at_rows(control: dict[str, list[Tensor | None]], rows: Tensor, tokens: int, net: Any) -> dict[str, Any]:
    """A ControlNet's residuals at the computed tokens; what is added behind the last block stays whole, for there the
    sequence has its full length again."""
    name, blocks = next(((kind, getattr(net, n)) for n, kind in RESIDUALS.items() if hasattr(net, n)), ("", ()))
    found: dict[str, Any] = {}
    for kind, parts in control.items():
        if any(p is not None and (p.ndim != 3 or p.shape[1] != tokens) for p in parts) or not name:
            raise NotLazy("this ControlNet adds to other tokens than the picture's")
        whole = len(blocks) - 1 if kind == name else -1
        found[kind] = [
            p if p is None or i == whole else p.index_select(1, rows.to(p.device)) for i, p in enumerate(parts)
        ]
    return found


@dataclass
class Pass:
    """What one forward pass computes, reads and keeps; tokens are counted over the whole image stream.

    plan(n) is asked once, with the stream's length (references and padding included), and returns the rows to compute:
    [n], or [b n] where every sample has its own; None: all. read(slot) gives context keys and values to attend to;
    keep(slot, k, v) is given the computed rows. Where the rows of all other tokens are at hand, fill(slot, k, v) copies
    the whole stream's instead, which is faster.
    """

    plan: Callable[[int, torch.device], Tensor | None]
    read: Callable[[Any], tuple[Tensor, Tensor] | None]
    keep: Callable[[Any, Tensor, Tensor], None]
    fill: Callable[[Any, Tensor, Tensor], None] | None = None
    total: int = 0
    text: int = 0
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        self._site: tuple[int, Site] | None = None
        self._call = 0
        self._ropes: dict[int, tuple[Tensor, Tensor]] = {}
        self._repeating = False

    @property
    def count(self) -> int:
        return self.total if self.rows is None else self.rows.shape[-1]

    @contextmanager
    def hooked(self, sites: list[Site]) -> Iterator[None]:
        with ExitStack() as handles:
            for index, site in enumerate(sites):
                before, after = self._before(index, site), self._after(site)
                handles.callback(site.block.register_forward_pre_hook(before, with_kwargs=True).remove)
                handles.callback(site.block.register_forward_hook(after).remove)
            yield

    def _before(self, index: int, site: Site) -> Callable[..., Any]:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._site, self._call = (index, site), 0
            values: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
            if not self.total:
                self.total = values[site.image].shape[1]
                self.rows = self.plan(self.total, values[site.image].device)
            if self.rows is None:
                return None
            if site.vector is not None and values[site.vector].shape[1] > 1:
                raise NotLazy("the frames have noise levels of their own")
            if site.first:
                values[site.image] = pick(values[site.image], 1, self._behind(values[site.image].shape[1]))
            if site.rope is not None and values.get(site.rope) is not None:
                values[site.rope] = self._rope(values[site.rope], site.rope_axis)
            return tuple(values[i] for i in range(len(args))), {k: values[k] for k in kwargs}

        return hook

    def _after(self, site: Site) -> Callable[..., Any]:
        def hook(_block: nn.Module, _args: Any, result: Any) -> Any:
            self._site = None
            if self.rows is None or not site.last:
                return None
            part = result if site.output is None else result[site.output]
            length = part.shape[1] - self.count + self.total
            whole = part.new_zeros(part.shape[0], length, *part.shape[2:])
            where = self._behind(length).expand(len(part), -1)[..., None].expand_as(part)
            whole = whole.scatter(1, where, part)
            if site.output is None:
                return whole
            return tuple(whole if i == site.output else value for i, value in enumerate(result))

        return hook

    def _behind(self, length: int) -> Tensor:
        """All text rows, which come first, then the chosen image rows."""
        assert self.rows is not None
        text = torch.arange(length - self.total, device=self.rows.device)
        return torch.cat([text.expand(*self.rows.shape[:-1], -1), len(text) + self.rows], -1)

    def _rope(self, rope: Tensor, axis: int) -> Tensor:
        if id(rope) not in self._ropes:
            # the full one is kept too, or its id could be given to another
            self._ropes[id(rope)] = (rope, pick(rope, axis, self._behind(rope.shape[axis])))
        return self._ropes[id(rope)][1]

    @contextmanager
    def again(self, place: tuple[int, Site] | None) -> Iterator[None]:
        """A checkpointed block runs once more in backward, without its hooks; place: where the pass was then."""
        before = self._site, self._call, self._repeating
        self._site, self._call, self._repeating = place, 0, True
        try:
            yield
        finally:
            self._site, self._call, self._repeating = before

    @property
    def place(self) -> tuple[int, Site] | None:
        return self._site

    def attention(self, before: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
        """For transformer_options[OVERRIDE]; `before` is what another pack had put there."""

        def override(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any):
            if self._site is not None:
                index, site = self._site
                if self._call in site.calls:
                    # heads, then mask
                    if options.get("mask") is not None or (len(args) > 1 and args[1] is not None):
                        raise NotLazy("an attention mask (of the text, or regional) covers the whole picture")
                    # without skip_reshape heads and width may be one axis in k and two in v (SD3)
                    k, v = self._extended((index, self._call), k, v, not options.get("skip_reshape"))
                self._call += 1
            run = function if before is None else lambda *a, **o: before(function, *a, **o)
            return run(q, k, v, *args, **options)

        return override

    def _extended(self, slot: tuple[int, int], k: Tensor, v: Tensor, flat: bool) -> tuple[Tensor, Tensor]:
        k, v = (rows.flatten(2) if flat else rows for rows in (k, v))
        own = k.shape[-2] - self.count
        self.text = max(self.text, own)
        if not self._repeating:
            self.keep(slot, k[..., own:, :], v[..., own:, :])
        if self.fill is not None and self.rows is not None:
            return self._filled(slot, k, v, own)
        more = self.read(slot)
        if more is None:
            return k, v
        return torch.cat([k, more[0].to(k)], -2), torch.cat([v, more[1].to(v)], -2)

    def _filled(self, slot: tuple[int, int], k: Tensor, v: Tensor, own: int) -> tuple[Tensor, Tensor]:
        """Text, then all image rows in their own order, the fresh ones in their places."""
        assert self.fill is not None
        assert self.rows is not None
        out = [x.new_empty(*x.shape[:-2], own + self.total, x.shape[-1]) for x in (k, v)]
        self.fill(slot, out[0][..., own:, :], out[1][..., own:, :])
        for whole, fresh in zip(out, (k, v), strict=True):
            whole[..., :own, :] = fresh[..., :own, :]
            whole.index_copy_(-2, own + self.rows, fresh[..., own:, :])
        return out[0], out[1]


def pick(values: Tensor, axis: int, index: Tensor) -> Tensor:
    """These places of an axis; index: [n], or [b n] of a tensor whose first axis is the batch (or 1)."""
    if index.ndim == 1:
        return values.index_select(axis, index)
    shape = [len(index), *(1 for _ in range(values.ndim - 1))]
    shape[axis] = index.shape[1]
    return torch.take_along_dim(values, index.reshape(shape), axis)
