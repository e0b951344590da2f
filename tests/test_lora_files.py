import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from dmd_core.adapters import AdapterBank
from dmd_core.families import FAMILIES, by_name, detect, layer_path, split_key
from dmd_core.weights import files, keys
from dmd_core.weights.checkpoint import base_hash, merge_file, save_model
from dmd_core.weights.lora import delta, fit, layer_shape, load_lora, merge, read_lora, save_lora
from dmd_core.weights.recipe import Recipe, read_recipe

GOLDEN = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in (Path(__file__).parent / "golden/keys").iterdir()}
NAMES = sorted(GOLDEN)
RECIPE = Recipe(
    family="sdxl",
    objective="dmd2",
    steps=2,
    timesteps=(999, 499),
    sigmas=(14.6, 1.6, 0.0),
    trained_cfg=7.0,
    prediction="eps",
    base="base.safetensors",
    base_hash="0123",
    rank=3,
    trained_on="prompts",
)


def network(name):
    """Layers of the tiny native model of a family, under their own names; nothing but weights."""
    net = nn.Module()
    for path, (out, width, *kernel) in GOLDEN[name]["layers"].items():
        parent = net
        *folders, last = path.split(".")
        for folder in folders:
            if folder not in parent._modules:
                parent.add_module(folder, nn.Module())
            parent = parent.get_submodule(folder)
        parent.add_module(
            last, nn.Conv2d(width, out, kernel, bias=False) if kernel else nn.Linear(width, out, bias=False)
        )
    return net


def trained(net, family, rank=3, seed=0, preset="all"):
    rng = torch.Generator().manual_seed(seed)
    bank = AdapterBank(net, family.targets(preset))
    bank.detach()
    bank.new("student", rank, rng)
    for p in bank.parameters("student").values():
        p.data = torch.randn(p.shape, generator=rng)
    return bank


def saved(tmp_path, name="flux", **options):
    bank = trained(network(name), by_name(name))
    path = save_lora(tmp_path, "x", bank.state("student"), GOLDEN[name]["names"], dtype="fp32", **options)
    return bank, path


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_ones_that_comfyui_was_seen_to_load(name):
    golden = GOLDEN[name]
    assert keys.lora_keys(golden["layers"], by_name(name), golden["names"]) == golden["keys"]


@pytest.mark.parametrize("name", NAMES)
def test_every_key_leads_back_to_its_layer_and_to_no_other(name):
    golden = GOLDEN[name]
    table = keys.slots(golden["layers"], by_name(name), golden["names"])
    for layer, key in golden["keys"].items():
        assert table[keys.spelled(key)] == [keys.Slot(layer)]


LAYOUTS = st.builds(keys.UNetLayout, st.integers(1, 4), st.integers(1, 3))
INSIDE = {
    "0": ["in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection"],
    "1": ["proj_in", "proj_out", "transformer_blocks.3.attn2.to_k", "transformer_blocks.0.ff.net.0.proj"],
}


def unet_paths(layout):
    """Every layer that a UNet of this layout can have, native names, attention everywhere."""
    found = ["input_blocks.0.0", "out.2", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2"]
    found += [f"middle_block.{i}.{p}" for i, kind in ((0, "0"), (1, "1"), (2, "0")) for p in INSIDE[kind]]
    for level in range(layout.levels):
        for i in range(layout.resnets + 1):
            n = level * (layout.resnets + 1) + i
            found += [f"output_blocks.{n}.{kind}.{p}" for kind in "01" for p in INSIDE[kind]]
            if i < layout.resnets:
                found += [f"input_blocks.{n + 1}.{kind}.{p}" for kind in "01" for p in INSIDE[kind]]
            elif level < layout.levels - 1:
                found += [f"input_blocks.{n + 1}.0.op", f"output_blocks.{n}.2.conv"]
    return found


@settings(deadline=None, max_examples=12)
@given(LAYOUTS)
def test_unet_names_survive_the_way_to_diffusers_and_back(layout):
    native = unet_paths(layout)
    family = by_name("sdxl")
    there = {n: keys.twins(n, family, layout)[0].name for n in native}
    assert len(set(there.values())) == len(native)  # no two layers meet
    assert not set(there.values()) & set(native)
    for n, d in there.items():
        assert n in [t.name for t in keys.twins(d, family, layout)]
    if layout.levels > 1:  # the layout is read off the names, in both spellings
        assert keys.unet_layout(native) == layout
    assert keys.unet_layout(there.values()) == layout
    kohya = keys.lora_keys(native, family, native) if layout.levels > 1 else {}
    assert len(set(kohya.values())) == len(kohya)


TRANSFORMERS = [f for f in FAMILIES.values() if f.same]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(TRANSFORMERS), st.integers(0, 59), st.integers(1, 5), st.integers(0, 4), st.data())
def test_transformer_names_survive_the_way_to_diffusers_and_back(family, block, width, extra, data):
    same = data.draw(st.sampled_from(family.same))
    native = same.native.format(block)
    there = keys.twins(native, family)
    assert [t.name for t in there] == [d.format(block) for d in same.diffusers]
    if there[0].name != native:
        for twin in there:
            (back,) = keys.twins(twin.name, family)
            assert (back.name, back.take) == (native, twin.fill)
    count = len(there)
    height = {1: 7, 2: 2 * width, 3: 3 * width, 4: 3 * width + extra}[count]
    rows = [r for t in there for r in range(height)[keys.part_rows(t.fill, height, width)]]
    assert rows == list(range(height))  # the parts are the whole, in order, each row once


def test_a_unet_whose_levels_do_not_show_needs_all_names():
    layers = ["output_blocks.2.1.transformer_blocks.0.attn2.to_k"]
    with pytest.raises(ValueError, match="names of all layers"):
        keys.lora_keys(layers, by_name("sd15"))
    assert keys.lora_keys(layers, by_name("sd15"), GOLDEN["sd15"]["names"]) == {
        layers[0]: "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    }


def test_a_layer_that_comfyui_lacks_is_not_written():
    with pytest.raises(ValueError, match=r"no layer for .*norm1_context"):
        keys.lora_keys(["transformer_blocks.0.norm1_context.linear"], by_name("sd3"))


# --- out and in again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_is_what_is_loaded(name, tmp_path):
    bank, path = saved(tmp_path, name)
    state = load_lora(path, bank, GOLDEN[name]["names"])
    before = bank.state("student")
    assert state.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    bank.load("again", state)
    assert read_lora(path).family.name in (name, "generic")


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 6e-4), ("bf16", 5e-3)])
def test_half_precision_costs_its_rounding_and_no_more(dtype, error, tmp_path):
    bank = trained(network("wan"), by_name("wan"))
    path = save_lora(tmp_path, "x", bank.state("student"), GOLDEN["wan"]["names"], dtype=dtype)
    assert {v.dtype for v in load_file(path).values()} == {{"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}
    back, before = load_lora(path, bank), bank.state("student")
    assert any(not torch.equal(v, before[k]) for k, v in back.items())
    for k, v in back.items():
        torch.testing.assert_close(v, before[k], rtol=error, atol=1e-7)


def test_the_strength_is_baked_into_up_and_alpha_is_the_rank(tmp_path):
    bank, path = saved(tmp_path, "sd15", scale=0.5)
    tensors, before = load_file(path), bank.state("student")
    layer, key = next(iter(GOLDEN["sd15"]["keys"].items()))
    assert torch.equal(tensors[f"{key}.lora_up.weight"], before[f"{layer}.up"] * 0.5)
    ranks = {k: tensors[k.replace(".alpha", ".lora_down.weight")].shape[0] for k in tensors if k.endswith(".alpha")}
    assert all(tensors[k].item() == rank for k, rank in ranks.items())
    assert len(tensors) == 3 * len(bank.layers)  # nothing else: diffusers and InvokeAI refuse files with more


def test_kohya_files_with_another_alpha_load_at_their_own_strength(tmp_path):
    bank, path = saved(tmp_path, "sdxl")
    tensors = load_file(path)
    tensors = {k: torch.tensor(1.5) if k.endswith(".alpha") else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "alpha.safetensors")
    state = load_lora(tmp_path / "alpha.safetensors", bank, GOLDEN["sdxl"]["names"])
    for n in bank.layers:
        rank = len(state[f"{n}.down"])
        torch.testing.assert_close(state[f"{n}.up"], bank.state("student")[f"{n}.up"] * 1.5 / rank)


PEFT = [
    ("{}.lora_A.weight", "{}.lora_B.weight"),
    ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    ("unet.{}.lora_A.default.weight", "unet.{}.lora_B.default.weight"),
    ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    ("model.diffusion_model.{}.lora_A", "model.diffusion_model.{}.lora_B"),
]


@pytest.mark.parametrize("ends", PEFT)
@pytest.mark.parametrize("name", ["sdxl", "flux", "wan"])
def test_files_of_other_trainers_load_whatever_their_keys(name, ends, tmp_path):
    bank, names = trained(network(name), by_name(name)), GOLDEN[name]["names"]
    before, layout, tensors = bank.state("student"), keys.unet_layout(names), {}
    for layer in bank.layers:
        one = keys.twins(layer, by_name(name), layout) if name != "flux" else []
        key = one[0].name if one else layer
        tensors |= {ends[0].format(key): before[f"{layer}.down"], ends[1].format(key): before[f"{layer}.up"]}
    save_file(tensors, tmp_path / "f.safetensors")
    state = load_lora(tmp_path / "f.safetensors", bank, names)
    assert all(torch.equal(state[k], v) for k, v in before.items())


def split_file(tmp_path, native, diffusers, shapes):
    """A LoRA of split layers, and what each part adds."""
    tensors, parts = {}, []
    for i, (name, height) in enumerate(zip(diffusers, shapes, strict=True)):
        rng = torch.Generator().manual_seed(i)
        down, up = torch.randn(i + 1, 8, generator=rng), torch.randn(height, i + 1, generator=rng)
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        parts.append(up @ down)
    save_file(tensors, tmp_path / "split.safetensors")
    return tmp_path / "split.safetensors", parts


@pytest.mark.parametrize(
    ("family", "native", "heights"),
    [
        ("sd3", "joint_blocks.0.x_block.attn.qkv", (8, 8, 8)),
        ("flux", "single_blocks.0.linear1", (8, 8, 8, 32)),
        ("z_image", "layers.0.attention.qkv", (8, 8, 8)),
        ("pixart", "blocks.0.cross_attn.kv_linear", (8, 8)),
    ],
)
def test_split_layers_fuse_exactly_and_fused_layers_split_exactly(family, native, heights, tmp_path):
    diffusers = [t.name for t in keys.twins(native, by_name(family))]
    path, parts = split_file(tmp_path, native, diffusers, heights)
    fused = load_lora(path, {native: (sum(heights), 8)}, family=by_name(family))
    down, up = fused[f"{native}.down"], fused[f"{native}.up"]
    assert len(down) == sum(range(1, len(heights) + 1))
    torch.testing.assert_close(delta(down, up), torch.cat(parts))

    save_file({f"{native}.lora_A.weight": down, f"{native}.lora_B.weight": up}, tmp_path / "fused.safetensors")
    shapes = {n: (h, 8) for n, h in zip(diffusers, heights, strict=True)}
    back = load_lora(tmp_path / "fused.safetensors", shapes, family=by_name(family))
    for n, part in zip(diffusers, parts, strict=True):
        torch.testing.assert_close(delta(back[f"{n}.down"], back[f"{n}.up"]), part)


def test_a_part_that_the_file_lacks_adds_nothing(tmp_path):
    native, names = "layers.0.attention.qkv", [t.name for t in keys.twins("layers.0.attention.qkv", by_name("z_image"))]
    path, (part,) = split_file(tmp_path, native, names[1:2], (8,))
    state = load_lora(path, {native: (24, 8)}, family=by_name("z_image"))
    change = delta(state[f"{native}.down"], state[f"{native}.up"])
    torch.testing.assert_close(change[8:16], part)
    assert change[:8].abs().max() == change[16:].abs().max() == 0


def test_the_last_modulation_has_scale_and_shift_in_the_other_order(tmp_path):
    path, (part,) = split_file(tmp_path, "", ["norm_out.linear"], (16,))
    layer = "final_layer.adaLN_modulation.1"
    state = load_lora(path, {layer: (16, 8)}, family=by_name("flux"))
    torch.testing.assert_close(delta(state[f"{layer}.down"], state[f"{layer}.up"]), part.roll(8, 0))


def test_convolutions_and_linear_layers_of_the_same_weight_exchange(tmp_path):
    """SD 1.5 has proj_in as a 1x1 convolution, other trainers' files may have it flat, and the other way round."""
    layer = "middle_block.1.proj_in"
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    flat = {f"lora_unet_{layer.replace('.', '_')}.lora_down.weight": down}
    flat |= {f"lora_unet_{layer.replace('.', '_')}.lora_up.weight": up}
    save_file(flat, tmp_path / "flat.safetensors")
    save_file({k: v[..., None, None].clone() for k, v in flat.items()}, tmp_path / "conv.safetensors")
    for name in ("flat", "conv"):
        for shape in ((6, 8), (6, 8, 1, 1)):
            state = load_lora(tmp_path / f"{name}.safetensors", {layer: shape}, family=by_name("sd15"))
            torch.testing.assert_close(delta(state[f"{layer}.down"], state[f"{layer}.up"]), (up @ down).reshape(shape))


def test_a_convolution_s_file_acts_as_the_merged_convolution(tmp_path):
    net = network("sd15")
    bank, path = saved(tmp_path, "sd15")
    layer = "input_blocks.2.0.op"
    conv = net.get_submodule(layer)
    assert isinstance(conv, nn.Conv2d)
    bank = AdapterBank(net, by_name("sd15").targets())
    bank.load("student", load_lora(path, bank, GOLDEN["sd15"]["names"]))
    x = torch.randn(1, conv.in_channels, 5, 5)
    with bank.use(student=0.7), torch.no_grad():
        adapted = conv(x)
    bank.detach()
    state = {k: v for k, v in bank.state("student").items() if k.startswith(f"{layer}.")}
    conv.weight.data = merge({f"{layer}.weight": conv.weight.data}, state, 0.7)[f"{layer}.weight"]
    torch.testing.assert_close(conv(x), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "loader"),
    [("sd15", "StableDiffusionLoraLoaderMixin"), ("sdxl", "StableDiffusionXLLoraLoaderMixin")],
)
def test_diffusers_understands_every_key_of_a_unet_file(name, loader, tmp_path):
    loaders = pytest.importorskip("diffusers.loaders")
    bank, path = saved(tmp_path, name)
    found, alphas = getattr(loaders, loader).lora_state_dict(load_file(path))
    assert len(found) == 2 * len(bank.layers)
    assert len(alphas) == len(bank.layers)
    layout = keys.unet_layout(GOLDEN[name]["names"])
    wanted = {keys.twins(n, by_name(name), layout)[0].name for n in bank.layers}
    assert {layer_path(split_key(k)[0]) for k in found} == wanted


# --- metadata ---------------------------------------------------------------------------------------------------------


def test_the_recipe_travels_with_the_file(tmp_path):
    _, path = saved(tmp_path, "sdxl", recipe=RECIPE, metadata={"modelspec.author": "me"})
    file = read_lora(path)
    assert file.recipe == RECIPE
    assert file.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert file.metadata["modelspec.usage_hint"] == "2 steps, lcm + simple, cfg 1"
    assert file.metadata["modelspec.timestep_range"] == "499,999"
    assert file.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert file.metadata["ss_network_dim"] == file.metadata["ss_network_alpha"] == "3"
    assert file.metadata["modelspec.author"] == "me"


def test_recipes_of_later_versions_load_and_broken_ones_are_refused():
    later = json.dumps({**json.loads(RECIPE.to_json()), "version": 9, "new_field": [1]})
    assert Recipe.from_json(later).steps == 2
    assert read_recipe({}) is None
    for text in ("{", "[]", "{}", '{"family": 1}', "null"):
        with pytest.raises(ValueError, match="recipe"):
            Recipe.from_json(text)
    with pytest.raises(ValueError, match="3 steps with 2 sigmas"):
        Recipe(family="flux", objective="dmd2", steps=3, sigmas=(1.0, 0.0))


# --- names and half-written files -------------------------------------------------------------------------------------


def test_nothing_is_ever_overwritten(tmp_path):
    first, second = (saved(tmp_path)[1] for _ in range(2))
    assert [first.name, second.name] == ["x_00001.safetensors", "x_00002.safetensors"]
    (tmp_path / "x_00041.safetensors").touch()
    assert files.free_path(tmp_path, "x").name == "x_00042.safetensors"
    assert files.free_path(tmp_path, "x.safetensors").name == "x_00042.safetensors"
    assert files.free_path(tmp_path, "sub/y") == tmp_path / "sub" / "y_00001.safetensors"
    assert files.free_path(tmp_path, "a (b) [c]+é").name == "a (b) [c]+é_00001.safetensors"


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "a/../../x", "/etc/x", "C:\\x", "a:b", "a*b", "a?", 'a"b', "a<b", "a>b", "a|b", "a\nb",
     "a\0b", "con", "NUL", "com1.txt", "a/prn", "a.", "a ", "x" * 200, "a//b", "..\\x"],
)  # fmt: skip
def test_names_that_some_system_forbids_or_that_lead_outside_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"name|Windows|letters"):
        files.free_path(tmp_path, name)


def test_a_link_does_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "out", tmp_path / "in" / "link", target_is_directory=True)
    with pytest.raises(ValueError, match="leads out"):
        files.free_path(tmp_path / "in", "link/x")


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    bank = trained(network("wan"), by_name("wan"))
    state, names = bank.state("student"), GOLDEN["wan"]["names"]
    key = next(k for k in state if k.endswith(".up"))
    for value, dtype in ((float("nan"), "fp32"), (1e6, "fp16")):
        with pytest.raises(ValueError, match=r"not finite.*nothing was saved"):
            save_lora(tmp_path, "x", {**state, key: state[key] * 0 + value}, names, dtype=dtype)
    with pytest.raises(ValueError, match="dtype 'fp8'"):
        save_lora(tmp_path, "x", state, names, dtype="fp8")
    with pytest.raises(ValueError, match="what AdapterBank"):
        save_lora(tmp_path, "x", {"a.weight": torch.ones(1)}, names)
    assert os.listdir(tmp_path) == []


def test_a_model_that_fails_in_the_middle_leaves_nothing_behind(tmp_path):
    weights = {"a.weight": torch.ones(4, 4), "b.weight": torch.full((4, 4), 1e6)}
    with pytest.raises(ValueError, match=r"b\.weight is not finite"):
        save_model(tmp_path, "m", weights, by_name("generic"))
    assert os.listdir(tmp_path) == []
    assert save_model(tmp_path, "m", weights, by_name("generic"), dtype="bf16").name == "m_00001.safetensors"


# --- bad input --------------------------------------------------------------------------------------------------------


def truncated(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(path: Path):
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path):
    path.write_bytes(b"")


def absurd_header(path: Path):
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def twice_named(path: Path):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    raw = f'{{"a.lora_A.weight":{entry},"a.lora_A.weight":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)


def pickled(path: Path):
    torch.save({"a": torch.ones(1)}, path)


def old_pickle(path: Path):
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)


def change(function):
    def apply(path: Path):
        tensors = {k: v.clone() for k, v in load_file(path).items()}  # loaded ones are the file itself
        save_file({k: v.contiguous() for k, v in function(tensors).items()}, path)

    apply.__name__ = function.__name__
    return apply


@change
def wrong_rank(t):
    key = next(k for k in t if k.endswith("lora_B.weight"))
    return {**t, key: t[key][:, :2]}


@change
def wrong_width(t):
    key = next(k for k in t if k.endswith("lora_A.weight"))
    return {**t, key: t[key][:, :-1]}


@change
def one_half_missing(t):
    return dict(list(t.items())[1:])


@change
def unknown_layer(t):
    return {k.replace("double_blocks.1.", "double_blocks.9."): v for k, v in t.items()}


@change
def unknown_key(t):
    return {**t, "something.else": torch.ones(1)}


@change
def loha(t):
    return {"lora_unet_a.hada_w1_a": torch.ones(2, 2), "lora_unet_a.hada_w1_b": torch.ones(2, 2)}


@change
def lokr(t):
    return {**t, "diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1": torch.ones(2, 2)}


@change
def dora(t):
    return {**t, "diffusion_model.double_blocks.0.img_attn.qkv.dora_scale": torch.ones(2)}


@change
def differences(t):
    return {**t, "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": torch.ones(2)}


@change
def text_encoder(t):
    return {**t, "lora_te_a.lora_down.weight": torch.ones(2, 2), "lora_te_a.lora_up.weight": torch.ones(2, 2)}


@change
def other_family(t):
    end = {"lora_down.weight": (2, 2048), "lora_up.weight": (640, 2), "alpha": ()}
    return {
        f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k.{k}": torch.ones(s)
        for k, s in end.items()
    }


@change
def whole_model(t):
    return {"double_blocks.0.img_attn.qkv.weight": torch.ones(3, 1)}


BAD = [
    (lambda p: p.unlink(), "no file at"),
    (truncated, "cut off"),
    (cut_in_header, "cut off"),
    (empty, "too few"),
    (absurd_header, "header of 4611686018427387904 bytes"),
    (twice_named, "twice"),
    (pickled, r"pickle; only \.safetensors"),
    (old_pickle, r"pickle; only \.safetensors"),
    (wrong_rank, "ranks of .* do not fit"),
    (wrong_width, "does not fit"),
    (one_half_missing, "lacks one half"),
    (unknown_layer, "8 of 20 layers have no place here: double_blocks_9"),
    (unknown_key, "not understood, such as something.else"),
    (loha, "LoHa"),
    (lokr, "LoKr"),
    (dora, "DoRA"),
    (differences, "bias differences"),
    (text_encoder, "text encoders too"),
    (other_family, r"LoRA for Stable Diffusion XL, this model is FLUX\.1"),
    (whole_model, "is no LoRA"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_files_are_refused_in_words_and_the_bank_stays_as_it_was(damage, message, tmp_path):
    bank, path = saved(tmp_path)
    before = bank.state("student")
    load_lora(path, bank, GOLDEN["flux"]["names"])  # sound before
    damage(path)
    with pytest.raises(ValueError, match=message):
        load_lora(path, bank, GOLDEN["flux"]["names"])
    assert list(bank.sets) == ["student"]
    assert all(torch.equal(v, before[k]) for k, v in bank.state("student").items())


@pytest.mark.parametrize("length", [128, 384, 640, 0x80 + 2**16, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_s_first_letters_is_read(length, tmp_path):
    path, n = tmp_path / "x.safetensors", 0
    while not path.exists() or struct.unpack("<Q", path.read_bytes()[:8])[0] < length:
        n = max(n + 1, length - 200)
        save_file({"a.weight": torch.ones(1)}, path, {"padding": "x" * n})
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] == length
    assert files.read_weights_header(path).shapes == {"a.weight": (1,)}


def test_a_narrower_bank_is_told_so(tmp_path):
    _, path = saved(tmp_path)
    narrow = trained(network("flux"), by_name("flux"), preset="attention")
    with pytest.raises(ValueError, match=r"8 of 20 layers have no place here.*try 'all'"):
        load_lora(path, narrow, GOLDEN["flux"]["names"])


def test_the_header_s_family_is_believed_before_the_keys(tmp_path):
    bank, path = saved(tmp_path, "flux", recipe=Recipe(family="wan", objective="dmd2"))
    with pytest.raises(ValueError, match=r"LoRA for Wan, this model is FLUX\.1"):
        load_lora(path, bank, GOLDEN["flux"]["names"])


# --- merging and whole models -----------------------------------------------------------------------------------------


def test_merging_is_linear_in_the_strength_and_leaves_its_input_alone():
    net = network("z_image")
    bank = trained(net, by_name("z_image"))
    weights = {f"model.diffusion_model.{k}": v.double() for k, v in net.state_dict().items()}
    weights["first_stage_model.x.weight"] = torch.ones(2, 2)
    kept = {k: v.clone() for k, v in weights.items()}
    state = bank.state("student")
    one = merge(weights, state)
    for scale in (-2.0, 0.0, 0.5):
        mixed = merge(weights, state, scale)
        for k, w in weights.items():
            torch.testing.assert_close(mixed[k] - w, scale * (one[k] - w), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(v, weights[k]) for k, v in kept.items())
    assert all(not torch.equal(one[k], w) for k, w in weights.items() if k.startswith("model."))
    with pytest.raises(ValueError, match="no weight in this model"):
        merge({"a.weight": torch.ones(2, 2)}, state)


def test_merging_into_eight_bits_is_refused():
    state = {"a.down": torch.ones(1, 2), "a.up": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="float8_e4m3fn; merge into an fp16"):
        merge({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, state)


def test_a_file_is_merged_tensor_by_tensor_and_keeps_the_rest(tmp_path):
    bank, lora = saved(tmp_path, "sd15", recipe=RECIPE.__class__(family="sd15", objective="dmd2"))
    net = {f"model.diffusion_model.{k}": v.half() for k, v in network("sd15").state_dict().items()}
    rest = {"first_stage_model.a.weight": torch.randn(3, 3), "model_ema.num_updates": torch.tensor(3)}
    save_file({**net, **rest}, tmp_path / "base.safetensors", {"kept": "yes"})
    path = merge_file(tmp_path, "merged", tmp_path / "base.safetensors", lora, scale=0.5)
    found, expected = load_file(path), merge({**net, **rest}, bank.state("student"), 0.5)
    assert found.keys() == expected.keys()
    for k, v in expected.items():
        torch.testing.assert_close(found[k], v, rtol=1e-3, atol=1e-3)  # fp16, another order of summing
        assert found[k].dtype == v.dtype
    assert all(torch.equal(found[k], v) for k, v in rest.items())
    header = files.read_weights_header(path)
    assert header.metadata["kept"] == "yes"
    assert read_recipe(header.metadata).objective == "dmd2"


def test_our_writer_writes_what_the_reference_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(2).bfloat16(),
        "c": torch.arange(3),
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 4),
        "f": torch.randn(7).to(torch.float8_e4m3fn),
        "g": torch.tensor([True, False]),
        "h": torch.randn(4, 6).T,
    }
    specs = {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}
    files.write_streaming(tmp_path / "x.safetensors", specs, tensors.__getitem__, {"k": "é"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k].float(), v.float()) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert files.read_weights_header(tmp_path / "x.safetensors").metadata == {"k": "é"}


def test_the_base_hash_follows_the_content_and_not_the_packing(tmp_path):
    weights = {k: v.bfloat16() for k, v in network("wan").state_dict().items()}
    bare = base_hash(weights)
    assert base_hash({f"model.diffusion_model.{k}": v.float() for k, v in weights.items()}) == bare
    packed = {f"model.diffusion_model.{k}": v for k, v in weights.items()} | {"vae.a.weight": torch.ones(2)}
    save_file(packed, tmp_path / "x.safetensors")
    assert base_hash(tmp_path / "x.safetensors") == bare
    key = next(iter(weights))
    assert base_hash({**weights, key: weights[key] * 1.01}) != bare
    assert base_hash({**weights, key: weights[key].T.contiguous()}) != bare


def test_a_checkpoint_takes_native_names_only(tmp_path):
    weights = {
        "transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2),
        "single_transformer_blocks.0.proj_mlp.weight": torch.ones(2, 2),
    }
    with pytest.raises(ValueError, match="diffusion_model"):
        save_model(tmp_path, "m", weights, by_name("flux"), layout="checkpoint")
    path = save_model(tmp_path, "m", weights, by_name("flux"), recipe=Recipe(family="flux", objective="ladd", steps=4))
    assert files.read_weights_header(path).metadata["modelspec.architecture"] == "flux-1-dev"


def test_a_layer_s_shape_is_what_its_weight_means():
    assert layer_shape(nn.Linear(3, 5)) == (5, 3)
    assert layer_shape(nn.Conv2d(3, 5, (1, 2))) == (5, 3, 1, 2)
    with pytest.raises(TypeError, match="LayerNorm"):
        layer_shape(nn.LayerNorm(3))


def test_fit_reads_the_family_from_shapes_where_names_do_not_tell(tmp_path):
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 1536), f"{key}.lora_B.weight": torch.ones(1536, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_lora(tmp_path / "x.safetensors")
    assert file.family.name == "sd3"
    assert detect(["transformer_blocks.0.attn.to_q"]).name == "generic"
    state = fit(file, {"joint_blocks.0.x_block.attn.qkv": (3 * 1536, 1536)})
    assert state["joint_blocks.0.x_block.attn.qkv.up"][1536:].abs().max() == 0
