"""The embedded demo model as MODEL, CLIP and VAE: nothing to download."""

from types import SimpleNamespace

import comfy.sd
import comfy.sd1_clip
import comfy.utils
import torch
from comfy_api.latest import io

from ..dmd_core import shapes

FILES = {
    "student, 4 steps": "shapes_student_4.safetensors",
    "student, 1 step": "shapes_student_1.safetensors",
}
# a student is offered once its file is there
STUDENTS = {label: name for label, name in FILES.items() if (shapes.WEIGHTS / name).is_file()}


class ShapesTokenizer:
    """Stands where ComfyUI's tokenizers stand; weights like (red:1.2) are read over."""

    def __init__(self, **_options):
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options):
        plain = "".join(part for part, _weight in comfy.sd1_clip.token_weights(text, 1.0))
        return {"shapes": shapes.text.tokenize([plain])}

    def untokenize(self, tokens):
        return [(i, shapes.text.VOCABULARY[i]) for i in tokens]


class ShapesTextEncoder(torch.nn.Module):
    """The tiny text encoder behind the members that comfy.sd.CLIP calls."""

    def __init__(self, **_options):
        super().__init__()
        self.encoder = shapes.load_text_encoder()
        self.dtypes = {torch.float32}

    def encode_token_weights(self, tokens):
        return self.encoder(tokens["shapes"].to(self.encoder.position.device))

    def set_clip_options(self, _options):
        pass

    def reset_clip_options(self):
        pass

    def load_sd(self, sd):
        return self.encoder.load_state_dict(sd, strict=False)

    def get_sd(self):
        return self.encoder.state_dict()


def load_clip() -> comfy.sd.CLIP:
    target = SimpleNamespace(params={}, clip=ShapesTextEncoder, tokenizer=ShapesTokenizer)
    return comfy.sd.CLIP(target, parameters=0)


def load_model(student: str | None):
    model = comfy.sd.load_diffusion_model(str(shapes.TEACHER))
    if student is None:
        return model
    lora, metadata = comfy.utils.load_torch_file(str(shapes.WEIGHTS / student), safe_load=True, return_metadata=True)
    metadata = {**metadata, "modelspec.title": "shapes student"}  # beside its teacher in a grid
    model, _clip = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0, lora_metadata=metadata)
    return model


class LoadShapes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_LoadShapes",
            display_name="Load Shapes (embedded demo)",
            category="DMD/load",
            description="A small text-to-image model of coloured shapes that comes with the pack. "
            "The teacher wants 40 steps at cfg 2; a student wants its own number of steps at cfg 1.",
            search_aliases=["demo", "toy model", "tiny model", "shapes", "dmd", "distill"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=["teacher", *STUDENTS],
                    default="teacher",
                    tooltip="The slow teacher, or a student that was distilled from it with DMD2.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The teacher, or the student with its recipe on it."),
                io.Clip.Output(tooltip="Reads prompts such as: a large red circle top left"),
                io.Vae.Output(tooltip="Turns its latents into pictures."),
            ],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(shapes.AUTOENCODER), safe_load=True))
        return io.NodeOutput(load_model(STUDENTS.get(model)), load_clip(), vae)
