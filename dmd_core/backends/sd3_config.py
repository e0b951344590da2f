"""The configuration of a bare Stable Diffusion 3 transformer in its original names, read from its shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .flux_keys import bare

HEAD = 64  # in every SD3, with as many heads as blocks
MARKS = ("joint_blocks.0.context_block.attn.qkv.weight", "pos_embed", "y_embedder.mlp.0.weight")


def is_native_sd3(state: Mapping[str, Tensor]) -> bool:
    keys = bare(state)
    return all(
        k in keys for k in ("joint_blocks.0.context_block.attn.qkv.weight", "pos_embed", "y_embedder.mlp.0.weight")
    )


def sd3_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What SD3Transformer2DModel's constructor needs."""
    keys = bare(state)
    width, channels, patch, _ = keys["x_embedder.proj.weight"].shape
    if width % HEAD:
        raise ValueError(f"this SD3 is {width} wide; a multiple of {HEAD} is accepted")
    grid = math.isqrt(keys["pos_embed"].shape[1])
    dual = sorted({int(m[1]) for k in keys if (m := re.match(r"joint_blocks\.(\d+)\.x_block\.attn2\.", k))})
    return {
        "sample_size": patch * grid,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": keys["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": 1 + max(int(k.split(".")[1]) for k in keys if k.startswith("joint_blocks.")),
        "attention_head_dim": HEAD,
        "num_attention_heads": width // HEAD,
        "joint_attention_dim": keys["context_embedder.weight"].shape[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": keys["y_embedder.mlp.0.weight"].shape[1],
        "pos_embed_max_size": grid,
        "dual_attention_layers": tuple(dual),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in keys else None,
    }
