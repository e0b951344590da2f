"""Networks of four families with random weights, at their real sizes and scaled down for a CPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmd_core.backends.nets import call_flux, call_sd3, call_unet
from dmd_core.conditioning import Cond
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.families import Family, by_name


@dataclass(frozen=True, kw_only=True)
class Size:
    family: str
    config: Mapping[str, Any]  # of diffusers' class, beside what LAYOUTS gives
    shape: tuple[int, int, int]  # of a latent
    width: int  # of the text tokens
    tokens: int = 77
    pooled: int | None = None

    @property
    def flow(self) -> bool:
        return self.kind.betas is None

    @property
    def kind(self) -> Family:
        return by_name(self.family)

    @property
    def call(self) -> Callable[[Any, Tensor, Tensor, Cond], Tensor]:
        return LAYOUTS[self.family][1]

    def build(self) -> nn.Module:
        import diffusers

        cls, _, fixed = LAYOUTS[self.family]
        return getattr(diffusers, cls)(**{**fixed, **self.config})

    def net(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.set_default_dtype(dtype)  # a model of 12 billion numbers is never made in fp32 first
            try:
                with torch.device(device):
                    return self.build().eval().requires_grad_(False)
            finally:
                torch.set_default_dtype(torch.float32)

    def denoiser(self, net: nn.Module) -> NetDenoiser:
        dtype = next(net.parameters()).dtype
        prediction = Prediction.FLOW if self.flow else Prediction.EPS
        return NetDenoiser(lambda x, t, c: self.call(net, x, t, c), self.kind.schedule(), prediction, dtype)

    def cond(self, batch: int, device: str = "cpu", seed: int = 0) -> Cond:
        g = torch.Generator().manual_seed(seed)
        extras = {"guidance": torch.full((batch,), 3.5, device=device)} if self.family == "flux" else {}
        if self.family == "sdxl":
            extras["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device).repeat(batch, 1)
        pooled = None if self.pooled is None else torch.randn(batch, self.pooled, generator=g).to(device)
        return Cond(torch.randn(batch, self.tokens, self.width, generator=g).to(device), pooled, extras)


# class of diffusers, how it is called, and what a family's layout is at any size
UNET, SD3, FLUX = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
LAYOUTS: dict[str, tuple[str, Callable[[Any, Tensor, Tensor, Cond], Tensor], dict[str, Any]]] = {
    "sd15": (UNET, call_unet, {}),
    "sdxl": (
        UNET,
        call_unet,
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
        },
    ),
    "sd3": (SD3, call_sd3, {"patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64}),
    "flux": (FLUX, call_flux, {"patch_size": 1, "in_channels": 64, "guidance_embeds": True}),
}


def sizes(*found: Size) -> dict[str, Size]:
    return {size.family: size for size in found}


REAL = sizes(
    Size(
        family="sd15",
        config={"cross_attention_dim": 768, "attention_head_dim": 8},
        shape=(4, 64, 64),
        width=768,
    ),
    Size(
        family="sdxl",
        config={
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        shape=(4, 128, 128),
        width=2048,
        pooled=1280,
    ),
    Size(
        family="sd3",
        config={
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        shape=(16, 128, 128),
        width=4096,
        tokens=333,
        pooled=2048,
    ),
    Size(
        family="flux",
        config={"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24},
        shape=(16, 128, 128),
        width=4096,
        tokens=512,
        pooled=768,
    ),
)
SMALL = sizes(
    Size(
        family="sd15",
        config={
            "block_out_channels": (64, 128, 256, 256),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "cross_attention_dim": 128,
        },
        shape=(4, 16, 16),
        width=128,
    ),
    Size(
        family="sdxl",
        config={
            "block_out_channels": (64, 128, 256),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 4),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 256,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 32 + 128,
        },
        shape=(4, 16, 16),
        width=256,
        pooled=128,
    ),
    Size(
        family="sd3",
        config={
            "sample_size": 32,
            "num_layers": 5,
            "num_attention_heads": 6,
            "joint_attention_dim": 256,
            "caption_projection_dim": 384,
            "pooled_projection_dim": 128,
            "pos_embed_max_size": 32,
        },
        shape=(16, 16, 16),
        width=256,
        pooled=128,
    ),
    Size(
        family="flux",
        config={
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 64,
            "num_attention_heads": 6,
            "axes_dims_rope": (8, 28, 28),
            "joint_attention_dim": 256,
            "pooled_projection_dim": 128,
        },
        shape=(16, 16, 16),
        width=256,
        pooled=128,
    ),
)
# for dry runs: the smallest that these classes are, in a second or two
TINY = sizes(
    Size(
        family="sd15",
        config={
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        shape=(4, 8, 8),
        width=16,
    ),
    Size(
        family="sdxl",
        config={
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        shape=(4, 8, 8),
        width=16,
        pooled=16,
    ),
    Size(
        family="sd3",
        config={
            "sample_size": 8,
            "num_layers": 1,
            "num_attention_heads": 1,
            "joint_attention_dim": 16,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
        },
        shape=(16, 8, 8),
        width=16,
        pooled=16,
    ),
    Size(
        family="flux",
        config={
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 1,
            "axes_dims_rope": (4, 6, 6),
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
        },
        shape=(16, 8, 8),
        width=16,
        pooled=16,
    ),
)
