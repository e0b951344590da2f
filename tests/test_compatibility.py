"""The pack beside what users have: a second copy of it, several users, no metadata, another output folder."""

import asyncio
import copy
from pathlib import Path
from types import SimpleNamespace

import comfy_host
import graph_files
import pytest

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_compatibility_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    from comfy_server import serving
    from PIL import Image
    from safetensors import safe_open

    comfy_host.start_comfy()
    SHORT = {"updates": 2, "batch": 2, "count": 2, "teacher_steps": 2, "run_name": "compatible"}

    def trained_and_saved():
        """The shapes distillation cut short, its student saved as a LoRA and its picture as a file."""
        api = copy.deepcopy(graph_files.read_api("Shapes - distill to 4 steps"))
        (key,) = (k for k, n in api.items() if n["class_type"] == "DMD_Distill")
        (picture,) = (k for k, n in api.items() if n["class_type"] == "VAEDecode")
        api[key]["inputs"].update(SHORT)
        api["90"] = {"class_type": "DMD_Save", "inputs": {"run": [key, 5]}}
        api["91"] = {"class_type": "SaveImage", "inputs": {"images": [picture, 0], "filename_prefix": "compatible"}}
        return graph_files.completed(api, graph_files.read_schemas())

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        place = tmp_path_factory.mktemp("compatibility")
        flags = ("--multi-user", "--disable-metadata", "--output-directory", str(place / "elsewhere"))
        with serving(place / "comfy", *flags, packs=("ComfyUI-DMD", "ComfyUI-DMD-main")) as found:
            found.execute(trained_and_saved())
            yield found

    def test_two_copies_load_and_neither_complains(server):
        start = server.log.split("To see the GUI")[0]
        mine = [line for line in start.splitlines() if "DMD" in line]
        assert len([line for line in mine if "seconds" in line]) == 2
        assert not [line for line in mine if any(w in line.upper() for w in ("WARN", "ERROR", "FAILED", "TRACEBACK"))]

    def test_runs_and_pictures_go_to_the_users_output_folder(server):
        elsewhere = server.base.parent / "elsewhere"
        assert (elsewhere / "dmd" / "compatible" / "report.txt").is_file()
        assert list(elsewhere.glob("compatible*.png"))
        output = server.base / "output"
        assert not output.exists() or not any(output.iterdir())

    def test_no_graph_is_written_where_metadata_is_off(server):
        picture = next((server.base.parent / "elsewhere").glob("compatible*.png"))
        with Image.open(picture) as found:
            assert not {"prompt", "workflow"} & set(found.info)
        file = next((server.base / "models" / "loras").rglob("compatible*.safetensors"))
        with safe_open(file, "pt") as lora:
            about = lora.metadata()
        assert not {"prompt", "workflow"} & set(about)
        assert about, "the control: how to sample it is no metadata that a user would want off"

    def test_an_old_id_goes_on_working_once_it_is_listed(monkeypatch):
        """ComfyUI's own manager is asked; with nothing listed, nothing is registered."""
        import server as comfy_server_module
        from comfy_api.latest import io

        pack, kept = comfy_host.pack_module("nodes"), []
        stub = SimpleNamespace(node_replace_manager=SimpleNamespace(register=kept.append))
        monkeypatch.setattr(comfy_server_module.PromptServer, "instance", stub, raising=False)
        extension = asyncio.run(pack.comfy_entrypoint())
        asyncio.run(extension.on_load())
        assert kept == []
        old = io.NodeReplace("DMD_FewStep", "DMD_FewStepSettings")
        monkeypatch.setattr(pack, "RENAMED", [old])
        asyncio.run(extension.on_load())
        assert kept == [old]
