"""ComfyUI-DMD: ComfyUI reads these two names."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "nodes/web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
