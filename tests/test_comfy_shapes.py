"""Load Shapes in the real ComfyUI: stock nodes compute with it what the engine computes."""

import json
import subprocess
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

IMPORT = """
import gc, json, sys, time
import comfy_host
cache = sys.argv[1]
comfy_host.start_comfy()
import comfy_api.latest, comfy.sd, comfy.samplers, einops, PIL.Image, safetensors.torch
# as on every start but the first: the pack's bytecode is there
sys.dont_write_bytecode, sys.pycache_prefix = False, cache
gc.collect()
gc.freeze()  # a collection of the host's objects in between is not our cost
before = set(sys.modules)
began = time.process_time()
pack = comfy_host.load_pack()
seconds = time.process_time() - began
new = set(sys.modules) - before
import asyncio
nodes = [n.GET_SCHEMA().node_id for n in asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())]
heavy = sorted(new & {"diffusers", "transformers", "accelerate"})
print(json.dumps({"seconds": seconds, "heavy": heavy, "nodes": nodes}))
"""

if not comfy_host.in_comfy():
    needs_host = pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))

    @needs_host
    def test_the_shapes_world_runs_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

    @needs_host
    def test_the_pack_adds_little_to_the_start_and_imports_nothing_heavy(tmp_path):
        script = tmp_path / "start.py"
        script.write_text(IMPORT)
        starts = []
        for _start in range(4):
            run = comfy_host.run_in_comfy([str(script), str(tmp_path / "bytecode")])
            assert run.returncode == 0, run.stderr
            starts.append(json.loads(run.stdout.splitlines()[-1]))
        found = starts[-1]
        assert found["heavy"] == []
        # the first start compiles; a busy machine only ever adds to the others
        assert min(start["seconds"] for start in starts[1:]) < 0.3
        assert "DMD_LoadShapes" in found["nodes"]

    @needs_host
    def test_comfyui_starts_with_the_pack_and_says_nothing_about_it(tmp_path):
        """main.py itself, with the pack in a custom_nodes of its own."""
        root = comfy_host.comfy_path()
        (tmp_path / "custom_nodes").mkdir()
        (tmp_path / "custom_nodes" / "ComfyUI-DMD").symlink_to(comfy_host.PACK)
        flags = ["--cpu", "--quick-test-for-ci", "--base-directory", str(tmp_path)]
        run = subprocess.run(
            [comfy_host.comfy_python(root), "main.py", *flags, "--database-url", f"sqlite:///{tmp_path}/db.sqlite"],
            cwd=root, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        log = run.stdout + run.stderr
        assert run.returncode == 0, log[-4000:]
        mine = [line for line in log.splitlines() if "ComfyUI-DMD" in line]
        assert any("seconds" in line and "IMPORT FAILED" not in line for line in mine), log[-4000:]
        assert not [line for line in mine if "WARN" in line.upper() or "FAILED" in line or "Traceback" in line]

else:
    comfy_host.start_comfy()
    import comfy.sample

    import nodes

    load_shapes = comfy_host.pack_module("nodes.load_shapes").LoadShapes
    shapes = comfy_host.pack_module("dmd_core.shapes")

    samplers, sigmas = (comfy_host.pack_module(f"dmd_core.{name}") for name in ("samplers", "sigmas"))
    core = comfy_host.pack_module("dmd_core.conditioning")
    SIDE = shapes.world.CANVAS // 8
    PROMPT = "a large red star left"

    def stock_latent(sampler, steps, seed=5):
        """One stock KSampler call as a user queues it, in the model's own latent space. [1 16 h w]"""
        model, clip, _vae = load_shapes.execute("teacher").result
        (cond,), (uncond,) = (nodes.CLIPTextEncode().encode(clip, p) for p in (PROMPT, ""))
        latent = {"samples": torch.zeros(1, 16, SIDE, SIDE)}
        (out,) = nodes.common_ksampler(model, seed, steps, 1.0, sampler, "simple", cond, uncond, latent)
        return model.model.process_latent_in(out["samples"])

    def engine_latent(prompt, steps, seed=5):
        teacher, text = shapes.load_teacher(), shapes.load_text_encoder()
        denoiser, cond = shapes.teacher.denoiser(teacher), core.Cond(*text.encode([prompt]))
        noise = comfy.sample.prepare_noise(torch.zeros(1, 16, SIDE, SIDE), seed)
        levels = sigmas.ending(sigmas.shifted(steps, denoiser.schedule.shift))
        return samplers.sample_euler(denoiser, samplers.start(denoiser.schedule, noise, 1.0), levels, cond)

    @torch.inference_mode()
    def test_the_stock_sampler_and_ours_draw_the_same_picture():
        stock = stock_latent("euler", 8)
        torch.testing.assert_close(stock, engine_latent(PROMPT, 8), atol=2e-3, rtol=1e-3)
        # the controls: another prompt, another number of steps
        assert (stock - engine_latent("a small blue circle right", 8)).abs().mean() > 0.05
        assert (stock - engine_latent(PROMPT, 4)).abs().mean() > 0.01

    @torch.inference_mode()
    def test_the_host_and_the_engine_are_the_same_network():
        model, clip, _vae = load_shapes.execute("teacher").result
        prompt = "a small red circle top left on dark"
        ((tokens, extra),) = nodes.CLIPTextEncode().encode(clip, prompt)[0]
        expected_tokens, expected_pooled = shapes.load_text_encoder().encode([prompt])
        torch.testing.assert_close(tokens, expected_tokens)
        torch.testing.assert_close(extra["pooled_output"], expected_pooled)
        x = torch.randn(1, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        sigma = torch.tensor([0.7])
        engine = shapes.teacher.denoiser(shapes.load_teacher())
        cond = core.Cond(expected_tokens, expected_pooled)
        host = model.model.apply_model(x, sigma, c_crossattn=tokens, y=extra["pooled_output"], guidance=None)
        torch.testing.assert_close(host, engine(x, sigma, cond), atol=1e-4, rtol=1e-4)

    @torch.inference_mode()
    def test_the_stock_vae_and_our_small_one_agree():
        _model, _clip, vae = load_shapes.execute("teacher").result
        image = shapes.world.render(shapes.world.sample(2, torch.Generator().manual_seed(1)))
        ours = shapes.load_autoencoder()
        latent = vae.encode(image.movedim(1, -1) * 0.5 + 0.5)
        host = load_shapes.execute("teacher").result[0].model.process_latent_in(latent)
        torch.testing.assert_close(host, ours.encode(image), atol=2e-3, rtol=1e-3)
        decoded = vae.decode(latent).movedim(-1, 1) * 2 - 1
        torch.testing.assert_close(decoded, ours.decode(ours.encode(image)).clamp(-1, 1), atol=5e-3, rtol=1e-3)

    @torch.inference_mode()
    def test_weights_in_a_prompt_are_read_over_and_unknown_words_do_no_harm():
        _model, clip, _vae = load_shapes.execute("teacher").result
        encode = nodes.CLIPTextEncode().encode
        plain, weighted = (encode(clip, p)[0][0][0] for p in ("a red circle", "a (red:1.3) circle"))
        assert torch.equal(plain, weighted)
        assert encode(clip, "a zebra, 8k, masterpiece")[0][0][0].isfinite().all()

    def test_words_that_nobody_wrote_are_not_said_to_be_unknown(caplog):
        """The prompts that name a text encoder are the pack's own."""
        encode = comfy_host.pack_module("nodes.encode_prompts")
        _model, clip, _vae = load_shapes.execute("teacher").result
        with torch.no_grad(), caplog.at_level("INFO"):
            encode.encoder_of(clip)
            assert "does not know" not in caplog.text
            encode.encode_one(clip, "a zebra")
        assert "does not know the words ['zebra']" in caplog.text  # control
