"""DMD2: exact checks, then short runs on mixtures whose teacher is known in closed form."""

import pytest
import torch
from oracle import Gaussian
from torch import Tensor, nn

from dmd_core.data import Batch
from dmd_core.denoiser import NetDenoiser, Prediction
from dmd_core.objectives.dmd2 import DMD2, DMD2Config
from dmd_core.schedule import Discrete, Flow, expand

SDXL = Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)
SDXL_STEPS = (999, 749, 499, 249)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only() -> dict[str, nn.Parameter]:
    return {"p": nn.Parameter(torch.zeros(1, dtype=torch.float64))}


def dmd2(teacher, student, critic, negative=None, **config) -> DMD2:
    config = {"sigmas": (float(teacher.schedule.sigma_max),), "guidance": 1.0, **config}
    return DMD2(teacher, student, critic, negative, only(), only(), DMD2Config(**config))


def test_sdxl_schedule_has_the_published_constants():
    steps = torch.tensor([999, 749, 499, 249, 399])
    alpha_bar = torch.tensor([0.004660, 0.056623, 0.277670, 0.675432, 0.426086])
    sigma = torch.tensor([14.6146, 4.08173, 1.61289, 0.69320, 1.16058])
    torch.testing.assert_close(SDXL.alphas_cumprod[steps], alpha_bar, atol=1e-6, rtol=0)
    torch.testing.assert_close(SDXL.sigma(steps), sigma, atol=0, rtol=1e-5)


@pytest.mark.parametrize("schedule", [SDXL, Flow()], ids=["ve", "flow"])
def test_gaussians_give_the_closed_form_matching_gradient(schedule):
    """E over noise: fake - real = mu_f - mu_r + k_f a (x0 - mu_f) - k_r a (x0 - mu_r)."""
    real, fake, n = Gaussian(schedule, 0.7, 0.5), Gaussian(schedule, -0.4, 0.8), 200_000
    floor = 1e3  # larger than any |x0 - real|: the normaliser is then this constant
    objective = dmd2(real, real, fake, floor=floor)
    point = 0.3
    x0 = torch.full((n, 1), point, dtype=torch.float64, requires_grad=True)
    loss = objective.student_terms(x0, Batch(None, (n, 1)), generator())["dmd"]
    (grad,) = torch.autograd.grad(loss, x0)
    sigma = schedule.sample(n, generator(), 0.02, 0.98).double()
    a, _ = schedule.coeffs(sigma)
    expected = -1.1 + fake.gain(sigma) * a * (point + 0.4) - real.gain(sigma) * a * (point - 0.7)
    noise = (grad[:, 0] * n * floor).std() / n**0.5  # standard error of the mean
    error = (grad[:, 0] * n * floor).mean() - expected.mean()
    assert abs(error) < 4 * noise
    assert noise < 0.01 * abs(expected.mean())  # the check above has teeth


@pytest.mark.parametrize("schedule", [SDXL, Flow()], ids=["ve", "flow"])
def test_gaussian_gradient_is_exact_draw_by_draw(schedule):
    real, fake, n = Gaussian(schedule, 0.7, 0.5), Gaussian(schedule, -0.4, 0.8), 64
    x0 = torch.randn(n, 3, generator=generator(1), dtype=torch.float64).requires_grad_()
    loss = dmd2(real, real, fake).student_terms(x0, Batch(None, (n, 3)), generator())["dmd"]
    (grad,) = torch.autograd.grad(loss, x0)
    rng = generator()
    sigma = schedule.sample(n, rng, 0.02, 0.98).double()
    eps = torch.randn(n, 3, generator=rng).double()
    a, b = (c[:, None] for c in schedule.coeffs(sigma))
    x = a * x0.detach() + b * eps
    # score form: x0_hat = (x + b^2 score) / a, and the score of a Gaussian's diffusion is known
    x0_real, x0_fake = (
        (x + b**2 * (a * mean - x) / (a**2 * std**2 + b**2)) / a for mean, std in ((0.7, 0.5), (-0.4, 0.8))
    )
    norm = (x0.detach() - x0_real).abs().mean(1, keepdim=True).clamp_min(0.05)
    torch.testing.assert_close(grad, (x0_fake - x0_real) / norm / grad.numel(), rtol=1e-9, atol=1e-12)


def test_gradient_is_zero_when_fake_equals_real():
    real = Gaussian(Flow(), 0.7, 0.5)
    x0 = torch.randn(8, 2, generator=generator(), dtype=torch.float64).requires_grad_()
    grads = [
        torch.autograd.grad(dmd2(real, real, fake).student_terms(x0, Batch(None, (8, 2)), generator())["dmd"], x0)[0]
        for fake in (real, Gaussian(Flow(), 0.6, 0.5))
    ]
    assert grads[0].abs().max() == 0
    assert grads[1].abs().max() > 1e-3  # control


def test_one_sample_does_not_change_the_gradient_of_another():
    real, fake = Gaussian(Flow(), 0.7, 0.5), Gaussian(Flow(), -0.4, 0.8)
    x0 = torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    other = x0.clone()
    other[0] += 100

    def grad(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(dmd2(real, real, fake).student_terms(x, Batch(None, (4, 2)), generator())["dmd"], x)[
            0
        ]

    assert torch.equal(grad(x0)[1:], grad(other)[1:])
    assert not torch.equal(grad(x0)[0], grad(other)[0])


class TinyNet(nn.Module):
    """A two-level convolutional eps network with time and prompt; float64 for exact comparisons."""

    def __init__(self, seed: int, width: int = 8, channels: int = 4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inp = nn.Conv2d(channels, width, 3, padding=1)
            self.time = nn.Linear(2, width)
            self.prompt = nn.Linear(3, width)
            self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
            self.out = nn.Conv2d(width, channels, 3, padding=1)
        self.double().requires_grad_(True)

    def forward(self, x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        t = timestep.double()[:, None] / 1000
        extra = self.time(torch.cat([(3 * t).sin(), (3 * t).cos()], 1)) + self.prompt(cond)
        h = torch.tanh(self.inp(x) + extra[..., None, None])
        return self.out(torch.tanh(h + self.up(torch.tanh(self.down(h)))))


def published_dmd2(teacher, student, critic, cond, negative, guidance, steps, shape, rng):
    """The published algorithm in its own terms (integer timesteps, alpha-bar, eps), derived anew."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)

    def draw():
        return torch.randn(shape, generator=rng).double()

    def diffuse(x0, eps, t):
        ab = alpha_bar[t].reshape(-1, 1, 1, 1)
        return ab.sqrt() * x0 + (1 - ab).sqrt() * eps

    def clean(eps, x, t):
        ab = alpha_bar[t].reshape(-1, 1, 1, 1)
        return (x - (1 - ab).sqrt() * eps) / ab.sqrt()

    def times(t):
        return torch.full((shape[0],), t)

    k = int(torch.randint(len(steps), (1,), generator=rng))
    x = draw()
    with torch.no_grad():
        for i in range(k):
            y = clean(student(x, times(steps[i]), cond), x, times(steps[i]))
            x = diffuse(y, draw(), times(steps[i + 1]))
    y = clean(student(x, times(steps[k]), cond), x, times(steps[k]))
    with torch.no_grad():
        t = torch.randint(20, 980, (shape[0],), generator=rng)
        x_t = diffuse(y, draw(), t)
        positive, negative = teacher(x_t, t, cond), teacher(x_t, t, negative)
        real = clean(negative + guidance * (positive - negative), x_t, t)
        fake = clean(critic(x_t, t, cond), x_t, t)
        p_real, p_fake = y - real, y - fake
        g = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True))
    loss = 0.5 * ((y - (y - g).detach()) ** 2).mean()
    return loss, y


def published_critic(critic, x0, cond, rng):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    t = torch.randint(0, 1000, (len(x0),), generator=rng)
    eps = torch.randn(x0.shape, generator=rng).double()
    ab = torch.cumprod(1 - betas, 0)[t].reshape(-1, 1, 1, 1)
    return ((critic(ab.sqrt() * x0 + (1 - ab).sqrt() * eps, t, cond) - eps) ** 2).mean()


def three_networks() -> tuple[TinyNet, TinyNet, TinyNet]:
    return TinyNet(0), TinyNet(1), TinyNet(2)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("seed", range(6))  # the draws of these seeds reach all four levels
def test_loss_and_gradient_equal_the_published_implementation(seed):
    teacher, student, critic = three_networks()
    shape, cond = (3, 4, 8, 8), torch.randn(3, 3, generator=generator(9), dtype=torch.float64)
    negative = torch.zeros(1, 3, dtype=torch.float64)
    eps = [NetDenoiser(net, SDXL, Prediction.EPS) for net in (teacher, student, critic)]
    params = dict(student.named_parameters())
    sigmas = tuple(SDXL.sigma(torch.tensor(SDXL_STEPS)).tolist())
    config = DMD2Config(sigmas=sigmas, guidance=8.0, floor=1e-8)
    objective = DMD2(*eps, negative, params, dict(critic.named_parameters()), config)
    batch = Batch(cond, shape)

    loss = objective.terms("student", batch, generator(seed))["dmd"]
    grads = torch.autograd.grad(loss, list(params.values()))
    theirs, y = published_dmd2(
        teacher, student, critic, cond, negative.expand(3, 3), 8.0, SDXL_STEPS, shape, generator(seed)
    )
    expected = torch.autograd.grad(theirs, list(params.values()))
    assert relative(loss, theirs) < 1e-5
    assert max(relative(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-5

    ours = objective.critic_terms(y.detach(), batch, generator(seed))["denoise"]
    theirs = published_critic(critic, y.detach(), cond, generator(seed))
    assert relative(ours, theirs) < 1e-5
    params = list(critic.parameters())
    grads, expected = torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params)
    assert max(relative(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-5


class Rewritten:
    """The same model with another parametrisation: its network emits what means the same x0."""

    def __init__(self, inner: NetDenoiser, prediction: Prediction):
        self.inner, self.prediction, self.schedule = inner, prediction, inner.schedule

    def __call__(self, x: Tensor, sigma: Tensor, cond: object) -> Tensor:
        out = self.prediction.from_x0(self.inner(x, sigma, cond), x, sigma)
        return NetDenoiser(lambda *_: out, self.schedule, self.prediction)(x, sigma, cond)


@pytest.mark.parametrize(
    ("schedule", "native", "others"),
    [
        (SDXL, Prediction.EPS, (Prediction.V, Prediction.X0)),
        (Flow(), Prediction.FLOW, (Prediction.X0,)),
    ],
    ids=["vp", "flow"],
)
def test_parametrisation_changes_neither_loss_nor_gradient(schedule, native, others):
    nets = three_networks()
    params = [dict(n.named_parameters()) for n in nets]
    sigmas = (schedule.sigma_max, 0.5)
    batch = Batch(torch.zeros(2, 3, dtype=torch.float64), (2, 4, 8, 8))

    def measure(wrap):
        models = [wrap(NetDenoiser(n, schedule, native)) for n in nets]
        objective = DMD2(*models, None, params[1], params[2], DMD2Config(sigmas=sigmas, guidance=1.0))
        out = []
        for player, own in (("student", params[1]), ("critic", params[2])):
            (loss,) = objective.terms(player, batch, generator(3)).values()
            out += [loss.detach(), *torch.autograd.grad(loss, list(own.values()))]
        return out

    reference = measure(lambda m: m)
    for prediction in others:
        again = measure(lambda m, p=prediction: Rewritten(m, p))
        assert max(relative(a, b) for a, b in zip(again, reference, strict=True)) < 1e-6
    # control: reading the output as another parametrisation is noticed
    swapped = measure(lambda m: NetDenoiser(m.net, m.schedule, Prediction.V))
    assert relative(swapped[0], reference[0]) > 1e-2


def test_a_flow_model_and_the_vp_model_it_equals_give_one_loss():
    """x_flow = (1 - t) x_ve with sigma_ve = t / (1 - t): eps and flow wrappers of one network, levels matched."""
    nets = three_networks()

    class AsFlow:
        schedule = Flow()

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x, sigma, cond):
            s = expand(sigma, x)
            net = NetDenoiser(
                lambda *_: (x - self.inner(x / (1 - s), sigma / (1 - sigma), cond)) / s, Flow(), Prediction.FLOW
            )
            return net(x, sigma, cond)

    class Levels(Discrete):
        """The VP schedule with flow's training times, so that both see the same noise levels."""

        def sample(self, n, rng, low=0.02, high=0.98):
            t = Flow().sample(n, rng, low, high).double()
            return t / (1 - t)

    vp = Levels(SDXL.alphas_cumprod)
    cond = torch.zeros(2, 3, dtype=torch.float64)
    x0 = torch.randn(2, 4, 8, 8, generator=generator(5), dtype=torch.float64)
    values = []
    for wrap in (lambda m: m, AsFlow):
        models = [wrap(NetDenoiser(n, vp, Prediction.EPS)) for n in nets]
        x = x0.clone().requires_grad_()
        objective = dmd2(*models, sigmas=(0.9,))
        loss = objective.student_terms(x, Batch(cond, tuple(x0.shape)), generator(4))["dmd"]
        values.append(torch.autograd.grad(loss, x)[0])
    assert relative(values[1], values[0]) < 1e-6
