"""Losses against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmd_core import losses
from dmd_core.augment import random_augment


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_matching_gradient_is_normalised_per_sample_and_floored():
    x0, real, fake = (tensor(3, 2, 4, seed=s) for s in range(3))
    real[0] = x0[0]  # agrees with the teacher: only the floor stands between it and a division by zero
    x0 = x0.requires_grad_()
    (grad,) = torch.autograd.grad(losses.distribution_matching(x0, real, fake, floor=0.05), x0)
    norm = (x0 - real).abs().mean((1, 2), keepdim=True)
    assert norm[0] == 0
    norm[0] = 0.05
    torch.testing.assert_close(grad, (fake - real) / norm / grad.numel(), rtol=1e-10, atol=0)


def test_matching_ignores_gradients_through_the_scores():
    x0 = tensor(3, 2).requires_grad_()
    real = x0 * 2
    loss = losses.distribution_matching(x0, real, tensor(3, 2, seed=1))
    (grad,) = torch.autograd.grad(loss, x0)
    frozen = losses.distribution_matching(x0, real.detach(), tensor(3, 2, seed=1))
    assert torch.equal(grad, torch.autograd.grad(frozen, x0)[0])


def test_half_precision_latents_give_an_fp32_loss():
    x0 = tensor(2, 3).bfloat16()
    assert losses.distribution_matching(x0, x0 + 1, x0).dtype == torch.float32
    assert losses.denoising(x0, x0).dtype == torch.float32


def test_denoising_weighs_each_sample():
    pred, x0, weight = tensor(4, 3), tensor(4, 3, seed=1), torch.tensor([0.0, 1.0, 2.0, 5.0]).double()
    expected = (weight[:, None] * (pred - x0) ** 2).mean()
    torch.testing.assert_close(losses.denoising(pred, x0, weight), expected)


def test_gan_losses_match_their_definitions():
    real, fake = [tensor(4, 5), tensor(4, 2, seed=1)], [tensor(4, 5, seed=2), tensor(4, 2, seed=3)]
    softplus = [(F.softplus(-r).mean() + F.softplus(f).mean()) for r, f in zip(real, fake, strict=True)]
    hinge = [(F.relu(1 - r).mean() + F.relu(1 + f).mean()) for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(losses.gan_critic(real, fake), sum(softplus) / 2)
    torch.testing.assert_close(losses.gan_critic(real, fake, "hinge"), sum(hinge) / 2)
    torch.testing.assert_close(losses.gan_student(fake), sum(F.softplus(-f).mean() for f in fake) / 2)
    torch.testing.assert_close(losses.gan_student(fake, "hinge"), -sum(f.mean() for f in fake) / 2)
    with pytest.raises(ValueError, match="'hinge'"):
        losses.gan_student(fake, "wgan")


def test_a_saturated_hinge_gives_no_gradient():
    """Why a discriminator that wins teaches nothing more: real > 1 and fake < -1 everywhere."""
    scale = torch.tensor(1.0, requires_grad=True)
    loss = losses.gan_critic([scale * torch.full((2, 3), 2.0)], [scale * torch.full((2, 3), -2.0)], "hinge")
    assert torch.autograd.grad(loss, scale)[0] == 0


def test_approximate_r1_of_a_linear_discriminator_is_its_squared_gradient():
    """(w . x - w . (x + a n))^2 has expectation a^2 |w|^2."""
    w, amount = torch.tensor([3.0, 4.0]), 0.1
    rng = torch.Generator().manual_seed(0)
    penalty = losses.approximate_r1(lambda x: [x @ w[:, None]], torch.zeros(100_000, 2), rng, amount)
    assert penalty.item() == pytest.approx(amount**2 * 25, rel=0.03)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 9, 6), (2, 6)], ids=["maps", "tokens", "vectors"])
def test_perceptual_distance_is_zero_on_itself_and_blind_to_feature_length(shape):
    a, b = tensor(*shape), tensor(*shape, seed=1)
    assert losses.latent_perceptual([a], [a]) == 0
    assert losses.latent_perceptual([3 * a], [a]).item() == pytest.approx(0, abs=1e-20)
    assert losses.latent_perceptual([a], [b]) > 0.1
    # |u - v|^2 of unit vectors is 2 - 2 cos
    axis = 1 if len(shape) in (2, 4) else 2
    expected = (2 - 2 * F.cosine_similarity(a, b, dim=axis)).mean()
    torch.testing.assert_close(losses.latent_perceptual([a], [b]), expected)


def test_perceptual_distance_trains_the_first_side_only():
    a, b = tensor(2, 6, 4, 4).requires_grad_(), tensor(2, 6, 4, 4, seed=1).requires_grad_()
    found = torch.autograd.grad(losses.latent_perceptual([a], [b]), (a, b), allow_unused=True)
    assert found[0].abs().max() > 0
    assert found[1] is None


def test_augmentation_is_the_same_on_both_sides_and_differs_between_samples():
    x = tensor(1, 4, 8, 8).expand(3, -1, -1, -1)
    augment = random_augment((3, 4, 8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(augment(x), augment(x))
    assert (augment(x)[0] - augment(x)[1]).abs().max() > 0.1
    other = random_augment((3, 4, 8, 8), torch.Generator().manual_seed(1))
    assert (augment(x) - other(x)).abs().max() > 0.1


def test_augmentation_lets_gradients_reach_most_of_the_latents():
    x = tensor(4, 2, 16, 16).requires_grad_()
    augment = random_augment((4, 2, 16, 16), torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(augment(x).square().sum(), x)
    assert (grad != 0).float().mean() > 0.4
