import pytest
import torch
from torch import nn

from dmd_core.features import features


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))


def test_features_are_the_outputs_of_the_named_layers_and_carry_gradients():
    model, x = net(), torch.randn(3, 4, requires_grad=True)
    first, third = features(model, ["0", "2"], lambda: model(x))
    torch.testing.assert_close(first, model[0](x))
    torch.testing.assert_close(third, model[:3](x))
    assert torch.autograd.grad(third.sum(), x)[0].abs().sum() > 0


def test_the_forward_pass_stops_early_and_leaves_no_hook():
    model, ran = net(), []
    model[3].register_forward_hook(lambda *_: ran.append(True))
    features(model, ["0"], lambda: model(torch.randn(1, 4)))
    assert not ran
    assert not model[0]._forward_hooks
    features(model, ["3"], lambda: model(torch.randn(1, 4)))
    assert ran


def test_a_layer_that_does_not_run_is_named():
    model = net()
    with pytest.raises(ValueError, match=r"\['3'\] did not run"):
        features(model, ["0", "3"], lambda: model[:2](torch.randn(1, 4)))
    assert not model[3]._forward_hooks
