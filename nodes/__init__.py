"""The nodes: thin, V3, and the only place that imports comfy."""

from comfy_api.latest import ComfyExtension, io

from .distill import Distill
from .doctor import Doctor
from .encode_prompts import EncodePrompts
from .few_step import FewStep, FewStepSampler
from .grid import Grid
from .inpaint import CompositeInpaint, Inpaint, LazyInpaint, PrepareInpaint
from .inspect_run import InspectRun
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


class DMDExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DMDExtension:
    return DMDExtension()
