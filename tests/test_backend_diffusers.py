"""The diffusers backend on tiny random models in the real folder layout: the contract, and the host's own pipelines."""

import json
import socket

import contract
import diffusers_tiny as tiny
import pytest
import torch

from dmd_core import samplers, shapes
from dmd_core.adapters import AdapterBank
from dmd_core.backends import diffusers as backend
from dmd_core.backends import flux_keys
from dmd_core.conditioning import Cond
from dmd_core.schedule import Discrete
from dmd_core.shapes import teacher

SIDE = 64  # pixels: latents of 8x8
FLOW_LIKE = ("sd3", "flux_dev", "flux_schnell")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every attempt is an error here and, where a library swallows that, a failure at the end."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args[1:] or args)
        raise OSError("the network is closed in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried
    assert not tried, f"tried to reach {tried}"


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def loaded(where):
    """family -> bundle, loaded once."""
    found = {}

    def get(family):
        if family not in found:
            found[family] = backend.load(tiny.save(family, where))
        return found[family]

    return get


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


def level(bundle, timestep):
    """The sigma of one trained timestep: schedulers know no others."""
    schedule = bundle.denoiser.schedule
    return schedule.sigmas[timestep].item() if isinstance(schedule, Discrete) else timestep / 1000


def host_x0(bundle):
    """x0 by the step of diffusers' own scheduler, from the network's raw output."""
    import diffusers

    schedule, config = bundle.denoiser.schedule, dict(bundle.pipeline.scheduler.config)

    def flow(x, sigma, cond):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=[sigma.item()])
        out = bundle.kind.call(bundle.net, x, scheduler.timesteps.float(), cond)
        return scheduler.step(out, scheduler.timesteps[0], x, return_dict=False)[0]  # down to sigma 0

    def ddim(x, sigma, cond):
        scheduler = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(1000)
        t = schedule.timestep(sigma)
        state = x / (1 + sigma**2).sqrt()
        out = bundle.kind.call(bundle.net, state, t, cond)
        return scheduler.step(out, t.item(), state).pred_original_sample

    return ddim if isinstance(schedule, Discrete) else flow


def make_case(family, bundle):
    conds = tuple(bundle.encode([p], SIDE, SIDE) for p in tiny.PROMPTS)
    shape = (2, *bundle.latent_shape(SIDE, SIDE))
    high, low = (level(bundle, t) for t in (820, 310))
    return contract.Case(
        name=family,
        denoiser=bundle.denoiser,
        bank=AdapterBank(bundle.net),
        shape=shape,
        sigmas=(high, low),
        conds=conds,
        both=bundle.encode(tiny.PROMPTS, SIDE, SIDE),
        host=host_x0(bundle),
        host_tolerance=2e-6,
    )


TWINS = ("sd15_v", "flux_schnell", "pixart_alpha")  # blocks like those of another family here
CONTRACTS = [
    pytest.param(f, c, id=f + ("-checkpointed" if c else ""), marks=[pytest.mark.slow] if c and f in TWINS else [])
    for c in (False, True)
    for f in tiny.FAMILIES
]


@pytest.mark.parametrize(("family", "checkpointed"), CONTRACTS)
def test_the_contract_holds(family, checkpointed, loaded):
    bundle = loaded(family)
    case = make_case(family, bundle)
    before = case.x0()
    if checkpointed:
        bundle.checkpoint_blocks(case.bank)
    try:
        for check in contract.CHECKS:
            check(case)
    finally:
        case.bank.detach()
        bundle.net.disable_gradient_checkpointing()
    assert torch.equal(case.x0(), before)


@torch.no_grad()
def test_sampling_equals_the_hosts_pipeline(family, loaded):
    """Prompts, sizes, guidance, packing, timesteps and decoding at once: two Euler steps against pipe(...)."""
    import diffusers

    bundle = loaded(family)
    pipe = bundle.pipeline
    before = pipe.scheduler
    if family not in FLOW_LIKE:
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(before.config, timestep_spacing="trailing")
    height, width = SIDE, 2 * SIDE
    noise = torch.randn(2, *bundle.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(noise, *noise.shape) if "flux" in family else noise
    options = {"guidance_scale": 2.0 if family == "flux_dev" else 1.0}
    if "flux" in family:
        options["max_sequence_length"] = 512 if family == "flux_dev" else 256
    if "pixart" in family:
        options.update(use_resolution_binning=False, clean_caption=False)
    pipe.set_progress_bar_config(disable=True)
    try:
        host = pipe(
            list(tiny.PROMPTS),
            height=height,
            width=width,
            num_inference_steps=2,
            latents=packed.clone(),
            output_type="pt",
            **options,
        ).images
        sigmas = pipe.scheduler.sigmas
        start = noise * getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    finally:
        pipe.scheduler = before
    cond = bundle.encode(tiny.PROMPTS, height, width, guidance=2.0)
    latents = samplers.sample_euler(bundle.denoiser, start, sigmas, cond)
    ours = (bundle.to_images(latents) / 2 + 0.5).clamp(0, 1)
    assert ours.std() > 0.02  # saturated or empty pictures would agree without effort
    torch.testing.assert_close(ours, host, atol=1e-4, rtol=0)
    if "time_ids" in cond.extras or "guidance" in cond.extras or "mask" in cond.extras:
        other = bundle.encode(tiny.PROMPTS[::-1], SIDE, SIDE, guidance=5.0)
        wrong = bundle.to_images(samplers.sample_euler(bundle.denoiser, start, sigmas, other))
        assert ((wrong / 2 + 0.5).clamp(0, 1) - host).abs().max() > 1e-3


def directional_error(bundle, bank, cond, backward_mix):
    """|gradient . d - central difference| / |gradient|, in float64, of the set 'on' with another mix at backward."""
    rng = torch.Generator().manual_seed(3)
    for name in ("on", "other"):
        for adapter in bank.new(name, 2, rng):
            adapter.double()
            adapter.up.data.normal_(0, 0.05, generator=rng)
    params = list(bank.parameters("on").values())
    x = torch.randn(2, *bundle.latent_shape(SIDE, SIDE), dtype=torch.float64, generator=rng)
    sigma = torch.tensor([level(bundle, 820), level(bundle, 310)], dtype=torch.float64)

    def value():
        with bank.use(on=1.0):
            return bundle.denoiser(x, sigma, cond).square().mean()

    loss = value()
    with bank.use(**backward_mix):
        grads = torch.autograd.grad(loss, params, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    ends = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            for p, g in zip(params, grads, strict=True):
                p += step * g / norm
            ends.append(value())
    return abs((ends[0] - ends[1]) / 2e-4 - norm).item() / norm.item()


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart_sigma"])
def test_checkpointed_gradients_are_exact_with_another_set_active_at_backward(name, where):
    bundle = backend.load(tiny.save(name, where), dtype=torch.float64)
    cond = bundle.encode(tiny.PROMPTS, SIDE, SIDE)
    bank = AdapterBank(bundle.net)
    bundle.checkpoint_blocks(bank)
    # SD3 normalises q and k in fp32 whatever it is given, so its own rounding shows
    error = directional_error(bundle, bank, cond, {"other": 1.0})
    assert error < (1e-7 if name != "sd3" else 1e-4)
    # the control: without the bank's contexts, recomputed blocks see the other set
    bundle.checkpoint_blocks()
    assert directional_error(bundle, bank, cond, {"other": 1.0}) > 0.01


def test_a_checkpointed_graph_can_be_walked_twice(loaded):
    bundle = loaded("sd15")
    bank = AdapterBank(bundle.net)
    bundle.checkpoint_blocks(bank)
    try:
        params = list(bank.new("s", 2, torch.Generator().manual_seed(0)).parameters())
        cond = bundle.encode(tiny.PROMPTS)
        with bank.use(s=1.0):
            out = bundle.denoiser(torch.ones(2, 4, 8, 8), torch.tensor([3.0, 0.5]), cond).mean()
        first = torch.autograd.grad(out, params, retain_graph=True)
        second = torch.autograd.grad(out, params)
    finally:
        bank.detach()
        bundle.net.disable_gradient_checkpointing()
    assert any(g.abs().max() > 0 for g in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- prompts and pictures


def test_prompts_encode_the_same_alone_and_in_chunks(loaded):
    bundle = loaded("sdxl")
    prompts = [f"{word} circle {i}" for i in range(9) for word in ("red", "blue")]
    together = bundle.encode(prompts)
    assert len(together) == 18
    assert together.pooled.shape == (18, 32)
    alone = bundle.encode(prompts[17])
    torch.testing.assert_close(together.cross[17:], alone.cross, atol=1e-6, rtol=1e-5)
    assert (together.cross[16] - together.cross[17]).abs().max() > 1e-3


def test_sizes_are_part_of_the_conditioning(loaded):
    cond = loaded("sdxl").encode(["a", "b"], 96, 64, original=(300, 200), crop=(8, 16))
    assert cond.extras["time_ids"].tolist() == [[300, 200, 8, 16, 96, 64]] * 2
    alpha = loaded("pixart_alpha").encode("a", 96, 64)
    assert alpha.extras["resolution"].tolist() == [[96, 64]]
    assert alpha.extras["aspect_ratio"].tolist() == [[1.5]]
    assert "resolution" not in loaded("pixart_sigma").encode("a").extras


def test_text_encoders_rest_on_the_cpu_and_can_be_dropped(where):
    bundle = backend.load(tiny.save("sd3", where))
    assert len(bundle.text_encoders()) == 3
    bundle.encode("x")
    assert {p.device.type for m in bundle.text_encoders() for p in m.parameters()} == {"cpu"}
    bundle.drop_text_encoders()
    with pytest.raises(ValueError, match="without text encoders"):
        bundle.encode("x")


def test_latents_have_the_scale_the_network_was_trained_with(family, loaded):
    bundle = loaded(family)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = bundle.pipeline.vae
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
        latents = bundle.to_latents(images)
        torch.testing.assert_close(bundle.to_images(latents), vae.decode(mode).sample, atol=1e-4, rtol=0)
        # scaled by the config's numbers, not merely invertible
        config = vae.config
        torch.testing.assert_close(latents, (mode - (config.shift_factor or 0)) * config.scaling_factor)
        drawn = [bundle.to_latents(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert latents.shape[1:] == bundle.latent_shape(SIDE, SIDE)


def test_schedules_come_from_the_scheduler_config(loaded, where):
    assert loaded("sd3").denoiser.schedule.shift == 3.0
    assert loaded("flux_schnell").denoiser.schedule.shift == 1.0
    assert loaded("flux_dev").denoiser.schedule.shift == pytest.approx(2.71828**1.15, rel=1e-4)
    small = backend.load(tiny.save("flux_dev", where), size=256)
    assert small.denoiser.schedule.shift == pytest.approx(2.71828**0.5, rel=1e-4)
    eps, v = (loaded(n).denoiser.schedule for n in ("sd15", "sd15_v"))
    assert eps.sigma_max == pytest.approx(14.6146, rel=1e-4)
    assert v.sigma_max == pytest.approx(4518, rel=1e-3)  # zero terminal SNR, ComfyUI's stand-in for infinity
    assert loaded("pixart_sigma").denoiser.schedule.sigma_max > 100  # linear betas


# --- files


def test_shards_and_variants_load_as_the_whole_model(where, loaded):
    whole = loaded("sd15").net.state_dict()
    sharded = tiny.save("sd15", where, max_shard_size="100KB", variant="fp16")
    assert len(list((sharded / "unet").glob("*.fp16-0*.safetensors"))) > 1
    bundle = backend.load(sharded)
    assert all(torch.equal(v, whole[k]) for k, v in bundle.net.state_dict().items())
    bundle.encode("x")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_compute_in_the_given_type_and_answer_in_fp32(family, dtype, where, loaded):
    bundle = backend.load(tiny.save(family, where), dtype=dtype)
    cond = bundle.encode(tiny.PROMPTS, SIDE, SIDE)
    x = torch.randn(2, *bundle.latent_shape(SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([level(bundle, 500), level(bundle, 100)])
    seen = []
    hook = bundle.net.register_forward_pre_hook(lambda m, a, k: seen.append(a[0].dtype), with_kwargs=True)
    with torch.no_grad():
        x0 = bundle.denoiser(x, sigma, cond)
    hook.remove()
    assert seen == [dtype]
    assert x0.dtype == torch.float32
    assert bundle.pipeline.vae.dtype == torch.float32
    exact = loaded(family)
    with torch.no_grad():
        reference = exact.denoiser(x, sigma, exact.encode(tiny.PROMPTS, SIDE, SIDE))
    assert contract.relative(x0, reference) < 0.1


def save(state, path):
    from safetensors.torch import save_file

    save_file({k: v.contiguous().clone() for k, v in state.items()}, str(path))
    return path


def test_the_embedded_teacher_is_the_same_network_in_diffusers():
    if not shapes.TEACHER.exists():
        pytest.skip("no teacher weights in this checkout")
    from safetensors.torch import load_file

    ours, bundle = teacher.from_state(load_file(str(shapes.TEACHER))), backend.load(shapes.TEACHER)
    rng = torch.Generator().manual_seed(1)
    cond = Cond(torch.randn(2, 5, teacher.TEXT, generator=rng), torch.randn(2, teacher.POOLED, generator=rng))
    x, sigma = torch.randn(2, 16, 16, 16, generator=rng), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        assert contract.relative(bundle.denoiser(x, sigma, cond), teacher.denoiser(ours)(x, sigma, cond)) < 1e-4


def test_any_shapes_teacher_is_the_same_network_in_diffusers(tmp_path):
    torch.manual_seed(0)
    ours = teacher.Teacher().eval().requires_grad_(False)
    bundle = backend.load(save(ours.state_dict(), tmp_path / "teacher.safetensors"))
    assert bundle.denoiser.schedule == teacher.SCHEDULE
    rng = torch.Generator().manual_seed(1)
    cond = Cond(torch.randn(2, 5, teacher.TEXT, generator=rng), torch.randn(2, teacher.POOLED, generator=rng))
    x, sigma = torch.randn(2, 16, 8, 12, generator=rng), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        native = teacher.denoiser(ours)(x, sigma, cond)
        assert contract.relative(bundle.denoiser(x, sigma, cond), native) < 1e-4
        # the control: the final layer's two halves the wrong way round
        last = bundle.net.norm_out.linear
        last.weight.data = last.weight.data.roll(len(last.weight) // 2, 0)
        assert contract.relative(bundle.denoiser(x, sigma, cond), native) > 1e-3


def test_native_flux_keys_equal_the_hosts_converter_at_full_width():
    """diffusers converts one width only, 3072; there ours gives the same tensors."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    def narrow(shape):  # the converter splits rows of 3072; columns may be thin
        return torch.randn(shape, generator=rng)

    rng, w = torch.Generator().manual_seed(0), 3072
    state = {}
    for name in ("time_in", "vector_in", "guidance_in"):
        for layer in ("in_layer", "out_layer"):
            state |= {f"{name}.{layer}.weight": narrow((4, 2)), f"{name}.{layer}.bias": narrow((4,))}
    for name in ("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"):
        state |= {f"{name}.weight": narrow((4, 2)), f"{name}.bias": narrow((4,))}
    for side in ("img", "txt"):
        at = f"double_blocks.0.{side}"
        for layer, rows in (("mod.lin", 6), ("attn.qkv", 3 * w), ("attn.proj", 4), ("mlp.0", 4), ("mlp.2", 4)):
            state |= {f"{at}_{layer}.weight": narrow((rows, 2)), f"{at}_{layer}.bias": narrow((rows,))}
        state |= {f"{at}_attn.norm.{n}_norm.scale": narrow((4,)) for n in ("query", "key")}
    for layer, rows in (("linear1", 7 * w), ("linear2", 4), ("modulation.lin", 6)):
        at = f"single_blocks.0.{layer}"
        state |= {f"{at}.weight": narrow((rows, 2)), f"{at}.bias": narrow((rows,))}
    state |= {f"single_blocks.0.norm.{n}_norm.scale": narrow((4,)) for n in ("query", "key")}
    ours = flux_keys.flux_state({flux_keys.PREFIX + k: v for k, v in state.items()})
    host = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    assert ours.keys() == host.keys()
    assert all(torch.equal(v, host[k]) for k, v in ours.items())


LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
LDM_PLAIN = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_key(key, layers=1):
    """The original checkpoint's name of a two-level SD 1.5 UNet's parameter."""
    head, _, part = key.rpartition(".")
    if head in LDM_PLAIN:
        return f"model.diffusion_model.{LDM_PLAIN[head]}.{part}"
    side, *rest = head.split(".")
    block = 0 if side == "mid_block" else int(rest.pop(0))
    kind, index, *inner = rest
    tail = ".".join([LDM_RESNET.get(inner[0], inner[0]), *inner[1:], part]) if inner else part
    if side == "mid_block":
        at = f"middle_block.{2 * int(index) + (kind == 'attentions')}"
    elif kind == "downsamplers":
        at, tail = f"input_blocks.{(layers + 1) * (block + 1)}.0", f"op.{part}"
    elif kind == "upsamplers":
        at, tail = f"output_blocks.{(layers + 1) * block + layers}.1", f"conv.{part}"
    elif side == "down_blocks":
        at = f"input_blocks.{(layers + 1) * block + int(index) + 1}.{int(kind == 'attentions')}"
    else:
        at = f"output_blocks.{(layers + 1) * block + int(index)}.{int(kind == 'attentions')}"
    return f"model.diffusion_model.{at}.{tail}"


def ldm_checkpoint(bundle, path):
    state = {ldm_key(k): v for k, v in bundle.net.state_dict().items()}
    text = bundle.pipeline.text_encoder.state_dict()
    prefix = "cond_stage_model.transformer.text_model."
    state |= {prefix + k.removeprefix("text_model."): v for k, v in text.items()}
    return save(state, path)


def test_a_single_file_loads_with_a_config_folder(loaded, where, tmp_path):
    bundle = loaded("sd15")
    folder = tiny.save("sd15", where)
    checkpoint = ldm_checkpoint(bundle, tmp_path / "whole.safetensors")
    bare = save(bundle.net.state_dict(), tmp_path / "unet.safetensors")
    x, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 0.6])
    with torch.no_grad():
        expected = bundle.denoiser(x, sigma, bundle.encode(tiny.PROMPTS))
        for file in (checkpoint, bare):
            single = backend.load(file, config=folder)
            assert torch.equal(single.denoiser(x, sigma, single.encode(tiny.PROMPTS)), expected)
            assert single.to_images(x).shape == (2, 3, 64, 64)  # the folder's VAE: neither file has one


def test_a_config_folder_without_weights_gives_the_network_alone(loaded, where, tmp_path):
    folder = tmp_path / "config"
    for source in tiny.save("sd15", where).rglob("*.json"):
        target = folder / source.relative_to(tiny.save("sd15", where))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    single = backend.load(save(loaded("sd15").net.state_dict(), tmp_path / "unet.safetensors"), config=folder)
    with pytest.raises(ValueError, match="without text encoders"):
        single.encode("x")
    with pytest.raises(ValueError, match="without a VAE"):
        single.to_images(torch.zeros(1, 4, 8, 8))


def test_an_original_checkpoint_loads_with_its_yaml(tmp_path):
    import yaml

    config = {
        "model": {
            "params": {
                "linear_start": 0.00085,
                "linear_end": 0.012,
                "timesteps": 1000,
                "parameterization": "v",
                "unet_config": {
                    "params": {
                        "in_channels": 4,
                        "out_channels": 4,
                        "model_channels": 32,
                        "attention_resolutions": [1],
                        "num_res_blocks": 1,
                        "channel_mult": [1, 2],
                        "num_heads": 4,
                        "transformer_depth": 1,
                        "context_dim": 16,
                    }
                },
                "first_stage_config": {"params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}},
            }
        }
    }
    torch.manual_seed(0)
    net = tiny.unet(block_out_channels=(32, 64), norm_num_groups=32, cross_attention_dim=16)
    file = save({ldm_key(k): v for k, v in net.state_dict().items()}, tmp_path / "original.safetensors")
    (tmp_path / "v1.yaml").write_text(yaml.safe_dump(config))
    bundle = backend.load(file, original_config=tmp_path / "v1.yaml")
    x = torch.randn(2, 4, 8, 8)
    t, cross = torch.tensor([500, 20]), torch.randn(2, 7, 16)
    with torch.no_grad():
        assert torch.equal(bundle.net(x, t, cross).sample, net(x, t, cross).sample)
    assert bundle.denoiser.prediction.value == "v"
    assert bundle.denoiser.schedule.sigma_max == pytest.approx(14.6146, rel=1e-4)


# --- refusals: what was given, what is accepted, what to do


def refused(*words):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(words))


def copy_of(family, where, tmp_path):
    import shutil

    return shutil.copytree(tiny.save(family, where), tmp_path / "copy")


def test_what_is_not_on_disk_is_refused(where, tmp_path):
    with refused("stabilityai/sdxl", "does not exist", "model_index.json", "hf download"):
        backend.load("stabilityai/sdxl")
    with refused("no readable model_index.json", "top folder"):
        backend.load(tmp_path)
    with refused("NoSuchPipeline", "StableDiffusionPipeline"):
        folder = copy_of("sd15", where, tmp_path)
        index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "NoSuchPipeline"}
        (folder / "model_index.json").write_text(json.dumps(index))
        backend.load(folder)


def test_missing_libraries_are_named(monkeypatch, where):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)  # what import sees of a package that is not there
    with refused("diffusers and transformers are needed", "pip install"):
        backend.load(tiny.save("sd15", where))


def test_wrong_types_are_refused(where):
    with refused("int8", "float32", "bfloat16"):
        backend.load(tiny.save("sd15", where), dtype=torch.int8)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_refused(part, where, tmp_path):
    folder = copy_of("sd15", where, tmp_path)
    (file,) = (folder / part).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    with refused(str(folder), "could not be loaded", "Fetch the model again"):
        backend.load(folder)
    file.unlink()
    with refused(part, "no weights", "safetensors"):
        backend.load(folder)
    (folder / part / "pytorch_model.bin").write_bytes(b"anything")
    with refused(part, "pytorch_model.bin", "can run code", "safetensors"):
        backend.load(folder)


def test_a_weight_that_is_missing_is_not_left_random(where, tmp_path):
    from safetensors.torch import load_file

    folder = copy_of("sd15", where, tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save({k: v for k, v in load_file(str(file)).items() if k != "conv_out.weight"}, file)
    with refused("lacks 1 weights", "conv_out.weight", "whole model"):
        backend.load(folder)


def test_single_files_that_cannot_be_read_are_refused(where, loaded, tmp_path):
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"x")
    with refused("model.ckpt", "pickle", "safetensors"):
        backend.load(pickle)
    file = save(loaded("sd15").net.state_dict(), tmp_path / "unet.safetensors")
    with refused("configuration is not on this disk", "config=FOLDER", "original_config"):
        backend.load(file)
    with refused("unet.safetensors", "could not be loaded"):
        backend.load(file, config=tiny.save("sdxl", where))  # another family's
    with refused("no single files of pixart", "folder"):
        backend.load(file, config=tiny.save("pixart_sigma", where))
    with refused("nowhere", "model_index.json"):
        backend.load(file, config=tmp_path / "nowhere")
    with refused("no.yaml", "is no file"):
        backend.load(file, original_config=tmp_path / "no.yaml")
    short = tmp_path / "short.safetensors"
    short.write_bytes(file.read_bytes()[:1000])
    with refused("short.safetensors", "cut short"):
        backend.load(short, config=tiny.save("sd15", where))
    scaled = teacher.Teacher().state_dict() | {"x_embedder.proj.scale_weight": torch.ones(1)}
    with refused("fp8.safetensors", "scale_weight"):
        backend.load(save(scaled, tmp_path / "fp8.safetensors"))


def test_networks_for_other_tasks_are_refused(where, tmp_path):
    torch.manual_seed(0)
    folder = copy_of("sd15", where, tmp_path)
    tiny.unet(in_channels=9).save_pretrained(str(folder / "unet"))
    with refused("9 latent channels", "text-to-image"):
        backend.load(folder)
    tiny.unet(time_cond_proj_dim=8).save_pretrained(str(folder / "unet"))
    with refused("LCM", "as the base"):
        backend.load(folder)


def test_schedulers_without_a_known_schedule_are_refused(where, tmp_path):
    folder = copy_of("sd15", where, tmp_path)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}))
    with refused("'sample'", "'epsilon' or 'v_prediction'"):
        backend.load(folder)


def test_bad_prompts_sizes_and_numbers_are_refused(loaded):
    bundle = loaded("sd15")
    for prompts in ([], [None], [3]):
        with refused("prompts are", "at least one text"):
            bundle.encode(prompts)
    with refused("100x64", "multiples of 8", "96x64|104x64"):
        bundle.latent_shape(100, 64)
    with refused("multiples of 16"):
        loaded("flux_dev").latent_shape(72, 64)
    latents = torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0] = float("nan")
    with refused("latents", "NaN", r"\[1\]"):
        bundle.to_images(latents)
    with refused("images", "infinite"):
        bundle.to_latents(torch.full((1, 3, 64, 64), float("inf")))


def test_conditioning_of_another_family_is_refused(loaded):
    plain = loaded("sd15").encode(tiny.PROMPTS)
    x, sigma = torch.zeros(2, 16, 8, 8), torch.tensor([0.5, 0.2])
    with refused("pooled text vector"):
        loaded("flux_schnell").denoiser(x, sigma, plain)
    with refused("embeds its guidance", "3.5"):
        loaded("flux_dev").denoiser(x, sigma, plain)
    with refused("even heights"):
        loaded("flux_schnell").denoiser(x[..., :7], sigma, loaded("flux_schnell").encode(tiny.PROMPTS))


def test_the_network_guard_sees_an_attempt(no_network):
    with pytest.raises(OSError, match="closed"):
        socket.create_connection(("huggingface.co", 443), timeout=1)
    assert no_network
    no_network.clear()
