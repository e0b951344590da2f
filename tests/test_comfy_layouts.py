"""The doctor's copies of networks under diffusers' names, in ComfyUI: the same weights, loaded, the same output.

The files are made by ComfyUI's own table of names, turned around; Wan's, which it has none for, by replacing words.
"""

import re
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_copies_of_diffusers_files_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import comfy.model_detection
    import comfy.sample
    import comfy.sd
    import comfy.utils
    import comfy_tiny
    from safetensors.torch import load_file, save_file

    doctor = comfy_host.pack_module("dmd_core.weights.doctor")
    layouts = comfy_host.pack_module("dmd_core.weights.layouts")
    NAMES = {"sd15_eps": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "z_image": "z_image", "wan": "wan"}
    # tiny files of these are enough for ComfyUI's own detection
    DETECTED = ("sd3", "flux")
    # further names of the same tensors in ComfyUI's tables: of unCLIP's vector condition, and of FLUX.2
    OTHER_NAMES = re.compile(
        r"class_embedding|time_guidance|.*(linear_(in|out)\.|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out"
    )
    WAN = (
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        ("modulation", "scale_shift_table"),
        ("norm3", "norm2"),
        ("cross_attn", "attn2"),
        ("self_attn", "attn1"),
        *((f".{x}.", f".to_{x}.") for x in "qkv"),
        (".o.", ".to_out.0."),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
    )

    def table(name, net, config):
        """ComfyUI's diffusers name -> its own name, or (name, rows, function)."""
        if name in ("sd15_eps", "sdxl"):
            return comfy.utils.unet_to_diffusers(config)
        if name == "sd3":
            return comfy.utils.mmdit_to_diffusers({"depth": 2, "num_blocks": 2})
        if name == "flux":
            return comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 128})
        return comfy.utils.z_image_to_diffusers({"n_layers": 1, "dim": 256, "n_refiner_layers": 1})

    def renamed(name, model):
        """Its weights under diffusers' names."""
        state = {k: v.clone() for k, v in model.diffusion_model.state_dict().items()}
        if name == "wan":
            found = {}
            for key, value in state.items():
                for a, b in WAN:
                    key = key.replace(a, b)
                found[key] = value
            return found
        found, used = {}, set()
        for key, target in table(name, model.diffusion_model, model.model_config.unet_config).items():
            own, rows, change = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            if own not in state:
                continue
            used.add(own)
            value = state[own] if rows is None else state[own].narrow(*rows)
            found[key] = (change(value) if change else value).contiguous()
        found = {k: v for k, v in found.items() if not OTHER_NAMES.match(k)}
        assert used == set(state), "ComfyUI's table has a place for every tensor"
        return {k: v.clone() for k, v in found.items()}

    @torch.inference_mode()
    def output(name, patcher):
        shape = comfy_tiny.FAMILIES[name].shape
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
        positive, negative = (comfy_tiny.conditioning(name, seed) for seed in (1, 2))
        return comfy.sample.sample(
            patcher, noise, 2, 2.0, "euler", "simple", positive, negative, torch.zeros_like(noise), seed=0,
            disable_pbar=True,
        )  # fmt: skip

    @torch.inference_mode()
    @pytest.mark.parametrize("name", NAMES)
    def test_the_copy_loads_and_gives_the_same_output(name, tmp_path):
        native = comfy_tiny.patcher(name)
        want = output(name, native)
        given = tmp_path / "diffusers.safetensors"
        save_file(renamed(name, native.model), given)
        assert doctor.diagnose(given).structure.family == NAMES[name]
        path = doctor.repair(given, tmp_path, "copy")
        copy = comfy_tiny.patcher(name, seed=1)
        assert not torch.equal(output(name, copy), want), "the control: other weights, another output"
        copy = comfy_tiny.patcher(name, seed=1)
        tensors = copy.model.model_config.process_unet_state_dict(load_file(path))
        assert set(tensors) == set(native.model.diffusion_model.state_dict())
        copy.model.diffusion_model.load_state_dict(tensors)
        assert torch.equal(output(name, copy), want)

    @torch.inference_mode()
    @pytest.mark.parametrize("name", DETECTED)
    def test_comfyuis_own_loader_takes_the_copy(name, tmp_path):
        native = comfy_tiny.patcher(name)
        given = tmp_path / "diffusers.safetensors"
        save_file(renamed(name, native.model), given)
        path = doctor.repair(given, tmp_path, "copy")
        options = {"dtype": torch.float32}
        loaded = comfy.sd.load_diffusion_model(str(path), options)
        torch.testing.assert_close(output(name, loaded), output(name, native), atol=1e-6, rtol=0)
        assert NAMES[name] in layouts.READ_BY_COMFYUI
        direct = comfy.sd.load_diffusion_model(str(given), options)
        torch.testing.assert_close(output(name, direct), output(name, native), atol=1e-6, rtol=0)

    def test_comfyui_knows_wan_by_the_copys_names_alone(tmp_path):
        given = tmp_path / "diffusers.safetensors"
        save_file(renamed("wan", comfy_tiny.patcher("wan").model), given)
        path = doctor.repair(given, tmp_path, "copy")
        assert type(comfy.model_detection.model_config_from_unet(load_file(path), "")).__name__ == "WAN21_T2V"
        with pytest.raises(RuntimeError, match="not detect"):
            comfy.sd.load_diffusion_model(str(given))
