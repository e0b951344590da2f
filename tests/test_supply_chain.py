"""Nothing of ours runs what a file says, nothing of ours talks to a network. Each check is shown what it must find."""

import ast
import importlib
import pickle
import pkgutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_headless import world, write  # noqa: F401 - a fixture

import dmd_core
from dmd_core import headless, shapes, trainstate
from dmd_core.pairs import read_pairs
from dmd_core.prompts import PromptCache, read_prompts
from dmd_core.runfile import read_run_file
from dmd_core.runs import Run, peek
from dmd_core.snapshots import read_measures
from dmd_core.weights.doctor import describe, diagnose, repair
from dmd_core.weights.extract import open_weights
from dmd_core.weights.header import read_header
from dmd_core.weights.lora import read_lora
from dmd_core.weights.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [ROOT / "__init__.py", *sorted(p for f in ("dmd_core", "nodes") for p in (ROOT / f).rglob("*.py"))]

# pickletools is not among them: it reads a pickle's instructions and runs none
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
NETWORK = {"socket", "ssl", "urllib", "http", "requests", "aiohttp", "httpx", "ftplib", "smtplib", "socketserver"}
NETWORK |= {"websockets", "urllib3", "wandb", "gradio_client"}
STARTERS = {"subprocess", "multiprocessing", "pty", "code", "runpy"}
RUNNERS = {"eval", "exec", "compile", "__import__", "breakpoint"}
DOWNLOADS = {"hf_hub_download", "snapshot_download", "from_pretrained", "from_single_file", "load_dataset"}
DOWNLOADS |= {"load_state_dict_from_url", "download_url_to_file", "fetch_original_config"}
SYSTEM = {"system", "popen", "execv", "execve", "execvp", "spawnl", "spawnv", "startfile"}
NAMES_THE_HOST = {("dmd_core/runs.py", "socket")}  # gethostname, for the note in a run's lock; checked below


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call, the last part of what is called, and the whole of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            whole = ast.unparse(node.func)
            yield node, whole.rpartition(".")[2], whole


def offences(source: str, where: str = "") -> list[str]:
    tree, found = ast.parse(source), []
    # functions that the scan knows by their whole name may not come in under a shorter one
    whole_names = {"torch": {"load"}, "numpy": {"load"}, "os": SYSTEM, "builtins": RUNNERS}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            taken = whole_names.get(str(node.module), set()) & {a.name for a in node.names}
            found += [f"imports {name} from {node.module}" for name in sorted(taken)]
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for top in (n.partition(".")[0] for n in names):
            if top in UNPICKLERS | NETWORK | STARTERS and (where, top) not in NAMES_THE_HOST:
                found.append(f"imports {top}")
    given = {id(n): {k.arg: ast.unparse(k.value) for k in n.keywords} for n, _, _ in calls(tree)}
    for node, last, whole in calls(tree):
        keywords = given[id(node)]
        if whole.removeprefix("builtins.") in RUNNERS:
            found.append(f"calls {whole}")
        module = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if last == "import_module" and str(module).partition(".")[0] in UNPICKLERS | NETWORK | STARTERS:
            found.append(f"imports {module} by its name")
        if whole in ("torch.load", "torch.jit.load", "torch.hub.load") and keywords.get("weights_only") != "True":
            found.append(f"calls {whole} without weights_only=True")
        if whole.endswith(("np.load", "numpy.load")) and keywords.get("allow_pickle") == "True":
            found.append(f"calls {whole} with allow_pickle")
        if whole.startswith("os.") and last in SYSTEM:
            found.append(f"calls {whole}")
        # **options are looked up in the function's own tables: see the test below
        if last in DOWNLOADS and keywords.get("local_files_only") != "True" and None not in keywords:
            found.append(f"calls {whole} without local_files_only=True")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_pickle_no_eval_no_network_no_shell(path: Path):
    assert offences(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from cloudpickle import loads", "imports cloudpickle"),
        ("import torch\ntorch.load('x')", "without weights_only"),
        ("import torch\ntorch.load('x', weights_only=False)", "without weights_only"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("eval('1')", "calls eval"),
        ("class A:\n    def f(self):\n        exec(self.x)", "calls exec"),
        ("__import__('os')", "calls __import__"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess", "imports subprocess"),
        ("import urllib.request", "imports urllib"),
        ("from huggingface_hub import snapshot_download\nsnapshot_download('a/b')", "without local_files_only"),
        ("AutoModel.from_pretrained('a/b', local_files_only=False)", "without local_files_only"),
        ("import socket", "imports socket"),
        ("from torch import load", "imports load from torch"),
        ("from os import system as go", "imports system from os"),
        ("import builtins\nbuiltins.eval('1')", "calls builtins.eval"),
        ("from importlib import import_module\nimport_module('pickle')", "imports pickle by its name"),
        ("import importlib\nimportlib.import_module('urllib.request')", "imports urllib.request by its name"),
    ],
)
def test_control_the_scan_sees_it(source: str, what: str):
    assert any(what in found for found in offences(source, "dmd_core/other.py"))
    assert offences("import re\nre.compile('x')\nmodel.eval()\nimport pickletools") == []


def test_the_lock_asks_the_system_for_its_name_and_for_nothing_else():
    for where, module in NAMES_THE_HOST:
        tree = ast.parse((ROOT / where).read_text(encoding="utf-8"))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == module}
        assert used == {"gethostname"}


def test_options_that_are_passed_on_are_offline_too():
    """What the scan lets through: calls with **options must build those with local_files_only."""
    for path in SHIPPED:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            passed = [n for n, last, _ in calls(function) if last in DOWNLOADS and None in {k.arg for k in n.keywords}]
            text = ast.unparse(function)
            assert not passed or "'local_files_only': True" in text or "local_files_only=True" in text, function.name


# --- a hostile file at every door


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').write('ran')",))


def with_weights(path: Path) -> None:
    with open_weights(path):
        pass


def cached(path: Path) -> None:
    """A prompt's entry in the cache: damaged ones count as missing."""
    cache = PromptCache(path.parent, "clip")
    cache.path("a cat").parent.mkdir(parents=True, exist_ok=True)
    cache.path("a cat").write_bytes(path.read_bytes())
    if cache.read("a cat") is None:
        raise ValueError("missing")


def measured(path: Path) -> None:
    (path.parent / "measures.json").write_bytes(path.read_bytes())
    if read_measures(path.parent) is None:
        raise ValueError("not judged")


def settings(path: Path) -> None:
    (path.parent / "run.json").write_bytes(path.read_bytes())
    if Run(path.parent).settings() == {}:
        raise ValueError("none")


DOORS: dict[str, Callable[[Path], object]] = {
    "training state": trainstate.read_state,
    "its header": peek,
    "pairs": read_pairs,
    "prompts": read_prompts,
    "prompt cache": cached,
    "run file": read_run_file,
    "run settings": settings,
    "figures of a snapshot": measured,
    "LoRA": read_lora,
    "weights' header": read_header,
    "extraction": with_weights,
    "doctor": diagnose,
    "its words": describe,
    "its repair": lambda path: repair(path, path.parent / "out", "mended"),
    "recipe": lambda path: Recipe.from_json(path.read_bytes().decode("latin-1")),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["torch archive", "bare pickle"])
def test_a_hostile_file_runs_nowhere(tmp_path: Path, door: str, kind: str):
    path, marker = tmp_path / "evil.safetensors", tmp_path / "ran.txt"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save({"weight": torch.ones(2), "x": Bomb(marker)}, path)
    with pytest.raises((ValueError, SafetensorError)):
        DOORS[door](path)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    # control: the bomb is live
    pickle.loads(pickle.dumps(Bomb(marker)))  # noqa: S301
    assert marker.exists()


# --- no network


class Reached(BaseException):
    """Not an Exception, so that nobody's fallback swallows it."""


@pytest.fixture
def blocked(monkeypatch) -> list[str]:
    """Every way out of this process is closed, and knocking is noted."""
    knocked: list[str] = []

    def refuse(name: str) -> Callable[..., None]:
        def no(*args: object, **_: object) -> None:
            knocked.append(f"{name}{args[-1:]}")
            raise Reached(name)

        return no

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse(name))
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse(name))
    return knocked


def test_training_sampling_saving_and_reading_use_no_network(blocked, world):  # noqa: F811
    for module in pkgutil.walk_packages(dmd_core.__path__, "dmd_core."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    folder = headless.train_from(write(world, "dmd2", 2, "critic_updates = 1"), say=lambda line: None)
    path = next((folder / "lora").glob("*.safetensors"))
    assert read_lora(path).recipe.objective == "dmd2"
    assert describe(path)
    with torch.no_grad():
        shapes.load_autoencoder()
    assert blocked == []


def test_control_a_call_home_is_noticed(blocked):
    import urllib.request

    with pytest.raises(Reached):
        urllib.request.urlopen("http://example.invalid/")
    with pytest.raises(Reached), socket.socket() as s:
        s.connect(("127.0.0.1", 9))
    assert len(blocked) == 2
