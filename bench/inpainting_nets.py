"""The networks of the inpainting tables, of ComfyUI's own classes, random. Import only inside a ComfyUI process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as supported
import comfy_tiny
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class Network:
    build: Callable[[dict[str, Any]], Any]  # from what a config shares: dtype
    context: int
    shape: tuple[int, int, int]
    pooled: int
    text: int
    options: tuple[tuple[str, Any], ...] = ()
    lazy: bool = True  # else it is cropped

    @property
    def tokens(self) -> int:
        return self.shape[1] * self.shape[2] // 4

    def patcher(self, device: torch.device) -> Any:
        """MODEL. What its weights are costs no time, so they are drawn where they stay."""
        with torch.device(device):
            model = self.build({"dtype": torch.float32 if device.type == "cpu" else torch.bfloat16})
        model = model.to(device)
        rng = torch.Generator(device).manual_seed(0)
        for value in (*model.diffusion_model.parameters(), *model.diffusion_model.buffers()):
            if value.is_floating_point():
                value.data.normal_(0, 0.02, generator=rng)
        return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))

    def conditioning(self, seed: int) -> list[Any]:
        rng = torch.Generator().manual_seed(seed)
        options = {**dict(self.options), "pooled_output": torch.randn(1, self.pooled, generator=rng)}
        return [[torch.randn(1, self.text, self.context, generator=rng), options]]


def flux(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda shared: comfy.model_base.Flux(supported.Flux(comfy_tiny.flux_config(**changes, **shared)))


def sd3(depth: int, context: int = 64, adm: int = 32, dual: int = 0, places: int = 96) -> Callable[..., Any]:
    """dual: so many blocks have a second attention, over the picture alone (SD3.5 medium)."""

    def build(shared: dict[str, Any]) -> Any:
        embedder = {"target": "torch.nn.Linear", "params": {"in_features": context, "out_features": 64 * depth}}
        config = {"in_channels": 16, "out_channels": 16, "pos_embed_scaling_factor": None, "depth": depth}
        config |= {"patch_size": 2, "input_size": None, "adm_in_channels": adm, "context_embedder_config": embedder}
        config |= {"num_patches": places**2, "pos_embed_max_size": places, "qk_norm": "rms"}
        return comfy.model_base.SD3(supported.SD3(config | {"x_block_self_attn_layers": [*range(dual)]} | shared))

    return build


def sdxl(shared: dict[str, Any]) -> Any:
    config = {"use_checkpoint": False, "image_size": 32, "out_channels": 4, "use_spatial_transformer": True}
    config |= {"legacy": False, "num_classes": "sequential", "adm_in_channels": 2816, "in_channels": 4}
    config |= {"model_channels": 320, "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10]}
    config |= {"channel_mult": [1, 2, 4], "transformer_depth_middle": 10, "use_linear_in_transformer": True}
    config |= {"context_dim": 2048, "num_head_channels": 64, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    config |= {"use_temporal_attention": False, "use_temporal_resblock": False}
    return comfy.model_base.SDXL(supported.SDXL(config | shared))


def narrow_vae() -> comfy.sd.VAE:
    """SD's layout, 32 channels throughout: beside networks this size a real one would be all of the work."""
    layers = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    layers |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    config = {"params": {"ddconfig": layers, "embed_dim": 16}}
    rng = torch.Generator().manual_seed(0)
    state = AutoencoderKL(**config["params"]).state_dict()
    return comfy.sd.VAE(sd={k: torch.randn(v.shape, generator=rng) * 0.05 for k, v in state.items()}, config=config)


FLUX = {"options": (("guidance", 3.5),)}
SIZE = (("width", 1024), ("height", 1024))
WIDE = {"hidden_size": 384, "num_heads": 3, "depth": 2, "depth_single_blocks": 3}
FULL = {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096}

SIZES: dict[str, dict[str, Network]] = {
    "mid": {
        "Flux, 384 wide, 2 + 3 blocks": Network(
            build=flux(**WIDE), context=64, shape=(16, 128, 128), pooled=32, text=256, **FLUX
        ),
        "SD3, 384 wide, 6 blocks": Network(build=sd3(6), context=64, shape=(16, 128, 128), pooled=32, text=256),
    },
    "wide": {
        "Flux, 512 wide, 4 + 6 blocks": Network(
            build=flux(hidden_size=512, num_heads=4, depth=4, depth_single_blocks=6),
            context=64, shape=(16, 64, 64), pooled=32, text=64, **FLUX,
        ),
    },
    "real": {
        "SD3.5 medium": Network(
            build=sd3(24, 4096, 2048, 13, 384), context=4096, shape=(16, 128, 128), pooled=2048, text=154
        ),
        "SDXL": Network(
            build=sdxl, context=2048, shape=(4, 128, 128), pooled=1280, text=77, options=SIZE, lazy=False
        ),
        "Flux": Network(
            build=flux(**FULL, vec_in_dim=768), context=4096, shape=(16, 128, 128), pooled=768, text=256, **FLUX
        ),
    },
    "tiny": {
        "SD3.5 medium": Network(build=sd3(2, dual=1), context=64, shape=(16, 16, 16), pooled=32, text=8),
        "SDXL": Network(
            build=lambda shared: comfy_tiny.sdxl(), context=48, shape=(4, 64, 64), pooled=1280, text=8, options=SIZE,
            lazy=False,
        ),
        "Flux": Network(build=flux(), context=64, shape=(16, 16, 16), pooled=32, text=8, **FLUX),
    },
}  # fmt: skip
