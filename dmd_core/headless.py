"""A run from a TOML file, without ComfyUI, alone or under `accelerate launch`: on the embedded shapes or on diffusers.

model = "shapes"                     # or a diffusers folder, or a .safetensors file
[run]     name = "my run"            # RunSettings; every table below has the fields of its dataclass
[data]    prompts = "prompts.txt"    # a file or a list; or pictures = "folder", whose captions they are
[method]  name = "dmd2"              # steps = 4, and every field of the method's own config
[lora], [train], [drive], [samples]
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import methods, pictures, probe
from .adapters import Adapted, AdapterBank
from .begun import refuse_other
from .board import board
from .conditioning import Cond
from .data import Latents, Prompts
from .denoiser import Guided
from .drive import REFERENCE, Progress, drive
from .export import export
from .inpaint import draw_holes
from .inpaint.partial import grid
from .pairs import Pairs, make_pairs
from .plan import Plan, plan
from .probe import levels
from .processes import ALONE, Accelerated, Processes
from .prompts import PromptCache, fingerprint, parse_prompts, read_prompts
from .runfile import RunFile, read_run_file
from .runs import Run, Say, open_run
from .samplers import sampled
from .snapshots import Gallery
from .sources import Source, load_source
from .train import mix
from .views import SHOWN_HOLES, preview_of
from .weights.checkpoint import base_hash
from .weights.recipe import Recipe

AT_ONCE = 8  # pictures in one call of network and VAE


def train_from(path: Path, resume: bool = False, say: Say = print) -> Path:
    """Trains as the file says and returns the run folder. resume: go on with a run of that name if there is one."""
    job = prepare(Path(path), resume, say)
    with board(job) as write:
        for progress in job.drive():
            write(progress)
            if job.first:
                say(line(progress))
    if job.first:
        with job.run.locked():  # who goes on with the run clears away what is half written
            export(job)
    return job.run.path


def plan_from(path: Path, say: Say = print) -> Plan:
    """What the run would cost; nothing is trained."""
    job = prepare(Path(path), True, say)
    with job.run.locked():
        job.make_pairs(2)
        found = job.plan()
    say(found.words())
    return found


@dataclass
class Job:
    """Everything that a run file stands for, loaded."""

    file: RunFile
    source: Source
    bank: AdapterBank
    run: Run
    prompts: list[str]
    pool: Cond
    negative: Cond
    method: methods.Made
    processes: Processes
    say: Say
    pictures: list[Tensor] = field(default_factory=list)  # latents of the user's own, one for each prompt

    def __post_init__(self) -> None:
        if self.method.needs_pictures and not self.pictures:
            raise ValueError(
                f"{self.file.method.name} learns from your own pictures, and there are none: choose their folder in "
                "Encode Prompts, or name it in [data] pictures of a run file, instead of prompts"
            )

    @property
    def makes_pairs(self) -> bool:
        return self.method.needs_latents and not (self.method.takes_pictures and self.pictures)

    @property
    def first(self) -> bool:
        return self.processes.rank == 0

    @property
    def begun(self) -> bool:
        return bool(self.run.states())

    def drive(self) -> Iterator[Progress]:
        if self.first:
            with self.run.locked():
                self.check()
                self.make_pairs()
                self.processes.share(0)
                yield from self._drive()
        else:
            self.processes.share(0)  # pairs are on disk now
            yield from self._drive()

    def _drive(self) -> Iterator[Progress]:
        yield from drive(
            self.method.objective,
            self.batches(),
            self.file.train,
            self.run,
            self.file.drive,
            gallery=self.gallery(),
            preview=preview_of(self),
            about={"file": asdict(self.file), "prompts": len(self.prompts), "begun_with": self.fixed()},
            beside=self.beside() if self.first else {},
            processes=self.processes,
            say=self.say,
        )

    def fixed(self) -> dict[str, Any]:
        """What a run keeps from its first step to its last, beside the settings that its states are marked with."""
        lora, full = self.file.lora, self.file.model.full
        model = {"name": Path(self.file.model.path).name, "hash": self.identity()}
        sets = {"layers": lora.layers, "rank": lora.rank, "critic rank": lora.critic_rank or lora.rank}
        height, width = (side * self.source.family.downscale for side in self.source.shape[1:])
        said = {"size": f"{width} x {height}", "training": "whole copies" if full else "LoRA sets"}
        return {"model": model, **said, **({} if full else sets)}

    def beside(self) -> dict[str, Any]:
        """More files for the run folder, by name, once the run's state has been loaded."""
        return {}

    def check(self) -> None:
        """Before the first step: is this a teacher, and what will the run cost?"""
        if self.begun:
            refuse_other(self.run, self.fixed(), asdict(self.file))
            return
        (self.run.path / REFERENCE).unlink(missing_ok=True)  # of a start that came to nothing, maybe on another model
        guidance = self.method.guidance
        if self.file.model.probe and len(self.pool) > 1:
            found = probe.probe(
                self.teacher(1.0), self.pool.take(slice(0, 4)), self.negative, self.source.shape, self.source.device
            )
            self.say(f"teacher: {found.words()}")
            probe.refuse(found, guidance)
        if self.file.run.plan and self.processes.count == 1:
            self.make_pairs(2)
            self.foretell(self.plan())

    def foretell(self, found: Plan) -> None:
        self.say(found.words())

    def plan(self) -> Plan:
        return plan(
            self.method.objective,
            self.batches(),
            self.file.train,
            self.source.net,
            checkpointing=self.file.model.checkpointing,
            batch=self.file.data.batch,
            first=self.method.settled,
            copies=self.method.copies,
            drive=self.file.drive,
        )

    # --- data

    def prompt_batches(self) -> Prompts:
        data = self.file.data
        return Prompts(self.pool, self.source.shape, data.batch, data.seed)

    def make_pairs(self, count: int = 0) -> None:
        """Those that are not there yet: all, or just the first ones."""
        if not self.makes_pairs:
            return
        data, folder = self.file.data, self.run.path / "pairs"
        there, wanted = len(list(folder.glob("pairs_*.safetensors"))), min(count or data.pairs, data.pairs)
        teacher = self.teacher(self.method.guidance if self.method.guidance != 1 else self.file.data.pair_guidance)
        recipe = f"{fingerprint([self.source.net])} {self.method.guidance} {data.pair_guidance} {self.source.encoder}"
        sigmas = levels(teacher, data.pair_steps, "cpu").tolist()
        made = make_pairs(teacher, islice(self.prompt_batches(), wanted), sigmas, folder, data.seed, recipe)
        for i, _ in enumerate(made):
            if i >= there:
                self.say(f"pairs {(i + 1) * data.batch} of {data.pairs * data.batch}")

    def batches(self) -> Any:
        if not self.method.needs_latents:
            return self.prompt_batches()
        data, device = self.file.data, self.source.device
        pairs = Pairs(self.run.path / "pairs", device, data.seed) if self.makes_pairs else None
        found = pairs or Latents(self.pool, self.pictures, data.batch, data.seed, device)
        return Tuples(found) if self.method.tuples else found

    # --- looking

    def teacher(self, guidance: float) -> Guided:
        return Guided(Adapted(self.source.denoiser, self.bank, {}), guidance, self.negative)

    def gallery(self) -> Gallery | None:
        samples, decode = self.file.samples, self.source.pictures
        chosen = list(samples.prompts) or self.prompts[: samples.count]
        if decode is None or len(chosen) < 2:
            self.say("no samples are drawn: " + ("there is no VAE" if decode is None else "two prompts are needed"))
            return None
        cond = self.cache().encode(chosen).to(self.source.device)
        guided = self.teacher(self.method.guidance if self.method.guidance != 1 else self.file.data.pair_guidance)
        steps = levels(guided, samples.teacher_steps, self.source.device)
        own = torch.tensor([*self.method.sigmas, 0.0], device=self.source.device)

        def draw(at: Callable[[int], Any], sigmas: Tensor, gamma: float | None) -> list[Tensor]:
            """at(i): the denoiser of the pictures from number i on"""
            parts = []
            for i in range(0, len(cond), AT_ONCE):
                rng = torch.Generator(self.source.device).manual_seed(mix(samples.seed, i))
                part = cond.take(slice(i, i + AT_ONCE))
                noise = torch.randn((len(part), *self.source.shape), generator=rng, device=rng.device)
                parts.append(sampled(at(i), noise, sigmas, part, rng, gamma))
            return parts

        def shown(parts: list[Tensor]) -> Tensor:
            return torch.cat([decode(p).float().cpu() for p in parts])

        @cache
        def canvases() -> list[Tensor]:
            return draw(lambda _i: guided, steps, None)

        def filled(i: int) -> Any:
            """The student on pictures of the teacher, a hole in each."""
            assert self.method.filler is not None
            canvas = canvases()[i // AT_ONCE]
            rows, columns = grid(canvas, self.source.partial.patch if self.source.partial else 1)
            own_rng = torch.Generator().manual_seed(mix(samples.seed, i))
            return self.method.filler(canvas, draw_holes(len(canvas), rows, columns, own_rng, SHOWN_HOLES))

        student = Guided(self.method.student, self.method.cfg, self.negative)
        return Gallery(
            chosen,
            lambda: shown(draw(filled if self.method.filler else lambda _i: student, own, self.method.gamma)),
            lambda: shown(canvases() if self.method.filler else draw(lambda _i: guided, steps, None)),
            self.source.features,
            labels=(f"teacher, {in_steps(len(steps))}", f"student, {in_steps(len(own))}"),
        )

    def cache(self) -> PromptCache:
        return prompt_cache(self.file, self.source)

    # --- result

    def recipe(self, data: str) -> Recipe:
        """How this student is sampled; data: what it was trained on."""
        schedule, sigmas = self.source.denoiser.schedule, self.method.sigmas
        vp = self.source.family.betas is not None
        return Recipe(
            family=self.source.family.name,
            objective=self.file.method.name,
            steps=len(sigmas),
            sigmas=(*sigmas, 0.0),
            timesteps=tuple(int(t) for t in schedule.timestep(torch.tensor(sigmas)).tolist()) if vp else (),
            gamma=0.0 if self.method.gamma is None else self.method.gamma,
            cfg=self.method.cfg,
            trained_cfg=self.method.guidance if self.method.cfg == 1 else None,
            prediction=self.source.denoiser.prediction.value,
            base=Path(self.file.model.path).name,
            base_hash=self.identity(),
            rank=0 if self.file.model.full else self.file.lora.rank,
            trained_on=data,
        )

    def identity(self) -> str:
        """Of the base; from its file where that is one, since a network in memory may have other names."""
        return base_hash(self.file.base_file or self.source.net)


def in_steps(levels: int) -> str:
    count = levels - 1  # the last one is 0
    return f"{count} step{'s' * (count != 1)}"


@dataclass(frozen=True)
class Tuples:
    """As rectified flow takes them: (x0, cond) of pictures, (x0, cond, eps) of pairs."""

    inner: Pairs | Latents

    def seek(self, cursor: int) -> Iterator[tuple[Any, ...]]:
        for batch in self.inner.seek(cursor):
            yield (batch.latents, batch.cond, *(() if batch.noise is None else (batch.noise,)))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self.seek(0)


def prepare(path: Path, resume: bool, say: Say) -> Job:
    """Reads the file, opens the run, loads the model, encodes the prompts, builds the objective."""
    file = read_run_file(path)
    processes, device = fellows(file)
    run = open_for(file, path, resume, processes)
    if file.data.batch % processes.count:
        raise ValueError(
            f"[data] batch is {file.data.batch} for {processes.count} processes; it is that of all together, "
            "give a multiple of their number"
        )
    embedded = file.model.path == "shapes"
    source = load_source(file.model if embedded else replace(file.model, path=str(file.model_path)), device)
    prompts = prompts_of(file, path)
    cache = prompt_cache(file, source)
    if processes.rank == 0:
        cache.fill([*prompts, *file.samples.prompts, ""], source.encode, say)
    processes.share(0)
    source.free_text()
    pool, negative = (cache.encode(p).to(source.device) for p in (prompts, [""]))
    bank = AdapterBank(source.net, source.family.targets(file.lora.layers))  # type: ignore[arg-type]
    method = methods.build(file, source, bank, pool, negative, processes)
    if file.model.checkpointing:
        source.checkpoint(bank)
    own = pictures_of(file, path, source) if method.needs_latents and method.takes_pictures else []
    return Job(file, source, bank, run, prompts, pool, negative, method, processes, say, own)


def open_for(file: RunFile, path: Path, resume: bool, processes: Processes) -> Run:
    root = path.parent / file.run.root
    mode = "auto" if resume else file.run.resume
    if mode == "new" and processes.count > 1:
        raise ValueError("[run] resume 'new' counts names up, which many processes cannot agree on; give a new name")
    run = open_run(root, file.run.name, mode or "auto")
    if not mode and run.states():
        raise ValueError(
            f"the run {run.name!r} in {root} has begun already; go on with --resume, or give [run] another name"
        )
    return run


def prompt_cache(file: RunFile, source: Source) -> PromptCache:
    folder = os.environ.get("DMD_PROMPT_CACHE")
    return PromptCache(Path(folder) if folder else Path(file.where) / file.run.root / ".prompts", source.encoder)


def prompts_of(file: RunFile, path: Path) -> list[str]:
    given, folder = file.data.prompts, file.data.pictures
    if folder:
        return [p.caption for p in pictures.listed(folder_of(file, path))]
    return read_prompts(path.parent / given) if isinstance(given, str) else parse_prompts("\n".join(given))


def pictures_of(file: RunFile, path: Path, source: Source) -> list[Tensor]:
    """Latents of the user's own pictures, about as large as the run's."""
    if not file.data.pictures:
        return []
    if source.latents is None:
        raise ValueError("pictures need the model's VAE, and it has none; give a diffusers folder with vae/")
    side = round(math.sqrt(math.prod(source.shape[1:])) / 2) * 16
    return pictures.encoded(folder_of(file, path), side, source.latents)


def folder_of(file: RunFile, path: Path) -> Path:
    folder = path.parent / Path(file.data.pictures).expanduser()
    if not folder.is_dir():
        raise ValueError(f"[data] pictures is {file.data.pictures!r}: there is no folder {folder}")
    return folder


def fellows(file: RunFile) -> tuple[Processes, torch.device]:
    """Under `accelerate launch` (or torchrun) its processes, else this one alone."""
    wanted = file.model.device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator, InitProcessGroupKwargs

        # the others wait while the first one makes pairs, which may take hours
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=48))
        accelerator = Accelerator(cpu=wanted == "cpu", kwargs_handlers=[patience])
        return Accelerated(accelerator), accelerator.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"[model] device is {wanted!r}; use 'auto', 'cpu', 'cuda' or 'cuda:0'") from None
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(f"[model] device is {wanted!r}, but torch finds {found} CUDA devices; use 'auto' or 'cpu'")
    return ALONE, device


def line(progress: Progress) -> str:
    losses = ", ".join(f"{k} {v:.4g}" for k, v in progress.report.losses.items())
    left = progress.seconds_left
    wait = f"{left / 3600:.1f} h" if left >= 5400 else f"{math.ceil(left / 60)} min"
    said = [f"{progress.step}/{progress.total}, {wait} left: {losses}"]
    said += [f"saved {progress.saved.name}"] if progress.saved else []
    said += [progress.stop] if progress.stop else []
    return "; ".join(said)
