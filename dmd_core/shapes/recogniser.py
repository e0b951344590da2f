"""Reads a picture's factors back: the world's measure. Frozen before the teacher is trained, never in a loss."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .world import CANVAS, COLOURS, ROUND, SHAPES, TEXTURES, TILT, Scene

FEATURES = 64
# head -> number of classes
CLASSES = {
    "count": 2,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "shape2": len(SHAPES),
    "colour2": len(COLOURS),
}
# continuous outputs -> what one unit of the raw output means
UNITS = {"radius": 0.5, "x": 0.42, "y": 0.42, "angle": TILT, "light": 1.0, "radius2": 0.5, "x2": 0.42, "y2": 0.42}


class Recogniser(nn.Module):
    """A small convolutional net; pictures of other sizes are resized to the canvas."""

    def __init__(self) -> None:
        super().__init__()

        def layer(before: int, after: int, stride: int = 2) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]

        self.body = nn.Sequential(*layer(3, 32), *layer(32, 64), *layer(64, 96, stride=1), *layer(96, 128))
        # positions matter, so the last map is flattened, not averaged
        self.neck = nn.Sequential(nn.Conv2d(128, 32, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 64, FEATURES))
        self.heads = nn.Linear(FEATURES, sum(CLASSES.values()) + len(UNITS))

    def features(self, images: Tensor) -> Tensor:
        """[b 3 h w] in -1..1 -> [b 64]"""
        if images.shape[-2:] != (CANVAS, CANVAS):
            images = F.interpolate(images, (CANVAS, CANVAS), mode="bilinear", antialias=True)
        return self.neck(self.body(images.clamp(-1, 1).contiguous(memory_format=torch.channels_last)))

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Class logits [b k] and continuous factors [b], per name."""
        out = self.heads(F.silu(self.features(images))).float()
        parts = out.split([*CLASSES.values(), len(UNITS)], dim=1)
        continuous = {k: parts[-1][:, i] * unit for i, (k, unit) in enumerate(UNITS.items())}
        return dict(zip(CLASSES, parts, strict=False)), continuous

    @torch.no_grad()
    def read(self, images: Tensor) -> Scene:
        logits, values = self(images)
        best = {k: v.argmax(1) for k, v in logits.items()}

        def slots(name: str) -> Tensor:
            source = best if name in best else values
            return torch.stack([source[name], source.get(name + "2", torch.zeros_like(source[name]))], 1)

        return Scene(
            count=best["count"] + 1,
            light=values["light"],
            **{k: slots(k) for k in ("shape", "colour", "texture", "radius", "x", "y", "angle")},
        )

    def loss(self, images: Tensor, scene: Scene) -> Tensor:
        logits, values = self(images)
        two, first = scene.count == 2, torch.ones(len(scene), dtype=torch.bool)
        turned = ~torch.isin(scene.shape[:, 0], torch.tensor(ROUND)) | (scene.texture[:, 0] == 1)
        total = F.cross_entropy(logits["count"], scene.count - 1)
        for name in ("shape", "colour", "texture", "shape2", "colour2"):
            slot = int(name.endswith("2"))
            target = getattr(scene, name.removesuffix("2"))[:, slot]
            error = F.cross_entropy(logits[name], target, reduction="none")
            total = total + (error * (two if slot else first)).mean()
        for name, unit in UNITS.items():
            slot = int(name.endswith("2"))
            target = scene.light if name == "light" else getattr(scene, name.removesuffix("2"))[:, slot]
            counts = two if slot else turned if name == "angle" else first
            total = total + 2 * (((values[name] - target) / unit).square() * counts).mean()
        return total


def from_state(state: Mapping[str, Tensor]) -> Recogniser:
    model = Recogniser()
    model.load_state_dict({k: v.float() for k, v in state.items()})
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)
