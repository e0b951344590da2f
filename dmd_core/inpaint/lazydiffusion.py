"""LazyDiffusion (Nitzan et al. 2024), small: an encoder reads the canvas once, a decoder computes the hole alone.

Of what the encoder says only the hole's tokens are kept. The decoder has no keys of the rest: each of its noisy tokens
is joined with what the encoder said at its place. So its attention is within the hole, and a step's cost falls faster
than the hole. The authors published no code; here both sides begin as the shapes teacher. The encoder reads no prompt,
so what it says outlives one. States are the hole's patches alone, [b k 64].
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..conditioning import Cond
from ..denoiser import NetDenoiser, Prediction
from ..samplers import Masked, sample_euler
from ..shapes.teacher import SCHEDULE, Teacher
from .partial import places

PATCH = 2


class Encoder(nn.Module):
    """Canvas [b 16 h w] and mask of its cells [b h w] -> what is said at every token, [b n width]."""

    tokens: Tensor
    pooled: Tensor

    def __init__(self, teacher: Teacher, blank: Cond):
        super().__init__()
        self.trunk = deepcopy(teacher).requires_grad_(True)
        del self.trunk.final_layer  # nobody reads it here
        self.mask_embedder = nn.Conv2d(1, teacher.pos_embed.shape[-1], PATCH, stride=PATCH, bias=False)
        nn.init.zeros_(self.mask_embedder.weight)
        self.register_buffer("tokens", blank.cross)
        self.register_buffer("pooled", blank.pooled)

    def forward(self, canvas: Tensor, mask: Tensor) -> Tensor:
        hidden = mask[:, None].to(canvas)
        rows, columns = canvas.shape[2] // PATCH, canvas.shape[3] // PATCH
        image = self.trunk.x_embedder(torch.where(hidden > 0, 0.0, canvas)) + self.trunk.places(rows, columns)
        image = image + rearrange(self.mask_embedder(hidden), "b c h w -> b (h w) c")
        b = len(canvas)
        blank = self.tokens.expand(b, -1, -1), self.pooled.expand(b, -1)
        said, _ = self.trunk.through(image, canvas.new_zeros(b), *blank)
        return F.layer_norm(said, said.shape[-1:])


class Decoder(nn.Module):
    """The teacher over some noisy patches [b k 64] alone; places and context [b k width] -> flow eps - x0, like x."""

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.trunk = deepcopy(teacher).requires_grad_(True)
        width = teacher.pos_embed.shape[-1]
        self.join = nn.Linear(2 * width, width)
        # untrained it is the teacher, deaf to the context
        self.join.weight.data = torch.cat([torch.eye(width), torch.zeros(width, width)], 1)
        nn.init.zeros_(self.join.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        proj = self.trunk.x_embedder.proj
        image = F.linear(x, rearrange(proj.weight, "w c p q -> w (p q c)"), proj.bias) + cond.extras["places"]
        image = self.join(torch.cat([image, cond.extras["context"]], -1))
        return self.trunk.final_layer(*self.trunk.through(image, t, cond.cross, cond.pooled))


class LazyDiffusion(nn.Module):
    """blank: the empty prompt, which the encoder is always given."""

    def __init__(self, teacher: Teacher, blank: Cond):
        super().__init__()
        self.encoder, self.decoder = Encoder(teacher, blank), Decoder(teacher)

    def read(self, canvas: Tensor, mask: Tensor, cond: Cond) -> Cond:
        """The prompt with what the encoder says of the hole: the same for all steps. Masks are > 0 in the hole."""
        b, _, h, w = canvas.shape
        spots = self.encoder.trunk.places(h // PATCH, w // PATCH).expand(b, -1, -1)
        extras = {"places": kept(spots, mask), "context": kept(self.encoder(canvas, mask), mask)}
        return replace(cond.expand(b), extras=extras)

    def denoiser(self) -> NetDenoiser:
        """Of the hole's patches; takes conditions that `read` made."""

        def net(x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
            return self.decoder(x, (timestep / SCHEDULE.num_timesteps).to(x.dtype), cond)

        return NetDenoiser(net, SCHEDULE, Prediction.FLOW)

    @torch.no_grad()
    def fill(self, canvas: Tensor, mask: Tensor, cond: Cond, sigmas: Tensor, noise: Tensor) -> Tensor:
        """Euler over the hole's tokens from noise like the canvas; cells whose mask is 0 stay to the bit."""
        if not mask.any():
            return canvas
        hidden = (mask[:, None] > 0).expand_as(canvas)
        known, free, start = (kept(patches(v), mask) for v in (canvas, hidden.to(canvas), noise))
        denoiser = Masked(self.denoiser(), known, free)
        asked = self.read(canvas, mask, cond)
        made = sample_euler(denoiser, denoiser.enter(start, start, sigmas[0]), sigmas, asked)
        where = rows(mask)[..., None].expand_as(made)
        return torch.where(hidden, unpatched(patches(canvas).scatter(1, where, made), canvas), canvas)


def patches(x: Tensor) -> Tensor:
    """[b c h w] -> [b n 4c], in the order of the teacher's output."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)


def unpatched(tokens: Tensor, like: Tensor) -> Tensor:
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=like.shape[2] // PATCH, p=PATCH, q=PATCH)


def rows(mask: Tensor) -> Tensor:
    """The tokens that a mask [b h w] touches, as many in every sample. [b k]"""
    return places(F.max_pool2d((mask[:, None] > 0).float(), PATCH).flatten(1).bool())


def kept(tokens: Tensor, mask: Tensor) -> Tensor:
    """Of tokens [b n d] those of the hole, [b k d]."""
    return tokens.take_along_dim(rows(mask)[..., None], 1)
