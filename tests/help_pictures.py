"""Draws the pictures of the help that show the shipped student, from the nodes themselves at their defaults.

    python tests/help_pictures.py      rewrites nodes/web/docs/variety.jpg, negative_guidance.jpg and grid.jpg

Look at them before they are committed, and at the words below them.
"""

import sys
from typing import Any

import comfy_host
from PIL import Image

HELP = comfy_host.PACK / "nodes" / "web" / "docs"
WIDTH, GAP = 560, 3  # pixels
PROMPT = "a star on dark"
SEEDS = range(6)


def main() -> None:
    if not comfy_host.in_comfy():
        done = comfy_host.run_in_comfy([__file__])
        sys.exit(done.stdout + (done.stderr if done.returncode else ""))
    comfy_host.start_comfy("--use-pytorch-cross-attention")
    import torch

    student, clip, vae = node("load_shapes", "LoadShapes").execute("student, 4 steps").result
    with torch.inference_mode():
        prompt, red = ([[*entry] for entry in encoded(clip, text)] for text in (PROMPT, "red"))
        plain = drawn(student, prompt, vae)
        varied = node("variety", "Variety").execute(student, strength=1.0).result[0]
        away = node("negative_guidance", "NegativeGuidance").execute(student, red).result[0]
        keep("variety", rows(plain, drawn(varied, prompt, vae)))
        keep("negative_guidance", rows(plain, drawn(away, prompt, vae)))
        teacher = node("load_shapes", "LoadShapes").execute("teacher").result[0]
        keep("grid", grid(teacher, student, clip, vae))


def keep(name: str, picture: Image.Image) -> None:
    path = HELP / f"{name}.jpg"
    picture.save(path, quality=85)
    print(f"{path.name}: {path.stat().st_size // 1024} KB")


def grid(teacher: Any, student: Any, clip: Any, vae: Any) -> Image.Image:
    import torch

    given = [teacher, *(encoded(clip, text) for text in ("a large red star on light", "")), vae]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    (image,) = node("grid", "Grid").execute(*given, latent, steps="40, 4", cfg=2.0, cell=96, model_2=student).result[0]
    return Image.fromarray((image.clamp(0, 1) * 255).byte().cpu().numpy())


def node(file: str, name: str) -> Any:
    return getattr(comfy_host.pack_module(f"nodes.{file}"), name)


def encoded(clip: Any, text: str) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def drawn(model: Any, prompt: Any, vae: Any) -> list[Image.Image]:
    """One picture a seed, as Few-Step Sampler draws them."""
    import torch

    sampler, pictures = node("few_step", "FewStepSampler"), []
    for seed in SEEDS:
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        (image,) = vae.decode(sampler.execute(model, prompt, latent, seed).result[0]["samples"])
        pictures.append(Image.fromarray((image.clamp(0, 1) * 255).byte().cpu().numpy()))
    return pictures


def rows(*lines: list[Image.Image]) -> Image.Image:
    side = (WIDTH + GAP) // len(lines[0]) - GAP
    page = Image.new("RGB", (len(lines[0]) * (side + GAP) - GAP, len(lines) * (side + GAP) - GAP), "white")
    for y, line in enumerate(lines):
        for x, picture in enumerate(line):
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x * (side + GAP), y * (side + GAP)))
    return page


if __name__ == "__main__":
    main()
