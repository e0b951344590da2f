"""The nodes: thin, V3, and the only place that imports comfy."""

from comfy_api.latest import ComfyExtension, io

from .doctor import Doctor
from .few_step import FewStep, FewStepSampler
from .grid import Grid
from .load_shapes import LoadShapes
from .negative_guidance import NegativeGuidance
from .switch_models import SwitchModels
from .variety import Variety

NODES: list[type[io.ComfyNode]] = [
    LoadShapes,
    FewStep,
    FewStepSampler,
    SwitchModels,
    NegativeGuidance,
    Variety,
    Grid,
    Doctor,
]


class DMDExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> DMDExtension:
    return DMDExtension()
