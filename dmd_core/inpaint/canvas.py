"""A canvas's latent, kept between edits: only what changed in the picture, and a ring around it, is encoded again."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .composite import match_ring
from .crop import crops, cut
from .masks import dilate

RING = 4  # latent cells around a change that are taken anew
CONTEXT = 12  # cells around these that the encoder sees besides
SAVING = 0.6  # share of the canvas above which it is encoded whole


class Canvas:
    """encode(picture [b c h w]) is the autoencoder's; a latent is [b c h w] or [b c 1 h w]."""

    def __init__(self) -> None:
        self.picture: Tensor | None = None
        self.latent: Tensor | None = None
        self.share = 1.0  # of the canvas that the last call encoded

    def encode(self, picture: Tensor, ratio: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The latent; away from the change it is the kept one, to the bit."""
        latent = self._local(picture, ratio, encode)
        if latent is None:
            latent, self.share = encode(picture), 1.0
        # a video's frames share latents: there is nothing that could be cut out
        fits = len(latent) == len(picture)
        self.picture, self.latent = (picture.clone(), latent.clone()) if fits else (None, None)
        return latent

    def _local(self, picture: Tensor, ratio: int, encode: Callable[[Tensor], Tensor]) -> Tensor | None:
        if self.picture is None or self.latent is None or self.picture.shape != picture.shape:
            return None
        changed = (picture != self.picture.to(picture)).any(1, keepdim=True).float()
        if not changed.any():
            self.share = 0.0
            return self.latent.clone()
        near = dilate(F.max_pool2d(changed, ratio)[:, 0], RING)
        boxes = crops(dilate(near, CONTEXT), factor=1.0, multiple=2)
        self.share = sum(b.area for b in boxes) / near.numel()
        if self.share > SAVING:
            return None
        pixels = [replace(b, **{k: ratio * getattr(b, k) for k in ("top", "left", "height", "width")}) for b in boxes]
        parts = encode(cut(picture, pixels))
        out = self.latent.clone()
        flat = out.reshape(len(out), -1, *out.shape[-2:])  # without the axis of a single frame
        parts = parts.reshape(len(boxes), flat.shape[1], *parts.shape[-2:])
        fresh = cut(near, boxes)
        # an autoencoder normalises over what it sees, so a crop comes out in another tone
        parts = match_ring(parts, cut(flat, boxes), fresh, pixels=CONTEXT)
        for part, box, mask in zip(parts, boxes, fresh, strict=True):
            box.of(flat).copy_(torch.where(mask > 0, part.to(flat), box.of(flat)))
        return flat.reshape(out.shape)
