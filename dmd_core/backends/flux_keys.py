"""Flux's original parameter names -> diffusers' names, for networks of any width."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX = "model.diffusion_model."
AXES = (16, 56, 56)  # rotary dimensions of heads of 128: the same in every Flux

EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
}
PLAIN = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **{f"{old}.in_layer": f"{new}.linear_1" for old, new in EMBEDDERS.items()},
    **{f"{old}.out_layer": f"{new}.linear_2" for old, new in EMBEDDERS.items()},
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
FUSED = {  # one layer there, several here, stacked along the output
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors only, without the prefix that all-in-one checkpoints put before them."""
    if any(k.startswith(PREFIX) for k in state):
        return {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    return dict(state)


def is_native_flux(state: Mapping[str, Tensor]) -> bool:
    keys = bare(state)
    # Chroma has no vector_in, Flux.2 shares its modulation: other networks
    return all(
        k in keys
        for k in (
            "double_blocks.0.img_attn.qkv.weight",
            "double_blocks.0.img_mod.lin.weight",
            "vector_in.in_layer.weight",
        )
    )


def flux_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What FluxTransformer2DModel's constructor needs, read from the shapes."""
    keys = bare(state)
    head = keys["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    width, channels = keys["img_in.weight"].shape
    if head != sum(AXES):
        raise ValueError(f"this Flux has attention heads of {head}; heads of {sum(AXES)} are accepted")

    def count(kind: str) -> int:
        return 1 + max((int(k.split(".")[1]) for k in keys if k.startswith(kind)), default=-1)

    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": keys["final_layer.linear.weight"].shape[0],
        "num_layers": count("double_blocks."),
        "num_single_layers": count("single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": keys["txt_in.weight"].shape[1],
        "pooled_projection_dim": keys["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in keys,
        "axes_dims_rope": AXES,
    }


def flux_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under diffusers' names."""
    return {new: value for key, tensor in bare(state).items() for new, value in rename(key, tensor)}


def rename(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    group, _, rest = key.partition(".")
    layer, _, part = key.rpartition(".")
    block, names = "", PLAIN
    if group in ("double_blocks", "single_blocks"):
        number, _, layer = rest.rpartition(".")[0].partition(".")
        block = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[group]
        block, names = f"{block}.{number}.", DOUBLE if group == "double_blocks" else SINGLE
    part = "weight" if part == "scale" else part
    if layer in FUSED:
        return split(tensor, [f"{block}{name}.{part}" for name in FUSED[layer]])
    if layer not in names:
        raise ValueError(f"tensor {key!r} is not part of a Flux transformer; files in fp32, bf16 or fp16 are accepted")
    if layer == "final_layer.adaLN_modulation.1":
        shift, scale = tensor.chunk(2)  # diffusers keeps the two the other way round
        tensor = torch.cat([scale, shift])
    return [(f"{block}{names[layer]}.{part}", tensor)]


def split(tensor: Tensor, names: list[str]) -> list[tuple[str, Tensor]]:
    """q, k, v of equal width; what is left belongs to the MLP, which is four times as wide."""
    width = tensor.shape[0] // (3 if len(names) == 3 else 7)
    sizes = [width] * 3 + ([tensor.shape[0] - 3 * width] if len(names) == 4 else [])
    return [(name, piece.clone()) for name, piece in zip(names, tensor.split(sizes), strict=True)]
