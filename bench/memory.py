"""What a DMD2 run keeps in memory, per family, counted from network layouts by dmd_core/plan.py. Nothing is measured.

    .venv/bin/python bench/memory.py        prints the table of docs/settings.md

Networks are built without weights, from the sizes that diffusers has as defaults or that are given below. What a step
needs beside this (activations, the VAE while it previews) is not counted: this can say that a card is too small, never
that it is large enough. Plan mode of the Distill node measures it.
"""

import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RANKS = (16, 64)
SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {"pos_embed_max_size": 192, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16}
SD3_MEDIUM = SD3 | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "out_channels": 16}
SD35_LARGE = SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "out_channels": 16}
WAN = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# title, class of diffusers, its arguments
MODELS = (
    ("SD1.5", "UNet2DConditionModel", {"cross_attention_dim": 768, "attention_head_dim": 8}),
    ("SDXL", "UNet2DConditionModel", SDXL),
    ("SD3 Medium", "SD3Transformer2DModel", SD3_MEDIUM),
    ("SD3.5 Large", "SD3Transformer2DModel", SD35_LARGE),
    ("Wan 2.1 1.3B", "WanTransformer3DModel", WAN),
    ("Z-Image", "ZImageTransformer2DModel", {}),
    ("Qwen-Image", "QwenImageTransformer2DModel", {}),
)


def load_engine() -> None:
    """dmd_core without the pack's root on sys.path."""
    spec = importlib.util.spec_from_file_location("dmd_core", ROOT / "dmd_core" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dmd_core"] = module
    spec.loader.exec_module(module)


def kept(net, rank: int, base_bytes: int, eight_bit: bool):
    """Student and critic LoRA in fp32, the student's average, two AdamW moments of both."""
    from dmd_core.families import detect
    from dmd_core.plan import Plan

    family = detect(net)
    targets, weights = family.targets("all"), 0
    for name, module in net.named_modules():
        if targets(name, module):
            inside, outside = module.weight.shape[1:].numel(), module.weight.shape[0]
            weights += min(rank, inside, outside) * (inside + outside)
    base = sum(p.numel() for p in net.parameters()) * base_bytes
    moments = 2 if eight_bit else 8
    return Plan(
        device="none",
        steps=0,
        seconds_per_step=0.0,
        base=base,
        trained=2 * weights * 4,
        averages=weights * 4,
        optimizer=2 * weights * moments,
        peak=None,
    )


def ruled_out(plan) -> str:
    """Cards that the kept parameters alone do not fit on."""
    return ", ".join(f"{g} GB" for g, fit in plan.fits().items() if fit is False) or "none"


def rows():
    import diffusers

    for title, cls, arguments in MODELS:
        with torch.device("meta"):
            net = getattr(diffusers, cls)(**arguments)
        for rank in RANKS:
            yield title, rank, kept(net, rank, 2, False), kept(net, rank, 1, True)


def table() -> str:
    from dmd_core.plan import size

    lines = [
        "| model | rank | frozen weights, bf16 | all that is kept | ruled out | fp8 weights, adamw8bit | ruled out |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, rank, plan, small in rows():
        lines.append(
            f"| {title} | {rank} | {size(plan.base)} | {size(plan.parameters)} | {ruled_out(plan)} | "
            f"{size(small.parameters)} | {ruled_out(small)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    load_engine()
    print(table())
