"""The committed golden of the node schemas against the live nodes, and what saved graphs rely on."""

import copy
from pathlib import Path

import comfy_host
import pytest

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_schemas_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import folder_paths
    import node_schemas
    from app.custom_node_manager import CustomNodeManager

    def test_the_golden_is_what_the_nodes_are():
        assert node_schemas.live() == node_schemas.golden(), "run scripts/golden, and read what changed"

    def test_every_schema_validates():
        for node in comfy_host.pack_module("nodes").NODES:
            node.GET_SCHEMA().validate()

    def test_control_a_changed_default_is_seen():
        changed = copy.deepcopy(node_schemas.golden())
        changed["DMD_FewStepSampler"]["input"]["required"]["steps"][1]["default"] = 4
        assert node_schemas.live() != changed

    def test_comfyui_reads_our_languages(tmp_path, monkeypatch):
        (tmp_path / "ComfyUI-DMD").symlink_to(comfy_host.PACK, target_is_directory=True)
        monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _name: [str(tmp_path)])
        found = CustomNodeManager().build_translations.__wrapped__(CustomNodeManager())
        assert set(found) == {p.name for p in node_schemas.LOCALES.iterdir()}
        for language in found:
            assert set(found[language]["nodeDefs"]) == set(node_schemas.golden()), language
            assert found[language]["nodeCategories"], language
