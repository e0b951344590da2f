"""The teacher: a transformer in the Flux-schnell layout, under the parameter names that ComfyUI uses."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..conditioning import Cond
from ..denoiser import NetDenoiser, Prediction
from ..schedule import Flow

CHANNELS = 16
AXES = (16, 56, 56)  # rotary dimensions: unused index, row, column. ComfyUI fixes these, hence heads of 128
HEAD = sum(AXES)
WIDTH, DOUBLE, SINGLE, MLP = 128, 2, 4, 4
TEXT, POOLED = 64, 64
SCHEDULE = Flow(shift=1.0)  # what ComfyUI gives a Flux without guidance embedding


def times(t: Tensor, size: int = 256) -> Tensor:
    """Sinusoids of t in 0..1, scaled as Flux does. [b size]"""
    half = size // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phase = 1000 * t.float()[:, None] * rates
    return torch.cat([phase.cos(), phase.sin()], -1).to(t.dtype)


def rotation(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions. ids: [n 3] -> two of [n 64]"""
    angles = []
    for axis, size in enumerate(AXES):
        rates = 1 / 10000 ** (torch.arange(0, size, 2, device=ids.device, dtype=torch.float64) / size)
        angles.append(ids[:, axis, None].double() * rates)
    angle = torch.cat(angles, -1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Neighbouring pairs of the last axis [b h n d] turned by their angle."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    # written out: for some eighty tokens the fused kernel's backward costs a CPU four times as much
    scores = rotate(q, turn).to(v.dtype) @ rotate(k, turn).to(v.dtype).transpose(-1, -2) * HEAD**-0.5
    return rearrange(scores.softmax(-1).to(v.dtype) @ v, "b h n d -> b n (h d)")


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.scale.float(), eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(HEAD), RMSNorm(HEAD)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, d=HEAD)
        return self.query_norm(q), self.key_norm(k), v


class Embedder(nn.Module):
    def __init__(self, size: int, width: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(size, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Shift, scale and gate per sub-layer from the vector of time and pooled text."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.groups = groups
        self.lin = nn.Linear(width, groups * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vector))[:, None].chunk(self.groups, -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(width, 3 * width), QKNorm(), nn.Linear(width, width)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, MLP * width), nn.GELU(approximate="tanh"), nn.Linear(MLP * width, width))


class DoubleBlock(nn.Module):
    """Picture and text keep their own weights and meet in one attention."""

    def __init__(self, width: int):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = Attention(width), Attention(width)
        self.img_mlp, self.txt_mlp = mlp(width), mlp(width)

    def forward(self, img: Tensor, txt: Tensor, vector: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i, t = self.img_mod(vector), self.txt_mod(vector)
        text = self.txt_attn.norm(self.txt_attn.qkv(modulate(txt, t[0], t[1])))
        image = self.img_attn.norm(self.img_attn.qkv(modulate(img, i[0], i[1])))
        q, k, v = (torch.cat(pair, 2) for pair in zip(text, image, strict=True))
        seen = attend(q, k, v, turn)
        img = img + i[2] * self.img_attn.proj(seen[:, txt.shape[1] :])
        txt = txt + t[2] * self.txt_attn.proj(seen[:, : txt.shape[1]])
        img = img + i[5] * self.img_mlp(modulate(img, i[3], i[4]))
        return img, txt + t[5] * self.txt_mlp(modulate(txt, t[3], t[4]))


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joined sequence."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, (3 + MLP) * width)
        self.linear2 = nn.Linear((1 + MLP) * width, width)
        self.norm, self.modulation = QKNorm(), Modulation(width, 3)

    def forward(self, x: Tensor, vector: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        width = x.shape[-1]
        qkv, hidden = self.linear1(modulate(x, shift, scale)).split([3 * width, MLP * width], -1)
        q, k, v = self.norm(qkv)
        seen = attend(q, k, v, turn)
        return x + gate * self.linear2(torch.cat([seen, F.gelu(hidden, approximate="tanh")], -1))


class FinalLayer(nn.Module):
    def __init__(self, width: int, size: int):
        super().__init__()
        self.linear = nn.Linear(width, size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


class Teacher(nn.Module):
    """x [b 16 h w], t [b] in 0..1, tokens [b n 64], pooled [b 64] -> flow eps - x0, like x. h and w are even."""

    def __init__(self, width: int = WIDTH, double: int = DOUBLE, single: int = SINGLE):
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(4 * CHANNELS, width), nn.Linear(TEXT, width)
        self.time_in, self.vector_in = Embedder(256, width), Embedder(POOLED, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(width) for _ in range(single))
        self.final_layer = FinalLayer(width, 4 * CHANNELS)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != CHANNELS or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"latent is {list(x.shape)}; the shapes teacher takes [b 16 h w], h and w even (pixels / 8)"
            )
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        img = self.img_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
        txt = self.txt_in(tokens.to(x.dtype))
        vector = self.time_in(times(t).to(x.dtype)) + self.vector_in(pooled.to(x.dtype))
        turn = rotation(positions(rows, columns, txt.shape[1], x.device))
        for block in self.double_blocks:
            img, txt = block(img, txt, vector, turn)
        joined = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            joined = block(joined, vector, turn)
        out = self.final_layer(joined[:, txt.shape[1] :], vector)
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2)


def positions(rows: int, columns: int, text: int, device: Any) -> Tensor:
    """Text tokens at the origin, then the picture row by row. [n 3]"""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    grid = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
    return torch.cat([torch.zeros(text, 3, dtype=torch.long), grid]).to(device)


def initialise(model: Teacher) -> Teacher:
    """Every residual branch and the output start at zero (DiT's adaLN-zero)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
            nn.init.zeros_(module.weight)
    return model


def denoiser(model: nn.Module, dtype: torch.dtype | None = None) -> NetDenoiser:
    """The network as the engine sees it; conditions are Cond(tokens, pooled)."""

    def net(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        cond = cond.expand(len(x))  # one negative serves any batch
        return model(x, (timestep / SCHEDULE.num_timesteps).to(x.dtype), cond.cross, cond.pooled)

    return NetDenoiser(net, SCHEDULE, Prediction.FLOW, dtype)


def from_state(state: Mapping[str, Tensor]) -> Teacher:
    model = Teacher()
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)
