"""The measuring half of inpainting_whole.py: a script for ComfyUI's interpreter, with tests/ on its path."""

import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import comfy_host

JOB = json.loads(sys.argv[1])  # {"rounds": , "steps": [...], "ways": [...]}
comfy_host.start_comfy("--use-pytorch-cross-attention")
sys.path.append(str(Path(__file__).parent))

import comfy.utils  # noqa: E402
import torch  # noqa: E402
from inpainting_nets import SIZES, narrow_vae  # noqa: E402
from record import all_compared, compared  # noqa: E402

import nodes as stock  # noqa: E402

((NETWORK, BUILT),) = SIZES["wide"].items()
SIDE, HOLE, CELL = BUILT.shape[-1], 20, 8  # of canvas and hole in latent cells, of a cell in pixels


class Desk:
    """A picture, its two holes, and the nodes that a user's graph has."""

    def __init__(self) -> None:
        self.nodes = comfy_host.pack_module("nodes.inpaint")
        self.model, self.vae = BUILT.patcher(torch.device("cpu")), narrow_vae()
        self.cond, rng = BUILT.conditioning(1), torch.Generator().manual_seed(5)
        self.image = torch.rand(1, CELL * SIDE, CELL * SIDE, 3, generator=rng)
        self.masks = [self.hole(6), self.hole(SIDE - HOLE - 6)]
        self.turn = count()

    def hole(self, first: int) -> torch.Tensor:
        mask = torch.zeros(1, CELL * SIDE, CELL * SIDE)
        mask[:, CELL * first : CELL * (first + HOLE), CELL * first : CELL * (first + HOLE)] = 1
        return mask

    def edit(
        self, steps: int, lazy: Callable[[Any], Any], mask: int = 0, area: str = "canvas", context: float = 1.5,
        kept: bool = False, local: bool = True,
    ) -> None:  # fmt: skip
        """kept: encode what changed alone; local: decode the hole alone."""
        nodes, mask = self.nodes, self.masks[mask % 2]
        # without a MODEL crops stay as small as they are asked to be
        latent, region, *_ = nodes.PrepareInpaint.execute(
            self.image, mask, self.vae, area, context, 0, 0, False, "push-pull", 0, 0, 0, 0, steps, None, kept
        ).args
        model = lazy(self.model)
        made = stock.common_ksampler(model, 5, steps, 1.0, "euler", "simple", self.cond, self.cond, latent)[0]
        nodes.CompositeInpaint.execute(region, made, self.vae, 0.0, True, local)

    def patched(self, model: Any, mode: str, session: str = "", forget: bool = False) -> Any:
        return self.nodes.LazyInpaint.execute(model, mode, 1, 3, 5, session, 0, forget, 8.0, 8.0)[0]

    def later(self, steps: int) -> None:
        self.edit(steps, partial(self.patched, mode="session", session=f"{steps}"), next(self.turn), kept=True)

    def works(self, steps: int) -> dict[str, Callable[[], None]]:
        forgetful = partial(self.patched, mode="session", session=f"first {steps}", forget=True)
        every = {
            "refresh": partial(self.edit, steps, partial(self.patched, mode="refresh")),
            "session, later edit": partial(self.later, steps),
            "session, first edit": partial(self.edit, steps, forgetful),
            "crop 1.5x": partial(self.edit, steps, plain, 0, "crop", 1.5),
            "tight crop": partial(self.edit, steps, plain, 0, "crop", 1.0),
        }
        return {way: every[way] for way in JOB["ways"]}


def plain(model: Any) -> Any:
    return model


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    comfy.utils.set_progress_bar_enabled(False)
    desk, rows = Desk(), []
    for steps in JOB["steps"]:
        works, whole = desk.works(steps), partial(desk.edit, steps, plain, local=False)
        for _ in range(2):  # both holes' banks are there
            desk.later(steps)
        found = all_compared(works, whole, JOB["rounds"], warm=int(steps == 1))
        rows.append({"steps": steps, "dense": 1} | {way: round(found[way]["ratio"], 3) for way in works})
        print(rows[-1], file=sys.stderr, flush=True)
    latent = desk.vae.encode(desk.image)
    given = {"samples": latent, "noise_mask": torch.ones(1, 1, SIDE, SIDE)}
    step = partial(stock.common_ksampler, desk.model, 5, 1, 1.0, "euler", "simple", desk.cond, desk.cond, given)
    coded = compared(lambda: desk.vae.decode(desk.vae.encode(desk.image)), step, JOB["rounds"])
    settings = {"network": NETWORK, "autoencoder": "SD's layout, 32 channels"}
    settings |= {"image tokens": BUILT.tokens, "text tokens": BUILT.text, "m": round((HOLE / SIDE) ** 2, 3)}
    settings |= {"encode and decode over a dense step": round(coded["ratio"], 3), "cfg": 1, "rounds": JOB["rounds"]}
    print(json.dumps({"rows": rows, "settings": settings}))


main()
