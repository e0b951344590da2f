"""A ComfyUI MODEL with its encoded prompts, as the engine's runs take a model from anywhere."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_sampling
import latent_preview
import numpy
import torch
from comfy.weight_adapter import WeightAdapterBase
from einops import rearrange
from torch import Tensor

from ..dmd_core import shapes
from ..dmd_core.conditioning import Cond, cat
from ..dmd_core.denoiser import Prediction
from ..dmd_core.families import Family
from ..dmd_core.headless import Job
from ..dmd_core.plan import Plan
from ..dmd_core.runfile import RunFile
from ..dmd_core.runs import Run
from ..dmd_core.schedule import Discrete, Flow, Schedule
from ..dmd_core.sources import SHAPES_SIZE, Source
from ..dmd_core.trainstate import config_hash
from ..dmd_core.weights.recipe import Recipe
from .comfy_conds import conds_from, own
from .comfy_denoiser import ComfyDenoiser
from .comfy_partial import partial_of
from .slider_files import identity

log = logging.getLogger(__name__)
TEXT = "dmd_prompt"  # the prompt itself, among the options of a CONDITIONING entry
LATENT = "dmd_latent"  # its picture, as the VAE gives it [1 ...], beside it
SIZES = {"sd15": 512, "sd2": 768}  # pixels; all later families: 1024
# specific before broad: V_PREDICTION and X0 are EPS too
PREDICTIONS = (
    (comfy.model_sampling.EDM, Prediction.EDM),
    (comfy.model_sampling.V_PREDICTION, Prediction.V),
    (comfy.model_sampling.X0, Prediction.X0),
    (comfy.model_sampling.CONST, Prediction.FLOW),
)


class NativeTeacher(ComfyDenoiser):
    @property
    def prediction(self) -> Prediction:
        kind = type(self.patcher.get_model_object("model_sampling"))
        return next((p for cls, p in PREDICTIONS if issubclass(kind, cls)), Prediction.EPS)


def native_source(
    teacher: NativeTeacher, family: Family, size: tuple[int, int], texts: list[str], vae: Any = None
) -> Source:
    """size: width and height of a picture."""
    return Source(
        net=teacher.net,
        denoiser=teacher,  # type: ignore[arg-type]
        family=family,
        shape=teacher.latent_shape(*size),  # type: ignore[arg-type]
        device=teacher.device,
        encoder=hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        encode=lambda prompts: refuse_to_encode(),
        free_text=lambda: None,
        checkpoint=lambda bank: None,  # the denoiser does it by itself
        pictures=pictures(teacher, vae),
        partial=partial_of(teacher),
    )


def refuse_to_encode() -> Cond:
    raise RuntimeError("prompts of a native run are encoded before it starts")


def pool_of(conditioning: list[Any]) -> tuple[list[str], Cond]:
    """Every prompt of a CONDITIONING: its text (or its number, where it has none) and all as one batch."""
    texts, conds = [], []
    for entry, plain in zip(conditioning, conds_from([without_text(e) for e in conditioning]), strict=True):
        for row in range(len(plain)):
            text = entry[1].get(TEXT)
            texts.append(text if isinstance(text, str) and text not in texts else f"prompt {len(texts) + 1}")
            conds.append(plain.take(slice(row, row + 1)))
    return texts, cat(conds)


def without_text(entry: Any) -> list[Any]:
    return [entry[0], {k: v for k, v in entry[1].items() if k not in (TEXT, LATENT)}]


def pictures_of(conditioning: list[Any], teacher: NativeTeacher) -> list[Tensor]:
    """The pictures that came with the prompts, in the network's space; none, or one for each prompt."""
    found = [entry[1].get(LATENT) for entry in conditioning]
    lost = sum(v is None for v in found)
    if lost == len(found):
        return []
    if lost:
        raise ValueError(f"{lost} of {len(found)} prompts have no picture; give each one in Encode Prompts, or none")
    return [row for v in found for row in teacher.latent_in(own(v)).cpu()]


def one_prompt(conditioning: list[Any]) -> Cond:
    texts, cond = pool_of(conditioning)
    if len(texts) != 1:
        raise ValueError(f"the negative holds {len(texts)} prompts; connect one, usually the empty prompt")
    return cond


@torch.no_grad()
def check_prompts(source: Source, *conds: Cond) -> None:
    """One call of the network for each, so that prompts of another text encoder are refused in a sentence."""
    x = torch.zeros((1, *source.shape), device=source.device)
    sigma = torch.full((1,), source.denoiser.schedule.sigma_max / 2, device=source.device)
    for cond in conds:
        try:
            source.denoiser(x, sigma, cond)
        except (RuntimeError, TypeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the prompts do not fit this MODEL ({str(error).splitlines()[0]}); "
                "encode them with the CLIP that belongs to it"
            ) from error


def pictures(teacher: NativeTeacher, vae: Any) -> Callable[[Tensor], Tensor] | None:
    """Latents -> [n 3 h w] in -1..1: decoded where a VAE is given, else ComfyUI's small latent previews."""
    if vae is not None:
        return torch.no_grad()(lambda latents: decoded(vae, teacher.latent_out(latents)))
    latent = teacher.model.latent_format
    if latent.latent_rgb_factors is None:
        return None
    previewer = latent_preview.Latent2RGBPreviewer(
        latent.latent_rgb_factors, latent.latent_rgb_factors_bias, latent.latent_rgb_factors_reshape
    )

    @torch.no_grad()
    def preview(latents: Tensor) -> Tensor:
        images = [numpy.array(previewer.decode_latent_to_preview(x.float().cpu())) for x in latents.split(1)]
        return rearrange(torch.from_numpy(numpy.stack(images)).float() / 127.5 - 1, "n h w c -> n c h w")

    return preview


def decoded(vae: Any, samples: Tensor) -> Tensor:
    with torch.inference_mode():  # as everywhere in ComfyUI: it moves and patches weights in place
        images = vae.decode(samples).cpu()
    images = own(images)
    first = images[:, 0] if images.ndim == 5 else images  # of a video, the first frame
    return rearrange(first[..., :3] * 2 - 1, "n h w c -> n c h w").clamp(-1, 1)


def file_of(model: Any) -> str:
    """Path of the file that a stock loader made this MODEL from; empty where none is noted."""
    noted = getattr(model, "cached_patcher_init", None)
    path = noted[1][0] if noted and noted[1] else ""
    return path if isinstance(path, str) and Path(path).is_file() else ""


def usual_size(model: Any, family: Family) -> int:
    is_shapes = file_of(model) == str(shapes.TEACHER)
    return SHAPES_SIZE if is_shapes else SIZES.get(family.name, 1024)


def shift_of(schedule: Schedule, family: Family) -> float | None:
    """Of the student's levels: the MODEL's own where it was set by a node, else what few-step students use."""
    if not isinstance(schedule, Flow):
        return None
    usual = abs(schedule.shift - family.shift) < 1e-3
    return family.student_shift if usual and family.student_shift else schedule.shift


def student_sigmas(schedule: Schedule, family: Family, steps: int) -> tuple[float, ...]:
    """Levels of a student of this MODEL, without the final 0."""
    if isinstance(schedule, Discrete):
        own = family.betas is not None
        times = family.timesteps(steps) if own else tuple(1000 * (steps - i) // steps - 1 for i in range(steps))
        return tuple(schedule.sigma(torch.tensor(times)).tolist())
    return tuple(family.sigmas(steps, shift_of(schedule, family)).tolist()[:-1])


@dataclass(frozen=True)
class Encoded:
    """Prompts that are encoded already, asked for by their text."""

    texts: list[str]
    pool: Cond

    def encode(self, prompts: list[str]) -> Cond:
        return self.pool.take(torch.tensor([self.texts.index(p) for p in prompts]))


ENDS = 64  # values of a tensor that name it
MEMORY = "memory.json"
TRAINING = 3  # activations that a backward needs, over those of a picture with guidance [estimate]


def kept_free(teacher: NativeTeacher, file: RunFile, run: Run) -> float:
    """Bytes beside the weights: measured by a plan of these settings in this run, else estimated before the first."""
    try:
        noted = json.loads((run.path / MEMORY).read_text(encoding="utf-8"))
        if noted["settings"] == costs(file):
            return float(noted["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shape = teacher.latent_shape(file.model.size, file.model.height or file.model.size)
    return TRAINING * teacher.model.memory_required([2 * file.data.batch, *shape])


def costs(file: RunFile) -> str:
    """What the memory of a run depends on."""
    options = file.method.options
    judged = bool(options.get("gan_weight")), options.get("gan_features")  # left out: as the method always has it
    named = file.method.name, file.method.features, file.data.batch, file.train.precision, file.train.optimizer
    return config_hash(file.model, file.lora, named, judged)


def patches_of(model: Any) -> str:
    """A name for what LoRAs add to the weights of this MODEL, and how strongly; "none" without any."""
    found = sorted((k, v) for k, v in model.patches.items() if k.startswith("diffusion_model."))
    sha = hashlib.sha256()
    for key, patches in found:
        for strength, value, strength_model, offset, _function in patches:
            sha.update(f"{key} {strength} {strength_model} {offset}\n".encode())
            for part in parts_of(value):
                sha.update(part)
    return f"{len(found)} layers, {sha.hexdigest()[:8]}" if found else "none"


def parts_of(value: Any) -> Iterator[bytes]:
    """Numbers, and both ends of every tensor: a whole LoRA would take seconds."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        ends = torch.cat([flat[:ENDS], flat[-ENDS:]]).float().cpu()
        yield f"{list(value.shape)}".encode() + ends.numpy().tobytes()
    elif isinstance(value, tuple | list):
        for part in value:
            yield from parts_of(part)
    elif isinstance(value, WeightAdapterBase):
        yield value.name.encode()
        yield from parts_of(value.weights)
    else:
        yield str(value).encode() if isinstance(value, int | float | str) else type(value).__name__.encode()


@dataclass
class NativeJob(Job):
    """A run on a MODEL: what the command line does, with prompts and pictures from the graph."""

    def plan(self) -> Plan:
        """Also notes what to keep free, so that the next load of the MODEL offloads as much as that takes."""
        made, patcher = super().plan(), self.source.denoiser.patcher  # type: ignore[attr-defined]
        if made.peak is not None and made.peak < float("inf"):
            beside = max(0.0, made.peak - patcher.loaded_size())
            self.run.write_json(MEMORY, {"settings": costs(self.file), "bytes": beside})
        return made

    def foretell(self, found: Plan) -> None:
        """Into the log alone: a node's words are read when its run has ended."""
        log.info("DMD: %s", found.words())

    def cache(self) -> Encoded:  # type: ignore[override]
        return Encoded(self.prompts, self.pool)

    def identity(self) -> str:
        return identity(self.source.denoiser.patcher)  # type: ignore[attr-defined]

    def recipe(self, data: str) -> Recipe:
        return replace(super().recipe(data), shift=shift_of(self.source.denoiser.schedule, self.source.family))

    def fixed(self) -> dict[str, Any]:
        """The LoRAs on the MODEL belong to the teacher."""
        patcher = self.source.denoiser.patcher  # type: ignore[attr-defined]
        return {**super().fixed(), "LoRA on the model": patches_of(patcher)}

    def beside(self) -> dict[str, Any]:
        """What exporting any snapshot takes later, without the MODEL."""
        names = [n for n, _ in self.source.net.named_modules() if n]
        found = self.recipe(f"{len(self.prompts)} prompts")
        return {"network.json": {"names": names, "recipe": found.to_json()}}
