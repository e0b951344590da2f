"""What a DMD2 run keeps in memory at real sizes, counted from network layouts by dmd_core/plan.py. Nothing is measured.

Networks are built without weights, from the sizes that diffusers has as defaults or that are given here. What a step
needs beside this (activations, the VAE while it previews) is not counted: this can say that a card is too small, never
that it is large enough. Plan mode of the Distill node measures it.
"""

from collections.abc import Callable

import torch
from torch import nn

from dmd_core.adapters import AdapterBank
from dmd_core.families import detect
from dmd_core.plan import GIB, Plan, size

from .models import REAL, SD3
from .record import NOT_RUN, Table

RANK, RANKS = 64, (16, 64)
# weights in fp32 and AdamW's two moments
LEARNING = 4 + 8


def layout(cls: str, **config: object) -> Callable[[], nn.Module]:
    """A network of diffusers without weights."""

    def build() -> nn.Module:
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, cls)(**config)

    return build


def real(name: str) -> Callable[[], nn.Module]:
    return lambda: REAL[name].net("meta")


LARGE = {"num_layers": 38, "num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432}
LARGE |= {"pooled_projection_dim": 2048, "pos_embed_max_size": 192, "in_channels": 16, "out_channels": 16}
MODELS = {
    "SD1.5": real("sd15"),
    "SDXL": real("sdxl"),
    "SD3 Medium": real("sd3"),
    "SD3.5 Large": layout(SD3, **LARGE),
    "Wan 2.1 1.3B": layout("WanTransformer3DModel", num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Z-Image": layout("ZImageTransformer2DModel"),
    "Qwen-Image": layout("QwenImageTransformer2DModel"),
}


def numbers(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def lora_numbers(net: nn.Module, rank: int) -> int:
    """Of one set on all layers."""
    bank = AdapterBank(net, detect(net).targets("all"))
    with torch.device("meta"):
        return numbers(bank.new("one", rank))


def kept(net: nn.Module, rank: int, base_bytes: int = 2, eight_bit: bool = False) -> Plan:
    """Student and critic LoRA in fp32, the student's average, two AdamW moments of both; gradients are gone by then."""
    lora = lora_numbers(net, rank)
    return Plan(
        device="none",
        steps=0,
        seconds_per_step=0.0,
        base=base_bytes * numbers(net),
        trained=2 * 4 * lora,
        averages=4 * lora,
        optimizer=2 * (2 if eight_bit else 8) * lora,
        peak=None,
    )


def on_paper() -> Table:
    """Ours beside the published loop."""
    table = Table(
        "memory",
        "Memory on paper",
        "GiB at the real sizes, counted from the networks themselves. ours: bf16 base, LoRA sets of student and critic "
        "in fp32, AdamW's moments of both, the student's average. three copies: bf16 teacher, full student and critic "
        "in fp32, AdamW's moments of both, no average. in an update: the gradients of one player too",
        settings={"rank": RANK, "layers": "all"},
        notes=["Activations and the CUDA context come on top. Not measured: see the CUDA tier."],
    )
    for name, network in REAL.items():
        net = network.net("meta", torch.bfloat16)
        base, lora = numbers(net), lora_numbers(net, RANK)
        ours, plain = kept(net, RANK).parameters, (2 + 2 * LEARNING) * base
        row = {"network": name, "parameters (millions)": round(base / 1e6, 1), "LoRA (millions)": round(lora / 1e6, 1)}
        for when, ours_more, plain_more in (("between updates", 0, 0), ("in an update", 4 * lora, 4 * base)):
            a, b = ours + ours_more, plain + plain_more
            row |= {f"ours, {when}": round(a / GIB, 1), f"three copies, {when}": round(b / GIB, 1)}
            row[f"ratio, {when}"] = round(a / b, 3)
        table.rows.append(row | {"measured on CUDA": NOT_RUN})
    return table


def ruled_out(plan: Plan) -> str:
    """Cards that the kept parameters alone do not fit on."""
    return ", ".join(f"{g} GB" for g, fit in plan.fits().items() if fit is False) or "none"


def settings() -> str:
    """The table of docs/settings.md."""
    lines = [
        "| model | rank | frozen weights, bf16 | all that is kept | ruled out | fp8 weights, adamw8bit | ruled out |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, build in MODELS.items():
        net = build()
        for rank in RANKS:
            plan, small = kept(net, rank), kept(net, rank, 1, True)
            lines.append(
                f"| {title} | {rank} | {size(plan.base)} | {size(plan.parameters)} | {ruled_out(plan)} | "
                f"{size(small.parameters)} | {ruled_out(small)} |"
            )
    return "\n".join(lines)
