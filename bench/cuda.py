"""The CUDA tier: real sizes with random weights, in under ten minutes on one GPU. `python -m bench cuda`.

What does not fit says so, what fails says how, what the time does not allow says "not run"; every row is written when
it is there. Absolute times come from here alone. `python -m bench cuda --dry` goes through all of it on the CPU, with
networks of a few numbers, and keeps nothing.
"""

import gc
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import inpainting
from .models import REAL, TINY, Size
from .record import NOT_RUN, Table, compared, seconds
from .sampling import bare, levels_of, samplers
from .training import Ours, ThreeCopies

PEAK = 989e12  # dense bf16 operations a second of an H100 or H200, for the floor
# operations of one pass, as counted in the literature: network, VAE, tiny VAE, text encoders
TERA = {"sd15": (0.803, 2.515, 0.141, 0.013), "sdxl": (6.761, 10.470, 0.565, 0.111)}
TARGET_MS = {("sdxl", 4, "tiny VAE"): 100, ("sd15", 1, "tiny VAE"): 15}
STEPS = {"sd15": 1, "sdxl": 4}
BATCH = {"sd15": 4, "sdxl": 1, "sd3": 1, "flux": 1}
COMPILED = "ours, compiled, s per update"
SIDES: dict[str, Callable[..., Any]] = {"ours": Ours, "three copies": ThreeCopies}
LATE: dict[str, Callable[..., Any]] = {  # where time is left
    "ours, one sample a step": partial(Ours, one_sample=True),
    "three copies, LoRA": ThreeCopies,
}


@dataclass
class Tier:
    """Where it runs and on what; the second set of values is the dry run's."""

    device: str = "cuda"
    sizes: Mapping[str, Size] = field(default_factory=lambda: REAL)
    rank: int = 64
    rounds: int = 20
    compiler: str = "inductor"
    text: tuple[Mapping[str, int], ...] = (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    )
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of the VAE
    budget_s: float = 540
    patience: float = 1.0  # times the limit of each row: a dry run is to go through on a busy machine too
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def dry(cls, device: str = "cpu") -> "Tier":
        tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        return cls(device, TINY, 2, 2, "eager", (tiny, tiny), (32, 32, 32, 32), 2 * 3600, patience=20.0)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def left(self) -> float:
        return self.budget_s - (time.monotonic() - self.began)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def attempt(self, work: Callable[[], Any], at_most_s: float) -> Any:
        """What the work gives, or in words why it gave nothing: one row that fails must not cost the others."""
        if self.left() < 20:
            return NOT_RUN
        at_most_s *= self.patience
        self.free()
        try:
            with alarm(min(at_most_s, self.left())):
                return work()
        except torch.OutOfMemoryError:
            return "does not fit"
        except TimeoutError:
            return f"{NOT_RUN}: over {at_most_s:.0f} s"
        except Exception as error:
            return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:200]


@contextmanager
def alarm(limit_s: float) -> Iterator[None]:
    """TimeoutError after so many seconds, also in a compiler; Windows has no such clock."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- training ---------------------------------------------------------------------------------------------------------


def side(tier: Tier, name: str, which: str, compiled: bool = False, rounds: int = 3) -> dict[str, float]:
    """Seconds per update and peak GiB of one side, alone on the device."""
    options = {} if which == "three copies" else {"rank": tier.rank}
    made = (SIDES | LATE)[which](tier.sizes[name], BATCH[name], tier.device, torch.bfloat16, **options)
    if compiled:
        made.net.compile(backend=tier.compiler)
    made.update()
    times = [seconds(made.update, tier.device) for _ in range(rounds)]
    return {"s per update": round(statistics.median(times), 4), "peak GiB": round(tier.peak_gib(), 2)}


def training_row(tier: Tier, name: str) -> dict[str, Any]:
    shape = tier.sizes[name].shape
    row: dict[str, Any] = {"network": name, "latent": "x".join(map(str, shape)), "batch": BATCH[name]}
    found = {which: tier.attempt(partial(side, tier, name, which), 90) for which in SIDES}
    row |= columns(found)
    row |= dict.fromkeys(columns(dict.fromkeys(LATE)), NOT_RUN)
    row |= {"speed": NOT_RUN, "memory": NOT_RUN, COMPILED: NOT_RUN}
    a, b = found["ours"], found["three copies"]
    if isinstance(a, dict) and isinstance(b, dict):
        row["speed"] = round(b["s per update"] / a["s per update"], 3)
        row["memory"] = round(a["peak GiB"] / b["peak GiB"], 3) if b["peak GiB"] else NOT_RUN
    return row


def columns(found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of each side, or the words why there are none."""
    keys = ("s per update", "peak GiB")
    return {f"{w}, {k}": f[k] if isinstance(f, dict) else f for w, f in found.items() for k in keys}


def training(tier: Tier) -> Table:
    return Table(
        "training",
        "Training step",
        "one student update of DMD2 (five critic updates and one of the student): one bf16 base with LoRA sets, and "
        "the published loop on three copies (bf16 teacher, fp32 student and critic under bf16 autocast)",
        settings={"rank": tier.rank, "optimizer": "AdamW", "accumulate": 1, "checkpointing": False},
    )


# --- sampling ---------------------------------------------------------------------------------------------------------


def text_encoders(tier: Tier, name: str) -> list[torch.nn.Module]:
    import transformers

    with torch.device(tier.device):
        shapes = tier.text[: 2 if name == "sdxl" else 1]
        nets = [transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape)) for shape in shapes]
    return [n.to(torch.bfloat16).eval() for n in nets]


def decoder(tier: Tier, tiny: bool) -> torch.nn.Module:
    import diffusers

    widths = {"block_out_channels": tier.widths, "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device(tier.device):
        vae = diffusers.AutoencoderTiny() if tiny else diffusers.AutoencoderKL(**widths, **blocks)
    return vae.to(torch.bfloat16).eval()


def milliseconds(work: Callable[[], object], device: str) -> float:
    for _ in range(3):
        work()
    return 1e3 * statistics.median(seconds(work, device) for _ in range(9))


@torch.no_grad()
def stages(tier: Tier, name: str, compiled: bool) -> list[dict[str, Any]]:
    """Text, network and VAE, each timed; ours around the network against the calls alone."""
    size, steps = tier.sizes[name], STEPS[name]
    net = size.net(tier.device, torch.bfloat16).to(memory_format=torch.channels_last)
    if compiled:
        net.compile(backend=tier.compiler)
    cond, levels = size.cond(1, tier.device), levels_of(size, tier.device, steps)
    noise = torch.randn(1, *size.shape, device=tier.device)
    calls = bare(size, net, levels, cond, noise.to(torch.bfloat16))
    work = samplers(size, size.denoiser(net), levels, cond, noise)["sample_restart, fresh noise"]
    network = compared(work, calls, tier.rounds, tier.device, warm=5, milliseconds=True)
    rows = [{"what": "network and sampler, over bare calls"} | network]
    encoders, ids = text_encoders(tier, name), torch.randint(49407, (1, 77), device=tier.device)
    text = milliseconds(lambda: [encode(ids) for encode in encoders], tier.device)
    rows.append({"what": "text encoders", "ours_ms": round(text, 3)})
    net_t, full_t, tiny_t, text_t = TERA[name]
    for what, tiny, tera in (("VAE", False, full_t), ("tiny VAE", True, tiny_t)):
        vae = decoder(tier, tiny)
        taken = milliseconds(partial(vae.decode, noise.to(torch.bfloat16)), tier.device)
        total = text + network["ours_ms"] + taken
        floor = 1e3 * (steps * net_t + tera + text_t) * 1e12 / PEAK
        rows.append({"what": what, "ours_ms": round(taken, 3)})
        row = {"what": f"whole image, {what}", "ours_ms": round(total, 2), "floor_ms": round(floor, 2)}
        row |= {"images per second": round(1e3 / total, 2), "over the floor": round(total / floor, 2)}
        rows.append(row | {"target_ms": TARGET_MS.get((name, steps, what), "none")})
    return rows


def sampling_rows(tier: Tier, name: str, compiled: bool) -> list[dict[str, Any]]:
    label = {"network": name, "steps": STEPS[name], "compiled": compiled}
    found = tier.attempt(partial(stages, tier, name, compiled), 150 if compiled else 60)
    rows = found if isinstance(found, list) else [{"what": "all", "ours_ms": found}]
    return [label | row for row in rows]


def sampling() -> Table:
    return Table(
        "sampling",
        "Sampling",
        "milliseconds per image by stage, batch 1, bf16; ratio: our sampler around the network over the bare calls. "
        f"floor: operations of all stages at {PEAK / 1e12:.0f} TFLOP/s",
    )


# --- inpainting -------------------------------------------------------------------------------------------------------


def inpainting_rows(tier: Tier, table: Table) -> None:
    """In ComfyUI's process, which has the device to itself."""
    sizes, rounds = ("real", tier.rounds) if tier.cuda else ("tiny", 1)
    found = tier.attempt(partial(inpainting.curve, sizes, tier.device, rounds, tier.left()), 150)
    if isinstance(found, dict):
        table.rows = found["rows"]
        table.settings |= found["settings"]
    else:
        table.rows = [{"network": "all", "later edit": found or f"{NOT_RUN}: there is no ComfyUI"}]


def go(tier: Tier, write: Callable[[Table], object]) -> list[Table]:
    """The short ones first, compilers last; tables are written row by row."""
    images, steps, holes = sampling(), training(tier), inpainting.on_cuda()
    torch.set_float32_matmul_precision("high")
    for name in STEPS:
        images.rows += sampling_rows(tier, name, False)
        write(images)
    inpainting_rows(tier, holes)
    write(holes)
    for name in tier.sizes:
        steps.rows.append(training_row(tier, name))
        write(steps)
    for name in STEPS:
        images.rows += sampling_rows(tier, name, True)
        write(images)
    smallest = next(iter(tier.sizes))  # five graphs, three of them with a backward: minutes for anything larger
    found = tier.attempt(partial(side, tier, smallest, "ours", compiled=True), 180)
    steps.rows[0][COMPILED] = found["s per update"] if isinstance(found, dict) else found
    write(steps)
    for name, row in zip(tier.sizes, steps.rows, strict=True):
        row |= columns({which: tier.attempt(partial(side, tier, name, which), 60) for which in LATE})
        write(steps)
    return [images, steps, holes]


def main(dry: bool = False) -> None:
    if not dry and not torch.cuda.is_available():
        raise SystemExit("not run: there is no CUDA device here; nothing was written")
    tier = Tier.dry() if dry else Tier()
    with tempfile.TemporaryDirectory() as aside:
        where = Path(aside) if dry else None

        def write(table: Table) -> None:
            path = table.write(tier.device, "python -m bench cuda", where)
            print(path.name, table.rows[-1], f"{tier.left():.0f} s left")

        go(tier, write)
