"""Links of all guides and help pages lead somewhere, and the computed table is the one that the code computes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "nodes" / "web" / "docs").glob("*.md"),
    *(ROOT / "dmd_core").rglob("*.md"),
]
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)>\s]+)>?[^)]*\)")
FENCE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def broken(page: Path) -> list[str]:
    """Relative links of a page whose file or heading is not there."""
    found = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (heading and heading not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    assert broken(page) == []


def test_control_broken_links_are_seen(tmp_path: Path):
    (tmp_path / "other.md").write_text("# A title: here\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md) [b](other.md#a-title-here) [c](none.md) [d](other.md#none) [e](#page) [f](#gone)\n"
        "[g](https://example.org) ![h](none.png) `[i](none.md)`\n```\n[j](none.md)\n```\n",
        encoding="utf-8",
    )
    assert broken(page) == ["none.md", "other.md#none", "#gone", "none.png"]


def test_every_guide_is_in_the_index():
    guides = {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"}
    index = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert guides <= index


def test_pages_speak_of_nodes_that_exist():
    """`DMD_...` in any page is a node, or the page says that it is none."""
    import json

    nodes = set(json.loads((ROOT / "tests" / "golden" / "nodes.json").read_text(encoding="utf-8")))
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "nodes" / "web" / "docs").glob("*.md")]:
        named = set(re.findall(r"\bDMD_[A-Z]\w+", page.read_text(encoding="utf-8")))
        assert named <= nodes, page.name


@pytest.mark.slow
def test_the_table_of_memory_is_what_the_plan_computes():
    pytest.importorskip("diffusers")
    run = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "memory.py")], capture_output=True, text=True, timeout=900, check=True
    )
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert run.stdout.count("\n") > 10
    for line in run.stdout.strip().splitlines():
        assert line in page
