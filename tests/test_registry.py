"""What `comfy node validate` and the registry ask of a pack, and names of files that every system can hold."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd_core.runs import check_name
from dmd_core.weights.files import free_path

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
OURS_TO_LEAVE = {"torch", "torchvision", "torchaudio", "numpy", "transformers", "pillow"}  # ComfyUI brings them
NEEDED = (
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "LICENSE",
    "README.md",
    "nodes/",
    "dmd_core/",
    "locales/",
)
PIN = re.compile(r"==|~=|<|===")
OPERATING_SYSTEMS = ("OS Independent", "Microsoft :: Windows", "POSIX :: Linux", "MacOS")
GPUS = ("NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in run.stdout.split("\0") if name and (ROOT / name).exists()]


def requirement(line: str) -> str:
    return re.split(r"[<>=!~;\[ ]", line.strip(), maxsplit=1)[0].lower()


def faults(pyproject: dict) -> list[str]:
    """What the registry would refuse, or what the project promises not to do."""
    about, comfy = pyproject.get("project", {}), pyproject.get("tool", {}).get("comfy", {})
    found = [f"project.{k}" for k in ("name", "version", "description", "license", "readme") if not about.get(k)]
    found += [f"tool.comfy.{k}" for k in ("PublisherId", "DisplayName", "Icon") if not comfy.get(k)]
    name = about.get("name", "")
    if not re.fullmatch(r"[a-z][a-z0-9._-]{0,99}", name) or "comfyui" in name:
        found.append(f"name {name!r}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", about.get("version", "")):
        found.append(f"version {about.get('version')!r}")
    if not about.get("urls", {}).get("Repository", "").startswith("https://github.com/"):
        found.append("project.urls.Repository")
    for line in about.get("dependencies", []):
        if requirement(line) in OURS_TO_LEAVE or PIN.search(line.partition(";")[0]):
            found.append(f"dependency {line}")
    for line in about.get("classifiers", []):
        head, _, rest = line.partition(" :: ")
        known = OPERATING_SYSTEMS if head == "Operating System" else GPUS if head == "Environment" else ()
        if rest.removeprefix("GPU :: ") not in known:
            found.append(f"classifier {line}")
    if not re.fullmatch(r">=\d+(\.\d+)+", comfy.get("requires-comfyui", "")):
        found.append(f"requires-comfyui {comfy.get('requires-comfyui')!r}")
    if "web" in comfy:
        found.append("tool.comfy.web: WEB_DIRECTORY has it already")
    return found


def test_the_registry_has_what_it_asks_for():
    assert faults(project()) == []


def test_control_what_the_registry_refuses_is_seen():
    bad = project()
    bad["project"]["version"] = "0.1"
    bad["project"]["name"] = "ComfyUI-DMD"
    bad["project"]["dependencies"] += ["torch>=2.0", "einops==0.8.0"]
    bad["project"]["classifiers"] = ["Environment :: GPU :: Abacus"]
    bad["tool"]["comfy"].update({"Icon": "", "web": "nodes/web", "requires-comfyui": "0.22"})
    assert faults(bad) == [
        "tool.comfy.Icon",
        "name 'ComfyUI-DMD'",
        "version '0.1'",
        "dependency torch>=2.0",
        "dependency einops==0.8.0",
        "classifier Environment :: GPU :: Abacus",
        "requires-comfyui '0.22'",
        "tool.comfy.web: WEB_DIRECTORY has it already",
    ]


def test_requirements_are_those_of_pyproject():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    given = [line.replace("'", '"') for line in lines if line.strip() and not line.startswith("#")]
    assert given == [line.replace("'", '"') for line in project()["project"]["dependencies"]]


def test_icon_banner_and_licence_are_in_the_repository():
    comfy, about = project()["tool"]["comfy"], project()["project"]
    for url in (comfy["Icon"], comfy["Banner"]):
        path = ROOT / url.partition("/main/")[2]
        assert path.suffix == ".svg"
        text = path.read_text(encoding="utf-8")
        assert text.startswith("<svg")
        assert "<script" not in text
        assert len(text) < 300_000
    assert (ROOT / about["license"]["file"]).is_file()
    assert (ROOT / about["readme"]).is_file()


def ignored(name: str) -> bool:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return any(name.startswith(p) if p.endswith("/") else fnmatch(name, p) for p in patterns)


def test_the_archive_holds_what_runs_and_leaves_out_what_only_tests():
    kept = [name for name in tracked() if not ignored(name)]
    assert all(any(name.startswith(part) for name in kept) for part in NEEDED)
    assert not [name for name in kept if name.startswith(("tests/", "bench/"))]
    lost = [name for name in tracked() if ignored(name) and name.startswith(("nodes/", "dmd_core/", "locales/"))]
    assert lost == []


@pytest.mark.skipif(shutil.which("ruff") is None and not (ROOT / ".venv/bin/ruff").exists(), reason="no ruff")
def test_the_registrys_own_lints(tmp_path: Path):
    """comfy node validate: no eval, no exec, no statements hidden behind a semicolon."""
    ruff = str(ROOT / ".venv/bin/ruff") if (ROOT / ".venv/bin/ruff").exists() else "ruff"
    command = [ruff, "check", "--isolated", "--no-cache", "-q", "--select", "S102,S307,E702"]
    shipped = [str(ROOT / part) for part in ("__init__.py", "nodes", "dmd_core")]
    done = subprocess.run([*command, *shipped], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "bad.py").write_text("eval('1'); exec('2')\n", encoding="utf-8")
    assert subprocess.run([*command, str(tmp_path)], capture_output=True, check=False).returncode == 1


# --- file names -------------------------------------------------------------------------------------------------------

RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}


def windows_can_hold(part: str) -> bool:
    """One name of a path, as Windows documents it."""
    plain = part.partition(".")[0].rstrip(" ").lower()
    return (
        bool(part) and not re.search(r'[<>:"/\\|?*\x00-\x1f]', part) and part[-1] not in ". " and plain not in RESERVED
    )


def test_every_file_of_ours_can_be_checked_out_on_windows():
    names = tracked()
    assert [n for n in names if not all(windows_can_hold(part) for part in n.split("/"))] == []
    assert len({n.casefold() for n in names}) == len(names)
    assert max(map(len, names)) < 120


def test_control_what_windows_cannot_hold_is_seen():
    bad = ("a:b", "aux", "Aux.txt", "com1.safetensors", "what?", "end.", "end ", "", "a\\b", "nul .txt")
    assert not any(windows_can_hold(name) for name in bad)
    assert windows_can_hold("Shapes - 4 steps against 40.json")


NAMES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["aux", "con.x", "a:b", "a/b", "..", "a\\..\\b", "C:\\x", "x ", ".x", "NUL", "lpt9.y", "a/aux/b"]),
)


@settings(max_examples=200, deadline=None)
@given(NAMES)
def test_names_of_runs_and_files_are_refused_or_hold_on_windows(name: str):
    try:
        run = PureWindowsPath("D:/out/dmd") / check_name(name)
    except ValueError:
        pass
    else:
        assert run.parent == PureWindowsPath("D:/out/dmd")
        assert windows_can_hold(run.name)
    try:
        path = free_path(ROOT / "does not exist", name)
    except (ValueError, OSError):
        return
    parts = path.relative_to(ROOT / "does not exist").parts
    below = PureWindowsPath("D:/loras").joinpath(*parts)
    assert below.is_relative_to("D:/loras")
    assert all(windows_can_hold(part) for part in parts)
