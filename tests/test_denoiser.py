import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd_core.denoiser import Guided, NetDenoiser, Prediction
from dmd_core.schedule import Discrete, Flow


@settings(max_examples=40, deadline=None)
@given(prediction=st.sampled_from(list(Prediction)), sigma=st.floats(1e-2, 50), seed=st.integers(0, 2**20))
def test_a_prediction_and_its_inverse_cancel(prediction, sigma, seed):
    g = torch.Generator().manual_seed(seed)
    x, x0 = (torch.randn(2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    s = torch.full((2,), sigma, dtype=torch.float64)
    torch.testing.assert_close(prediction.to_x0(prediction.from_x0(x0, x, s), x, s), x0, atol=1e-9, rtol=1e-9)


def test_an_eps_network_and_a_v_network_that_know_the_noise_find_the_clean_latent():
    schedule = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)
    x0, eps = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 5.0, 14.0], dtype=torch.float64)
    alpha = 1 / (sigma**2 + 1).sqrt()
    x = x0 + sigma[:, None] * eps
    v = alpha[:, None] * eps - (sigma * alpha)[:, None] * x0  # Salimans & Ho 2022
    for prediction, out in ((Prediction.EPS, eps), (Prediction.V, v)):
        denoiser = NetDenoiser(lambda *_, out=out: out, schedule, prediction)
        torch.testing.assert_close(denoiser(x, sigma, None), x0)


def test_vp_networks_see_unit_variance():
    seen = {}
    schedule = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)

    def net(x, t, cond):
        seen["std"] = x.std().item()
        return x

    NetDenoiser(net, schedule, Prediction.EPS)(14.6 * torch.randn(1, 10000), torch.tensor([14.6]), None)
    assert seen["std"] == pytest.approx(1, abs=0.05)


def test_zero_terminal_snr_v_models_are_finite_at_the_end():
    schedule = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000, zero_terminal_snr=True)
    sigma = torch.tensor([schedule.sigma_max])
    x0 = NetDenoiser(lambda x, t, c: -torch.ones_like(x), schedule, Prediction.V)(
        sigma * torch.randn(1, 8), sigma, None
    )
    torch.testing.assert_close(x0, torch.ones(1, 8), atol=1e-2, rtol=0)


def test_the_network_computes_in_its_own_dtype_and_x0_is_fp32():
    def net(x, t, cond):
        assert x.dtype == torch.bfloat16
        return x

    denoiser = NetDenoiser(net, Flow(), Prediction.FLOW, dtype=torch.bfloat16)
    assert denoiser(torch.randn(2, 3), torch.tensor([0.5, 0.7]), None).dtype == torch.float32


def test_guidance_is_an_extrapolation_and_scale_one_calls_the_network_once():
    calls = []

    def inner(x, sigma, cond):
        calls.append(cond)
        return torch.full_like(x, cond)

    inner.schedule = Flow()
    x, sigma = torch.zeros(1, 2), torch.ones(1)
    assert Guided(inner, 3.0, 1.0)(x, sigma, 2.0).tolist() == [[4.0, 4.0]]
    assert Guided(inner, 1.0, 1.0)(x, sigma, 2.0).tolist() == [[2.0, 2.0]]
    assert calls == [2.0, 1.0, 2.0]


def test_one_negative_serves_any_batch():
    def inner(x, sigma, cond):
        assert len(cond) == len(x)
        return cond

    inner.schedule = Flow()
    out = Guided(inner, 2.0, torch.zeros(1, 2))(torch.zeros(3, 2), torch.ones(3), torch.ones(3, 2))
    assert torch.equal(out, torch.full((3, 2), 2.0))
