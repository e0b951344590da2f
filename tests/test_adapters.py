import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmd_core.adapters import AdapterBank, LowRank


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 6, 1)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 5))

    def forward(self, x):
        return self.body(self.point(self.conv(x)).mean((2, 3)))


def linear_and_conv(name, module):
    return isinstance(module, (nn.Linear, nn.Conv2d))


@pytest.fixture
def bank():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    return AdapterBank(net, linear_and_conv)


def fill(bank, name, seed):
    g = torch.Generator().manual_seed(seed)
    for adapter in bank.sets[name].values():
        adapter.up.data = torch.randn(adapter.up.shape, generator=g)


def run(bank, net, x, **scales):
    with bank.use(**scales):
        return net(x)


@pytest.fixture
def net(bank):
    # the bank does not keep the network; its layers know their owner only by name
    owner = Net().requires_grad_(False)
    for name in ("conv", "point"):
        setattr(owner, name, bank.layers[name])
    owner.body = nn.Sequential(bank.layers["body.0"], nn.SiLU(), bank.layers["body.2"])
    return owner


def test_a_new_set_changes_nothing_to_the_bit(bank, net):
    x = torch.randn(2, 3, 8, 8)
    before = net(x)
    bank.new("student", 4)
    assert torch.equal(run(bank, net, x, student=1.0), before)


def test_an_adapter_equals_its_merged_weight(bank, net):
    x = torch.randn(2, 3, 8, 8)
    bank.new("s", 3)
    fill(bank, "s", 1)
    adapted = run(bank, net, x, s=0.5)
    for name, layer in bank.layers.items():
        a = bank.sets["s"][name]
        layer.weight.data += 0.5 * (a.up.flatten(1) @ a.down.flatten(1)).reshape(layer.weight.shape)
    torch.testing.assert_close(net(x), adapted, atol=1e-5, rtol=1e-5)


def test_mixes_add_up_and_scale_zero_is_the_bare_network(bank, net):
    x = torch.randn(2, 3, 8, 8)
    bare = net(x)
    for i, name in enumerate("ab"):
        bank.new(name, 2)
        fill(bank, name, i)
    last = "body.2"
    only_last = {n: m for n, m in bank.sets["a"].items() if n == last}
    bank.sets["a"], bank.sets["b"] = only_last, {last: bank.sets["b"][last]}
    a, b = (run(bank, net, x, **{k: 1.0}) - bare for k in "ab")
    torch.testing.assert_close(run(bank, net, x, a=2.0, b=-0.5) - bare, 2 * a - 0.5 * b, atol=1e-5, rtol=1e-5)
    assert torch.equal(run(bank, net, x, a=0.0, b=0.0), bare)
    assert not torch.equal(run(bank, net, x, a=1.0), bare)


def test_gradients_reach_the_active_set_only(bank, net):
    for name in "ab":
        bank.new(name, 2)
        fill(bank, name, 3)
    loss = run(bank, net, torch.randn(1, 3, 8, 8), a=1.0).square().sum()
    grads = torch.autograd.grad(loss, list(bank.parameters("b").values()), allow_unused=True, retain_graph=True)
    assert all(g is None for g in grads)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(bank.parameters("a").values())))


def test_detaching_restores_the_network_to_the_bit(bank, net):
    x = torch.randn(1, 3, 8, 8)
    before = net(x)
    bank.new("s", 2)
    fill(bank, "s", 0)
    bank.active = {"s": 1.0}
    assert not torch.equal(net(x), before)
    bank.detach()
    assert torch.equal(net(x), before)
    assert not any(m._forward_hooks for m in bank.layers.values())
    bank.attach()
    bank.attach()
    assert all(len(m._forward_hooks) == 1 for m in bank.layers.values())


def test_use_restores_the_mix_after_an_error(bank):
    with contextlib.suppress(RuntimeError), bank.use(student=1.0):
        raise RuntimeError
    assert bank.active == {}


def test_state_goes_out_and_comes_back(bank, net):
    x = torch.randn(1, 3, 8, 8)
    bank.new("s", 3)
    fill(bank, "s", 5)
    before = run(bank, net, x, s=1.0)
    bank.load("copy", bank.state("s"))
    assert torch.equal(run(bank, net, x, copy=1.0), before)


def gradient_under(bank, layer, context_fn, reentrant=False):
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(7), requires_grad=True)
    with bank.use(a=1.0):
        y = checkpoint(layer, x, use_reentrant=reentrant, **({"context_fn": context_fn} if context_fn else {}))
    with bank.use(b=1.0):  # another set is active at backward, as in DMD2
        return torch.autograd.grad(y.square().sum(), x)[0]


def test_checkpointing_recomputes_with_the_mix_of_the_forward(bank):
    for i, name in enumerate("ab"):
        bank.new(name, 2)
        fill(bank, name, i)
    layer = bank.layers["body.0"]
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(7), requires_grad=True)
    with bank.use(a=1.0):
        plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(gradient_under(bank, layer, bank.checkpoint_contexts), plain)
    # the control: without the context the gradient is silently another one
    assert not torch.allclose(gradient_under(bank, layer, None), plain)


@pytest.mark.parametrize("rank", [0, -3])
def test_a_wrong_rank_is_refused(bank, rank):
    with pytest.raises(ValueError, match="rank is"):
        bank.new("s", rank)


def test_a_set_of_another_network_is_refused(bank):
    with pytest.raises(ValueError, match=r"lacks, such as 'other.layer'"):
        bank.load("s", {"other.layer.down": torch.zeros(2, 3), "other.layer.up": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="belongs to another model"):
        bank.load("s", {"body.0.down": torch.zeros(2, 99), "body.0.up": torch.zeros(8, 2)})


def test_a_grouped_convolution_is_refused():
    with pytest.raises(ValueError, match="groups=3"):
        LowRank(nn.Conv2d(3, 3, 3, groups=3), 2)
