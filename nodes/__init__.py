"""The nodes: thin, V3, and the only place that imports comfy."""

from comfy_api.latest import ComfyExtension, io

from .load_shapes import LoadShapes


class DMDExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadShapes]


async def comfy_entrypoint() -> DMDExtension:
    return DMDExtension()
