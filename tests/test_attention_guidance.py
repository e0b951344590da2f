"""Normalized attention guidance against the paper's equations written out."""

import torch

from dmd_core.attention_guidance import guided_attention, per_sample, tiled


def tokens(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_guided_attention_is_the_paper():
    z, n = tokens(0, 2, 5, 8), tokens(1, 2, 5, 8)
    pushed = z + 3 * (z - n)
    ratio = pushed.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
    for limit in (1.0, 1.5, 100.0):
        expected = 0.25 * pushed * ratio.clamp_max(limit) / ratio + 0.75 * z
        torch.testing.assert_close(guided_attention(z, n, 3.0, limit, 0.25), expected)
    assert (guided_attention(z, n, 3.0, 1.0, 0.25) - guided_attention(z, n, 3.0, 100.0, 0.25)).abs().max() > 0.1


def test_equal_prompts_and_scale_zero_change_nothing():
    z = tokens(0, 2, 5, 8)
    assert torch.equal(guided_attention(z, z, 4.0, 2.5, 0.5), z)
    torch.testing.assert_close(guided_attention(z, tokens(1, 2, 5, 8), 0.0, 2.5, 0.5), z)


def test_the_norm_is_held_per_token():
    z, n = tokens(0, 2, 5, 8), tokens(1, 2, 5, 8)
    z[0, 0], n[0, 0] = 1e-3, 50.0
    out = guided_attention(z, n, 5.0, 2.0, 1.0)
    ratio = out.abs().sum(-1) / z.abs().sum(-1)
    assert ratio.max() <= 2.0 + 1e-4
    assert guided_attention(z.half(), n.half(), 5.0, 2.0, 1.0).dtype == torch.float16


def test_repeating_all_tokens_alike_does_not_change_attention():
    q, k, v = tokens(0, 1, 4, 8), tokens(1, 1, 3, 8), tokens(2, 1, 3, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(q, tiled(k, 9), tiled(v, 9)), attend(q, k, v))
    assert (attend(q, tiled(k, 8), tiled(v, 8)) - attend(q, k, v)).abs().max() > 1e-3
    assert torch.equal(tiled(k, 2), k[:, :2])


def test_one_prompt_serves_all_samples():
    assert per_sample(torch.arange(1)[:, None], 3).flatten().tolist() == [0, 0, 0]
    assert per_sample(torch.arange(2)[:, None], 3).flatten().tolist() == [0, 1, 1]
    assert per_sample(torch.arange(5)[:, None], 3).flatten().tolist() == [0, 1, 2]
