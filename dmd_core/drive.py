"""A run from begin to end as one generator: the node and the command line only draw what it yields.

It saves every so often, at the end and, unless its weights are shards, when it is cancelled; goes on where the folder
stands; takes snapshots, judges them and writes a report. Whatever the caller raises, closes or kills, the folder holds
a whole state.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .alarms import alarms
from .curves import curves
from .plan import duration
from .processes import ALONE, Processes, Shared, SharedBatches
from .runs import Run, Say, Unwritable, step_of
from .shards import collected
from .snapshots import DIVERSE, Gallery, Measures, Reference, best, fill, read_measures, write_student
from .train import NonFinite, Objective, Report, Seekable, TrainConfig, train
from .trainstate import TrainState

log = logging.getLogger(__name__)
ALARM_EVERY = 25  # steps
REFERENCE = "reference.safetensors"  # the teacher's pictures that snapshots are compared with
OUT_OF_MEMORY = (
    "the device is out of memory at step {step}; {kept}. Three things help most: a batch of 1 with more accumulation, "
    "gradient checkpointing on, a smaller picture size (then: optimizer 'adamw8bit', a lower rank, an fp8 base)"
)


@dataclass(frozen=True, kw_only=True)
class DriveConfig:
    """How a run is kept; none of it changes what is learned."""

    save_every: int = 100  # steps
    save_minutes: float = 5.0  # and at least this often; 0: by steps alone
    keep: int = 3  # states
    snapshot_every: int = 100  # steps; 0: at the end only
    keep_snapshots: int = 20  # the best one always stays
    preview_every: int = 25  # steps; 0: none
    stop_minutes: float = 0.0  # 0: run to the end; the next start goes on
    player: str = "student"  # whose average is the result

    def __post_init__(self) -> None:
        for name in ("save_every", "keep", "keep_snapshots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("save_minutes", "snapshot_every", "preview_every", "stop_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (off) or more")


@dataclass(frozen=True)
class Progress:
    """One step, and what came with it."""

    report: Report
    total: int  # steps of the whole run
    seconds_left: float
    alarms: tuple[str, ...] = ()  # new ones
    preview: Image.Image | None = None
    snapshot: Path | None = None
    saved: Path | None = None
    stop: str = ""  # why this is the last one, if the run is not finished

    @property
    def step(self) -> int:
        return self.report.step


def drive(
    objective: Objective,
    batches: Iterable[Any] | Seekable,
    config: TrainConfig,
    run: Run,
    settings: DriveConfig | None = None,
    *,
    gallery: Gallery | None = None,
    preview: Callable[[], Image.Image] | None = None,
    about: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
    say: Say = lambda line: None,
) -> Iterator[Progress]:
    """Trains in the run folder until config.steps, going on where its newest sound state stands.

    Cancel by close(), or by any exception raised at the yield or inside the objective: the state is saved (not that of
    shards, see `rescue`) and the exception passes. `about` goes into run.json, `beside` into files of its
    keys' names. With many processes every one of them drives; the first one writes.
    """
    settings = settings or DriveConfig()
    if processes.count > 1:
        objective, batches = Shared(objective, processes), SharedBatches(batches, processes)
    with run.locked() if processes.rank == 0 else nullcontext():
        state = TrainState(objective, config)
        session = Session(objective, config, run, settings, gallery, preview, processes, say, state)
        session.begin(about or {}, beside or {})
        steps = train(objective, batches, config, state, processes.mean if processes.count > 1 else None)
        try:
            for report in steps:
                session.whole = mark(state)
                progress = session.after(report)
                yield progress
                if progress.stop:
                    break
            session.finish()
        except NonFinite as error:
            session.failed(str(error))
            raise NonFinite(f"{error}. {session.kept().capitalize()} in {run.path}") from error
        except Unwritable:
            raise
        except torch.OutOfMemoryError as error:
            session.rescue()
            message = OUT_OF_MEMORY.format(step=state.step, kept=session.kept())
            session.failed(message)
            raise torch.OutOfMemoryError(message) from error
        except BaseException:  # cancelled: GeneratorExit, KeyboardInterrupt, the host's own exceptions
            session.rescue()
            raise
        finally:
            steps.close()  # type: ignore[attr-defined]


Mark = tuple[int, int, dict[str, int]]


def mark(state: TrainState) -> Mark:
    return state.step, state.cursor, dict(state.counters)


@dataclass
class Session:
    """What happens around the steps of one run."""

    objective: Objective
    config: TrainConfig
    run: Run
    settings: DriveConfig
    gallery: Gallery | None
    preview: Callable[[], Image.Image] | None
    processes: Processes
    say: Say
    state: TrainState
    history: list[dict[str, Any]] = field(default_factory=list)
    reference: Reference | None = None
    standing: dict[str, str] = field(default_factory=dict)  # alarms, by their first words
    whole: Mark = (0, 0, {})  # where the last whole step ended
    began: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0

    @property
    def first(self) -> bool:
        return self.processes.rank == 0

    @property
    def takes_part(self) -> bool:
        """Sharded weights cannot be looked at or saved by the first process alone."""
        return self.first or self.state.sharded

    def agreed(self, value: bool) -> bool:
        """What the first process decides, where the others have to do it with it."""
        return bool(self.processes.share(int(value))) if self.state.sharded else value

    def begin(self, about: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
        """Loads the newest sound state into every process; then the first one writes, and tidies the folder."""
        resumed = self.first and self.run.resume(self.state, self.say)
        if self.first:
            settings = {"train": asdict(self.config), "drive": asdict(self.settings), **about}
            self.run.describe({**settings, "config_hash": self.state.config_hash})
            for name, value in beside.items():
                self.run.write_json(name, value)
            self.history = self.run.cut(self.state.step)
            if resumed:
                where = f"{self.state.step} of {self.config.steps}"
                done = self.state.step >= self.config.steps
                more = f"has all its steps, {where}: nothing was trained; give it more steps, or set resume to new"
                self.say(f"run {self.run.name!r} {more if done else f'goes on at step {where}'}")
        # a run that was cancelled in its first step has a state of step 0, with critics that have learned
        chosen = self.processes.share(self.state.step if resumed else -1)
        if not self.first and chosen >= 0:
            self.run.load(self.run.path / "states" / f"state_{chosen:08d}.safetensors", self.state)
        self.processes.share(0)  # nobody trains, and so no state is removed, before all have read theirs
        self.whole, self.saved_step = mark(self.state), self.state.step

    def after(self, report: Report) -> Progress:
        """Line, picture, snapshot, state: in this order, so that a state is never ahead of what belongs to it."""
        late = self.settings.stop_minutes and time.monotonic() - self.began >= 60 * self.settings.stop_minutes
        stop = ""
        if self.settings.stop_minutes and self.processes.share(int(bool(late))) and report.step < self.config.steps:
            stop = f"stopped after {self.settings.stop_minutes:g} minutes"
        if not self.takes_part:
            return Progress(report, self.config.steps, 0.0, stop=stop)
        if self.first:
            record = asdict(report)
            self.history.append(record)
            self.run.log(record)
        done = report.step == self.config.steps
        picture = self.draw_preview() if self.shows(report.step) else None
        snapshot = self.take_snapshot() if done or self.due(report.step, self.settings.snapshot_every) else None
        news = self.new_alarms() if self.first and (snapshot or self.due(report.step, ALARM_EVERY)) else ()
        minutes = (time.monotonic() - self.saved_at) / 60
        save = done or bool(stop) or self.due(report.step, self.settings.save_every)
        saved = self.save() if self.agreed(save or 0 < self.settings.save_minutes <= minutes) else None
        left = self.seconds_per_step() * (self.config.steps - report.step)
        return Progress(report, self.config.steps, left, news, picture, snapshot, saved, stop)

    def shows(self, step: int) -> bool:
        """The first update too: an early picture says that all is well, and what there was to begin with."""
        every = self.settings.preview_every
        return self.due(step, every) or (step == 1 and every > 0)

    @staticmethod
    def due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def seconds_per_step(self) -> float:
        last = [r["seconds"] for r in self.history[-20:] if r.get("seconds")]
        return sum(last) / len(last) if last else 0.0

    def save(self, meta: Mapping[str, Any] | None = None) -> Path | None:
        self.refuse_broken()
        path = self.run.save(self.state, self.settings.keep, meta) if self.first else None
        if not self.first:
            self.state.join()
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
        return path

    def refuse_broken(self) -> None:
        """An update can break weights after sound losses: the last good state must not make room for such a one."""
        if bad := self.state.broken():
            raise NonFinite(
                f"the weights of {', '.join(bad)} became NaN or infinite in the update of step {self.state.step}; "
                "they are not saved. Lower the learning rate"
            )

    def draw_preview(self) -> Image.Image | None:
        if self.preview is None:
            return None
        name = self.settings.player
        with self.state.averaged(name) if name in self.state.params else nullcontext():
            picture = self.preview()
        if self.first:
            self.run.write_picture("previews/latest.png", picture)
        return picture

    def take_snapshot(self) -> Path | None:
        """The player's average as it stands, its pictures and figures."""
        name, step = self.settings.player, self.state.step
        if name not in self.state.params:
            return None
        self.refuse_broken()
        with self.state.averaged(name):
            student = collected(self.state.params[name], keep=self.first)
            with torch.no_grad():
                images = self.gallery.student() if self.gallery else None
            if not self.first:
                return None
            self.write_snapshot(step, student, images)
        self.run.write_picture("curves.png", curves(loss_series(self.history)))
        self.bound_snapshots()
        self.write_report("running")
        return self.run.path / "snapshots" / f"step_{step:08d}"

    def write_snapshot(self, step: int, student: Mapping[str, Tensor], images: Tensor | None) -> None:
        with self.run.new_snapshot(step) as folder:
            if self.gallery is None or images is None:
                return write_student(folder, student, step)
            if self.reference is None:
                self.reference = Reference.at(self.run.path / REFERENCE, self.gallery)
            fill(folder, student, step, images, self.gallery, self.reference)

    def bound_snapshots(self) -> None:
        chosen, found = best_snapshot(self.run), self.run.snapshots()
        for path in found[: -self.settings.keep_snapshots]:
            if path != chosen:
                shutil.rmtree(path, ignore_errors=True)

    def new_alarms(self) -> tuple[str, ...]:
        measures = [m for p in self.run.snapshots() if (m := read_measures(p))]
        found = {text[:24]: text for text in alarms(self.history, measures)}
        news = tuple(text for key, text in found.items() if key not in self.standing)
        self.standing = found
        for text in news:
            self.say(f"step {self.state.step}: {text}")
        return news

    def kept(self) -> str:
        states = self.run.states()
        return (
            f"the last good state, of step {step_of(states[0])}, is kept" if states else "no state had been saved yet"
        )

    def finish(self) -> None:
        if not self.takes_part:
            return
        if self.agreed(self.state.step != self.saved_step):
            self.save()
        whole = self.state.step >= self.config.steps
        if self.agreed(whole and self.state.step not in map(step_of, self.run.snapshots())):
            self.take_snapshot()  # a run that was cancelled in its very last pictures has a state of that step
        if self.first:
            self.write_report("finished" if whole else "stopped by the time limit; start it again to go on")

    def failed(self, why: str) -> None:
        if self.first:
            self.write_report(f"stopped: {why}")

    def rescue(self) -> None:
        """Saves what a cancelled run has. An exception on the way must not hide the one that is passing.

        Shards are not saved: nobody knows whether the other processes are cancelled too, and when.
        """
        if not self.first or self.state.step + sum(self.state.counters.values()) == 0:
            return
        try:
            with torch.inference_mode(False):
                if not self.state.sharded:
                    self.save_interrupted()
                self.write_report(f"cancelled; {self.kept()}; start it again to go on")
        except Exception as error:
            log.warning("the cancelled run could not be saved: %s", error)
            self.say(str(error))

    def save_interrupted(self) -> None:
        """Between steps the state is exact. Within one it is sound, but repeats the step that had begun."""
        step, cursor, counters = self.whole
        if self.state.counters == counters:
            self.state.cursor = cursor  # batches that were drawn but taught nobody anything
        if self.state.step == self.saved_step and step == self.saved_step and self.run.states():
            return  # that step is on disk, whole: better than a part of the next
        self.save({"whole": self.state.counters == counters})

    def write_report(self, status: str) -> None:
        self.run.write_text("report.txt", report_text(self.run, self.history, self.config, status, self.standing))


def best_snapshot(run: Run) -> Path | None:
    """The one to take: by fidelity and diversity where snapshots were judged, else the last."""
    judged = [(p, m) for p in run.snapshots() if (m := read_measures(p))]
    if not judged:
        return run.snapshots()[-1] if run.snapshots() else None
    index = best([m for _, m in judged])
    assert index is not None
    return judged[index][0]


def loss_series(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for record in history:
        for name, value in record.get("losses", {}).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return found


def report_text(
    run: Run, history: list[dict[str, Any]], config: TrainConfig, status: str, standing: Mapping[str, str]
) -> str:
    """How the run went, for people: the first line says it all, the others why."""
    step = history[-1]["step"] if history else 0
    seconds = sum(r.get("seconds") or 0.0 for r in history)
    chosen = best_snapshot(run)
    measures = read_measures(chosen) if chosen is not None else None
    best = f" Best snapshot: update {step_of(chosen)}" if chosen is not None else ""
    best += f", {describe(measures)}." if measures else ", the last one; none was judged." if best else ""
    alarmed = f" {len(standing)} alarm{'s' * (len(standing) > 1)}, see below." if standing else " No alarms."
    took = f"{step} of {config.steps} updates in {duration(seconds)}."
    lines = [f"Run {run.name}: {status}. {took}{best}{alarmed}"]
    if measures:
        lines.append(verdict(measures))
    lines += [f"Alarm: {text}" for text in standing.values()]
    if history:
        counted = ", ".join(f"{k} {v}" for k, v in history[-1]["counters"].items())
        lines.append(f"Updates: {counted}; {seconds / len(history):.3g} s each.")
        lines.append("Losses, mean of the first and of the last tenth; they are no score, judge by the pictures:")
        for name, values in sorted(loss_series(history).items()):
            n = max(1, len(values) // 10)
            lines.append(f"  {name}: {sum(values[:n]) / n:.4g} -> {sum(values[-n:]) / n:.4g}")
    states = run.states()
    if states:
        lines.append(f"States kept: {', '.join(str(step_of(p)) for p in reversed(states))}.")
    return "\n".join(lines) + "\n"


def verdict(measures: Measures) -> str:
    """The figures of a snapshot, for people."""
    low, high = DIVERSE
    d = measures.diversity
    varied = "about as varied as" if low <= d <= high else "less varied than" if d < low else "further apart than"
    return (
        f"Its pictures are {varied} the teacher's (diversity {d:.2f}, theirs is 1); fidelity is "
        f"{measures.fidelity:.2f}, where 1 is the teacher's own picture of each prompt and 0 that of any other."
    )


def describe(measures: Measures) -> str:
    return f"fidelity {measures.fidelity:.2f}, diversity {measures.diversity:.2f} of the teacher's"
