"""Inpainting whose cost follows the mask: masks, tokens, the cost law, crops, prefill, composite, the bank of keys.

Masks are [b h w] in 0..1; a pixel is known where its mask is exactly 0, and a known pixel never changes.
"""

from .bank import Bank, BankFull
from .canvas import Canvas
from .composite import composite, fade, match_ring
from .crop import Box, box_of, crops, merged, paste
from .masks import binary, check, dilate, fill_holes, islands, ring, soften, stabilise
from .partial import Filler, OnCanvas, Partial
from .prefill import PREFILLS, prefill
from .strokes import MaskConfig, draw_holes, draw_masks
from .tokens import Tokens, dense_steps, run_cost, select, step_cost, token_mask

__all__ = [
    "PREFILLS",
    "Bank",
    "BankFull",
    "Box",
    "Canvas",
    "Filler",
    "MaskConfig",
    "OnCanvas",
    "Partial",
    "Tokens",
    "binary",
    "box_of",
    "check",
    "composite",
    "crops",
    "dense_steps",
    "dilate",
    "draw_holes",
    "draw_masks",
    "fade",
    "fill_holes",
    "islands",
    "match_ring",
    "merged",
    "paste",
    "prefill",
    "ring",
    "run_cost",
    "select",
    "soften",
    "stabilise",
    "step_cost",
    "token_mask",
]
