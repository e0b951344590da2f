"""LoRA files and family facts against ComfyUI itself, on tiny native models of each family.

DMD_WRITE_GOLDEN=1 writes tests/golden/keys/*.json anew: module names, target layers and keys, for tests without a host.
"""

import json
import logging
import os
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy
GOLDEN = Path(__file__).parent / "golden" / "keys"

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_loras_load_in_full_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base
    import comfy.model_detection
    import comfy.model_sampling
    import comfy.sample
    import comfy.supported_models
    import comfy.utils
    import comfy_tiny

    families = comfy_host.pack_module("dmd_core.families")
    keys = comfy_host.pack_module("dmd_core.weights.keys")
    lora = comfy_host.pack_module("dmd_core.weights.lora")
    checkpoint = comfy_host.pack_module("dmd_core.weights.checkpoint")
    adapters = comfy_host.pack_module("dmd_core.adapters")
    schedule = comfy_host.pack_module("dmd_core.schedule")
    core_features = comfy_host.pack_module("dmd_core.features")

    def pixart():
        config = comfy.supported_models.PixArtSigma(
            {
                "image_model": "pixart_sigma",
                "depth": 2,
                "hidden_size": 64,
                "num_heads": 2,
                "patch_size": 2,
                "input_size": None,
                "pe_interpolation": 2,
                "in_channels": 4,
                "caption_channels": 32,
                "model_max_length": 300,
                "dtype": torch.float32,
            }
        )
        return comfy.model_base.PixArt(config, device="cpu")

    BUILD = {k: v.build for k, v in comfy_tiny.FAMILIES.items() if k != "sd15_v"} | {"pixart": pixart}
    BUILD["sd15"] = BUILD.pop("sd15_eps")
    NAMES = sorted(set(BUILD) & set(families.FAMILIES))
    UNNAMED = sorted(set(BUILD) - set(NAMES))  # ltxv and anima have no Family: the generic one must serve

    def model(name):
        host = comfy_tiny.randomize(BUILD[name](), 0)
        for buffer in host.buffers():  # positions that real files bring along hold whatever memory held
            buffer.data.nan_to_num_(0, 0, 0)
        return host

    def module_names(net):
        return [n for n, _ in net.named_modules() if n]

    def random_bank(net, family, preset="all", rank=3):
        """A bank with one trained-looking set."""
        rng = torch.Generator().manual_seed(1)
        bank = adapters.AdapterBank(net, family.targets(preset))
        bank.detach()
        bank.new("student", rank, rng)
        for p in bank.parameters("student").values():
            p.data = torch.randn(p.shape, generator=rng) / 4
        return bank

    def apply(host, path, strength=1.0):
        """Weights after ComfyUI's own loader has applied a file, and what it logged as not loaded."""
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        try:
            tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path), safe_load=True))
            known = comfy.lora.model_lora_keys_unet(host, {})
            patches = comfy.lora.load_lora(tensors, known)
        finally:
            logging.getLogger().removeHandler(handler)
        weights = {k: v.clone() for k, v in host.state_dict().items()}
        for target, patch in patches.items():
            key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]
            entry = [(strength, patch, 1.0, offset, function)]
            weights[key] = comfy.lora.calculate_weight(entry, weights[key], key)
        return weights, [s for s in said if "not loaded" in s or "ERROR" in s]

    def expected(host, state, scale=1.0):
        net = {k: v for k, v in host.state_dict().items() if k.startswith("diffusion_model.")}
        return {**host.state_dict(), **lora.merge(net, state, scale)}

    def assert_same_weights(got, want, tolerance=2e-6):
        for k in want:
            torch.testing.assert_close(got[k], want[k], rtol=tolerance, atol=tolerance, msg=lambda m, k=k: f"{k}: {m}")

    @pytest.mark.parametrize("name", NAMES + UNNAMED)
    def test_comfyui_loads_every_key_and_adds_exactly_up_down(name, tmp_path):
        host = model(name)
        family = families.detect(host.diffusion_model)
        assert family.name == (name if name in NAMES else "generic")
        bank, names = random_bank(host.diffusion_model, family), module_names(host.diffusion_model)
        path = lora.save_lora(tmp_path, "x", bank.state("student"), names, dtype="fp32")
        weights, unloaded = apply(host, path)
        assert not unloaded
        assert_same_weights(weights, expected(host, bank.state("student")))
        changed = [k for k, v in host.state_dict().items() if not torch.equal(v, weights[k])]
        assert len(changed) == len(bank.layers)  # each target changed, and nothing else

    @pytest.mark.parametrize("name", NAMES)
    def test_negative_strength_is_the_mirror_image(name, tmp_path):
        host = model(name)
        bank = random_bank(host.diffusion_model, families.detect(host.diffusion_model), "attention")
        path = lora.save_lora(tmp_path, "x", bank.state("student"), module_names(host.diffusion_model), dtype="fp32")
        weights, unloaded = apply(host, path, strength=-1.5)
        assert not unloaded
        assert_same_weights(weights, expected(host, bank.state("student"), -1.5))

    @pytest.mark.parametrize("name", NAMES)
    def test_diffusers_spelled_layers_load_too(name, tmp_path):
        """A bank on the diffusers network of the same family has split layers; ComfyUI must place all their parts."""
        host = model(name)
        family = families.detect(host.diffusion_model)
        native = random_bank(host.diffusion_model, family)
        shapes = {n: lora.layer_shape(m) for n, m in native.layers.items()}
        layout = keys.unet_layout(module_names(host.diffusion_model))
        state, rng = {}, torch.Generator().manual_seed(2)
        for layer, (height, width, *kernel) in shapes.items():
            for twin in keys.twins(layer, family, layout) or [keys.Twin(layer)]:
                rows = keys.part_rows(twin.fill, height, width)
                state[f"{twin.name}.down"] = torch.randn(2, width, *kernel, generator=rng)
                state[f"{twin.name}.up"] = torch.randn(rows.stop - rows.start, 2, *[1] * len(kernel), generator=rng)
        split = sorted({k.rpartition(".")[0] for k in state})
        # all names of the diffusers network: its UNet levels are read from them
        path = lora.save_lora(tmp_path, "x", state, split, family=family, dtype="fp32")
        weights, unloaded = apply(host, path)
        assert not unloaded
        fitted = lora.load_lora(path, native, module_names(host.diffusion_model))
        assert len(fitted) == 2 * len(native.layers)
        assert_same_weights(weights, expected(host, fitted), 1e-5)

    @pytest.mark.parametrize("name", ["sd15", "sdxl"])
    def test_both_kohya_spellings_of_a_unet_load(name, tmp_path):
        host = model(name)
        bank = random_bank(host.diffusion_model, families.detect(host.diffusion_model))
        tensors = {}
        for layer in bank.layers:
            key = "lora_unet_" + layer.replace(".", "_")  # sgm block names
            tensors[f"{key}.lora_down.weight"] = bank.state("student")[f"{layer}.down"]
            tensors[f"{key}.lora_up.weight"] = bank.state("student")[f"{layer}.up"]
        comfy.utils.save_torch_file(tensors, tmp_path / "sgm.safetensors")
        weights, unloaded = apply(host, tmp_path / "sgm.safetensors")
        assert not unloaded
        assert_same_weights(weights, expected(host, bank.state("student")))
        back = lora.load_lora(tmp_path / "sgm.safetensors", bank, module_names(host.diffusion_model))
        assert all(torch.equal(v, back[k]) for k, v in bank.state("student").items())

    @pytest.mark.parametrize("name", ["sd15", "sdxl"])
    def test_peft_keys_of_a_unet_do_not_load_in_full(name, tmp_path):
        """The reason for kohya keys; were this to pass one day, PEFT keys would do."""
        host = model(name)
        family, names = families.detect(host.diffusion_model), module_names(host.diffusion_model)
        bank, layout = random_bank(host.diffusion_model, family), keys.unet_layout(names)
        tensors = {}
        for layer in bank.layers:
            key = "unet." + keys.twins(layer, family, layout)[0].name
            tensors[f"{key}.lora_A.weight"] = bank.state("student")[f"{layer}.down"]
            tensors[f"{key}.lora_B.weight"] = bank.state("student")[f"{layer}.up"]
        comfy.utils.save_torch_file(tensors, tmp_path / "peft.safetensors")
        _, unloaded = apply(host, tmp_path / "peft.safetensors")
        assert any("attn2.to_k" in s for s in unloaded)
        # ours reads it in full all the same
        back = lora.load_lora(tmp_path / "peft.safetensors", bank, names)
        assert all(torch.equal(v, back[k]) for k, v in bank.state("student").items())

    def test_the_check_for_unloaded_keys_sees_one(tmp_path):
        host = model("flux")
        bank = random_bank(host.diffusion_model, families.detect(host.diffusion_model))
        tensors = lora.lora_tensors(bank.state("student"), families.by_name("flux"), module_names(host.diffusion_model))
        tensors = {k.replace("double_blocks.0.img_attn", "double_blocks.7.img_attn"): v for k, v in tensors.items()}
        comfy.utils.save_torch_file(tensors, tmp_path / "wrong.safetensors")
        _, unloaded = apply(host, tmp_path / "wrong.safetensors")
        assert len(unloaded) == 4

    def test_a_fp16_file_is_off_by_its_rounding_alone(tmp_path):
        host = model("sdxl")
        bank = random_bank(host.diffusion_model, families.detect(host.diffusion_model))
        path = lora.save_lora(tmp_path, "x", bank.state("student"), module_names(host.diffusion_model))
        weights, unloaded = apply(host, path)
        assert not unloaded
        want = expected(host, bank.state("student"))
        assert_same_weights(weights, want, 5e-3)
        with pytest.raises(AssertionError):
            assert_same_weights(weights, want)

    @pytest.mark.parametrize("name", NAMES)
    def test_family_facts_are_comfyui_s(name):
        host = model(name)
        family = families.by_name(name)
        flow = isinstance(host.model_sampling, comfy.model_sampling.CONST)
        assert flow == (family.prediction.value == "flow")
        assert host.latent_format.latent_channels == family.latent_channels
        assert host.latent_format.spacial_downscale_ratio == family.downscale
        if flow:
            at = [host.model_sampling.percent_to_sigma(p) for p in (0.2, 0.5, 0.8)]
            ours = schedule.shift_time(torch.tensor([0.8, 0.5, 0.2]), family.shift)
            torch.testing.assert_close(torch.tensor(at), ours, rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(host.model_sampling.sigmas, family.schedule().sigmas, rtol=2e-5, atol=1e-6)

    @pytest.mark.parametrize("name", [n for n in comfy_tiny.FAMILIES if n != "sd15_v" and n not in UNNAMED])
    def test_every_feature_layer_gives_one_tensor_of_image_features(name):
        patcher = comfy_tiny.patcher(name)
        net, tiny = patcher.model.diffusion_model, comfy_tiny.FAMILIES[name]
        layers = families.detect(net).feature_layers(module_names(net))
        noise = torch.randn(2, *tiny.shape, generator=torch.Generator().manual_seed(0))
        positive = comfy_tiny.conditioning(name, 1)
        args = (1, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise))
        found = core_features.features(net, layers, lambda: comfy.sample.sample(patcher, noise, *args))
        assert len(found) == len(layers)
        for layer, value in zip(layers, found, strict=True):
            assert value.shape[0] == 2, layer
            assert value.flatten(1).std(0).max() > 0, f"{layer} does not see the image"

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("layout", ["diffusion_model", "checkpoint"])
    def test_a_saved_model_has_the_keys_that_comfyui_s_loaders_strip(name, layout, tmp_path):
        host = model(name)
        weights = host.diffusion_model.state_dict()
        path = checkpoint.save_model(tmp_path, "m", weights, families.by_name(name), layout=layout, dtype="fp32")
        loaded = comfy.utils.load_torch_file(str(path))
        prefix = comfy.model_detection.unet_prefix_from_state_dict(loaded)
        found = {k.removeprefix(prefix if layout == "checkpoint" else ""): v for k, v in loaded.items()}
        missing, unexpected = host.diffusion_model.load_state_dict(found, strict=False)
        assert (missing, unexpected) == ([], [])
        assert checkpoint.base_hash(path) == checkpoint.base_hash(host.diffusion_model)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_golden_names_and_keys_are_those_of_this_comfyui(name):
        net = BUILD[name]().diffusion_model
        family, names = families.detect(net), module_names(net)
        layers = {n: list(lora.layer_shape(m)) for n, m in net.named_modules() if family.targets()(n, m)}
        found = {"names": names, "layers": layers, "keys": keys.lora_keys(layers, family, names)}
        if os.environ.get("DMD_WRITE_GOLDEN"):
            GOLDEN.mkdir(parents=True, exist_ok=True)
            (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
        assert json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8")) == found
