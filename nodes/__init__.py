"""The nodes: thin, V3, and the only place that imports comfy."""

import comfy.model_management
from comfy_api.latest import ComfyAPI, ComfyExtension, io

from ..dmd_core import cancel
from .discover_sliders import DiscoverSliders
from .distill import Distill
from .doctor import Doctor
from .encode_prompts import EncodePrompts
from .few_step import FewStep, FewStepSampler
from .grid import Grid
from .inpaint import CompositeInpaint, Inpaint, LazyInpaint, PrepareInpaint
from .inspect_run import InspectRun
from .instant_slider import InstantSlider
from .load_shapes import LoadShapes
from .mix_sliders import MixSliders
from .negative_guidance import NegativeGuidance
from .save import Save
from .switch_models import SwitchModels
from .train_slider import TrainSlider
from .variety import Variety

NODES: list[type[io.ComfyNode]] = [
    LoadShapes,
    EncodePrompts,
    Distill,
    Save,
    InspectRun,
    TrainSlider,
    DiscoverSliders,
    InstantSlider,
    MixSliders,
    FewStep,
    FewStepSampler,
    SwitchModels,
    NegativeGuidance,
    Variety,
    Grid,
    PrepareInpaint,
    LazyInpaint,
    CompositeInpaint,
    Inpaint,
    Doctor,
]

# by its name at each call: ComfyUI's question is what the host has then
cancel.ask = lambda: comfy.model_management.throw_exception_if_processing_interrupted()

# Node ids are permanent. Should one ever change, it is listed here and its old id goes on working. None has changed
# yet; tests/test_shipped.py fails when an id, an input or an output disappears.
RENAMED: list[io.NodeReplace] = []


class DMDExtension(ComfyExtension):
    async def on_load(self) -> None:
        for old in RENAMED:
            await ComfyAPI().node_replacement.register(old)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DMDExtension:
    return DMDExtension()
