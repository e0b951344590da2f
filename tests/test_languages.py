"""Help and languages: every node and every input says what it is, in every language, in words of its own.

All of it is read from the golden of the schemas, so no ComfyUI is needed; tests/test_comfy_schemas.py holds that golden
against the live nodes.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from node_schemas import LOCALES, PACK, Schemas, english, golden, walk

HELP = PACK / "nodes" / "web" / "docs"
LANGUAGES = ("zh", "ja", "ko", "fr", "de", "es")
# names of things that are called the same in that language; never sentences
NAMES = {"LoRA", "VAE"}
SAME = {"de": {"Prompts", "Samples", "Latent"}}
SPECIAL = re.compile(r"[{}@$|]")  # the frontend's message compiler reads these as its own syntax, but for tooltips
HEADINGS = ("## When", "## Inputs", "## Outputs", "## Typical values", "## Mistakes")


def strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every string in a language file."""
    if isinstance(value, str):
        yield where, value
    else:
        for key, inner in value.items():
            yield from strings(inner, f"{where}/{key}")


def translation(language: str, file: str = "nodeDefs.json") -> dict[str, str]:
    return dict(strings(json.loads((LOCALES / language / file).read_text(encoding="utf-8"))))


def untold(schemas: Schemas) -> list[str]:
    """Inputs and outputs without a tooltip, nodes without a description or search words."""
    found = []
    for node, s in schemas.items():
        found += [f"{node}.{name}" for name, spec in walk(s["input"]) if not spec[1].get("tooltip")]
        found += [f"{node} -> {n}" for n, t in zip(s["output_name"], s["output_tooltips"], strict=True) if not t]
        found += [f"{node}: {k}" for k in ("display_name", "description", "search_aliases", "category") if not s[k]]
    return found


def mistranslated(given: dict[str, str], wanted: dict[str, str], same: set[str]) -> list[str]:
    """What is missing, too much, English still, or would be read as syntax."""
    found = [f"missing {k}" for k in wanted if not given.get(k, "").strip()]
    found += [f"unknown {k}" for k in given.keys() - wanted.keys()]
    for key, text in given.items():
        if text.casefold() == wanted.get(key, "").casefold() and text not in same:
            found.append(f"English {key}: {text}")
        if SPECIAL.search(text) and not key.endswith("tooltip"):
            found.append(f"special letter {key}: {text}")
    return found


def unexplained(schema: dict[str, Any], page: str) -> list[str]:
    """Headings that a help page lacks, and inputs that it does not name."""
    named = {name for name, _ in walk(schema["input"])}
    # of rows that are all alike (slider_1 to slider_8) the first one is explained
    firsts = {name: re.sub(r"_\d+$", "_1", name) for name in named}
    named = {first if first in named else name for name, first in firsts.items()}
    lacking = [f"`{name.rpartition('.')[2]}`" for name in named]
    return [h for h in HEADINGS if f"\n{h}\n" not in page] + sorted({n for n in lacking if n not in page})


def test_every_node_input_and_output_says_what_it_is():
    assert untold(golden()) == []


def test_control_a_missing_tooltip_is_seen():
    schemas = golden()
    del schemas["DMD_Save"]["input"]["required"]["run"][1]["tooltip"]
    del schemas["DMD_Distill"]["input"]["required"]["method"][1]["options"][1]["inputs"]["required"]["steps"][1][
        "tooltip"
    ]
    schemas["DMD_Save"]["output_tooltips"][0] = None
    assert untold(schemas) == ["DMD_Distill.method.steps", "DMD_Save.run", "DMD_Save -> path"]


def test_categories_are_ours_and_aliases_lead_here():
    for node, schema in golden().items():
        assert schema["category"].startswith("DMD/"), node
        assert "dmd" in schema["search_aliases"], node
        assert schema["input_order"]["required"] == list(schema["input"]["required"]), node


def test_the_english_file_is_what_the_nodes_say():
    assert translation("en") == dict(strings(english(golden())))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_string_is_there_and_not_english(language: str):
    assert mistranslated(translation(language), translation("en"), NAMES | SAME.get(language, set())) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_survive_translation(language: str):
    """A default or a size that is wrong in one language; words for numbers (two, three) are free."""
    english_, given = translation("en"), translation(language)
    for key, text in english_.items():
        if key.endswith(("tooltip", "description")):
            there = re.sub(r"(\d),(\d)", r"\1.\2", given[key])
            lost = [n for n in re.findall(r"\d+(?:\.\d+)?", text) if n not in re.findall(r"\d+(?:\.\d+)?", there)]
            assert not lost, f"{language} {key}: {lost} of {text!r} are not in {given[key]!r}"


def test_control_missing_english_and_special_strings_are_seen():
    wanted = {"a": "The seed.", "b": "vae", "c": "Steps."}
    assert mistranslated({"a": "the seed.", "b": "VAE", "d": "x|y"}, wanted, {"VAE"}) == [
        "missing c",
        "unknown d",
        "English a: the seed.",
        "special letter d: x|y",
    ]


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_categories_have_a_name(language: str):
    parts = {part for s in golden().values() for part in s["category"].split("/")[1:]}
    assert {k.rpartition("/")[2] for k in translation(language, "main.json")} >= parts


def test_no_language_is_half_there():
    assert sorted(p.name for p in LOCALES.iterdir()) == sorted(["en", *LANGUAGES])


@pytest.mark.parametrize("node", sorted(golden()))
def test_every_node_has_a_help_page_that_names_its_inputs(node: str):
    page = (HELP / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {golden()[node]['display_name']}\n")
    assert unexplained(golden()[node], page) == []


@pytest.mark.parametrize("node", sorted(golden()))
def test_every_help_page_has_a_small_picture_with_words_for_it(node: str):
    page = (HELP / f"{node}.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", page)
    assert pictures
    for words, name in pictures:
        assert len(words) > 20
        assert (HELP / name).stat().st_size < 60_000


def test_no_picture_of_the_help_is_unused():
    pages = "".join(p.read_text(encoding="utf-8") for p in HELP.glob("*.md"))
    assert [p.name for p in HELP.iterdir() if p.suffix != ".md" and f"({p.name})" not in pages] == []


def test_control_a_page_that_skips_an_input_is_seen():
    schema = golden()["DMD_Distill"]
    page = (HELP / "DMD_Distill.md").read_text(encoding="utf-8")
    assert unexplained(schema, page.replace("`student_lr`", "").replace("## Mistakes", "")) == [
        "## Mistakes",
        "`student_lr`",
    ]


def test_there_is_no_page_of_a_node_that_does_not_exist():
    assert {p.stem for p in HELP.glob("*.md")} <= set(golden())


def test_what_trains_keeps_its_seed_between_queues():
    """The frontend rolls inputs called seed after every run unless it is told; a run of another seed does not go on."""
    for node, schema in golden().items():
        if "run_name" in schema["input"]["required"]:
            (seed,) = [spec for name, spec in walk(schema["input"]) if name == "seed"]
            assert seed[1]["control_after_generate"] == "fixed", node
