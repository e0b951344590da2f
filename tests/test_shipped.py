"""What graphs on users' disks rely on: no node, input or output that was ever there may go."""

import copy

from node_schemas import golden, grown, lost, shipped


def test_nothing_that_saved_graphs_may_name_has_gone():
    assert lost(shipped(), golden()) == [], "keep it, and list a changed node id in nodes/__init__.py (RENAMED)"


def test_the_list_holds_all_that_there_is():
    assert grown(shipped(), golden()) == shipped(), "run scripts/golden, which adds to tests/golden/shipped.json"


def test_control_what_went_is_named_also_after_the_golden_was_rewritten():
    schemas = copy.deepcopy(golden())
    del schemas["DMD_Grid"]
    del schemas["DMD_Save"]["input"]["required"]["snapshot"]
    for option in schemas["DMD_Distill"]["input"]["required"]["method"][1]["options"]:
        option["inputs"]["required"].pop("steps", None)
    schemas["DMD_Save"]["output_name"].reverse()
    known = grown(shipped(), schemas)  # as scripts/golden would write it
    assert lost(known, schemas) == [
        "DMD_Distill.method.steps",
        "DMD_Grid",
        "DMD_Save.snapshot",
        "DMD_Save -> path",
        "DMD_Save -> sheet",
    ]
