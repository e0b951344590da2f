"""Networks of four families with random weights, at their real sizes and scaled down for a CPU."""

from collections.abc import Callable
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
    build: Callable[[], nn.Module]
    call: Callable[[Any, Tensor, Tensor, Cond], Tensor]
    shape: tuple[int, int, int]  # of a latent
    width: int  # of the text tokens
    tokens: int
    pooled: int | None = None

    @property
    def flow(self) -> bool:
        return self.kind.betas is None

    @property
    def kind(self) -> Family:
        return by_name(self.family)

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


def unet(**config: Any) -> nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(**config)


def xl(**config: Any) -> nn.Module:
    defaults = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
    }
    return unet(**{**defaults, **config})


def sd3(**config: Any) -> nn.Module:
    import diffusers

    return diffusers.SD3Transformer2DModel(patch_size=2, in_channels=16, out_channels=16, **config)


def flux(**config: Any) -> nn.Module:
    import diffusers

    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=64, guidance_embeds=True, **config)


REAL = {
    "sd15": Size(
        family="sd15",
        build=lambda: unet(cross_attention_dim=768, attention_head_dim=8),
        call=call_unet,
        shape=(4, 64, 64),
        width=768,
        tokens=77,
    ),
    "sdxl": Size(
        family="sdxl",
        build=lambda: xl(
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        call=call_unet,
        shape=(4, 128, 128),
        width=2048,
        tokens=77,
        pooled=1280,
    ),
    "sd3": Size(
        family="sd3",
        build=lambda: sd3(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        ),
        call=call_sd3,
        shape=(16, 128, 128),
        width=4096,
        tokens=333,
        pooled=2048,
    ),
    "flux": Size(
        family="flux",
        build=lambda: flux(num_layers=19, num_single_layers=38, num_attention_heads=24),
        call=call_flux,
        shape=(16, 128, 128),
        width=4096,
        tokens=512,
        pooled=768,
    ),
}
SMALL = {
    "sd15": Size(
        family="sd15",
        build=lambda: unet(
            block_out_channels=(64, 128, 256, 256),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=128,
        ),
        call=call_unet,
        shape=(4, 16, 16),
        width=128,
        tokens=77,
    ),
    "sdxl": Size(
        family="sdxl",
        build=lambda: xl(
            block_out_channels=(64, 128, 256),
            layers_per_block=1,
            transformer_layers_per_block=(1, 1, 4),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=256,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + 128,
        ),
        call=call_unet,
        shape=(4, 16, 16),
        width=256,
        tokens=77,
        pooled=128,
    ),
    "sd3": Size(
        family="sd3",
        build=lambda: sd3(
            sample_size=32,
            num_layers=5,
            num_attention_heads=6,
            attention_head_dim=64,
            joint_attention_dim=256,
            caption_projection_dim=384,
            pooled_projection_dim=128,
            pos_embed_max_size=32,
        ),
        call=call_sd3,
        shape=(16, 16, 16),
        width=256,
        tokens=77,
        pooled=128,
    ),
    "flux": Size(
        family="flux",
        build=lambda: flux(
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=6,
            axes_dims_rope=(8, 28, 28),
            joint_attention_dim=256,
            pooled_projection_dim=128,
        ),
        call=call_flux,
        shape=(16, 16, 16),
        width=256,
        tokens=77,
        pooled=128,
    ),
}
