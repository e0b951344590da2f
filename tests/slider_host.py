"""A text encoder and a VAE for the tiny models, and all inputs of a slider's node at their defaults, but small."""

import zlib

import comfy_tiny
import torch


class FakeClip:
    """Every text has its own random tokens; equal texts have equal ones."""

    def __init__(self, name):
        self.name = name

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        return comfy_tiny.conditioning(self.name, zlib.crc32(text.encode()) % 10_000)


class FakeVAE:
    """Pictures are the first three channels, eight pixels a cell."""

    def __init__(self, channels):
        self.channels = channels

    def encode(self, pictures):
        small = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8)
        return small.repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels]

    def decode(self, samples):
        return samples[:, :3].sigmoid().repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)


WORDS = {
    "made_from": "words",
    "neutral": "a dog",
    "positive": "a big dog",
    "negative": "a small dog",
    "attributes": "",
    "keep": "",
}


def inputs(node, name, **changes):
    found = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    small = {
        "model": comfy_tiny.patcher(name),
        "clip": FakeClip(name),
        "run_name": "run",
        **{"steps": 10, "size": 128, "batch": 2, "pool": 12, "seeds": 4, "sample_steps": 2, "cfg": 1.0},
        **{"lr": 1e-2, "rank": 2, "at_once": 8, "preview_every": 0},
    }
    return found | {k: v for k, v in small.items() if k in found or k in ("model", "clip")} | changes
