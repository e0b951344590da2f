"""A run is a folder, found again by its name: states, snapshots, curves, samples, settings and a report.

    run.json     who made it and with which settings      report.txt   how it went, in plain words
    curves.jsonl one line per step                        curves.png   the same as a picture
    states/      the last few training states             snapshots/   a student, its samples and figures each
    lock         held by the one process that writes

Order always comes from step numbers, never from file times: clocks go back.
"""

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from safetensors import SafetensorError

from .trainstate import TrainState, header_of

MAX_NAME = 80  # letters; Windows allows 260 for a whole path
LOCK_AT = 1 << 30  # a byte far behind the text: Windows' locks would make locked bytes unreadable
_FORBIDDEN = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_STATE = re.compile(r"state_(\d{8,12})\.safetensors")
_SNAPSHOT = re.compile(r"step_(\d{8,12})")

Say = Callable[[str], None]


class Unwritable(ValueError):
    """The run folder cannot be written: full disk, read-only folder. What was there is still there."""


def check_name(name: str) -> str:
    """The name if it is one plain folder name on every system."""
    if not isinstance(name, str) or not name or name != name.strip() or name.startswith(".") or name.endswith("."):
        raise ValueError(
            f"run name is {name!r}; give a plain name such as 'my run 1', not starting or ending with . or space"
        )
    if _FORBIDDEN.search(name) or PureWindowsPath(name).parts != (name,):
        raise ValueError(f'run name is {name!r}; names hold none of / \\ : * ? " < > | nor control letters')
    if _RESERVED.fullmatch(name):
        raise ValueError(f"run name {name!r} is a reserved name on Windows; choose another one")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"run name {name[:20]!r}... has {len(name.encode())} letters; up to {MAX_NAME} are accepted")
    return name


def locate(root: str | os.PathLike[str], name: str) -> Path:
    """root/name, never anywhere else."""
    root, path = Path(root), Path(root) / check_name(name)
    if path.is_symlink() or path.resolve().parent != root.resolve():
        raise ValueError(f"run {name!r} is a link that leads out of {root}; give the name of a folder inside it")
    for folder, folders, files in os.walk(path):  # does not walk into links, nor minds what goes away meanwhile
        for inside in (os.path.join(folder, name) for name in (*folders, *files)):
            if os.path.islink(inside):
                raise ValueError(f"{inside} is a link; a run keeps its files inside its own folder, replace the link")
    return path


def runs(root: str | os.PathLike[str]) -> list[str]:
    """Names of the runs under root."""
    folder = Path(root)
    return sorted(p.parent.name for p in folder.glob("*/run.json")) if folder.is_dir() else []


def open_run(root: str | os.PathLike[str], name: str, resume: str = "auto") -> "Run":
    """auto: the run of that name, begun if there is none; new: a fresh folder, counted up (name_2, name_3, ...)."""
    if resume not in ("auto", "new"):
        raise ValueError(f"resume is {resume!r}; use 'auto' (go on where it stopped) or 'new' (a fresh folder)")
    path, number = locate(root, name), 2
    while resume == "new" and path.exists():
        path, number = locate(root, f"{name}_{number}"), number + 1
    return Run(path)


def about(path: Path) -> str:
    """What a run's folder, state or snapshot is, and where the run's result lies; "" for all else."""
    path = path.resolve()
    root = next((p for p in (path, *path.parents[:3]) if Run(p).identity()), None)
    place = path.relative_to(root).parts[:1] if root and path.exists() else None
    whats = {(): "the folder", ("states",): "a training state (only to go on from)", ("snapshots",): "a snapshot"}
    if root is None or place not in whats:
        return ""
    made = [str(p) for folder in ("lora", "model") for p in sorted((root / folder).glob("*.safetensors"))]
    none = "no file in there; `train` writes one there at its end, Save Student into ComfyUI's model folders"
    return f"{path.name} is {whats[place]} of the run {root.name!r}. Its result: {', '.join(made) or none}."


def delete_run(root: str | os.PathLike[str], name: str) -> None:
    """Removes the whole folder, if it is a run and nobody works in it."""
    run = Run(locate(root, name))
    if not (run.path / "run.json").is_file():
        raise ValueError(f"{run.path} holds no run (there is no run.json); nothing was deleted")
    with run.locked():
        pass
    shutil.rmtree(run.path)


class Run:
    """One run folder. Reading needs no lock; whoever writes holds `locked()`."""

    def __init__(self, path: Path):
        self.path = path
        self._held = False

    @property
    def name(self) -> str:
        return self.path.name

    # --- the lock: the system's own, so that it dies with its process

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, nobody else writes here. Whoever holds it may enter again."""
        if self._held:
            yield
            return
        with explained(self):
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / "lock", "a+b")  # noqa: SIM115 - closed below
        try:
            if not acquire(file):
                file.seek(0)
                raise ValueError(
                    f"run {self.name!r} is in use by {holder(file)}; wait for it, stop it, or choose another run name"
                )
            note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with explained(self):
                file.truncate(0)
                file.write(json.dumps(note).encode())
                file.flush()
            self._held = True
            try:
                yield
            finally:
                self._held = False
                file.truncate(0)  # the file stays: removing it would race with the next one to open it
                release(file)
        finally:
            file.close()

    # --- settings

    def settings(self) -> dict[str, Any]:
        """What run.json holds; {} where it is missing or damaged."""
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Writes run.json; the run keeps the identity that it was born with."""
        identity = self.identity() or secrets.token_hex(8)
        self.write_json("run.json", {"id": identity, **settings})

    def identity(self) -> str:
        found = self.settings().get("id")
        return found if isinstance(found, str) else ""

    # --- states

    def states(self) -> list[Path]:
        """Newest first."""
        folder = self.path / "states"
        found = [(int(m[1]), p) for p in folder.glob("state_*") if (m := _STATE.fullmatch(p.name))]
        return [p for _, p in sorted(found, reverse=True)]

    def save(self, state: TrainState, keep: int = 3, meta: Mapping[str, Any] | None = None) -> Path:
        """Saves a state, then removes all but the last `keep`. A failure loses nothing that was saved before."""
        path = self.path / "states" / f"state_{state.step:08d}.safetensors"
        with explained(self, f"step {state.step} was not saved"):
            state.save(path, {"run": self.identity(), **(meta or {})})
            for old in self.states()[keep:]:
                old.unlink(missing_ok=True)
        return path

    def resume(self, state: TrainState, say: Say = lambda line: None) -> bool:
        """Loads the newest sound state; False where the run has none yet. Refused ones are said, with the reason."""
        reasons = []
        for path in self.states():
            try:
                self.load(path, state)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reasons.append(str(error))
                say(f"{path.name} is refused: {error}")
                continue
            if reasons:
                say(f"going on from {path.name}, step {state.step}, the newest sound state")
            return True
        if reasons:
            raise ValueError(
                f"none of the {len(reasons)} states of run {self.name!r} can be used. The newest: {reasons[0]}. "
                "Start a new run (resume: new), or delete this one"
            )
        return False

    def load(self, path: Path, state: TrainState) -> None:
        """One state, if it is what its name says and belongs to this run."""
        match = _STATE.fullmatch(path.name)
        header = peek(path)
        mine = self.identity()
        if match is None or header.get("step") != int(match[1]):
            raise ValueError(f"{path.name} holds step {header.get('step')}: the file was swapped or renamed")
        if mine and header.get("run") not in ("", mine):
            raise ValueError(f"{path.name} belongs to another run (id {header.get('run')}, this one is {mine})")
        state.load(path)

    # --- curves

    def log(self, record: Mapping[str, Any]) -> None:
        with explained(self, "a line of curves.jsonl was not written"):
            with open(self.path / "curves.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(record)) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of the curves, ordered by step; a line that a killed process left torn is dropped."""
        try:
            text = (self.path / "curves.jsonl").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        found: dict[int, dict[str, Any]] = {}
        for line in text.splitlines():
            try:
                record = json.loads(line)
                found[int(record["step"])] = record
            except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                continue
        return [found[k] for k in sorted(found)]

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Forgets the lines and snapshots after `step`, which a resumed run makes again; returns what is left."""
        kept = [r for r in self.history() if r["step"] <= step]
        if (self.path / "curves.jsonl").exists():
            self.write_text("curves.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
        with explained(self):
            for path in self.snapshots():
                if step_of(path) > step:
                    shutil.rmtree(path)
            for left in self.leftovers():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        return kept

    def leftovers(self) -> list[Path]:
        """What a killed process was writing aside, or had just renamed and not yet cleared away."""
        folders = ("states", "snapshots", "previews", "pairs", "pool", "sliders", "lora", "model")
        places = (self.path, *(self.path / name for name in folders))
        return [left for place in places for left in place.glob(".*.part")]

    # --- snapshots

    def snapshots(self) -> list[Path]:
        """Oldest first."""
        found = (self.path / "snapshots").glob("step_*")
        return sorted((p for p in found if _SNAPSHOT.fullmatch(p.name)), key=step_of)

    @contextmanager
    def new_snapshot(self, step: int) -> Iterator[Path]:
        """A folder to fill; it appears under its name when all went well."""
        path = self.path / "snapshots" / f"step_{step:08d}"
        part = path.with_name(f".{path.name}.part")
        with explained(self, f"the snapshot of step {step} was not written"):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                yield part
                shutil.rmtree(path, ignore_errors=True)
                os.replace(part, path)
            finally:
                shutil.rmtree(part, ignore_errors=True)

    # --- small files, each written aside and renamed

    def write_text(self, name: str, text: str) -> Path:
        path = self.path / name
        part = path.with_name(f".{path.name}.part")
        with explained(self, f"{name} was not written"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(part, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(finite(value), indent=2, default=str) + "\n")

    def write_picture(self, name: str, picture: Any) -> Path:
        """A Pillow picture as PNG."""
        path = self.path / name
        part = path.with_name(f".{path.name}.part")
        with explained(self, f"{name} was not written"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(part, format="PNG")
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        return path


def step_of(path: Path) -> int:
    """The step in the name of a state or a snapshot."""
    match = _STATE.fullmatch(path.name) or _SNAPSHOT.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is neither a state nor a snapshot of a run")
    return int(match[1])


def peek(path: Path) -> dict[str, Any]:
    """A state's header alone, without its tensors."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return header_of(file.metadata() or {})
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path.name} is not a sound training state ({error})") from error


@contextmanager
def explained(run: Run, lost: str = "") -> Iterator[None]:
    """Failures to write, in words that say what is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = run.states()
        left = f"the newest state on disk is that of step {step_of(kept[0])}" if kept else "no state was saved yet"
        raise Unwritable(
            f"the run folder {run.path} cannot be written ({error}){'; ' + lost if lost else ''}; {left}. "
            "Free disk space or make the folder writable, then resume"
        ) from error


def finite(value: Any) -> Any:
    """JSON knows no NaN: null takes its place."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def acquire(file: IO[bytes]) -> bool:
    """False where somebody else holds the lock. The system frees it when its holder dies, however that happens."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(LOCK_AT)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: better to work unguarded than not at all
        return True
    return True


def release(file: IO[bytes]) -> None:
    """Closing is enough except on Windows, which would free the byte late."""
    if os.name == "nt":
        import msvcrt

        file.seek(LOCK_AT)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def holder(file: IO[bytes]) -> str:
    try:
        note = json.loads(file.read(4096))
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
