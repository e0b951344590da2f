"""The example graphs executed in a real, headless ComfyUI: shapes graphs as they are, others on tiny models.

Of a graph only its loaders are replaced by stand-ins of the same family, and files by small ones of the same name;
where it waits for a folder of the user's pictures, it gets one. Empty latents have a quarter of their side. What trains
is cut short: as its plan, of two batches an update, where it has one, and for two updates, both at 64 pixels.
"""

import copy
from pathlib import Path

import comfy_host
import graph_files
import pytest
from PIL import Image

pytestmark = pytest.mark.comfy
NAMES = graph_files.names()
SHAPES = [n for n in NAMES if n.startswith("Shapes")]
SHAPES_S = 120  # of one core
# of a model file's name -> family of comfy_tiny
FAMILIES = {
    "sd_xl": "sdxl",
    "dmd2_sdxl": "sdxl",
    "flux1-": "flux",
    "z_image": "z_image",
    "sd3.5": "sd3",
    "qwen_image": "qwen_image",
    "wan2.2": "wan",
}
PICTURES = "pictures"  # in ComfyUI's input folder
MODEL_LOADERS = {"UNETLoader": "unet_name", "CheckpointLoaderSimple": "ckpt_name"}
STANDINS = {
    "UNETLoader": "StandinModel",
    "CheckpointLoaderSimple": "StandinCheckpoint",
    "CLIPLoader": "StandinCLIP",
    "DualCLIPLoader": "StandinCLIP",
    "VAELoader": "StandinVAE",
}


def family_of(api):
    files = [n["inputs"][MODEL_LOADERS[n["class_type"]]] for n in api.values() if n["class_type"] in MODEL_LOADERS]
    (found,) = {next(v for k, v in FAMILIES.items() if file.startswith(k)) for file in files}
    return found


def with_standins(api):
    """The graph with its loaders replaced and small latents, and nothing else."""
    if not any(n["class_type"] in STANDINS for n in api.values()):
        return api
    family, found = family_of(api), copy.deepcopy(api)
    for node in found.values():
        if node["class_type"] in STANDINS:
            file = node["inputs"].get(MODEL_LOADERS.get(node["class_type"], ""), "")
            node["class_type"] = STANDINS[node["class_type"]]
            node["inputs"] = {"family": family, "file": file}
        if node["class_type"] == "DMD_EncodePrompts" and not node["inputs"]["prompts"]:
            node["inputs"].update(folder=PICTURES, size=64)
        if node["class_type"].startswith("Empty"):
            node["inputs"].update({k: v // 64 * 16 for k, v in node["inputs"].items() if k in ("width", "height")})
    return found


def make_pictures(folder):
    """Four of two shapes, with captions."""
    folder.mkdir()
    for i, size in enumerate([(64, 64), (64, 64), (96, 48), (96, 48)]):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"noise number {i}", encoding="utf-8")


SLIDER = {"steps": 2, "size": 64, "pool": 8, "seeds": 4, "batch": 1, "sample_steps": 0, "checkpointing": False}
SHORT = {
    "DMD_Distill": {
        **{"mode": "train", "updates": 2, "size": 64, "accumulate": 2, "count": 2, "teacher_steps": 2},
        **{"pairs": 2, "pair_steps": 2, "check_teacher": False},
    },
    "DMD_TrainSlider": SLIDER,
    "DMD_DiscoverSliders": {**SLIDER, "sliders": 2},
}


def training(api):
    return [n for n in api.values() if n["class_type"] in SHORT]


def has_plan(api):
    return all(n["inputs"].get("mode") == "plan" for n in training(api))


if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_graphs_in_a_headless_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__), timeout_s=3000)

else:
    import torch
    from comfy_server import serving
    from safetensors.torch import load_file

    from dmd_core import demo, shapes
    from dmd_core.adapters import Adapted, AdapterBank
    from dmd_core.runs import Run

    @pytest.fixture(scope="module")
    def server(tmp_path_factory):
        with serving(tmp_path_factory.mktemp("graphs") / "comfy") as found:
            make_pictures(found.base / "input" / PICTURES)
            yield found

    @pytest.mark.parametrize("name", SHAPES)
    def test_a_shapes_graph_runs_as_it_is_and_quickly(server, name):
        began = server.cpu_seconds()
        outputs = server.execute(graph_files.read_api(name))
        assert server.cpu_seconds() - began < SHAPES_S
        for key in graph_files.read_layout(name).outputs:
            assert outputs[key].get("images") or outputs[key].get("text")
        for shown in [i for out in outputs.values() for i in out.get("images", [])]:
            with Image.open(server.picture(shown)) as picture:
                assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 30, "nothing to see"

    def right(world, bank, prompts):
        """Share of prompts that the student draws right, as the recogniser reads its pictures."""
        student = Adapted(world.teacher, bank, {"student": 1.0})
        latents = demo.generate(world, student, demo.levels(4), world.encode(prompts), 7, fresh=True)
        return shapes.captions.accuracy(prompts, demo.read(world, world.pictures(latents)))

    def test_the_shapes_distillation_leaves_a_better_student(server):
        """After the graph above: 80 updates of seeds 0 to 2 took 87 % to 94 to 95 %."""
        folder = Run(server.base / "output" / "dmd" / "shapes student")
        if not folder.snapshots():
            server.execute(graph_files.read_api("Shapes - distill to 4 steps"))
        world, prompts = demo.World.load(torch.device("cpu")), demo.captions(256, 101)
        bank = AdapterBank(world.net, demo.FAMILY.targets())
        bank.new("student", 16, torch.Generator().manual_seed(0))  # changes nothing yet
        before = right(world, bank, prompts)
        state = load_file(folder.snapshots()[-1] / "student.safetensors")
        bank.load("student", state)
        assert right(world, bank, prompts) > before + 0.04
        bank.load("student", {k: -v if k.endswith("up") else v for k, v in state.items()})
        assert right(world, bank, prompts) < before, "the control: the other way"

    REAL = {n: graph_files.read_api(n) for n in NAMES if n not in SHAPES}

    @pytest.mark.parametrize("name", [n for n, api in REAL.items() if has_plan(api)])
    def test_a_graph_for_real_models_runs_on_tiny_ones(server, name):
        api = with_standins(REAL[name])
        for node in training(api):
            node["inputs"].update(size=64, accumulate=2)
        outputs = server.execute(api)
        for key in graph_files.read_layout(name).outputs:
            # a plan gives words; what shows pictures of a student waits for one
            if not training(REAL[name]) or "source" in REAL[name][key]["inputs"]:
                assert outputs[key].get("images") or outputs[key].get("text")

    @pytest.mark.parametrize("name", [n for n, api in REAL.items() if training(api)])
    def test_a_training_graph_trains(server, name):
        """As a user goes on after the plan, but for two updates of little."""
        api = with_standins(REAL[name])
        for node in training(api):
            node["inputs"].update(SHORT[node["class_type"]], run_name=f"{node['inputs']['run_name']} short")
        for key, node in api.items():
            if node["class_type"] == "LoadImage":  # pictures that differ: from equal ones nothing can be learnt
                node["inputs"]["image"] = f"{key}.png"
                Image.effect_noise((64, 64), 20 * int(key)).convert("RGB").save(server.base / "input" / f"{key}.png")
        outputs = server.execute(api)
        for key in graph_files.read_layout(name).outputs:
            assert outputs[key].get("images") or outputs[key].get("text")

    def test_outpainting_needs_no_painted_mask(server):
        """Load Image gives a mask of 64 x 64 zeros for a picture that nobody painted on."""
        plain = server.base / "input" / "plain.png"
        Image.new("RGB", (512, 512), (90, 120, 150)).save(plain)
        api = with_standins(graph_files.read_api("Outpaint"))
        (load,) = (n["inputs"] for n in api.values() if n["class_type"] == "LoadImage")
        load["image"] = plain.name
        outputs = server.execute(api)
        (shown,) = outputs[graph_files.read_layout("Outpaint").outputs[0]]["images"]
        with Image.open(server.picture(shown)) as picture:
            assert picture.size == (768, 512)
            assert picture.convert("RGB").getpixel((10, 10)) == (90, 120, 150), "the picture itself has changed"

    def test_inpainting_knows_its_student_by_the_file_in_the_graph(server):
        api = with_standins(graph_files.read_api("SDXL DMD2 inpaint in 4 steps"))
        (text,) = server.execute(api)["8"]["text"]
        assert "DMD2" in text
        assert "sigmas" in text
        (inpaint,) = (n["inputs"] for n in api.values() if n["class_type"] == "DMD_Inpaint")
        (lora,) = (k for k, n in api.items() if n["class_type"] == "LoraLoaderModelOnly")
        inpaint.update(model=api[lora]["inputs"]["model"], steps=2)  # the control: past the LoRA
        assert "not recognised as a few-step model: 2 steps" in server.execute(api)["8"]["text"][0]

    def test_the_log_holds_no_complaint_of_ours(server):
        """The start and every graph above."""
        lines = [line for line in server.log.splitlines() if "lora key not loaded" in line]
        assert lines == []
        start = server.log.split("To see the GUI")[0]
        assert "Cannot import" not in start
        assert "IMPORT FAILED" not in start

    # --- controls -----------------------------------------------------------------------------------------------------

    def test_without_stand_ins_a_graph_for_real_models_is_refused(server):
        with pytest.raises(ValueError, match="was refused"):
            server.execute(graph_files.read_api("SDXL DMD2 in 4 steps"))

    @pytest.mark.parametrize("change", ["renamed node", "wrong value", "missing link"])
    def test_a_broken_graph_fails(server, change):
        api = with_standins(graph_files.read_api("SDXL DMD2 in 4 steps"))
        (key,) = (k for k, n in api.items() if n["class_type"] == "DMD_FewStepSampler")
        if change == "renamed node":
            api[key]["class_type"] = "DMD_FewStepSamplerOfTomorrow"
        elif change == "wrong value":
            api[key]["inputs"]["profile"] = "dmd3"
        else:
            del api[key]["inputs"]["positive"]
        with pytest.raises(ValueError, match="was refused"):
            server.execute(api)

    def test_a_stand_in_of_another_family_fails(server):
        """The wiring matters: a conditioning that is as wide as another family's does not fit."""
        api = with_standins(graph_files.read_api("SDXL DMD2 in 4 steps"))
        for node in api.values():
            if node["class_type"] == "StandinCheckpoint":
                node["inputs"]["family"] = "flux"
        with pytest.raises(ValueError, match="failed"):
            server.execute(api)
        assert "lora key not loaded" in server.log
