"""The teacher's noise-latent pairs on disk: made once, resumable, read in a shuffled order that can be sought."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .conditioning import Cond
from .data import Batch
from .denoiser import Denoiser
from .samplers import sample_heun, start
from .train import mix
from .trainstate import config_hash, save_atomic


def make_pairs(
    teacher: Denoiser, prompts: Iterable[Batch], sigmas: Sequence[float], folder: Path, seed: int, recipe: str = ""
) -> Iterator[Path]:
    """One file per batch, by Heun over the sigmas (with the final 0); yields as it goes. Files that are there stay.

    Noise depends on seed and position alone, so an interrupted run goes on to the same pairs. `recipe` names what else
    they depend on (teacher, guidance): a folder made otherwise is refused.
    """
    made_by = config_hash([float(s) for s in sigmas], seed, recipe)
    levels = torch.tensor(list(sigmas))
    for index, batch in enumerate(prompts):
        path = folder / f"pairs_{index:06d}.safetensors"
        if path.exists():
            if header(path)["recipe"] != made_by:
                raise ValueError(
                    f"{path} was made with another teacher, seed or step list; choose a new folder or delete this one"
                )
        else:
            noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(mix(seed, index)))
            noise = noise.to(device_of(batch.cond))
            latents = sample_heun(teacher, start(teacher.schedule, noise, levels[0]), levels.to(noise), batch.cond)
            tensors = {"noise": noise, "latents": latents, **cond_tensors(batch.cond)}
            tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_atomic(tensors, path, {"dmd_pairs": json.dumps({"recipe": made_by})})
        yield path


class Pairs:
    """Batches of a folder of pairs, without end; every epoch in its own order, given by the seed."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu", seed: int = 0):
        self.files = sorted(folder.glob("pairs_*.safetensors"))
        if not self.files:
            raise ValueError(f"no pairs in {folder}; make them first, or name another folder")
        self.device, self.seed = device, seed

    def seek(self, cursor: int) -> Iterator[Batch]:
        for position in count(cursor):
            epoch, place = divmod(position, len(self.files))
            order = torch.randperm(len(self.files), generator=torch.Generator().manual_seed(mix(self.seed, epoch)))
            yield read_pairs(self.files[int(order[place])], self.device)

    def __iter__(self) -> Iterator[Batch]:
        return self.seek(0)


def read_pairs(path: Path, device: torch.device | str = "cpu") -> Batch:
    header(path)
    with safe_open(path, "pt", device=str(device)) as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    latents = tensors["latents"]
    return Batch(cond_of(tensors), tuple(latents.shape), latents, tensors["noise"])


def header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["dmd_pairs"])
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a sound file of pairs ({error}); delete it and make it again") from error


def device_of(cond: Any) -> torch.device:
    tensor = cond.cross if isinstance(cond, Cond) else cond
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")


def cond_tensors(cond: Any) -> dict[str, Tensor]:
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"cond": cond}
    if isinstance(cond, Cond):
        pooled = {} if cond.pooled is None else {"cond.pooled": cond.pooled}
        return {"cond.cross": cond.cross, **pooled, **{f"cond.extras.{k}": v for k, v in cond.extras.items()}}
    raise TypeError(f"conditioning of type {type(cond).__name__} cannot be stored; use Cond or a tensor")


def cond_of(tensors: dict[str, Tensor]) -> Any:
    if "cond.cross" not in tensors:
        return tensors.get("cond")
    prefix = "cond.extras."
    extras = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return Cond(tensors["cond.cross"], tensors.get("cond.pooled"), extras)
