"""Makes dmd_core importable without the pack's root on sys.path, where nodes/ would shadow ComfyUI's nodes.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _load(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


class _RootIsNotAPackage:
    """The root has an __init__.py for ComfyUI; pytest must not import it. Only a plugin is asked about it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(_RootIsNotAPackage())


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="not run: no CUDA device"))


if "dmd_core" not in sys.modules:
    _load("dmd_core", ROOT / "dmd_core")

# two threads on two busy cores are slower than one, and results would depend on the count
torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
