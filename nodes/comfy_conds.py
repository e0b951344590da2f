"""ComfyUI's CONDITIONING and the engine's Cond, both ways."""

from typing import Any

import torch
from torch import Tensor

from ..dmd_core.conditioning import Cond

TOKENS = "tokens"  # how many of the (padded) tokens belong to a sample
MASK = "attention_mask"  # [b n], as long as the tokens
SKIPPED = ("model_conds", "uuid", "hooks_clip", "clip_start_percent", "clip_end_percent")


def conds_from(conditioning: list[Any]) -> list[Cond]:
    """One Cond per entry of the list. To ComfyUI a list means "combine", so entries are never merged here."""
    if not isinstance(conditioning, list) or not conditioning:
        raise ValueError(
            f"got {type(conditioning).__name__} as conditioning; connect a CONDITIONING with at least one prompt"
        )
    return [cond_from(entry) for entry in conditioning]


def cond_from(entry: Any) -> Cond:
    """Numbers become one value per sample; anything that is not tensor or number has no place in training."""
    cross, options = entry
    if cross is None:
        raise ValueError("this conditioning has no text tokens; encode a prompt with CLIPTextEncode and connect that")
    n = len(cross)
    pooled = None
    extras: dict[str, Tensor] = {TOKENS: torch.full((n,), cross.shape[1])}
    for key, value in options.items():
        if value is None or key in SKIPPED:
            continue
        if key == "pooled_output":
            pooled = own(value)
        elif isinstance(value, Tensor) and value.ndim and len(value) in (1, n):
            extras[key] = own(value).expand(n, *value.shape[1:])
        elif isinstance(value, bool | int | float):
            extras[key] = torch.full((n,), value, dtype=torch.float64)
        else:
            raise ValueError(
                f"this conditioning carries {key!r} ({type(value).__name__}), which cannot be trained on; "
                "connect plain encoded prompts, without area, mask, ControlNet, hooks or time range"
            )
    return Cond(own(cross), pooled, extras)


def own(value: Tensor) -> Tensor:
    """Upstream nodes run in inference mode; autograd refuses their tensors."""
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value


def groups(cond: Cond, n: int) -> list[tuple[list[int], Cond]]:
    """Samples that one call of the network can serve: same number of tokens, same settings such as guidance or width.

    Padding would change what most families compute, so prompts of different length run one after another.
    """
    cond = cond.expand(n)
    settings = {k: v.tolist() for k, v in cond.extras.items() if v.ndim == 1}
    found: dict[tuple[Any, ...], list[int]] = {}
    for i in range(n):
        found.setdefault(tuple(v[i] for v in settings.values()), []).append(i)
    if len(found) == 1:
        return [(list(range(n)), cond)]
    return [(index, cond.take(torch.tensor(index))) for index in found.values()]


def conditioning_from(cond: Cond) -> list[Any]:
    """A group as one CONDITIONING entry with a batch axis."""
    options: dict[str, Any] = {k: v for k, v in cond.extras.items() if v.ndim > 1}
    options |= {k: v[0].item() for k, v in cond.extras.items() if v.ndim == 1 and k != TOKENS}
    if cond.pooled is not None:
        options["pooled_output"] = cond.pooled
    tokens = int(cond.extras[TOKENS][0]) if TOKENS in cond.extras else cond.cross.shape[1]
    if MASK in options:
        options[MASK] = options[MASK][:, :tokens]
    return [[cond.cross[:, :tokens], options]]
