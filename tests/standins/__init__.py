"""A pack for tests alone: loaders that give tiny random models where a graph names files nobody has here.

The server of tests/comfy_server.py loads it beside the real pack. At its start it also writes small LoRA files under
the names that the graphs use, so that the stock LoRA loader stays in the graph.
"""

import os
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.utils
import comfy_tiny
import folder_paths
import safetensors.torch
import torch
import torch.nn.functional as F
from comfy_api.latest import ComfyExtension, io
from einops import rearrange, repeat

TEXT_TOKENS = 20
# LoRA files of the graphs -> family whose layers they hold; PEFT keys as their authors wrote them, kohya for UNets
LORAS = {
    "dmd2_sdxl_4step_lora_fp16.safetensors": "sdxl",
    "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors": "qwen_image",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "wan",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors": "wan",
}


def tiny_model(family: str, file: str) -> Any:
    """MODEL of a family that says it came from a file of that name, as stock loaders note it."""
    seed = zlib.crc32(file.encode()) % 1000
    model = comfy_tiny.patcher(family, seed)

    def again(_path: str, **_options: Any) -> Any:
        return comfy_tiny.patcher(family, seed)

    model.cached_patcher_init = (again, (f"nowhere/{file}",))
    return model


class TinyTokenizer:
    def __init__(self, **_options: Any):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options: Any) -> dict[str, str]:
        return {"text": text}


def tiny_clip(family: str) -> Any:
    """A CLIP whose encoding of a text is noise that the text decides; as wide as the family wants it."""
    tiny = comfy_tiny.FAMILIES[family]

    class TinyTextEncoder(torch.nn.Module):
        def __init__(self, **_options: Any):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.dtypes = {torch.float32}

        def encode_token_weights(self, tokens: dict[str, str]) -> tuple[Any, ...]:
            rng = torch.Generator().manual_seed(zlib.crc32(tokens["text"].encode()))
            cond = torch.randn(1, TEXT_TOKENS, tiny.context, generator=rng)
            pooled = torch.randn(1, tiny.pooled, generator=rng) if tiny.pooled else None
            mask = {"attention_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.long)} if tiny.mask else {}
            return cond, pooled, mask

        def set_clip_options(self, _options: Any) -> None:
            pass

        def reset_clip_options(self) -> None:
            pass

        def get_sd(self) -> dict[str, torch.Tensor]:
            return self.state_dict()

    return comfy.sd.CLIP(SimpleNamespace(params={}, clip=TinyTextEncoder, tokenizer=TinyTokenizer), parameters=0)


class TinyVAE:
    """Averages 8 x 8 pixels into a cell and back; channels and a time axis as the family has them."""

    def __init__(self, family: str):
        self.channels, *rest = comfy_tiny.FAMILIES[family].shape
        self.video = len(rest) == 3
        self.ratio = 16 if family == "flux2" else 8

    def spacial_compression_encode(self) -> int:
        return self.ratio

    spacial_compression_decode = spacial_compression_encode

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        cells = F.avg_pool2d(rearrange(pixels[..., :3], "b h w c -> b c h w") * 2 - 1, self.ratio)
        latent = cells.repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels]
        return latent[:, :, None] if self.video else latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        pixels = torch.sigmoid(latent[:, :3].float())
        frames = repeat(pixels if pixels.ndim == 5 else pixels[:, :, None], "b c t h w -> b t (h p) (w q) c",
                        p=self.ratio, q=self.ratio)  # fmt: skip
        return frames if self.video else frames[:, 0]


def loader(node_id: str, outputs: list[Any], load: Any) -> type[io.ComfyNode]:
    class Standin(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                category="test",
                inputs=[io.String.Input("family"), io.String.Input("file", default="")],
                outputs=outputs,
            )

        @classmethod
        def execute(cls, family: str, file: str = "") -> io.NodeOutput:
            return io.NodeOutput(*load(family, file))

    return Standin


NODES = [
    loader("StandinModel", [io.Model.Output()], lambda family, file: [tiny_model(family, file)]),
    loader("StandinCLIP", [io.Clip.Output()], lambda family, file: [tiny_clip(family)]),
    loader("StandinVAE", [io.Vae.Output()], lambda family, file: [TinyVAE(family)]),
    loader(
        "StandinCheckpoint",
        [io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        lambda family, file: [tiny_model(family, file), tiny_clip(family), TinyVAE(family)],
    ),
]


def lora_tensors(family: str) -> dict[str, torch.Tensor]:
    """Rank 1 on every linear layer, in the family's usual spelling."""
    found = {}
    rng = torch.Generator().manual_seed(1)
    for name, layer in comfy_tiny.FAMILIES[family].build().diffusion_model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        outputs, inputs = layer.weight.shape
        up, down = torch.zeros(outputs, 1), torch.randn(1, inputs, generator=rng)
        up[0] = 0.01
        if family.startswith("sd"):
            key = f"lora_unet_{name.replace('.', '_')}"
            found |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(1.0)}
        else:
            key = f"diffusion_model.{name}"
            found |= {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}
    return found


def write_loras() -> None:
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, family in LORAS.items():
        safetensors.torch.save_file(lora_tensors(family), folder / name)


class Standins(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> Standins:
    if os.environ.get("DMD_STANDINS") == "1":
        write_loras()
    return Standins()
