"""The LoRA of a difference: exact at full rank, recovers a known one, holds one layer at a time, refuses mismatches."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file

from dmd_core.weights.extract import ExtractConfig, Weights, extract, extract_files, factors, matched, state


def models(rank=4, seed=0, dtype=torch.float32):
    """A base and a version that differs by a known low rank in a linear and a convolution layer, and in a bias."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng)

    base = {
        "down_blocks.0.attn.to_q.weight": randn(96, 80),
        "down_blocks.0.conv1.weight": randn(64, 16, 3, 3),
        "down_blocks.0.norm.weight": randn(96),
        "down_blocks.0.attn.to_q.bias": randn(96),
        "same.weight": randn(8, 8),
    }
    tuned = {k: v.clone() for k, v in base.items()}
    tuned["down_blocks.0.attn.to_q.weight"] += randn(96, rank) @ randn(rank, 80) / 10
    tuned["down_blocks.0.conv1.weight"] += (randn(64, rank) @ randn(rank, 144) / 10).reshape(64, 16, 3, 3)
    tuned["down_blocks.0.attn.to_q.bias"] += 0.1
    return {k: v.to(dtype) for k, v in base.items()}, {k: v.to(dtype) for k, v in tuned.items()}


def run(base, tuned, **config):
    return {x.name: x for x in extract(Weights.of(base), Weights.of(tuned), ExtractConfig(**config))}


def rebuilt(layer, shape):
    return (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(shape)


def worst(layers, base, tuned):
    keys = ["down_blocks.0.attn.to_q", "down_blocks.0.conv1"]
    errors = [
        (rebuilt(layers[k], base[f"{k}.weight"].shape) - (tuned[f"{k}.weight"] - base[f"{k}.weight"])).abs().max()
        for k in keys
    ]
    return max(errors).item()


def test_a_known_low_rank_difference_is_recovered_by_the_random_sketch():
    base, tuned = models(rank=4)
    layers = run(base, tuned, rank=4, oversample=4)
    assert worst(layers, base, tuned) < 1e-4
    assert [layers[k].rank for k in ("down_blocks.0.attn.to_q", "down_blocks.0.conv1")] == [4, 4]
    assert layers["down_blocks.0.attn.to_q"].kept > 1 - 1e-6
    # control: one rank less cannot hold it, and says so
    fewer = run(base, tuned, rank=3, oversample=4)
    assert worst(fewer, base, tuned) > 0.05
    assert fewer["down_blocks.0.attn.to_q"].kept < 0.99


def test_full_rank_is_exact():
    base, _ = models()
    rng = torch.Generator().manual_seed(9)
    tuned = {k: v + torch.randn(v.shape, generator=rng) for k, v in base.items()}
    assert worst(run(base, tuned, rank=80), base, tuned) < 1e-4
    assert worst(run(base, tuned, rank=40), base, tuned) > 0.1


def test_energy_chooses_the_smallest_rank_that_keeps_it():
    spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    rng = torch.Generator().manual_seed(2)
    u = torch.linalg.qr(torch.randn(40, 6, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(30, 6, generator=rng)).Q
    share = spectrum.square().cumsum(0) / spectrum.square().sum()
    for energy in (0.7, 0.9, 0.97, 0.999):
        wanted = int((share < energy).sum()) + 1
        down, _, kept = factors((u * spectrum) @ v.T, ExtractConfig(rank=6, energy=energy, oversample=8))
        assert down.shape[0] == wanted
        assert kept == pytest.approx(share[wanted - 1].item(), abs=1e-5)
    assert factors((u * spectrum) @ v.T, ExtractConfig(rank=2, energy=0.999))[0].shape[0] == 2, "rank is the cap"


def test_the_sketch_is_as_good_as_the_exact_svd_on_a_slowly_falling_spectrum():
    rng = torch.Generator().manual_seed(3)
    difference = torch.randn(200, 160, generator=rng) @ torch.diag(torch.arange(1.0, 161.0) ** -0.5)
    _, _, kept = factors(difference, ExtractConfig(rank=16))
    s = torch.linalg.svdvals(difference)
    best = (s[:16].square().sum() / s.square().sum()).item()
    assert best - 1e-3 < kept <= best + 1e-5
    _, _, rough = factors(difference, ExtractConfig(rank=16, oversample=0, iterations=0))
    assert rough < best - 5e-3, "without power iterations the sketch is visibly worse"


def test_norms_biases_and_unchanged_layers_are_named_not_lost():
    base, tuned = models()
    layers = run(base, tuned, rank=4)
    assert layers["same"].reason == "unchanged"
    assert "cannot hold" in layers["down_blocks.0.attn.to_q.bias"].reason
    assert layers["down_blocks.0.attn.to_q.bias"].change > 0
    assert {x.total for x in layers.values()} == {len(base)}
    assert sorted(x.done for x in layers.values()) == list(range(1, len(base) + 1))


def test_at_most_one_layer_of_each_model_is_alive():
    def counting(tensors, alive, most):
        def get(key):
            tensor = tensors[key].clone()
            alive.add(tensor)
            weakref.finalize(tensor, lambda: None)
            gc.collect()
            most.append(len(alive))
            return tensor

        return Weights({k: tuple(v.shape) for k, v in tensors.items()}, get)

    base = {f"blocks.{i}.to_q.weight": torch.randn(16, 16) for i in range(6)}
    tuned = {k: v + torch.randn(16, 16) for k, v in base.items()}
    alive, most = weakref.WeakSet(), []
    for _ in extract(counting(base, alive, most), counting(tuned, alive, most), ExtractConfig(rank=2, oversample=2)):
        pass
    assert max(most) <= 2
    # control: reading everything first is seen
    alive, most = weakref.WeakSet(), []
    greedy = counting(base, alive, most)
    assert len([greedy.get(k) for k in base]) == max(most) == 6


def test_files_in_half_precision_with_a_checkpoints_prefix(tmp_path):
    base, tuned = models(dtype=torch.float16)
    save_file(base, tmp_path / "base.safetensors")
    inside = {f"model.diffusion_model.{k}": v for k, v in tuned.items()}
    save_file(inside | {"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "tuned.safetensors")
    found = state(extract_files(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", ExtractConfig(rank=8)))
    assert sorted(found) == sorted(
        f"{k}.{part}" for k in ("down_blocks.0.attn.to_q", "down_blocks.0.conv1") for part in ("down", "up")
    )
    assert found["down_blocks.0.conv1.down"].shape == (8, 16, 3, 3)
    assert found["down_blocks.0.conv1.up"].shape == (64, 8, 1, 1)


def test_mismatched_checkpoints_are_refused_in_a_sentence():
    base, tuned = models()
    with pytest.raises(ValueError, match="one family in one key layout"):
        matched({f"input_blocks.{i}.weight": (2, 2) for i in range(4)}, {k: tuple(v.shape) for k, v in tuned.items()})
    other = {k: tuple(v.shape) for k, v in tuned.items()} | {"same.weight": (8, 9)}
    with pytest.raises(ValueError, match="same is"):
        matched({k: tuple(v.shape) for k, v in base.items()}, other)
    scaled = {k: tuple(v.shape) for k, v in base.items()} | {"same.scale_weight": ()}
    with pytest.raises(ValueError, match="scaled fp8"):
        matched(scaled, scaled)
    with pytest.raises(ValueError, match="take the bf16"):
        run({"a.weight": torch.ones(2, 2, dtype=torch.int8)}, {"a.weight": torch.ones(2, 2, dtype=torch.int8)})
    with pytest.raises(ValueError, match="do not differ"):
        state(extract(Weights.of(base), Weights.of(base), ExtractConfig()))
    for bad in ({"rank": 0}, {"energy": 1.5}):
        with pytest.raises(ValueError, match="use"):
            ExtractConfig(**bad)
