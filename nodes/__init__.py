"""The nodes: thin, V3, and the only place that imports comfy."""

from comfy_api.latest import ComfyExtension, io

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


# Node ids are permanent. Should one ever change, its old id goes on working by
# `await ComfyAPI().node_replacement.register(io.NodeReplace(...))` in this class's on_load. None has changed yet, so
# nothing is registered; tests/test_comfy_schemas.py fails when an id or an input disappears.
class DMDExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DMDExtension:
    return DMDExtension()
