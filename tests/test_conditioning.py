import pytest
import torch

from dmd_core.conditioning import Cond, cat


def cond(n, tokens, value=1.0):
    return Cond(torch.full((n, tokens, 2), value), torch.full((n, 3), value), {"size": torch.full((n, 1), value)})


def test_shorter_prompts_are_padded():
    both = cat([cond(1, 2), cond(2, 4)])
    assert both.cross.shape == (3, 4, 2)
    assert both.cross[0, 2:].abs().sum() == 0
    assert both.pooled.shape == (3, 3)


def test_dropout_replaces_whole_samples_by_the_negative():
    out = cond(1000, 2).dropout(cond(1, 3, 0.0), 0.25, torch.Generator().manual_seed(0))
    dropped = out.pooled[:, 0] == 0
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(out.cross[:, 0, 0] == 0, dropped)
    assert torch.equal(out.extras["size"][:, 0] == 0, dropped)
    assert cond(8, 2).dropout(cond(1, 2, 0.0), 0.0, torch.Generator()).pooled.min() == 1


def test_one_prompt_serves_a_batch_and_a_wrong_count_is_refused():
    assert len(cond(1, 2).expand(5)) == 5
    with pytest.raises(ValueError, match="holds 3 prompts for a batch of 5"):
        cond(3, 2).expand(5)


def test_prompts_of_different_encoders_do_not_mix():
    with pytest.raises(ValueError, match="pooled"):
        cat([cond(1, 2), Cond(torch.zeros(1, 2, 2))])
