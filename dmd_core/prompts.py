"""Prompts from text or a file, encoded once and kept on disk, so that the text encoder can leave the device."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .conditioning import Cond, cat
from .trainstate import digest, save_atomic

MASK = "mask"  # the extra that says which tokens are real
AT_ONCE = 64
SAMPLED = 4096  # bytes at both ends of a weight that go into a text encoder's fingerprint
VERSION = 1

Encode = Callable[[Sequence[str]], Cond]


def parse_prompts(text: str) -> list[str]:
    """One prompt per line; empty lines and lines that begin with # are left out, so are repetitions."""
    lines = [line.strip() for line in text.lstrip("\ufeff").replace("\r", "\n").split("\n")]
    found = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise ValueError(
            f"no prompts in {len(lines)} lines; write one prompt per line (empty lines and lines with # do not count), "
            "a few hundred are good"
        )
    bad = next((p for p in found if any(ord(c) < 32 and c != "\t" for c in p)), None)
    if bad is not None:
        raise ValueError(f"the prompt {bad[:40]!r} holds control characters; is this a text file?")
    return found


def read_prompts(path: Path) -> list[str]:
    try:
        return parse_prompts(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 text (line {line}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(
            f"the prompts file {path} cannot be read ({error}); give a text file, one prompt per line"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fingerprint(modules: Iterable[nn.Module], *settings: Any) -> str:
    """Of text encoders: names, shapes and both ends of every weight, for a whole T5 would take half a minute."""
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in modules:
        for name, value in module.state_dict().items():
            raw = value.detach().reshape(-1)
            count = max(1, SAMPLED // raw.element_size())
            sha.update(f"{type(module).__name__}.{name}{tuple(value.shape)}{value.dtype}".encode())
            for end in (raw[:count], raw[-count:]):
                sha.update(end.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class PromptCache:
    """Encoded prompts in a folder: a file per prompt, fp16, cut to its true length, named by encoder and text."""

    def __init__(self, folder: Path, encoder: str):
        self.folder, self.encoder = folder, encoder

    def path(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{VERSION}\n{self.encoder}\n{prompt}".encode()).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}.safetensors"

    def missing(self, prompts: Sequence[str]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if self.read(p) is None]

    def fill(self, prompts: Sequence[str], encode: Encode, say: Callable[[str], None] = lambda line: None) -> None:
        """Encodes what is not there yet; an interrupted one goes on."""
        wanted = self.missing(prompts)
        for i in range(0, len(wanted), AT_ONCE):
            part = wanted[i : i + AT_ONCE]
            with torch.no_grad():
                cond = encode(part)
            if len(cond) != len(part):
                raise ValueError(
                    f"the text encoder gave {len(cond)} rows for {len(part)} prompts; it must give one each"
                )
            for j, prompt in enumerate(part):
                self.write(prompt, cond.take(slice(j, j + 1)))
            say(f"prompts encoded: {i + len(part)} of {len(wanted)}")

    def encode(
        self, prompts: Sequence[str], encode: Encode | None = None, say: Callable[[str], None] = lambda line: None
    ) -> Cond:
        """All of them as one batch, in fp32; `encode` is asked only for those that are not on disk."""
        if not prompts:
            raise ValueError("no prompts were given; give at least one ('' is a valid prompt)")
        if encode is not None:
            self.fill(prompts, encode, say)
        rows = [self.read(p) for p in prompts]
        lost = [p for p, row in zip(prompts, rows, strict=True) if row is None]
        if lost:
            raise ValueError(
                f"{len(lost)} prompts are not in the cache {self.folder}, such as {lost[0]!r}; encode them first"
            )
        return cat([row for row in rows if row is not None])

    def write(self, prompt: str, cond: Cond) -> None:
        cond = true_length(cond)
        tensors = {"cross": compact(cond.cross), **{f"extras.{k}": v for k, v in cond.extras.items()}}
        if cond.pooled is not None:
            tensors["pooled"] = compact(cond.pooled)
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_atomic(tensors, self.path(prompt), {"dmd_prompt": json.dumps({"text": prompt, "digest": digest(tensors)})})

    def read(self, prompt: str) -> Cond | None:
        """None where it is missing, damaged, or another prompt's."""
        try:
            with safe_open(self.path(prompt), "pt") as file:
                header = json.loads((file.metadata() or {})["dmd_prompt"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
            if header["text"] != prompt or header["digest"] != digest(tensors):
                return None
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            return None
        pooled = tensors["pooled"].float() if "pooled" in tensors else None
        return Cond(tensors["cross"].float(), pooled, extras_of(tensors))


def extras_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("extras."): v for k, v in tensors.items() if k.startswith("extras.")}


def compact(value: Tensor) -> Tensor:
    """fp16, unless that overflows."""
    half = value.to(torch.float16)
    return half if half.isfinite().all() else value.float()


def true_length(cond: Cond) -> Cond:
    """Without the padding behind a prompt: what its mask leaves out, or else rows of zeros. [1 n d]"""
    used = cond.extras[MASK][0] != 0 if MASK in cond.extras else (cond.cross[0] != 0).any(-1)
    length = max(1, int(used.nonzero().max()) + 1 if used.any() else 1)
    extras = {k: v[:, :length] if k == MASK else v for k, v in cond.extras.items()}
    return Cond(cond.cross[:, :length], cond.pooled, extras)
