"""The direction of imports: workflows -> nodes -> dmd_core, and inside dmd_core never back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = sorted((ROOT / "dmd_core").rglob("*.py"))
HOST = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "comfy_kitchen",
    "folder_paths",
    "nodes",
    "server",
    "execution",
    "latent_preview",
}
HEAVY = {"diffusers", "transformers"}
GROUND = {"schedule", "denoiser", "conditioning", "adapters", "features", "losses", "samplers", "train", "trainstate"}
ABOVE = {"objectives", "sliders", "inpaint", "backends", "shapes", "weights", "families", "__main__", "demo"}


def imports(path: Path) -> set[tuple[int, str]]:
    """(relative level, module) of every import in the file, also inside functions."""
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(0, a.name) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, f"{node.module or ''}.{a.name}".strip(".")) for a in node.names}
    return found


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_knows_nothing_of_the_host(path: Path):
    absolute = {name.partition(".")[0] for level, name in imports(path) if level == 0}
    assert not absolute & HOST
    assert "dmd_core" not in absolute, "imports inside the pack are relative: ComfyUI names the pack by its path"
    if path.parent.name != "backends":
        assert not absolute & HEAVY, "diffusers and transformers are imported in backends/ only"


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_layer_imports_nothing_above_it(name: str):
    relative = {module.partition(".")[0] for level, module in imports(ROOT / "dmd_core" / f"{name}.py") if level == 1}
    assert not relative & ABOVE


def test_only_nodes_and_tests_import_comfy():
    pack = [p for folder in ("nodes",) for p in (ROOT / folder).rglob("*.py")]
    assert all(not {n for level, n in imports(p) if level == 0 and n.startswith("dmd_core")} for p in pack)


def test_the_check_sees_an_import_inside_a_function(tmp_path: Path):
    sly = tmp_path / "sly.py"
    sly.write_text("def f():\n    from comfy.sd import VAE\n    import diffusers\n")
    assert {n.partition(".")[0] for _, n in imports(sly)} == {"comfy", "diffusers"}
