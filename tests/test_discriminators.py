"""Heads: any resolution, conditioned on the noise level, gradients where they belong."""

import pytest
import torch
from torch import nn
from toy import MLP

from dmd_core import losses
from dmd_core.adapters import Adapted, AdapterBank
from dmd_core.conditioning import Cond
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.discriminators import Discriminator, FeatureReader, alarms, verdict
from dmd_core.schedule import Flow


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.never = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Identity()

    def forward(self, x, timestep, cond):
        return self.never(self.two(torch.relu(self.one(x))))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x, timestep, cond):
        h = x.flatten(2).mT
        return self.two(torch.relu(self.one(h))).mT.reshape(x.shape)


def on(net, layers, cond=None, size=8, seed=0) -> Discriminator:
    model = NetDenoiser(net, Flow(), Prediction.FLOW)
    example = torch.zeros(2, 4, size, size)
    rng = torch.Generator().manual_seed(seed)
    return Discriminator.on(FeatureReader(model, net, layers), example, torch.full((2,), 0.5), cond, rng, width=16)


@pytest.mark.parametrize("net", [Maps, Tokens])
@pytest.mark.parametrize("size", [(8, 8), (12, 6), (3, 5)])
def test_heads_made_at_one_size_judge_any_other(net, size):
    heads = on(net(), ("one", "two"))
    logits = heads(torch.randn(3, 4, *size), torch.full((3,), 0.3), None)
    assert len(logits) == 2
    assert all(d.ndim == 2 and len(d) == 3 for d in logits)


def test_every_sample_is_heard_where_one_call_of_the_network_cannot_serve_all():
    """Tokens stand behind as many of the text as a prompt has; a call takes prompts of one length."""
    net, lengths = Tokens(), torch.tensor([3.0, 1.0, 3.0])

    class Grouped(NetDenoiser):
        def apart(self, cond, n):
            return [(cond.cross[:, 0, 0] == k).nonzero().flatten().tolist() for k in cond.cross.unique()]

        def __call__(self, x, sigma, cond):
            for index in self.apart(cond, len(x)):
                text = torch.zeros(len(index), 4, int(cond.cross[index[0], 0, 0]))
                self.net(torch.cat([text, x[index].flatten(2)], 2)[..., None], None, None)
            return x

    model = Grouped(net, Flow(), Prediction.FLOW)
    reader = FeatureReader(Adapted(model, AdapterBank(net), {}), net, ("one",))
    x, sigma, cond = torch.randn(3, 4, 2, 2), torch.full((3,), 0.5), Cond(lengths[:, None, None])
    (found,) = reader(x, sigma, cond)
    assert found.shape == (3, 1 + 4, 6)
    for i in range(3):
        (alone,) = reader(x[[i]], sigma[[i]], cond.take(torch.tensor([i])))
        torch.testing.assert_close(found[[i]], alone[:, -5:])
        assert not torch.equal(found[i, 1:], found[i - 1, 1:])  # control: samples differ


def test_vectors_are_one_token():
    net = MLP(16)
    reader = FeatureReader(NetDenoiser(net, Flow(), Prediction.FLOW), net, ("blocks.1",))
    heads = Discriminator.on(reader, torch.zeros(2, 2), torch.full((2,), 0.5), None, torch.Generator().manual_seed(0))
    assert heads(torch.randn(5, 2), torch.full((5,), 0.3), None)[0].shape == (5, 1)


def test_the_network_stops_after_the_last_layer_that_is_read():
    net = Maps()
    reached = []
    net.never.register_forward_hook(lambda *_: reached.append(1))
    heads = on(net, ("one",))
    heads(torch.randn(2, 4, 8, 8), torch.full((2,), 0.3), None)
    assert not reached
    net(torch.randn(2, 4, 8, 8), None, None)
    assert reached  # control


def test_initial_weights_come_from_the_generator_and_the_global_one_is_untouched():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    net = Maps()
    torch.set_rng_state(before)
    a, b, c = on(net, ("one",), seed=1), on(net, ("one",), seed=1), on(net, ("one",), seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(p, q) for p, q in zip(a.parameters.values(), b.parameters.values(), strict=True)]
    assert all(same)
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters.values(), c.parameters.values(), strict=True))


def test_heads_are_told_the_noise_level_and_the_pooled_text():
    net = Maps()
    cond = Cond(torch.zeros(2, 1, 3), torch.randn(2, 5))
    heads = on(net, ("one",), cond)
    x, low, high = torch.randn(2, 4, 8, 8), torch.full((2,), 0.1), torch.full((2,), 0.9)
    # the modulation starts as the identity
    assert torch.equal(heads(x, low, cond)[0], heads(x, high, cond)[0])
    for p in heads.parameters.values():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(0))
    reference = heads(x, low, cond)[0]
    assert not torch.equal(reference, heads(x, high, cond)[0])
    assert not torch.equal(reference, heads(x, low, Cond(cond.cross, cond.pooled + 1))[0])


def test_gradients_reach_heads_and_latents_but_not_a_frozen_network():
    net = Maps().requires_grad_(False)
    heads = on(net, ("one", "two"))
    x = torch.randn(2, 4, 8, 8).requires_grad_()
    loss = losses.gan_student(heads(x, torch.full((2,), 0.3), None))
    loss.backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters.values())


def test_verdict_measures_without_gradient_and_alarms_speak():
    real, fake = [torch.tensor([[2.0], [-1.0]], requires_grad=True)], [torch.tensor([[-3.0], [-1.0]])]
    found = verdict(real, fake)
    assert not found["accuracy"].requires_grad
    assert found["accuracy"].item() == 0.75
    assert found["gap"].item() == 2.5
    assert alarms(0.75, 2.5) == []
    assert "wins" in alarms(0.99, 20.0)[0]
    assert "cannot tell" in alarms(0.5, 0.01)[0]


def test_a_layer_with_an_unusable_shape_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Identity()

        def forward(self, x, timestep, cond):
            return self.one(x[:, :, None])

    with pytest.raises(ValueError, match=r"\(2, 4, 1, 8, 8\).*choose other layers"):
        on(Odd(), ("one",))
