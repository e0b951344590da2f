"""The CUDA tier: real sizes with random weights, in under ten minutes on one GPU. `python -m bench cuda`.

What does not fit says so, what the time does not allow says "not run". Absolute times come from here alone.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .models import REAL, Size
from .record import NOT_RUN, Table, compared, seconds
from .sampling import bare, levels_of, samplers
from .training import RANK, Ours, ThreeCopies

BUDGET_S = 540
DEVICE, DTYPE = "cuda", torch.bfloat16
BATCH = {"sd15": 4, "sdxl": 1, "sd3": 1, "flux": 1}
PEAK = 989e12  # dense bf16 operations a second of an H100 or H200, for the floor
# operations of one pass, as counted in the literature: network, VAE, tiny VAE, text encoders
TERA = {"sd15": (0.803, 2.515, 0.141, 0.013), "sdxl": (6.761, 10.470, 0.565, 0.111)}
TARGET_MS = {("sdxl", 4, "tiny VAE"): 100, ("sd15", 1, "tiny VAE"): 15}


class Clock:
    def __init__(self) -> None:
        self.began = time.monotonic()

    def left(self) -> float:
        return BUDGET_S - (time.monotonic() - self.began)


def measured(make: Callable[[], Any], rounds: int = 3) -> dict[str, float] | str:
    """Seconds per update and peak GiB of one side, alone on the device."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        side = make()
        side.update()
        times = [seconds(side.update, DEVICE) for _ in range(rounds)]
    except torch.OutOfMemoryError:
        return "does not fit"
    return {"s": statistics.median(times), "GiB": torch.cuda.max_memory_allocated() / 2**30}


def training(clock: Clock) -> Table:
    table = Table(
        "training",
        "Training step",
        "one student update of DMD2 (five critic updates and one of the student): one bf16 base with LoRA sets, and "
        "the published loop on three copies (bf16 teacher, fp32 student and critic under bf16 autocast)",
        settings={"rank": RANK["cuda"], "batch": BATCH, "optimizer": "AdamW", "accumulate": 1, "checkpointing": False},
    )
    for name, size in REAL.items():
        row: dict[str, Any] = {"network": name, "latent": "x".join(map(str, size.shape))}
        sides = {"ours": Ours, "three copies": ThreeCopies}
        for side, kind in sides.items():
            options = {"rank": RANK["cuda"]} if kind is Ours else {}
            make = partial(kind, size, BATCH[name], DEVICE, DTYPE, **options)
            found = measured(make) if clock.left() > 200 else NOT_RUN
            row[f"{side}, s per update"] = round(found["s"], 3) if isinstance(found, dict) else found
            row[f"{side}, peak GiB"] = round(found["GiB"], 2) if isinstance(found, dict) else found
        for what, key in (("speed", "s per update"), ("memory", "peak GiB")):
            a, b = row[f"ours, {key}"], row[f"three copies, {key}"]
            numbers = isinstance(a, float) and isinstance(b, float)
            row[what] = round(b / a if what == "speed" else a / b, 3) if numbers else NOT_RUN
        table.rows.append(row)
    return table


def text_encoders(name: str) -> list[torch.nn.Module]:
    import transformers

    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    with torch.device(DEVICE):
        nets = [transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape))]
        if name == "sdxl":
            nets.append(transformers.CLIPTextModel(transformers.CLIPTextConfig(**large)))
    return [n.to(DTYPE).eval() for n in nets]


def decoder(tiny: bool) -> torch.nn.Module:
    import diffusers

    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device(DEVICE):
        vae = diffusers.AutoencoderTiny() if tiny else diffusers.AutoencoderKL(**widths, **blocks)
    return vae.to(DTYPE).eval()


@torch.no_grad()
def stages(size: Size, steps: int, clock: Clock, compiled: bool) -> list[dict[str, Any]]:
    """Text, network and VAE, each timed; ours around the network against the calls alone."""
    label = {"network": size.family, "steps": steps, "compiled": compiled}
    if clock.left() < (150 if compiled else 60):
        return [label | {"what": "all", "ours_ms": NOT_RUN}]
    net = size.net(DEVICE, DTYPE).to(memory_format=torch.channels_last)
    if compiled:
        net.compile(mode="max-autotune-no-cudagraphs")
    cond, levels = size.cond(1, DEVICE), levels_of(size, DEVICE, steps)
    noise = torch.randn(1, *size.shape, device=DEVICE)
    model = size.denoiser(net)
    calls = bare(size, net, levels, cond, noise.to(DTYPE))
    work = samplers(size, model, levels, cond, noise)["sample_restart, fresh noise"]
    network = compared(work, calls, 20, DEVICE, warm=5)
    rows = [label | {"what": "network and sampler, over bare calls"} | network]
    encoders, ids = text_encoders(size.family), torch.randint(49407, (1, 77), device=DEVICE)
    text = 1e3 * statistics.median(seconds(lambda: [e(ids) for e in encoders], DEVICE) for _ in range(12))
    rows.append(label | {"what": "text encoders", "ours_ms": round(text, 3)})
    net_t, full_t, tiny_t, text_t = TERA[size.family]
    for what, tiny, tera in (("VAE", False, full_t), ("tiny VAE", True, tiny_t)):
        vae, latent = decoder(tiny), noise.to(DTYPE)
        taken = 1e3 * statistics.median(seconds(lambda v=vae: v.decode(latent), DEVICE) for _ in range(12))  # noqa: B023
        total = text + network["ours_ms"] + taken
        floor = 1e3 * (steps * net_t + tera + text_t) * 1e12 / PEAK
        row = label | {"what": f"whole image, {what}", "ours_ms": round(total, 2), "floor_ms": round(floor, 2)}
        row |= {"images per second": round(1e3 / total, 2), "over the floor": round(total / floor, 2)}
        target = TARGET_MS.get((size.family, steps, what), "none")
        rows.append(row | {"target_ms": target, f"{what}_ms": round(taken, 2)})
    return rows


def sampling(clock: Clock) -> Table:
    table = Table(
        "sampling",
        "Sampling",
        "milliseconds per image by stage, batch 1, bf16; ratio: our sampler around the network over the bare calls. "
        f"floor: operations of all stages at {PEAK / 1e12:.0f} TFLOP/s",
    )
    for compiled in (False, True):
        for name, steps in (("sd15", 1), ("sdxl", 4)):
            gc.collect()
            torch.cuda.empty_cache()
            table.rows += stages(REAL[name], steps, clock, compiled)
    return table


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("not run: there is no CUDA device here; nothing was written")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    clock = Clock()
    for make in (sampling, training):  # the short one first
        print(make(clock).write(DEVICE, "python -m bench cuda"), f"{clock.left():.0f} s left")
