"""Eight rows of sliders on one MODEL: which, how strong, at which steps."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sd
import torch
from comfy_api.latest import io, ui

from ..dmd_core.sliders.card import describe
from .slider_files import NONE, Slider, SliderSet, choices, fitting, slider_of, state_of
from .slider_timing import LAST_STEP, Span, Timed, with_hooks

ROWS = 8
WEIGHTS, RUNNING = "in the weights", "while sampling"
OFF = "No slider is active: the model is what it was."
SMALL = 1e-3  # a strength that no widget can mean
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row:
    number: int
    slider: Slider
    strength: float  # what is applied, master strength included
    span: Span


def rows_of(
    given: Mapping[str, Any], sliders: Sequence[Slider] | None, master: float, randomise: float, seed: int
) -> list[Row]:
    """The rows that do something. Every row has its own draw: switching one off leaves the others as they are."""
    draws = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = []
    for i in range(1, ROWS + 1):
        choice, strength = given.get(f"slider_{i}", NONE), given.get(f"strength_{i}", 0.0)
        if choice == NONE or not given.get(f"on_{i}", True) or (strength == 0 and not randomise) or master == 0:
            continue
        span = Span(
            start=given.get(f"start_{i}", 0.0),
            end=given.get(f"end_{i}", 1.0),
            first=given.get(f"start_step_{i}", 0),
            last=given.get(f"end_step_{i}", LAST_STEP),
        )
        if span.empty:
            raise ValueError(
                f"row {i} starts at {span.start:g} (step {span.first}) and ends at {span.end:g} (step {span.last}); "
                "let it end after it starts"
            )
        slider = slider_of(choice, sliders)
        if randomise:
            low, high = slider.usable
            strength = randomise * (low + (high - low) * draws[i - 1])
        rows.append(Row(number=i, slider=slider, strength=master * strength, span=span))
    return rows


def mixed(model: Any, rows: Sequence[Row], how: str) -> tuple[Any, list[str]]:
    """The MODEL with the rows on it, and a sentence for each."""
    if how not in (WEIGHTS, RUNNING):
        raise ValueError(f"apply is {how!r}; use {WEIGHTS!r} or {RUNNING!r}")
    said, timed, base = [], [], model
    for row in rows:
        slider, notes = fitting(base, row.slider)
        if how == WEIGHTS and row.span.whole:
            model, _ = comfy.sd.load_lora_for_models(
                model, None, slider.tensors, row.strength, 0.0, lora_metadata=slider.metadata
            )
        else:
            timed.append(Timed(state=state(base, row), strength=row.strength, span=row.span))
        said += [line(row), *(warning(row, n) for n in notes), *warnings(row)]
    if timed:
        model = with_hooks(model, timed)
    if how == WEIGHTS and len(timed) < len(rows) and quantised(base):
        said.append(f"Warning: the weights are fp8, which rounds small changes away; set apply to {RUNNING!r}")
    return model, said


def state(model: Any, row: Row) -> dict[str, torch.Tensor]:
    try:
        return state_of(model, row.slider)
    except ValueError as error:
        raise ValueError(
            f"row {row.number} cannot work at some steps only: {error}. From 0 to 1, all steps and in the weights "
            "any LoRA works that ComfyUI loads"
        ) from error


def line(row: Row) -> str:
    when = f", {row.span.words()}" if not row.span.whole else ""
    return f"{row.number}. {row.slider.name} {row.strength:+.3g}{when}: {row.slider.about()}"


def warnings(row: Row) -> list[str]:
    found = []
    if row.slider.beyond(row.strength):
        usable = describe(row.slider.usable)
        found.append(warning(row, f"strength {row.strength:+.3g} is outside of the measured range, {usable}"))
    if row.slider.card is not None and row.slider.card.warning:
        found.append(warning(row, row.slider.card.warning))
    return found


def warning(row: Row, text: str) -> str:
    log.warning("%s: %s", row.slider.name, text)
    return f"Warning, row {row.number}: {text}"


def quantised(model: Any) -> bool:
    return any("float8" in str(p.dtype) for p in model.model.diffusion_model.parameters())


def row_inputs(i: int) -> list[Any]:
    share: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001, "advanced": True}
    step: dict[str, Any] = {"min": 0, "max": LAST_STEP, "advanced": True}
    return [
        io.Combo.Input(
            f"slider_{i}",
            options=choices(),
            default=NONE,
            tooltip="A slider file, any LoRA, or an entry of the connected slider set. None leaves the row out.",
        ),
        io.Boolean.Input(f"on_{i}", default=True, tooltip="Off: the row does nothing and keeps its settings."),
        io.Float.Input(
            f"strength_{i}",
            default=0.0,
            min=-3.0,
            max=3.0,
            step=0.05,
            round=0.001,
            display_mode=io.NumberDisplay.slider,
            tooltip="0 is off, negative is the other way. For sliders of this pack 1 is one standard deviation of what "
            "the model varies in by itself; the text below says how far each was measured.",
        ),
        io.Float.Input(
            f"start_{i}",
            default=0.0,
            tooltip="Share of the sampling before which it is off. 0.3 leaves the composition alone.",
            **share,
        ),
        io.Float.Input(
            f"end_{i}", default=1.0, tooltip="Share of the sampling from which on it is off again.", **share
        ),
        io.Int.Input(
            f"start_step_{i}",
            default=0,
            tooltip="First step at which it works, counted from 0. Few-step models: clearer than a share.",
            **step,
        ),
        io.Int.Input(
            f"end_step_{i}", default=LAST_STEP, tooltip="First step at which it does not work any more.", **step
        ),
    ]


class MixSliders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_MixSliders",
            display_name="Mix Sliders",
            category="DMD/sliders",
            description="Up to eight sliders or LoRAs at once, each with a real slider, for all steps or some of them. "
            "Nodes in a row add up. The text says what is known of each: its measured range, a wrong base, or that "
            "nobody measured it.",
            search_aliases=["slider", "lora stack", "concept slider", "power lora loader", "random lora", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the sliders were made for, or a relative of it."),
                SliderSet.Input(
                    "sliders",
                    optional=True,
                    tooltip="From Train Slider or Discover Sliders: choose set 1, set 2, ... in the rows.",
                ),
                io.Float.Input(
                    "master",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Multiplies the strength of every row. 0 turns all of them off.",
                ),
                *(w for i in range(1, ROWS + 1) for w in row_inputs(i)),
                io.Float.Input(
                    "randomise",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Above 0 every row that is on gets a random strength instead of its own: within this share "
                    "of its measured range, or of -1 to 1 where nobody measured it.",
                    advanced=True,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the random strengths.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "apply",
                    options=[WEIGHTS, RUNNING],
                    default=WEIGHTS,
                    tooltip="In the weights costs nothing while sampling and equals stock LoRA loaders. While sampling "
                    "is exact on fp8 models and changes faster. Rows that do not work at all steps always run while "
                    "sampling.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the sliders on it; unchanged where none is active."),
                io.String.Output(
                    "report", display_name="report", tooltip="What is applied, measured ranges and warnings."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        sliders: Sequence[Slider] | None = None,
        master: float = 1.0,
        randomise: float = 0.0,
        seed: int = 0,
        apply: str = WEIGHTS,
        **rows: Any,
    ) -> io.NodeOutput:
        chosen = [r for r in rows_of(rows, sliders, master, randomise, seed) if abs(r.strength) >= SMALL]
        if not chosen:
            return io.NodeOutput(model, OFF, ui=ui.PreviewText(OFF))
        model, said = mixed(model, chosen, apply)
        report = "\n".join(said)
        return io.NodeOutput(model, report, ui=ui.PreviewText(report))
