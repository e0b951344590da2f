"""The measuring half of inpainting.py: a script for ComfyUI's interpreter, with tests/ on its path."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import comfy_host

JOB = json.loads(sys.argv[1])  # {"sizes": of inpainting_nets, "device": , "rounds": , "shares": [...]}
DEVICE = JOB["device"]
comfy_host.start_comfy("--use-pytorch-cross-attention", device=DEVICE)
sys.path.append(str(Path(__file__).parent))

import comfy.utils  # noqa: E402
import torch  # noqa: E402
from inpainting_nets import SIZES, Network  # noqa: E402
from record import all_compared  # noqa: E402

import nodes as stock  # noqa: E402

STEPS = 1  # one step: what sampling costs once counts in full
CUDA = DEVICE.startswith("cuda")


def even(cells: float, side: int) -> int:
    return min(side, max(2, round(cells / 2) * 2))


class Curve:
    """One network over shares of the picture, each against the whole one."""

    def __init__(self, name: str, network: Network):
        self.name, self.network, self.side = name, network, network.shape[-1]
        self.model, self.cond = network.patcher(torch.device(DEVICE)), network.conditioning(1)
        self.samples = torch.randn(1, *network.shape, generator=torch.Generator().manual_seed(5))
        self.node = comfy_host.pack_module("nodes.inpaint").LazyInpaint

    def sample(self, model: Any, latent: dict[str, torch.Tensor]) -> None:
        stock.common_ksampler(model, 5, STEPS, 1.0, "euler", "simple", self.cond, self.cond, latent)

    def crop(self, cells: int) -> partial:
        part = self.samples[..., :cells, :cells].contiguous()
        return partial(self.sample, self.model, {"samples": part, "noise_mask": torch.ones(1, 1, cells, cells)})

    def edit(self, latent: dict[str, torch.Tensor], key: str, forget: bool) -> None:
        memory = 64.0 if CUDA else 8.0
        patched = self.node.execute(self.model, "session", 1, 3, 5, key, 0, forget, memory, memory)[0]
        self.sample(patched, latent)

    def works(self, share: float) -> tuple[dict[str, Any], dict[str, partial]]:
        """A row without times, and what is timed. The warm-up fills the bank."""
        inpaint = comfy_host.pack_module("dmd_core.inpaint")
        hole, tokens, text = even(self.side * share**0.5, self.side), self.network.tokens, self.network.text
        first = (self.side - hole) // 4 * 2
        mask = torch.zeros(1, 1, self.side, self.side)
        mask[..., first : first + hole, first : first + hole] = 1
        row: dict[str, Any] = {"network": self.name, "m": round((hole / self.side) ** 2, 3)}
        works = {"tight crop": self.crop(hole), "crop 1.5x": self.crop(even(1.5 * hole, self.side))}
        if not self.network.lazy:
            return row, works
        computed = inpaint.select(inpaint.token_mask(mask, (1, 2, 2))).share
        row |= {"computed": round(computed, 3), "law": round((computed * tokens + text) / (tokens + text), 3)}
        latent = {"samples": self.samples, "noise_mask": mask}
        works["later edit"] = partial(self.edit, latent, f"{self.name} {share}", False)
        if share == 0.1:
            works["first edit"] = partial(self.edit, latent, f"{self.name} first", True)
        return row, works

    def rows(self, shares: list[float]) -> list[dict[str, Any]]:
        """All shares in one run, so that the whole pass is measured once per round."""
        made = {share: self.works(share) for share in shares}
        works = {(share, name): work for share, (_, found) in made.items() for name, work in found.items()}
        ones = torch.ones(1, 1, self.side, self.side)
        whole = partial(self.sample, self.model, {"samples": self.samples, "noise_mask": ones})
        found = all_compared(works, whole, JOB["rounds"], DEVICE, milliseconds=CUDA)
        rows = []
        for share, (row, _) in made.items():
            for what in ("later edit", "first edit", "tight crop", "crop 1.5x"):
                row[what] = round(found[share, what]["ratio"], 3) if (share, what) in found else "not run"
            if self.network.lazy:
                row["over the law"] = round(row["later edit"] / row["law"], 2)
            if CUDA:
                row |= absolute(found, share, works[share, "later edit" if self.network.lazy else "tight crop"], whole)
            rows.append({**row, "rounds": JOB["rounds"]})
        return rows


def absolute(found: dict[Any, Any], share: float, ours: partial, whole: partial) -> dict[str, float]:
    """Milliseconds and peak memory, weights and bank included."""
    times = found.get((share, "later edit"), found[share, "tight crop"])
    row = {"ours_ms": times["ours_ms"], "whole_ms": times["other_ms"]}
    for name, work in (("peak GiB", ours), ("peak GiB, whole", whole)):
        torch.cuda.reset_peak_memory_stats()
        work()
        row[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    comfy.utils.set_progress_bar_enabled(False)
    rows: list[dict[str, Any]] = []
    networks = SIZES[JOB["sizes"]]
    for name, network in networks.items():
        curve = Curve(name, network)
        # a bank of every share at a time is too much beside a real network; there whole passes cost little
        groups = [[share] for share in JOB["shares"]] if CUDA else [JOB["shares"]]
        for group in groups:
            rows += curve.rows(group)
            print(rows[-1], file=sys.stderr, flush=True)
            comfy_host.pack_module("nodes.inpaint").SESSIONS.clear()
        del curve
    tokens, text = (
        " / ".join(dict.fromkeys(str(getattr(n, k)) for n in networks.values() if n.lazy)) for k in ("tokens", "text")
    )
    settings = {"networks": "ComfyUI's own classes, random", "image tokens": tokens, "text tokens": text}
    print(json.dumps({"rows": rows, "settings": settings | {"steps": STEPS, "cfg": 1}}))


main()
