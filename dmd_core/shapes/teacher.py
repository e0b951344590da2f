"""The teacher: a transformer in the Stable Diffusion 3 layout, under the parameter names that ComfyUI uses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..conditioning import Cond
from ..denoiser import NetDenoiser, Prediction
from ..schedule import Flow

CHANNELS = 16
HEAD = 64  # the layout fixes it, and as many heads as blocks: three blocks are 192 wide
DEPTH, MLP = 3, 4
TEXT, POOLED = 64, 64
GRID = 16  # tokens across the largest canvas: 256 pixels
SCHEDULE = Flow(shift=3.0)  # what ComfyUI gives an SD3


def times(t: Tensor, size: int = 256) -> Tensor:
    """Sinusoids of t in 0..1. [b size]"""
    half = size // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phase = 1000 * t.float()[:, None] * rates
    return torch.cat([phase.cos(), phase.sin()], -1).to(t.dtype)


def positions(width: int, grid: int = GRID) -> Tensor:
    """Sinusoids of column and row for every token of the largest canvas; smaller ones take its middle. [1 n width]"""
    rates = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    phase = torch.arange(grid, dtype=torch.float64)[:, None] * rates
    waves = torch.cat([phase.sin(), phase.cos()], -1).float()
    column, row = waves[None].expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)
    return rearrange(torch.cat([column, row], -1), "h w c -> 1 (h w) c")


class PatchEmbed(nn.Module):
    """Two by two latent pixels make a token."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(CHANNELS, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b c h w -> b (h w) c")


class Embedder(nn.Module):
    def __init__(self, size: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def modulation(width: int, groups: int) -> nn.Sequential:
    """Shifts, scales and gates from the vector of time and pooled text."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, groups * width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Only the projections: picture and text meet between them."""

    def __init__(self, width: int, proj: bool = True):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if proj:
            self.proj = nn.Linear(width, width)


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, MLP * width), nn.Linear(MLP * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Stream(nn.Module):
    """One side of a joint block; nobody reads the text after the last block, so there it gives keys and values only."""

    def __init__(self, width: int, last: bool = False):
        super().__init__()
        self.attn = Attention(width, proj=not last)
        self.adaLN_modulation = modulation(width, 2 if last else 6)
        if not last:
            self.mlp = Mlp(width)

    def before(self, x: Tensor, vector: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        shift, scale, *rest = self.adaLN_modulation(vector).split(x.shape[-1], -1)
        return self.attn.qkv(modulate(x, shift, scale)), tuple(rest)

    def after(self, x: Tensor, seen: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, gate_mlp = rest
        x = x + gate[:, None] * self.attn.proj(seen)
        return x + gate_mlp[:, None] * self.mlp(modulate(x, shift, scale))


class JointBlock(nn.Module):
    """Picture and text keep their own weights and meet in one attention."""

    def __init__(self, width: int, last: bool):
        super().__init__()
        self.context_block, self.x_block = Stream(width, last), Stream(width)
        self.last = last

    def forward(
        self, text: Tensor, image: Tensor, vector: Tensor, more: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """more: keys and values of picture tokens that are not in `image`; those of `image` are put into kept."""
        said, text_rest = self.context_block.before(text, vector)
        shown, image_rest = self.x_block.before(image, vector)
        if kept is not None:
            kept.append(shown[..., image.shape[-1] :])
        seen = attend(torch.cat([said, shown], 1), more)
        if not self.last:
            text = self.context_block.after(text, seen[:, : text.shape[1]], text_rest)
        return text, self.x_block.after(image, seen[:, text.shape[1] :], image_rest)


def attend(qkv: Tensor, more: Tensor | None = None) -> Tensor:
    """more: further keys and values [b m 2w]."""
    # written out: for some thirty tokens the fused kernel's backward costs a CPU four times as much
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, d=HEAD)
    if more is not None:
        k, v = torch.cat([torch.stack([k, v]), rearrange(more, "b m (two h d) -> two b h m d", two=2, d=HEAD)], -2)
    scores = q @ k.transpose(-1, -2) * HEAD**-0.5
    return rearrange(scores.softmax(-1).to(v.dtype) @ v, "b h n d -> b n (h d)")


class FinalLayer(nn.Module):
    def __init__(self, width: int, size: int):
        super().__init__()
        self.linear = nn.Linear(width, size)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(vector).chunk(2, -1)))


class Teacher(nn.Module):
    """x [b 16 h w], t [b] in 0..1, tokens [b n 64], pooled [b 64] -> flow eps - x0, like x. h and w are even."""

    pos_embed: Tensor

    def __init__(self, depth: int = DEPTH):
        super().__init__()
        width = HEAD * depth
        self.x_embedder, self.context_embedder = PatchEmbed(width), nn.Linear(TEXT, width)
        self.t_embedder, self.y_embedder = Embedder(256, width), Embedder(POOLED, width)
        self.joint_blocks = nn.ModuleList(JointBlock(width, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(width, 4 * CHANNELS)
        self.register_buffer("pos_embed", positions(width))

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, part: "Part | None" = None) -> Tensor:
        most = 2 * self.grid
        if x.ndim != 4 or x.shape[1] != CHANNELS or x.shape[2] % 2 or x.shape[3] % 2 or max(x.shape[2:]) > most:
            raise ValueError(
                f"latent is {list(x.shape)}; the shapes teacher takes [b 16 h w], h and w even (pixels / 8), "
                f"at most {most}"
            )
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        image = self.x_embedder(x) + self.places(rows, columns).to(x.dtype)
        if part is not None:
            image = image.take_along_dim(part.rows[..., None], 1)
        out = self.final_layer(*self.through(image, t, tokens, pooled, part))
        if part is not None:
            where = part.rows[..., None].expand_as(out)
            out = out.new_zeros(len(out), rows * columns, out.shape[-1]).scatter(1, where, out)
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=2, q=2)

    def through(
        self, image: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, part: "Part | None" = None
    ) -> tuple[Tensor, Tensor]:
        """The blocks, over embedded picture tokens [b n w]; and the vector of time and pooled text [b w]."""
        text = self.context_embedder(tokens.to(image.dtype))
        vector = self.t_embedder(times(t).to(image.dtype)) + self.y_embedder(pooled.to(image.dtype))
        for i, block in enumerate(self.joint_blocks):
            beside = (None, None) if part is None else (part.context[i] if part.context else None, part.kept)
            text, image = block(text, image, vector, *beside)
        return image, vector

    @property
    def grid(self) -> int:
        """Tokens across the largest canvas: those of its table of places."""
        return math.isqrt(self.pos_embed.shape[1])

    def places(self, rows: int, columns: int) -> Tensor:
        top, left = (self.grid - rows) // 2, (self.grid - columns) // 2
        table = rearrange(self.pos_embed, "1 (h w) c -> 1 h w c", h=self.grid)
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


@dataclass
class Part:
    """Only these picture tokens are computed, attending also to the context; their keys and values end in kept."""

    rows: Tensor  # [b n]
    context: list[Tensor] | None = None  # per block [b m 2w]
    kept: list[Tensor] = field(default_factory=list)


def initialise(model: Teacher) -> Teacher:
    """Every residual branch and the output start at zero (DiT's adaLN-zero)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            module.bias.data.zero_()  # type: ignore[union-attr]  # every layer here has one
        if name.endswith(("adaLN_modulation.1", "final_layer.linear")):
            nn.init.zeros_(module.weight)
    return model


def denoiser(model: nn.Module, dtype: torch.dtype | None = None, part: Part | None = None) -> NetDenoiser:
    """The network as the engine sees it; conditions are Cond(tokens, pooled)."""

    def net(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        cond = cond.expand(len(x))  # one negative serves any batch
        return model(x, (timestep / SCHEDULE.num_timesteps).to(x.dtype), cond.cross, cond.pooled, part)

    return NetDenoiser(net, SCHEDULE, Prediction.FLOW, dtype)


@dataclass(frozen=True)
class Partial:
    """The teacher where only some tokens are computed, as `inpaint.partial` asks for it."""

    model: nn.Module
    schedule: Flow = SCHEDULE
    patch: int = 2
    multiple: int = 1

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Cond, rows: Tensor, context: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        part = Part(rows, context)
        return denoiser(self.model, part=part)(x, sigma, cond), part.kept


def from_state(state: Mapping[str, Tensor]) -> Teacher:
    model = Teacher()
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)
