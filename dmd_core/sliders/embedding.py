"""How the model itself sees a picture: the encoder that is used when no other one is given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import fit
from ..denoiser import Denoiser
from ..features import features
from ..schedule import add_noise

CELLS = 16  # places that a layer's output is averaged to: enough to tell where something is


def own_features(
    model: Denoiser, net: nn.Module, layers: Sequence[str], cond: Any, sigma: float, cells: int = CELLS
) -> Callable[[Tensor], Tensor]:
    """Clean latents -> features [b d] of the given layers at a low noise level, differentiable.

    cond: a neutral prompt, the empty one usually. The noise is one and the same for all pictures, so that it cancels
    in differences. Every position is normalised: a few huge channels would otherwise be all that there is.
    """

    def embed(x0: Tensor) -> Tensor:
        noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(0)).to(x0).expand_as(x0)
        level = torch.full((len(x0),), sigma, device=x0.device, dtype=x0.dtype)
        x = add_noise(model.schedule, x0, noise, level)
        found = features(net, layers, lambda: model(x, level, fit(cond, len(x))))
        return torch.cat([places(f, cells) for f in found], 1)

    return embed


def places(f: Tensor, cells: int) -> Tensor:
    """Maps [b c h w] or tokens [b n c], averaged over neighbouring positions. [b cells * c]"""
    tokens = f.flatten(2).transpose(1, 2) if f.ndim == 4 else f
    tokens = F.layer_norm(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), tokens.shape[-1:])
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), min(cells, tokens.shape[1])).flatten(1)
