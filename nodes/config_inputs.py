"""Fields of the engine's configs as widgets: the default is the config's own, only range and words are added here."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from comfy_api.latest import io

from ..dmd_core.families import PRESETS
from ..dmd_core.objectives.dmd2 import DIVERGENCES


@dataclass(frozen=True)
class Widget:
    words: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    options: tuple[str, ...] = ()
    shown: bool = False  # else under `advanced`


LR = {"high": 1e-2, "step": 1e-7}
WIDGETS = {
    # methods
    "critic_updates": Widget("Critic updates before every student update. 5 is published; raise it if an alarm says "
                             "that the critic falls behind.", 1, 50, shown=True),
    "student_lr": Widget("Learning rate of the student's LoRA.", **LR, shown=True),
    "critic_lr": Widget("Learning rate of the critic's LoRA (and of the GAN's heads).", **LR),
    "discriminator_lr": Widget("Learning rate of the discriminator.", **LR),
    "lr": Widget("Learning rate of the LoRA.", **LR, shown=True),
    "ema": Widget("Decay of the student's running average, which is the result. 0 keeps none.", 0, 0.9999, 0.001),
    "gamma": Widget("Fresh noise between the student's steps: 1 all (sample it with lcm), 0 none (euler).", step=0.05),
    "backward_simulation": Widget("The student trains on its own intermediate images, as it will be sampled. Off: on "
                                  "noised images of the teacher."),
    "trajectory": Widget("A deterministic student, matched segment by segment (TDM): sample it with plain euler."),
    "gan_weight": Widget("Weight of a GAN beside the matching, for sharpness. 0 is off; 0.005 for SDXL, 0.001 for "
                         "SD1.5. The teacher makes its real images first.", 0, 10, 0.0001),
    "gan_loss": Widget("Form of the GAN loss.", options=("softplus", "hinge")),
    "gan_features": Widget("Whose features the GAN reads: the frozen teacher's, or the critic's, which then learns "
                           "from it.", options=("teacher", "critic")),
    "loss": Widget("Form of the GAN loss.", options=("hinge", "softplus")),
    "r1_weight": Widget("Approximate R1 penalty, which calms a discriminator that wins too easily.", 0, 1000, 0.1),
    "synchronise": Widget("Share of the student that the critic takes over after each student update; with 0.03 a "
                          "critic_updates of 2 is enough.", step=0.005),
    "divergence": Widget("Which divergence is minimised; all but rkl need the GAN.", options=tuple(DIVERGENCES)),
    "critic_weight": Widget("Weighting of the critic's loss over noise levels.",
                            options=("native", "v", "edm", "min_snr", "x0")),
    "guidance_weight": Widget("Weight of the part that comes from the teacher's guidance.", 0, 10, 0.05),
    "matching_weight": Widget("Weight of the part that matches the unguided teacher.", 0, 10, 0.05),
    "regression_weight": Widget("Weight of the regression on the teacher's own images.", 0, 10, 0.05),
    "regression": Widget("What the student's image is compared with the teacher's in: plain latents, or the teacher's "
                         "own features of them, which costs two passes more.", options=("mse", "perceptual")),
    "warm_up": Widget("First updates, on the teacher's own images alone, before the matching begins.", 0, 100000),
    "noise_mean": Widget("Where the discriminator looks: higher judges structure, lower texture.", -3, 3, 0.1),
    "noise_std": Widget("How widely the discriminator's noise levels spread.", 0.1, 3, 0.1),
    "discriminator_updates": Widget("Discriminator updates before every student update.", 1, 20),
    "early_steps": Widget("First updates, in which only the cleaner half of the levels is trained. -1: a fifth of the "
                          "run, at most 100.", -1, 100000),
    "perceptual_weight": Widget("Weight of the distance in the teacher's own features.", 0, 100, 0.05),
    "l1_weight": Widget("Weight of the plain distance beside it.", 0, 100, 0.05),
    "logit_mean": Widget("Centre of the trained times: 0 is the middle.", -3, 3, 0.1),
    "logit_std": Widget("Spread of the trained times.", 0.1, 3, 0.1),
    "adapt": Widget("First updates, in which the student only learns to read clean context: plain denoising of the "
                    "hole.", 0, 100000, shown=True),
    "text_dropout": Widget("Share of samples without their prompt, where the context has to say it all."),
    "smallest": Widget("Smallest hole, as a share of the picture.", 0.001, 1, 0.001),
    "largest": Widget("Largest hole, as a share of the picture; outpainting goes beyond.", 0.01, 1),
    "whole": Widget("Share of batches that are all hole, so that plain text-to-image stays alive.", 0, 0.9),
    # the run
    "rank": Widget("Rank of the student's LoRA: how much it can learn, and its size.", 1, 1024),
    "critic_rank": Widget("Rank of the critic's LoRA; 0 takes the student's.", 0, 1024),
    "layers": Widget("Which layers carry the LoRA.", options=PRESETS),
    "optimizer": Widget("adamw8bit needs the package bitsandbytes or torchao and a quarter of the memory for its "
                        "state.", options=("adamw", "adamw8bit")),
    "seed": Widget("Everything random in the run hangs on it.", 0, 2**31 - 1),
    "warmup": Widget("Updates until the learning rate is full.", 0, 10000),
    "cooldown": Widget("Share of the run, at its end, in which the learning rate falls to 0."),
    "clip": Widget("Bound of the gradient norm; 0 is off.", 0, 1000, 0.1),
    "pairs": Widget("Batches of images that the teacher makes first, for the methods that need them.", 1, 100000),
    "pair_steps": Widget("Steps (Heun) of the teacher for each of these.", 2, 200),
    "count": Widget("How many prompts the snapshots are judged on.", 2, 256),
    "teacher_steps": Widget("Steps of the teacher's pictures that the snapshots are compared with.", 2, 200),
    "save_every": Widget("Updates between saved states; a killed run loses at most these.", 1, 100000),
    "keep": Widget("How many states stay on disk.", 1, 100),
    "preview_every": Widget("Updates between previews; 0 shows none.", 0, 100000),
    "snapshot_every": Widget("Updates between snapshots, each with a contact sheet; 0 makes one at the end. Students "
                             "are often best early.", 0, 100000),
}  # fmt: skip


def widgets(config: type, names: Sequence[str], **renamed: str) -> list[Any]:
    """Inputs for these fields of a config class; renamed: field -> id of the input."""
    defaults = {f.name: f.default for f in fields(config)}
    return [widget(name, renamed.get(name, name), defaults[name]) for name in names]


def widget(name: str, shown_as: str, default: Any) -> Any:
    w = WIDGETS[name]
    common = {"tooltip": w.words, "advanced": not w.shown}
    if isinstance(default, bool):
        return io.Boolean.Input(shown_as, default=default, **common)
    if isinstance(default, str):
        return io.Combo.Input(shown_as, options=list(w.options), default=default, **common)
    if isinstance(default, int):
        # the frontend rolls every input called seed after each run, and a run with another seed does not go on
        after = {"control_after_generate": io.ControlAfterGenerate.fixed} if shown_as == "seed" else {}
        return io.Int.Input(shown_as, default=default, min=int(w.low), max=int(w.high), **after, **common)
    return io.Float.Input(shown_as, default=default or 0.0, min=w.low, max=w.high, step=w.step, **common)


def run_folder_inputs(name: str) -> list[Any]:
    """Where a training keeps itself, and whether it goes on there."""
    return [
        io.String.Input("run_name", default=name, tooltip="Name of the folder in output/dmd."),
        io.Combo.Input(
            "resume",
            options=["auto", "new"],
            default="auto",
            tooltip="Auto goes on where the run of that name stopped. New begins a fresh folder (name_2, ...).",
        ),
    ]
