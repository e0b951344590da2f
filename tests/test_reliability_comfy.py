"""Cancelling our nodes at any moment in the real ComfyUI, and queueing them for hours.

ComfyUI asks before every layer whether the user has cancelled; a run is cancelled at one of these questions, drawn by
chance. Afterwards everything is as it was, and the next prompt gives the bits of a fresh start.
"""

import asyncio
import gc
import logging
import random
import re
import shutil
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy_host
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():
    needs_host = pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))

    @needs_host
    def test_cancelling_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__), "-m", "comfy and not slow")

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.ops
    import comfy.sample
    import comfy_tiny
    import execution
    import folder_paths
    import safetensors.torch
    import slider_files
    import slider_host
    import soak_graphs
    from comfy_extras import nodes_custom_sampler, nodes_mask

    import nodes as stock

    pack = comfy_host.pack_module
    distill, encode, load_shapes = pack("nodes.distill"), pack("nodes.encode_prompts"), pack("nodes.load_shapes")
    few_step, switch_models, grid = pack("nodes.few_step"), pack("nodes.switch_models"), pack("nodes.grid")
    negative_guidance, variety, inpaint = pack("nodes.negative_guidance"), pack("nodes.variety"), pack("nodes.inpaint")
    sampler, runs, instant_slider = pack("nodes.sampler"), pack("dmd_core.runs"), pack("nodes.instant_slider")
    train_slider, discover_sliders = pack("nodes.train_slider"), pack("nodes.discover_sliders")
    doctor, inspect_run = pack("nodes.doctor"), pack("nodes.inspect_run")
    save = pack("nodes.save")
    save.STRENGTHS = (0.0, 1.0)  # fewer pictures, the same way
    mix_sliders, read_slider = pack("nodes.mix_sliders"), pack("nodes.slider_files").read

    for kind in pack("nodes").NODES:
        stock.NODE_CLASS_MAPPINGS[kind.GET_SCHEMA().node_id] = kind
    for extra in (nodes_custom_sampler, nodes_mask):
        for kind in asyncio.run(asyncio.run(extra.comfy_entrypoint()).get_node_list()):
            stock.NODE_CLASS_MAPPINGS[kind.GET_SCHEMA().node_id] = kind
    SERVER = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *a: None)

    class CalledHome(BaseException):
        """No `except Exception` of a node can hide it."""

    @pytest.fixture(autouse=True)
    def place(tmp_path, monkeypatch):
        """ComfyUI's folders, all in one that goes away; and no way out of this machine, for any node."""

        def refuse(self, where):
            raise CalledHome(f"a node called {where}")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        for name in ("output", "temp", "input"):
            (tmp_path / name).mkdir()
            monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
        known = folder_paths.folder_names_and_paths["loras"]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], known[1]))
        return tmp_path

    # --- one prompt per node: models made once, then calls that give tensors ------------------------------------------

    def conds(family: str = "flux"):
        return comfy_tiny.conditioning(family, 1), comfy_tiny.conditioning(family, 9)

    def latent(family: str = "flux", mask: bool = False):
        samples = torch.zeros(1, *comfy_tiny.FAMILIES[family].shape)
        if not mask:
            return {"samples": samples}
        hole = torch.zeros(1, 1, *samples.shape[-2:])
        hole[..., 4:8, 5:9] = 1
        return {"samples": torch.randn(samples.shape, generator=torch.Generator().manual_seed(5)), "noise_mask": hole}

    def ksampler(model, given, steps: int = 3):
        positive, negative = conds()
        (out,) = stock.common_ksampler(model, 5, steps, 2.0, "euler", "simple", positive, negative, given)
        return out["samples"]

    def widgets(node) -> dict:
        return {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}

    def distilling(model, number: int):
        """Every prompt a run of its own, as a fresh start would be; the student is what is compared."""
        options = next(i for i in distill.Distill.GET_SCHEMA().inputs if i.id == "method").options
        chosen = {i.id: i.default for o in options if o.key == "DMD2" for i in o.inputs}
        method = {"method": "DMD2", **chosen, "steps": 2, "guidance": 2.0, "critic_updates": 1, "student_lr": 1e-2}
        small = {"updates": 2, "size": 64, "batch": 1, "accumulate": 1, "rank": 2, "count": 2, "teacher_steps": 1}
        prompts = [comfy_tiny.conditioning("flux", s)[0] for s in range(2)]
        given = widgets(distill.Distill) | small | {"preview_every": 0, "check_teacher": False}
        name = f"run {number}"
        given |= {"model": model, "prompts": prompts, "negative": conds()[1], "mode": "train", "run_name": name}
        distill.Distill.execute(**given | {"method": method})
        run = runs.Run(runs.locate(distill.root(), name))
        found = safetensors.torch.load_file(run.snapshots()[-1] / "student.safetensors")
        return torch.cat([v.flatten() for v in found.values()])

    def few_step_sampler(model, number: int):
        return few_step.FewStepSampler.execute(model, conds()[0], latent(), 5, profile="flux-schnell")[0]["samples"]

    def settings_of_it(model, number: int):
        patched, how, sigmas, cfg, *_ = few_step.FewStep.execute(model, profile="flux-schnell").result
        noise = torch.randn(comfy_tiny.FAMILIES["flux"].shape, generator=torch.Generator().manual_seed(5))[None]
        return comfy.sample.sample_custom(patched, noise, cfg, how, sigmas, *conds(), torch.zeros_like(noise))

    def saving(model, number: int):
        """The picture of steps and strengths of a student that is there already."""
        if number == 0:
            distilling(model, 0)
        prompts = [comfy_tiny.conditioning("flux", 1)[0]]
        return save.Save.execute(run="run 0", model=model, prompts=prompts, vae=Colours()).result[2]

    def switching(model, number: int):
        other = comfy_tiny.patcher("flux", 1)
        out = switch_models.SwitchModels.execute(other, model, *conds(), first_steps=1, profile="flux-schnell")
        return sampler.sample_latent(model, out[0], out[1], out[2], latent(), 5)["samples"]

    def guiding(model, number: int):
        return ksampler(negative_guidance.NegativeGuidance.execute(model, conds()[1])[0], latent())

    def varying(model, number: int):
        return ksampler(variety.Variety.execute(model)[0], latent())

    def lazily(mode: str):
        def run(model, number: int):
            # one session for all prompts, forgotten at the start of each: what a cancel leaves in it must not matter
            patched = inpaint.LazyInpaint.execute(model, mode, 1, 1, 2, "soak", 0, True, 1.0, 1.0)[0]
            ksampler(patched, latent(mask=True))
            edit = inpaint.LazyInpaint.execute(model, mode, 1, 1, 2, "soak", 0, False, 1.0, 1.0)[0]
            return ksampler(edit, latent(mask=True))

        return run

    class Colours:
        """A VAE as far as these nodes need one, without layers to be cancelled in."""

        def spacial_compression_encode(self):
            return 8

        def encode(self, pixels):
            cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
            return torch.cat([cells] * 6, 1)[:, :16]

        def decode(self, samples):
            return torch.nn.functional.interpolate(samples[:, :3], scale_factor=8).movedim(1, -1).sigmoid()

    def gridding(model, number: int):
        args = (model, *conds(), Colours(), latent(), "1, 2", "3, 4", 2.0, grid.NONE, "0", 64)
        return grid.Grid.execute(*args)[0]

    def inpainting(model, number: int):
        picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
        mask = torch.zeros(1, 128, 128)
        mask[:, 40:64, 40:64] = 1
        inpaint.SESSIONS.clear()
        args = (model, Colours(), *conds(), 1, 2, 2.0, "euler", "simple", 1.0, "session", "push-pull", 0, 0)
        return inpaint.Inpaint.execute(picture, mask, *args)[0]

    def encoding(model, number: int):
        """Odd prompts find on disk what a cancelled one has left there."""
        if number == 1 or number % 2 == 0:
            shutil.rmtree(distill.root() / ".prompts", ignore_errors=True)
        _, clip, _ = load_shapes.LoadShapes.execute("teacher").result
        out, negative = encode.EncodePrompts.execute([clip], ["a red circle\na blue square"]).result
        return torch.cat([c.flatten() for c, _ in [*out, *negative]])

    def sliding(node, **small):
        def run(model, number: int):
            given = slider_host.inputs(node, "flux", model=model, run_name=f"slider {number}", size=64, **small)
            lora = node.execute(**given).result[1]
            sets = lora if isinstance(lora, list) else [lora]  # Discover Sliders gives one per slider
            return torch.cat([v.flatten().float() for found in sets for v in found.values()])

        return run

    def instantly(model, number: int):
        clip = slider_host.FakeClip("flux")
        return ksampler(instant_slider.InstantSlider.execute(model, clip, "a big dog", "a small dog")[0], latent())

    def mixing(model, number: int):
        """One slider in the weights, one that joins while sampling."""
        folder, source = Path(folder_paths.get_output_directory()), comfy_tiny.patcher("flux")
        paths = [slider_files.write(folder, f"slider_{i}", source, seed=i) for i in (1, 2)]
        known = [read_slider(p.name, str(p)) for p in paths]
        rows = {"slider_1": "set 1", "strength_1": 0.5, "slider_2": "set 2", "strength_2": 0.5, "start_2": 0.4}
        return ksampler(mix_sliders.MixSliders.execute(model, known, **rows)[0], latent())

    PROMPTS: dict[str, Callable] = {
        "Distill": distilling,
        "Save": saving,
        "Few-Step Settings": settings_of_it,
        "Few-Step Sampler": few_step_sampler,
        "Switch Models": switching,
        "Negative Guidance": guiding,
        "Seed Variety": varying,
        "Lazy Inpaint, refresh": lazily("refresh"),
        "Lazy Inpaint, session": lazily("session"),
        "Grid": gridding,
        "Inpaint": inpainting,
        "Encode Prompts": encoding,
        "Train Slider": sliding(train_slider.TrainSlider, made_from=slider_host.WORDS, steps=2, pool=8, seeds=4),
        "Discover Sliders": sliding(
            discover_sliders.DiscoverSliders, prompt="a dog", sliders=2, steps=2, pool=8, rank=1
        ),
        "Instant Slider": instantly,
        "Mix Sliders": mixing,
    }

    # --- nodes without a network, in graphs: ComfyUI's executor asks before each node ---------------------------------

    class Kept:
        """Ends a graph; what reached it is in `found`."""

        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "keep", True
        found: dict = {}

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        @classmethod
        def IS_CHANGED(cls, **given):
            return float("nan")

        def keep(self, **given):
            Kept.found = given
            return {}

    stock.NODE_CLASS_MAPPINGS["Kept"] = Kept
    CACHE = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    EXECUTOR = execution.PromptExecutor(SERVER, cache_args=CACHE)

    def through(graph: soak_graphs.Graph, number: int, **ends: list) -> dict:
        """What reaches the end. Odd prompts find in ComfyUI's cache what a cancelled one has left there."""
        if number == 1 or number % 2 == 0:
            EXECUTOR.reset()
        inpaint.SESSIONS.clear()
        EXECUTOR.execute(graph | {"kept": soak_graphs.node("Kept", **ends)}, "a prompt", {}, ["kept"])
        event, about = EXECUTOR.status_messages[-1]
        if event == "execution_interrupted":
            raise mm.InterruptProcessingException
        assert event == "execution_success", about
        found, Kept.found = Kept.found, {}
        return found

    def loading(model, number: int):
        given = soak_graphs.loaded(3) | {
            "student": soak_graphs.node("DMD_LoadShapes", model=soak_graphs.STUDENT),
            "sampled": soak_graphs.node("DMD_FewStepSampler", model=["student", 0], positive=["text", 0],
                                        latent=["empty", 0], seed=3),
            "pictures": soak_graphs.node("VAEDecode", samples=["sampled", 0], vae=["student", 2]),
        }  # fmt: skip
        return through(given, number, pictures=["pictures", 0])["pictures"]

    SHOWS_PICTURES = {"Inspect Run"}  # when it is done; ComfyUI draws their files' names from Python's generator

    def inspecting(model, number: int):
        if number == 0:
            distilling(model, 0)
        given = {"run": soak_graphs.node("DMD_InspectRun", run="run 0", snapshot="last", action="show")}
        found = through(given, number, curves=["run", 0], sheet=["run", 1], lora=["run", 2])
        return torch.cat([v.flatten().float() for v in (found["curves"], found["sheet"], *found["lora"].values())])

    def repairing(model, number: int):
        folder = Path(folder_paths.get_folder_paths("loras")[0])
        if number == 0:
            slider_files.write(folder, "tiny", model)
        given = {"copy": soak_graphs.node("DMD_Doctor", file="loras/tiny_00001.safetensors", action=doctor.COPY)}
        found = safetensors.torch.load_file(through(given, number, path=["copy", 1])["path"])
        return torch.cat([v.flatten() for _, v in sorted(found.items())])

    def preparing(model, number: int):
        ends = {name: ["prepared", i] for i, name in ((0, "latent"), (2, "picture"), (3, "mask"))}
        found = through(soak_graphs.inpainted(3, "", ""), number, **ends)
        parts = (found["latent"]["samples"], found["latent"]["noise_mask"], found["picture"], found["mask"])
        return torch.cat([v.flatten() for v in parts])

    def compositing(model, number: int):
        return through(soak_graphs.inpainted(3, "", ""), number, picture=["put", 0])["picture"]

    QUIET: dict[str, tuple[type, Callable]] = {
        "Load Shapes": (load_shapes.LoadShapes, loading),
        "Inspect Run": (inspect_run.InspectRun, inspecting),
        "Doctor": (doctor.Doctor, repairing),
        "Prepare Inpaint": (inpaint.PrepareInpaint, preparing),
        "Composite Inpaint": (inpaint.CompositeInpaint, compositing),
    }

    def test_no_node_is_left_out():
        def plain(name):
            return "".join(re.findall(r"\w", name.partition(",")[0]))

        tried = {plain(name) for name in [*PROMPTS, *QUIET]}
        shown = {"FewStep": "FewStepSettings", "Variety": "SeedVariety"}
        nodes = {kind.__name__ for kind in pack("nodes").NODES}
        assert tried == {shown.get(name, name) for name in nodes}

    # --- what must be as before ---------------------------------------------------------------------------------------

    HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def around(model) -> dict[str, object]:
        """Everything of the model and the process that a prompt must not change, but for the global noise generator."""
        modules = dict(model.model.named_modules())
        return {
            "hooks": {n: [len(getattr(m, h)) for h in HOOKS] for n, m in modules.items()},
            "replaced forwards": [n for n, m in modules.items() if "forward" in vars(m)],
            "training mode": [n for n, m in modules.items() if m.training],
            "asks for gradients": [n for n, p in model.model.named_parameters() if p.requires_grad],
            "gradients": [n for n, p in model.model.named_parameters() if p.grad is not None],
            "patches": sorted(model.patches),
            "object patches": sorted(model.object_patches),
            "injections": sorted(model.injections),
            "attachments": sorted(model.attachments),
            "options": repr(model.model_options),
            "in_training": mm.in_training,
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "python's generator": random.getstate(),
            "numpy's generator": np.random.get_state()[1].tobytes(),  # noqa: NPY002 - the one that others use
            "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
        }

    def bits(model) -> dict[str, torch.Tensor]:
        """The weights without what a loaded LoRA has put into them, which ComfyUI leaves until another is loaded."""
        mm.unload_all_models()
        return {k: v.detach().clone() for k, v in model.model.state_dict().items()}

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(v, b[k]) for k, v in a.items())

    def held() -> int:
        """Bytes of all tensors that are alive, each storage once."""
        mm.cleanup_models_gc()
        gc.collect()
        alive = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())

    @contextmanager
    def asked(at: int | None = None):
        """Counts ComfyUI's questions; at the given one the answer is that the user has cancelled."""
        count, ask = SimpleNamespace(n=0, noise=set()), mm.throw_exception_if_processing_interrupted

        def question():
            count.n += 1
            count.noise.add(torch.get_rng_state().numpy().tobytes())
            if count.n == at:
                mm.interrupt_current_processing(True)
            ask()

        mm.throw_exception_if_processing_interrupted = question
        try:
            yield count
        finally:
            mm.throw_exception_if_processing_interrupted = ask

    @contextmanager
    def pressed(kind: type, at: int | None = None):
        """Counts the calls inside of a node; at the given one the user cancels. Who asks next learns of it."""
        count, work = SimpleNamespace(n=0, noise=set()), kind.execute.__func__

        def watch(frame, event, argument):
            if event == "call":
                count.n += 1
                if count.n == at:
                    mm.interrupt_current_processing(True)

        def watched(cls, *args, **given):
            sys.setprofile(watch)
            try:
                return work(cls, *args, **given)
            finally:
                sys.setprofile(None)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "execute", classmethod(watched))
            yield count

    @torch.inference_mode()
    def cancelled(name: str, times: int, seed: int) -> None:
        model, moments, prompt = comfy_tiny.patcher("flux"), asked, PROMPTS.get(name)
        if prompt is None:
            moments, prompt = partial(pressed, QUIET[name][0]), QUIET[name][1]
        fresh = prompt(model, 0).clone()
        # the control: an equal start gives equal bits, so that a difference would be the cancel's
        with moments() as questions:
            assert torch.equal(prompt(comfy_tiny.patcher("flux"), 1), fresh)
        assert questions.n > 2, "this node is never asked whether it was cancelled"
        questions.noise.add(torch.get_rng_state().numpy().tobytes())
        weights = bits(model)
        memory = held()
        rng = random.Random(f"{name} {seed}")
        for i in range(times):
            moment = rng.randint(1, questions.n)
            torch.manual_seed(1234)
            # taken anew each time: ComfyUI names a finished node's pictures by chance
            noise_before, state = torch.get_rng_state(), around(model)
            with moments(moment), pytest.raises(mm.InterruptProcessingException):
                prompt(model, 2 + 2 * i)
            where = f"{name}, cancelled at moment {moment} of {questions.n}"
            assert not mm.processing_interrupted(), where
            changed = {k: v for k, v in around(model).items() if v != state[k]}
            if name in SHOWS_PICTURES:
                changed.pop("python's generator", None)
            assert not changed, where
            assert same(bits(model), weights), where
            # stock sampling seeds torch's generator with the prompt's seeds; nothing else may touch it
            noise = torch.get_rng_state()
            assert torch.equal(noise, noise_before) or noise.numpy().tobytes() in questions.noise, where
            assert held() <= memory + (1 << 20), where
            assert not [*Path(folder_paths.get_output_directory()).parent.rglob("*.part")], where
            assert torch.equal(prompt(model, 3 + 2 * i), fresh), where

    @pytest.mark.parametrize("name", [*PROMPTS, *QUIET])
    def test_a_cancel_at_any_moment_leaves_nothing_and_the_next_prompt_is_a_fresh_start(name):
        cancelled(name, 1, 0)

    @pytest.mark.slow
    @pytest.mark.endurance
    @pytest.mark.parametrize("name", [*PROMPTS, *QUIET])
    def test_so_do_a_hundred_cancels(name):
        cancelled(name, 7, 1)

    def test_a_cancel_stops_masks_and_files_at_once():
        """Not only at the next node."""
        picture, mask = torch.rand(1, 64, 64, 3), torch.zeros(1, 64, 64)
        mask[:, 20:40, 20:40] = 1
        given = (picture, mask, Colours(), "crop per island", 1.5, 8, 8, True, "blur", 0, 0, 0, 0, 2)
        inpaint.PrepareInpaint.execute(*given)
        mm.interrupt_current_processing(True)
        with pytest.raises(mm.InterruptProcessingException):
            inpaint.PrepareInpaint.execute(*given)
        assert not mm.processing_interrupted()

    def test_loading_the_embedded_world_draws_no_numbers_from_others_generators():
        noise, numbers = torch.get_rng_state(), random.getstate()
        load_shapes.LoadShapes.execute("teacher")
        assert torch.equal(torch.get_rng_state(), noise)
        assert random.getstate() == numbers

    def test_control_a_call_home_is_noticed(place):
        with pytest.raises(CalledHome, match="a node called"), suppress(Exception), socket.socket() as line:
            line.connect(("127.0.0.1", 9))

    def test_control_what_a_cancel_could_leave_behind_is_seen():
        model = comfy_tiny.patcher("flux", inference=False)
        before = around(model)
        layer = next(m for m in model.model.modules() if isinstance(m, torch.nn.Linear))
        handle = layer.register_forward_hook(lambda *a: None)
        mm.in_training = True
        random.random()
        assert {k for k, v in around(model).items() if v != before[k]} == {"hooks", "in_training", "python's generator"}
        handle.remove()
        mm.in_training = False
        kept = [held()]
        kept.append(torch.zeros(1 << 19))
        assert held() > kept[0] + (1 << 20)

    def test_a_cancelled_run_goes_on_to_the_student_of_an_uninterrupted_one():
        """Wherever it was cancelled: between steps, inside a network call, in the pictures of the last snapshot."""
        model = comfy_tiny.patcher("flux")
        with torch.inference_mode():
            with asked() as questions:
                whole = distilling(model, 0)
            for share in (0.1, 0.5, 0.95):
                number = int(100 * share)
                with asked(int(questions.n * share)), pytest.raises(mm.InterruptProcessingException):
                    distilling(model, number)
                step = runs.Run(runs.locate(distill.root(), f"run {number}"))
                exact = not step.states() or runs.peek(step.states()[0]).get("whole") is not False
                again = distilling(model, number)
                # a cancel between two updates of one step keeps a sound state that repeats the step
                assert torch.equal(again, whole) or not exact

    def test_a_full_device_is_said_and_comfyui_stays_usable(monkeypatch):
        model = comfy_tiny.patcher("flux")
        with torch.inference_mode():
            fresh = ksampler(model, latent())
            whole, state = distilling(model, 0), around(model)
            curves = runs.locate(distill.root(), "run 2") / "curves.jsonl"

            def full():
                """Before every layer of a network, once the first step is done."""
                if curves.is_file():
                    raise torch.OutOfMemoryError("CUDA out of memory")

            with monkeypatch.context() as patch:
                patch.setattr(comfy.ops, "run_every_op", full)
                words = "out of memory at step .*batch of 1.*checkpointing.*smaller picture"
                with pytest.raises(torch.OutOfMemoryError, match=words):
                    distilling(model, 2)
            assert not {k: v for k, v in around(model).items() if v != state[k]}
            assert torch.equal(ksampler(model, latent()), fresh)
            assert torch.equal(distilling(model, 3), whole)

    # --- for hours ----------------------------------------------------------------------------------------------------

    PERIOD = 6  # prompts after which the queue comes back to the same graph and count of accepted edits

    def queue(place: Path) -> Callable[[int], None]:
        """One prompt after another through ComfyUI's own executor, with a slider's file and a run to look at."""
        with torch.inference_mode():
            distilling(comfy_tiny.patcher("flux"), 0)
        slider = slider_files.write(place / "loras", "tiny", load_shapes.load_model(None)).name
        executor = execution.PromptExecutor(SERVER, cache_args=CACHE)

        def prompt(seed: int) -> None:
            given = soak_graphs.graph(seed, slider, "run 0")
            executor.execute(given, f"prompt {seed}", {}, soak_graphs.ends(given))
            assert executor.success, executor.status_messages[-1]
            (cached,) = (about["nodes"] for event, about in executor.status_messages if event == "execution_cached")
            assert {given[name]["class_type"] for name in cached} <= {"DMD_LoadShapes", "EmptyLatentImage"}
            for picture in place.rglob("*.png"):
                if picture.parent.name == "temp":
                    picture.unlink()

        return prompt

    def resident() -> int:
        """Bytes of this process in memory."""
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def standing() -> dict[str, int]:
        """How many of what a prompt must not leave behind there are."""
        mm.cleanup_models_gc()
        gc.collect()
        alive = gc.get_objects()
        modules = [o for o in alive if isinstance(o, torch.nn.Module)]
        models = [o for o in alive if isinstance(o, comfy.model_patcher.ModelPatcher)]
        return {
            "modules": len(modules),
            "hooks": sum(len(getattr(m, kind)) for m in modules for kind in HOOKS),
            "replaced forwards": sum("forward" in vars(m) for m in modules),
            "models": len(models),
            "patches": sum(len(m.patches) + len(m.object_patches) + len(m.injections) for m in models),
            "files": len(list(Path("/proc/self/fd").iterdir())),
        }

    def soak(prompts: int, warm: int, place: Path, after: Callable[[], object] = lambda: None) -> SimpleNamespace:
        """What has grown from after `warm` prompts to the end: the process's memory, as a share; counts of the rest."""
        assert (prompts - warm) % PERIOD == 0, "the same graph must have run last"
        prompt = queue(place)
        logging.disable(logging.WARNING)
        try:
            for seed in range(prompts):
                prompt(seed)
                after()
                if seed == warm - 1:
                    memory, count = resident(), standing()
            more = {k: n - count[k] for k, n in standing().items() if n != count[k]}
            return SimpleNamespace(growth=resident() / memory - 1, more=more)
        finally:
            logging.disable(logging.NOTSET)

    needs_linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")

    @pytest.mark.slow
    @pytest.mark.endurance
    @needs_linux
    def test_memory_is_flat_over_two_thousand_prompts(place, record_property):
        found = soak(2000, 200, place)
        record_property("growth of memory", round(found.growth, 4))
        record_property("hooks, patches, models, open files left behind", sum(found.more.values()))
        assert found.growth < 0.02
        assert not found.more

    @pytest.mark.slow
    @pytest.mark.endurance
    @needs_linux
    def test_control_memory_is_not_flat_where_every_prompt_keeps_a_megabyte(place, record_property):
        kept: list[torch.Tensor] = []
        found = soak(66, 6, place, lambda: kept.append(torch.ones(1 << 18)))
        record_property("growth with a leak of 1 MB in 60 prompts", round(found.growth, 4))
        assert found.growth > 0.02
        assert not found.more

    @needs_linux
    def test_a_few_prompts_go_through_the_queue(place):
        """So that the long test is known to run; in so few prompts caches still grow."""
        found = soak(8, 2, place)
        assert found.growth < 0.1
        assert not found.more

    @needs_linux
    def test_control_what_a_prompt_leaves_in_the_queue_is_counted(place):
        layer, kept = torch.nn.Linear(1, 1), []

        def leave():
            kept.append(torch.ones(1 << 23))
            layer.register_forward_hook(lambda *a: None)

        found = soak(8, 2, place, leave)
        assert found.growth > 0.1
        assert found.more == {"hooks": 6}

    def test_every_node_without_training_is_in_the_queue():
        queued = {n["class_type"] for turn in soak_graphs.TURNS for n in turn(0, "a slider", "a run").values()}
        ours = {kind.GET_SCHEMA().node_id for kind in pack("nodes").NODES}
        assert ours - queued == {"DMD_Distill", "DMD_TrainSlider", "DMD_DiscoverSliders", "DMD_Save"}
