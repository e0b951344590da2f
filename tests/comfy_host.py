"""Finding a ComfyUI on this machine, and running the host tests in it.

Host tests run in ComfyUI's own Python and in their own process: its root must come first on sys.path, and the pack's
root must never be there (its `nodes/` would shadow ComfyUI's nodes.py).
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

PACK = Path(__file__).resolve().parents[1]


def comfy_path() -> Path | None:
    """COMFYUI_PATH, else the ComfyUI whose custom_nodes holds this pack, else ~/comfy/ComfyUI."""
    places = [os.environ.get("COMFYUI_PATH"), PACK.parents[1] if PACK.parent.name == "custom_nodes" else None]
    for place in (*places, Path.home() / "comfy" / "ComfyUI"):
        if place and (Path(place) / "comfy" / "model_patcher.py").is_file():
            return Path(place).resolve()
    return None


def comfy_python(root: Path) -> str:
    """COMFYUI_PYTHON, else the interpreter of a virtual environment inside ComfyUI, else this one."""
    inside = [root / env / part for env in (".venv", "venv") for part in ("bin/python", "Scripts/python.exe")]
    found = [str(p) for p in inside if p.is_file()]
    return os.environ.get("COMFYUI_PYTHON") or (found[0] if found else sys.executable)


def missing() -> str | None:
    """Why host tests cannot run here, in one line; None where they can."""
    if comfy_path() is None:
        return "no ComfyUI found: set COMFYUI_PATH (and COMFYUI_PYTHON) to run the host tests"
    return None


def run_in_comfy(args: Sequence[str], timeout_s: float = 1800) -> subprocess.CompletedProcess[str]:
    """`python ARGS` in ComfyUI's interpreter with ComfyUI on the path: a script, or ["-m", "pytest", ...]."""
    root = comfy_path()
    if root is None:
        raise ValueError(missing())
    env = {
        **os.environ,
        "COMFYUI_PATH": str(root),
        "PYTHONPATH": os.pathsep.join([str(root), str(PACK / "tests")]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "DMD_IN_COMFY": "1",
        # ComfyUI looks around its working directory; nothing may land in the checkout
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [comfy_python(root), *args]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)


def run_tests_in_comfy(file: Path, *flags: str, timeout_s: float = 1800) -> None:
    """The `comfy` tests of a file, in ComfyUI's process; fails with their output."""
    config = ["-c", str(PACK / "pyproject.toml"), "--rootdir", str(PACK), "-o", "addopts=--strict-markers"]
    run = run_in_comfy(["-m", "pytest", "-q", "-p", "no:cacheprovider", *config, *flags, str(file)], timeout_s)
    assert run.returncode == 0, f"{file.name} failed inside ComfyUI:\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"


def in_comfy() -> bool:
    """Is this the process that run_in_comfy started?"""
    return os.environ.get("DMD_IN_COMFY") == "1"


def start_comfy(*flags: str, device: str = "cpu") -> None:
    """Options as main.py would set them; before anything of `comfy` is imported."""
    import comfy.options

    sys.argv = [sys.argv[0], *(["--cpu"] if device == "cpu" else []), *flags]
    comfy.options.enable_args_parsing()
    import comfy.cli_args  # parses now, while argv is ours


def load_pack() -> ModuleType:
    """The pack's root module as ComfyUI loads it: named by its path, found by location, not through sys.path."""
    name = str(PACK).replace(".", "_x_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def pack_module(name: str) -> ModuleType:
    """`pack_module("nodes.comfy_denoiser")`"""
    return importlib.import_module(f"{load_pack().__name__}.{name}")
