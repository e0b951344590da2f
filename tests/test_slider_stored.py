"""What a slider's run keeps on disk, its words for people, and files in the key layouts of published sliders."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import save_file
from slider_worlds import generator, world
from torch import nn

from dmd_core.adapters import AdapterBank
from dmd_core.runs import Run
from dmd_core.sliders import Calibration, Point, Pool, Sampling, card, draw_pool
from dmd_core.sliders.card import words
from dmd_core.sliders.settings import DiscoverySettings, SliderSettings
from dmd_core.sliders.stored import Finished, kept, kept_pool, key_of, read_sliders, write_sliders
from dmd_core.weights.doctor import coverage, diagnose, repair
from dmd_core.weights.lora import lora_of, read_lora

D = 5
MODEL, COND = world(torch.randn(3, D, generator=generator(1)))
SAMPLING = Sampling(shape=(D,), sigmas=(1.0, 0.5), gamma=(1.0, 0.0), batch=4)


def draw(begin: int, n: int = 14):
    return draw_pool(MODEL, SAMPLING, COND, n, begin=begin)


def equal(a: Pool, b: Pool) -> bool:
    return torch.equal(a.latents, b.latents) and torch.equal(a.row, b.row)


# --- pools -----------------------------------------------------------------------------------------------------------


def test_a_pool_goes_on_where_it_stopped():
    whole = Pool.join(list(draw(0)))
    for begin in (4, 8, 13):
        rest = Pool.join(list(draw(begin)))
        assert equal(Pool.join([Pool(whole.latents[:begin], whole.row[:begin]), rest]), whole)
    assert list(draw(14)) == []
    assert not torch.equal(Pool.join(list(draw(4))).latents, whole.latents[:10])


def test_parts_on_disk_are_not_made_again(tmp_path):
    asked = []

    def counted(begin: int):
        asked.append(begin)
        return draw(begin)

    whole = Pool.join(list(draw(0)))
    parts = kept_pool(tmp_path, "key", 14, counted)
    assert len(list(islice(parts, 2))) == 2  # and then it is cancelled
    parts.close()
    assert equal(Pool.join(list(kept_pool(tmp_path, "key", 14, counted))), whole)
    assert equal(Pool.join(list(kept_pool(tmp_path, "key", 14, counted))), whole)
    assert asked == [0, 8, 14]
    # a shorter one is its beginning, and a longer one goes on
    shorter = Pool.join(list(kept_pool(tmp_path, "key", 6, lambda begin: draw(begin, 6))))
    assert equal(shorter, Pool(whole.latents[:6], whole.row[:6]))
    longer = Pool.join(list(kept_pool(tmp_path, "key", 18, lambda begin: draw(begin, 18))))
    assert torch.equal(longer.latents[:14], whole.latents)
    assert len(longer) == 18


def test_a_pool_made_otherwise_or_damaged_is_made_anew(tmp_path):
    list(kept_pool(tmp_path, "key", 14, draw))
    (tmp_path / "part_00001.safetensors").write_bytes(b"cut off")
    begun = []
    list(kept_pool(tmp_path, "key", 14, lambda begin: begun.append(begin) or draw(begin)))
    list(kept_pool(tmp_path, "other", 14, lambda begin: begun.append(begin) or draw(begin)))
    assert begun == [4, 0]


def test_tensors_are_kept_under_their_key(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": torch.full((2,), float(len(made)))}

    path = tmp_path / "x.safetensors"
    assert [kept(path, k, make)["a"][0].item() for k in ("k", "k", "other", "k")] == [1, 1, 2, 3]
    assert key_of({"a": 1, "b": (1.0, 2)}) == key_of({"b": [1.0, 2], "a": 1}) != key_of({"a": 2, "b": (1.0, 2)})


def test_a_few_step_sampling_takes_a_number_for_each_step_and_a_way_to_keep_noise():
    seeds = range(3)
    each = SAMPLING(MODEL, COND[:1], seeds)
    assert torch.equal(each, replace(SAMPLING, gamma=1.0)(MODEL, COND[:1], seeds))
    assert not torch.equal(each, replace(SAMPLING, gamma=(0.0, 0.0))(MODEL, COND[:1], seeds))
    half = replace(SAMPLING, gamma=0.5)
    assert not torch.equal(half(MODEL, COND[:1], seeds), replace(half, keep="variance")(MODEL, COND[:1], seeds))


# --- finished sliders ------------------------------------------------------------------------------------------------


def a_card(verdict="works", **facts):
    points = tuple(Point(s, 0.9 * s, 0.1, abs(s) / 8) for s in (-1.0, 0.0, 1.0))
    measured = Calibration(2.0, points, (-1.5, 1.0), 0.97, verdict)
    common = {"kind": "text", "name": "age", "prompts": {}, "encoder": "eyes", "base": "tiny.safetensors"}
    return card(measured, **(common | {"base_hash": "x", "rank": 2, "layers": "all"} | facts))


def test_a_set_comes_back_whole_or_not_at_all(tmp_path):
    run = Run(tmp_path)
    made = [Finished({"a.up": torch.randn(2, 1)}, a_card(name=f"s{i}")) for i in range(3)]
    assert read_sliders(run) == []
    write_sliders(run, made, 40)
    back = read_sliders(run, 40)
    assert [b.card for b in back] == [m.card for m in made]
    assert all(torch.equal(b.state["a.up"], m.state["a.up"]) for b, m in zip(back, made, strict=True))
    assert read_sliders(run, 50) == []
    (tmp_path / "sliders" / "02.safetensors").unlink()
    assert read_sliders(run) == []
    write_sliders(run, made[:1], 50)
    assert len(read_sliders(run, 50)) == 1
    (tmp_path / "sliders" / "01.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        read_sliders(run)


def test_words_say_first_if_it_works_then_how_far_and_what_else_moves():
    text = words(a_card())
    assert "works; use it from -1.5 to +1" in text
    assert "+1 moves it by +0.90" in text
    assert "-1 by -0.90; other things by up to 0.12" in text
    assert "correlation of 0.97" in text
    assert "WARNING" not in text
    assert "DOES NOTHING" in words(a_card("nothing"))
    assert all("WARNING" in words(a_card(v)) for v in ("nothing", "drifts", "weak"))
    found = words(a_card(kind="discovered", explained=0.3, stability=0.9, additivity=0.05, ends=("dark", "bright")))
    assert "age (bright - dark)" in found
    assert "30% of the pool's variety, and 0.90" in found
    assert "off the sum by 0.05" in found


def test_settings_that_cannot_work_are_named():
    for changes, message in [({"steps": 0}, "steps is 0"), ({"seeds": 3}, "seeds is 3"), ({"pool": 7}, "pool is 7")]:
        with pytest.raises(ValueError, match=message):
            SliderSettings(**changes)
    for changes in ({"sliders": 33}, {"sliders": 0}, {"prompts": 0}):
        with pytest.raises(ValueError, match="1 to 32"):
            DiscoverySettings(**changes)


# --- files of the original trainers ----------------------------------------------------------------------------------

FLUX = {"double_blocks.0.img_attn.qkv": (24, 8), "single_blocks.0.linear1": (56, 8)}
SPLIT = tuple(f"transformer_blocks_0_attn_to_{p}" for p in "qkv")
SINGLE = tuple(f"single_{n}" for n in SPLIT)


def published(layers=SPLIT + SINGLE, rank=4):
    """lora_unet_ and diffusers' names with underscores, alpha 1: Concept Sliders and SliderSpace, also for Flux."""
    rng, found = torch.Generator().manual_seed(0), {}
    for n in layers:
        found[f"lora_unet_{n}.lora_down.weight"] = torch.randn(rank, 8, generator=rng)
        found[f"lora_unet_{n}.lora_up.weight"] = torch.randn(8, rank, generator=rng)
        found[f"lora_unet_{n}.alpha"] = torch.tensor(1.0)
    return found


def test_the_layout_that_comfyui_drops_is_a_problem_of_transformers_only(tmp_path):
    save_file(published(), tmp_path / "flux.safetensors")
    unet = tuple(f"down_blocks_1_attentions_0_transformer_blocks_{i}_attn2_to_k" for i in range(2))
    save_file(published(unet), tmp_path / "unet.safetensors")
    native = ("double_blocks_0_img_attn_proj", "single_blocks_0_linear2")
    save_file(published(native), tmp_path / "native.safetensors")
    said = {
        n: [f.text for f in diagnose(tmp_path / f"{n}.safetensors").findings if f.level == "problem"]
        for n in ("flux", "unet", "native")
    }
    assert "ComfyUI drops 6 of 6 layers" in said["flux"][0]
    assert said["unet"] == said["native"] == []
    assert len(coverage(tmp_path / "flux.safetensors", FLUX).dropped) == 6


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_it_is_repaired_with_the_model_at_hand_as_pickle_too(ending, tmp_path):
    tensors, path = published(), tmp_path / f"slider.{ending}"
    torch.save(tensors, path) if ending == "pt" else save_file(tensors, path)
    with pytest.raises(ValueError, match="cannot be undone without the model"):
        repair(path, tmp_path, "no")
    copy = read_lora(repair(path, tmp_path, "yes", network=FLUX))
    (down, up) = copy.modules["double_blocks_0_img_attn_qkv"]
    parts = [tensors[f"lora_unet_{n}.lora_up.weight"] @ tensors[f"lora_unet_{n}.lora_down.weight"] / 4 for n in SPLIT]
    torch.testing.assert_close(up @ down, torch.cat(parts), rtol=2e-3, atol=2e-3)
    assert len(coverage(copy.path, FLUX).dropped) == 0


def test_tensors_in_memory_are_read_as_the_file_is(tmp_path):
    tensors = published()
    save_file(tensors, tmp_path / "x.safetensors")
    a, b = read_lora(tmp_path / "x.safetensors"), lora_of(tensors, "x.safetensors", {"k": "v"})
    assert a.modules.keys() == b.modules.keys()
    assert all(torch.equal(a.modules[k][1], b.modules[k][1]) for k in a.modules)
    assert (a.family, b.metadata) == (b.family, {"k": "v"})


def test_loading_a_set_leaves_the_global_generator_alone():
    bank = AdapterBank(nn.Sequential(nn.Linear(4, 4)))
    bank.new("a", 2, generator())
    before = torch.random.get_rng_state()
    bank.load("b", bank.state("a"))
    assert torch.equal(torch.random.get_rng_state(), before)
    bank.new("c", 2)  # the control: this one does draw from it
    assert not torch.equal(torch.random.get_rng_state(), before)
