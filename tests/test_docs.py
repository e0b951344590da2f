"""Links of all guides and help pages lead somewhere, and the computed table is the one that the code computes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dmd_core import alarms, discriminators, plan, snapshots
from dmd_core.drive import DriveConfig
from dmd_core.families import FAMILIES
from dmd_core.inpaint import dense_steps
from dmd_core.runfile import DataSettings, LoraSettings
from dmd_core.sliders.settings import DiscoverySettings, SliderSettings

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


def share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def guidance(name: str) -> float:
    """What Distill takes when guidance is 0."""
    low, high = FAMILIES[name].cfg
    return min(max(DataSettings.pair_guidance, low), high)


def constant(file: str, name: str) -> float:
    """Of a file that needs ComfyUI to be imported."""
    found = re.search(rf"^{name} = ([\d.]+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return float(found[1])


FIGURES = {
    "docs/curves.md": [
        f"{alarms.CRITIC_RISE:g} times its best, over {alarms.WINDOW} steps",
        f"below {share(alarms.DIVERSITY[0])}",
        f"above {share(alarms.DIVERSITY[1])}",
        f"at least {alarms.LEAST:g}",
        f"diversity of {snapshots.DIVERSE[0]:g} to {snapshots.DIVERSE[1]:g}",
        f"Below {snapshots.DIVERSE[0]:g}",
        f"above {snapshots.DIVERSE[1]:g}",
    ],
    "docs/settings.md": [f"{plan.CONTEXT / plan.GIB:.1f} GB for CUDA", f"exceed {share(plan.USABLE)}"],
    "docs/distil.md": [
        f"{guidance('sdxl'):g} for SDXL, {guidance('sd15'):g} for SD1.5",
        f"{guidance('sd3'):g} for SD3",
        f"**rank.** {LoraSettings.rank} by default",
    ],
    "docs/inpainting.md": [
        f"({constant('nodes/lazy_inpaint.py', 'MANY_STEPS'):g} steps and more)",
        f"Above {share(constant('nodes/lazy_inpaint.py', 'LITTLE_GAIN'))}",
    ],
    "nodes/web/docs/DMD_TrainSlider.md": [f"Words, {SliderSettings.steps} steps, rank {SliderSettings.rank}"],
    "nodes/web/docs/DMD_DiscoverSliders.md": [
        f"{DiscoverySettings.sliders} sliders from one topic, {DiscoverySettings.pool} pictures, "
        f"rank {DiscoverySettings.rank}"
    ],
    "nodes/web/docs/DMD_InspectRun.md": [f"diversity of {snapshots.DIVERSE[0]:g} to {snapshots.DIVERSE[1]:g}"],
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_in_guides_are_those_of_the_code(name: str):
    page = " ".join((ROOT / name).read_text(encoding="utf-8").split())
    assert [f for f in FIGURES[name] if f not in page] == []


def test_words_in_guides_are_those_of_the_code():
    """Where a guide says a figure in words: the alarms' bounds, the steps that refresh computes whole, saving."""
    curves = (ROOT / "docs" / "curves.md").read_text(encoding="utf-8")
    assert discriminators.alarms(0.951, 1.0)
    assert discriminators.alarms(0.8, 15.1)
    assert discriminators.alarms(0.549, 1.0)
    assert discriminators.alarms(0.8, 0.09)
    assert not discriminators.alarms(0.9, 10.0)
    assert "more than 95 % right, or a gap above 15" in curves
    assert "less than 55 % right, or a gap below 0.1" in curves
    assert DriveConfig.save_minutes == 5
    assert "or five minutes" in curves
    assert sorted(dense_steps(20)) == [0, 1, 2, 7, 12, 17]
    assert "the first three steps and every fifth" in (ROOT / "docs" / "inpainting.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_of_memory_is_what_the_plan_computes():
    pytest.importorskip("diffusers")
    run = subprocess.run(
        [sys.executable, "-m", "bench", "settings"], cwd=ROOT, capture_output=True, text=True, timeout=900, check=True
    )
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert run.stdout.count("\n") > 10
    for line in run.stdout.strip().splitlines():
        assert line in page


def test_the_disk_of_whole_copies_is_what_the_plan_counts():
    """SDXL's network has 2568 million weights (docs/benchmarks.md, memory on paper)."""
    count = 2_568_000_000
    player = {"base": 2 * count, "trained": 8 * count, "averages": 4 * count, "optimizer": 16 * count}
    made = plan.Plan(device="", steps=0, seconds_per_step=0, peak=None, copies=2, snapshot=4 * count, **player)
    page = (ROOT / "docs" / "distil.md").read_text(encoding="utf-8").replace("\n", " ")
    sizes = [v / plan.GIB for v in (made.state, made.snapshot, plan.disk(made, 10_000, DriveConfig()))]
    assert "For SDXL that is {:.0f} GB and {:.2f} GB, and".format(*sizes) in page
    assert f"up to {sizes[2]:.0f} GB" in page
    assert (DriveConfig().keep, DriveConfig().keep_snapshots) == (3, 20)
