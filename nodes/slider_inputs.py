"""The inputs that training and discovering sliders have in common."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..dmd_core.drive import DriveConfig
from ..dmd_core.sliders.settings import SliderSettings
from .config_inputs import widgets
from .distill import PRECISIONS


def settings_of(kind: type[SliderSettings], given: Mapping[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in given.items() if k in names})


def run_inputs(kind: type[SliderSettings]) -> list[Any]:
    """The inputs that training and discovering have in common."""

    def number(name: str, low: int, high: int, words: str, shown: bool = False) -> Any:
        default = getattr(kind, name)
        return io.Int.Input(name, default=default, min=low, max=high, tooltip=words, advanced=not shown)

    each = " of each slider" if kind is not SliderSettings else ""
    return [
        number("steps", 1, 1000000, f"Training steps{each}. A run goes on when more are asked for.", shown=True),
        io.Float.Input(
            "stop_minutes",
            default=DriveConfig.stop_minutes,
            min=0.0,
            max=100000.0,
            step=1.0,
            tooltip="Hands the queue back after that many minutes of training; the next Queue goes on. 0 runs to the "
            "end.",
            advanced=True,
        ),
        io.Vae.Input("vae", optional=True, tooltip="For sharp pictures, and to read image pairs."),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="What looks at the pictures: CLIP, SigLIP or DINOv2. Without it the model's own features do.",
        ),
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=4096,
            step=16,
            tooltip="Pixels, each side. 0: what the family is usually given.",
            advanced=True,
        ),
        number("rank", 1, 128, "Rank of the LoRA. Less drags fewer other things along."),
        *widgets(SliderSettings, ("layers", "seed")),
        number("batch", 1, 64, "Samples per step."),
        io.Float.Input(
            "lr",
            default=0.0,
            min=0.0,
            max=0.1,
            step=1e-6,
            round=False,
            tooltip="Learning rate; 0 takes the method's own.",
            advanced=True,
        ),
        number("pool", 8, 100000, "Pictures of the frozen model to learn from and to measure its own variety with."),
        number(
            "seeds", 4, 256, "Seeds that the unit is found on; range and side effects are measured on as many others."
        ),
        number("sample_steps", 0, 200, "Steps of every picture. 0: a few-step model's own number, else 20."),
        io.Float.Input(
            "cfg",
            default=SliderSettings.cfg,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="CFG of every picture. 0: a few-step model's own, else what the family is usually given.",
            advanced=True,
        ),
        number("at_once", 1, 256, "Pictures in one call of the network, where no gradient is needed."),
        number("preview_every", 0, 100000, "Steps between live strips; 0 shows none."),
        *widgets(DriveConfig, ("save_every",)),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default=PRECISIONS[0],
            advanced=True,
            tooltip="Automatic computes as the model was loaded, but fp16 models in bf16.",
        ),
        io.Boolean.Input(
            "checkpointing",
            default=True,
            advanced=True,
            tooltip="Computes activations twice instead of keeping them: far less memory, a third slower.",
        ),
    ]
