"""The example graphs against the committed schemas of all nodes they use: no ComfyUI needed."""

import copy
import json
import re
from pathlib import PureWindowsPath

import graph_files
import pytest
import torch
from graph_files import AUTHORED, WORKFLOWS
from PIL import Image

from dmd_core import inpaint, shapes

NAMES = graph_files.names()
SCHEMAS = graph_files.read_schemas()
MODELS = graph_files.read_models()
THUMBNAIL_BYTES = 300_000
each = pytest.mark.parametrize("name", NAMES)


def complaints(api):
    return graph_files.complaints(api, SCHEMAS)


def dmd_nodes(ui):
    return [n for n in ui["nodes"] if n["type"].startswith("DMD_")]


# --- the authored form ------------------------------------------------------------------------------------------------


@each
def test_comfyui_would_take_the_graph(name):
    assert complaints(graph_files.read_api(name)) == []


@each
def test_every_widget_is_written_out(name):
    api = graph_files.read_api(name)
    assert graph_files.completed(api, SCHEMAS) == api


@each
def test_every_node_stands_in_one_group_and_the_app_view_names_what_is_there(name):
    api, layout = graph_files.read_api(name), graph_files.read_layout(name)
    placed = [key for group in layout.groups for column in group["columns"] for key in column]
    assert sorted(placed) == sorted(api)
    for key, widget in layout.inputs:
        assert widget in api[key]["inputs"], f"{key} has no {widget}"
        assert not graph_files.is_link(api[key]["inputs"][widget])
    assert layout.outputs
    for key in layout.outputs:
        assert SCHEMAS[api[key]["class_type"]]["output_node"]
    assert layout.note.startswith("# ")
    assert len(layout.note) > 200


@each
def test_every_named_file_can_be_found_and_shapes_graphs_name_none(name):
    files = {file for _, _, file in graph_files.named_files(graph_files.read_api(name))}
    assert not files or not name.startswith("Shapes")
    for file in files:
        assert MODELS[file]["url"].endswith(f"/{file}")
        assert MODELS[file]["url"].startswith("https://")


@each
def test_the_note_says_where_every_file_is_found_and_goes(name):
    note, also = graph_files.note_of(name), graph_files.read_layout(name).also
    files = {file for _, _, file in graph_files.named_files(graph_files.read_api(name))}
    for file in {*files, *also}:
        assert f"[{file}]({MODELS[file]['url']}) into `models/{MODELS[file]['directory']}`" in note
    assert ("**Files**" in note) == bool(files)  # the shapes graphs have none
    assert not files & set(also)
    words = graph_files.read_layout(name).note
    assert [file for file in also if file.rpartition(".")[0] not in words] == [], "the text does not speak of it"


def test_no_file_is_listed_that_no_graph_names():
    named = {file for name in NAMES for _, _, file in graph_files.named_files(graph_files.read_api(name))}
    assert set(MODELS) == named | {file for name in NAMES for file in graph_files.read_layout(name).also}


def distill_of(name):
    return next(n["inputs"] for n in graph_files.read_api(name).values() if n["class_type"] == "DMD_Distill")


def test_notes_of_distill_graphs_say_what_their_node_is_set_to():
    shapes_one, sdxl = (distill_of(n) for n in ("Shapes - distill to 4 steps", "Distill your checkpoint (SDXL)"))
    needs = f"needs {shapes_one['teacher_steps']} steps at cfg {shapes_one['method.guidance']:g}"
    assert needs in graph_files.note_of("Shapes - distill to 4 steps")  # the sheet says teacher_steps
    assert f"begin with *{sdxl['preset']}*" in graph_files.note_of("Distill your checkpoint (SDXL)").replace("\n", " ")
    guide = (WORKFLOWS.parent / "docs" / "distil.md").read_text(encoding="utf-8")
    assert f"0 takes the family's: {sdxl['method.guidance']:g} for SDXL" in guide


def test_shapes_graphs_draw_on_the_worlds_own_canvas():
    for name in NAMES:
        if name.startswith("Shapes"):
            for node in graph_files.read_api(name).values():
                if node["class_type"] == "EmptyLatentImage":
                    assert (node["inputs"]["width"], node["inputs"]["height"]) == (shapes.world.CANVAS,) * 2


@each
def test_shapes_prompts_use_words_that_the_world_knows(name):
    if not name.startswith("Shapes"):
        return
    for node in graph_files.read_api(name).values():
        texts = [v for k, v in node["inputs"].items() if k in ("text", "prompts") and isinstance(v, str)]
        for line in "\n".join(texts).splitlines():
            assert shapes.text.VOCABULARY.index(shapes.text.UNKNOWN) not in shapes.text.tokenize([line])


@each
def test_names_are_good_for_every_file_system_and_for_an_address(name):
    assert not re.search(r'[:*?"<>|#%&\\/]', name)
    assert name == name.strip(" .")
    assert not PureWindowsPath(f"{name}.json").is_reserved()


# --- the form that users open -----------------------------------------------------------------------------------------


@each
def test_what_users_open_is_the_authored_graph(name):
    assert graph_files.api_of(graph_files.read_ui(name), SCHEMAS) == graph_files.plain(graph_files.read_api(name))


@each
def test_what_users_open_says_whose_nodes_these_are_and_where_files_are_found(name):
    ui, api = graph_files.read_ui(name), graph_files.read_api(name)
    for node in ui["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        own = node["type"].startswith("DMD_")
        assert node["properties"]["cnr_id"] == ("comfy-dmd" if own else "comfy-core")
        assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"])
    listed = {m["name"]: m for n in ui["nodes"] for m in n.get("properties", {}).get("models", [])}
    for key, _, file in graph_files.named_files(api):
        if not api[key]["class_type"].startswith("DMD_"):
            assert listed[file] == {"name": file, **MODELS[file]}


@each
def test_what_users_open_has_a_note_groups_and_the_app_view(name):
    ui, layout = graph_files.read_ui(name), graph_files.read_layout(name)
    (note,) = (n for n in ui["nodes"] if n["type"] == "MarkdownNote")
    assert note["widgets_values"] == [graph_files.note_of(name)]
    assert [g["title"] for g in ui["groups"]] == [g["title"] for g in layout.groups]
    assert ui["extra"]["linearData"] == {"inputs": layout.inputs, "outputs": layout.outputs}
    for node in ui["nodes"]:
        inside = [g for g in ui["groups"] if contains(g["bounding"], [*node["pos"], *node["size"]])]
        assert len(inside) == (node["type"] != "MarkdownNote"), node["type"]


@each
def test_no_two_nodes_lie_on_each_other(name):
    ui = graph_files.read_ui(name)
    taken = [[n["pos"][0], n["pos"][1] - 30, n["size"][0], n["size"][1] + 30] for n in ui["nodes"]]
    for i, a in enumerate(taken):
        for b in taken[:i]:
            apart = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
            assert apart, (ui["nodes"][i]["type"], a, b)


@each
def test_on_a_usual_screen_a_template_opens_with_readable_text(name):
    """ComfyUI fits it into its window; too wide or too high, and all nodes are grey boxes."""
    ui = graph_files.read_ui(name)
    boxes = [g["bounding"] for g in ui["groups"]] + [[*n["pos"], *n["size"]] for n in ui["nodes"]]
    for axis, room in enumerate(graph_files.SCREEN):
        assert max(b[axis] + b[axis + 2] for b in boxes) - min(b[axis] for b in boxes) <= room


def contains(outer, inner):
    left, top, width, height = outer
    return (
        left <= inner[0]
        and top <= inner[1]
        and inner[0] + inner[2] <= left + width
        and inner[1] + inner[3] <= (top + height)
    )


@each
def test_seeds_stay_as_they_are_until_the_user_wants_otherwise(name):
    values = [v for n in graph_files.read_ui(name)["nodes"] for v in n.get("widgets_values") or []]
    assert "randomize" not in values


@each
def test_every_graph_has_a_thumbnail_where_the_template_browser_looks(name):
    path = WORKFLOWS / f"{name}.jpg"
    assert path.stat().st_size < THUMBNAIL_BYTES
    with Image.open(path) as picture:
        assert picture.format == "JPEG"


def unused_nodes(names):
    """Nodes of ours that none of these graphs shows."""
    used = {n["class_type"] for name in names for n in graph_files.read_api(name).values()}
    return {node for node in SCHEMAS if node.startswith("DMD_")} - used


def test_every_node_of_ours_is_in_some_graph():
    assert unused_nodes(NAMES) == set()
    # the control: this one alone shows Instant Slider
    assert unused_nodes([n for n in NAMES if not n.startswith("Age slider")]) == {"DMD_InstantSlider"}


def test_nothing_else_lies_where_the_template_browser_looks():
    assert {p.stem for p in WORKFLOWS.glob("*.json")} == set(NAMES)
    assert {p.stem for p in WORKFLOWS.glob("*.jpg")} == set(NAMES)
    assert {p.stem for p in AUTHORED.glob("*.toml")} == {*NAMES, "models"}


# --- controls: what must not pass -------------------------------------------------------------------------------------


@pytest.fixture
def api():
    return graph_files.read_api("SDXL DMD2 in 4 steps")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda api: api["5"].update(class_type="DMD_FewStepSamplers"), "no such node"),
        (lambda api: api["5"]["inputs"].update(denoise=1.5), "outside of 0.01 to 1.0"),
        (lambda api: api["5"]["inputs"].update(profile="dmd3"), "is none of"),
        (lambda api: api["5"]["inputs"].update(steps="4"), "is no INT"),
        (lambda api: api["5"]["inputs"].update(colour=1), "no such input"),
        (lambda api: api["5"]["inputs"].pop("positive"), "5 (DMD_FewStepSampler).positive: it is missing"),
        (lambda api: api["5"]["inputs"].update(positive=["9", 0]), "which is not there"),
        (lambda api: api["5"]["inputs"].update(positive=["1", 0]), "it wants CONDITIONING, '1' gives MODEL"),
        (lambda api: api["5"]["inputs"].update(positive=["3", 1]), "has no output 1"),
        (lambda api: api["7"]["inputs"].pop("images"), "it is missing"),
        (lambda api: (api.pop("7"), api.pop("8")), "no node gives a result"),
    ],
)
def test_a_wrong_graph_is_told(api, change, said):
    change(api)
    assert said in "\n".join(complaints(api))


def test_of_a_choice_only_the_chosen_inputs_are_taken():
    api = graph_files.read_api("Distill with LADD and your images")
    (distill,) = (n["inputs"] for n in api.values() if n["class_type"] == "DMD_Distill")
    assert "method.noise_mean" in distill
    distill["method"] = "DMD2"
    assert ".method.noise_mean: there is no such input" in "\n".join(complaints(api))


def opens_as(ui, schemas, name):
    """Do the saved values still mean what was authored?"""
    try:
        found = graph_files.api_of(ui, schemas)
    except ValueError:
        return False
    return found == graph_files.plain(graph_files.read_api(name))


def test_a_shifted_widget_value_in_what_users_open_is_told():
    name = "SDXL DMD2 in 4 steps"
    ui = copy.deepcopy(graph_files.read_ui(name))
    assert opens_as(ui, SCHEMAS, name)
    (node,) = dmd_nodes(ui)
    node["widgets_values"].insert(0, node["widgets_values"].pop())
    assert not opens_as(ui, SCHEMAS, name)


def test_an_input_that_was_put_first_is_told():
    """Saved graphs hold values by position: a schema may only grow at its end."""
    name = "SDXL DMD2 in 4 steps"
    schemas = json.loads(json.dumps(SCHEMAS))
    sampler = schemas["DMD_FewStepSampler"]
    sampler["input"]["required"]["eta"] = ["FLOAT", {"default": 0.0}]
    sampler["input_order"]["required"].insert(0, "eta")
    assert not opens_as(graph_files.read_ui(name), schemas, name)


def test_the_lazy_shapes_graph_is_lazy():
    """Its canvas has 16 tokens; with a ring, three quarters of them would be computed, and the patch steps aside."""
    nodes = graph_files.read_api("Shapes - lazy inpainting").values()
    hole = next(n["inputs"] for n in nodes if n["class_type"] == "MaskComposite")
    lazy = next(n["inputs"] for n in nodes if n["class_type"] == "DMD_LazyInpaint")
    touched = torch.zeros(1, 4, 4, dtype=torch.bool)
    touched[:, :, hole["x"] // 16 :] = True
    assert inpaint.select(touched, lazy["ring"]).share == 0.5
    assert inpaint.select(touched, 1).share == 0.75  # control
