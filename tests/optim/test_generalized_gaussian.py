"""The generalized Gaussian: its density, samples, quantiles, fit and initialiser (paper 4)."""

import math

import pytest
import torch
from torch.distributions import Laplace, Normal

from regularizers.optim import GeneralizedGaussian, estimate_shape, gg_init_

F64 = torch.float64


def unit(shape):
    return GeneralizedGaussian.from_stddev(
        torch.zeros((), dtype=F64), 1.0, torch.tensor(shape, dtype=F64)
    )


@pytest.mark.parametrize(
    ("shape", "alpha", "entropy"),
    [(0.5, 0.0912871, 0.992548), (1.0, 0.7071068, 1.346574), (2.0, 1.4142136, 1.418939)],
)
def test_scale_and_entropy_at_unit_variance(shape, alpha, entropy):
    law = unit(shape)
    assert law.alpha.item() == pytest.approx(alpha, abs=1e-7)
    assert law.entropy().item() == pytest.approx(entropy, abs=1e-6)
    assert law.variance.item() == pytest.approx(1, abs=1e-12)
    assert law.stddev.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [1, 2])
def test_shapes_one_and_two_are_laplace_and_normal(shape):
    x = torch.linspace(-8, 8, 201, dtype=F64)
    loc, scale = torch.tensor([0.3, 0.7], dtype=F64)
    torchs = Laplace(loc, scale) if shape == 1 else Normal(loc, scale)
    ours = GeneralizedGaussian(loc, scale if shape == 1 else scale * math.sqrt(2), shape)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(ours.log_prob(x), torchs.log_prob(x), **close)
    torch.testing.assert_close(ours.cdf(x), torchs.cdf(x), **close)
    torch.testing.assert_close(ours.entropy(), torchs.entropy(), **close)
    u = torch.linspace(0.001, 0.999, 99, dtype=F64)
    torch.testing.assert_close(ours.icdf(u), torchs.icdf(u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 10.0])
def test_quantile_inverts_the_distribution_function_into_the_tails(shape):
    law = unit(shape)
    u = torch.tensor([1e-12, 1e-6, 0.01, 0.3, 0.5 - 1e-9, 0.5, 0.6, 0.99, 1 - 1e-6], dtype=F64)
    torch.testing.assert_close(law.cdf(law.icdf(u)), u, rtol=1e-9, atol=1e-15)
    assert law.icdf(torch.tensor([0.0, 1.0], dtype=F64)).tolist() == [-math.inf, math.inf]


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 5.0])
def test_density_integrates_to_the_distribution_function(shape):
    law = unit(shape)
    x = torch.linspace(-3, 3, 7, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(law.cdf(x).sum(), x)
    torch.testing.assert_close(slope, law.log_prob(x).exp().detach(), rtol=1e-10, atol=1e-12)


def test_quantile_has_the_derivative_of_the_inverse_and_refuses_that_of_the_shape():
    law = unit(0.7)
    u = torch.tensor([0.1, 0.4, 0.8], dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(law.icdf, u)
    learned = GeneralizedGaussian(0.0, 1.0, torch.tensor(0.7, dtype=F64, requires_grad=True))
    with pytest.raises((NotImplementedError, RuntimeError), match="not implemented"):
        learned.icdf(u.detach()).sum().backward()


def test_log_density_and_samples_are_differentiable_in_all_parameters():
    x = torch.tensor([-1.0, 0.2, 3.0], dtype=F64)
    start = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.1, 0.8, 0.7)]
    torch.autograd.gradcheck(lambda *p: GeneralizedGaussian(*p).log_prob(x), start)
    torch.manual_seed(0)
    shape = torch.tensor(0.8, dtype=F64, requires_grad=True)
    law = GeneralizedGaussian(0.0, torch.ones((), dtype=F64), shape)
    law.rsample((200_000,)).square().mean().backward()
    exact = torch.tensor(0.8, dtype=F64, requires_grad=True)
    GeneralizedGaussian(0.0, torch.ones((), dtype=F64), exact).variance.backward()
    # d Var / d nu is about -27 with a standard error near 1 %.
    assert shape.grad.item() == pytest.approx(exact.grad.item(), rel=0.05)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_log_density_has_a_finite_gradient_at_its_peak(shape):
    x = torch.zeros(2, requires_grad=True)
    GeneralizedGaussian(0.0, 1.0, shape).log_prob(x).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0, 2.0, 10.0])
def test_samples_follow_the_distribution_function(shape):
    torch.manual_seed(1)
    law = GeneralizedGaussian(0.2, 0.5, torch.tensor(shape, dtype=F64))
    n = 20_000
    u = law.cdf(law.sample((n,))).sort().values
    distance = (u - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov at level 0.001


def test_distribution_expands_broadcasts_and_validates():
    # torch.compile, when it is first used, turns the default of validate_args off.
    law = GeneralizedGaussian(torch.zeros(3), 1.0, torch.tensor([[0.5], [2.0]]), True)
    assert law.batch_shape == (2, 3)
    assert law.sample((4,)).shape == (4, 2, 3)
    assert law.expand((5, 2, 3)).log_prob(torch.zeros(3)).shape == (5, 2, 3)
    assert law.mean is law.loc
    assert law.mode is law.loc
    for name, call in (
        ("alpha", lambda: GeneralizedGaussian(0.0, 0.0, 1.0, True)),
        ("shape", lambda: GeneralizedGaussian(0.0, 1.0, 0.0, True)),
        ("shape", lambda: GeneralizedGaussian(0.0, 1.0, 10.5, True)),
        ("shape", lambda: GeneralizedGaussian.from_stddev(0.0, 1.0, -1.0)),
        ("value", lambda: law.log_prob(torch.tensor(math.nan))),
        ("value", lambda: law.icdf(torch.tensor(1.5))),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize(
    ("shape", "ratio"),
    [(0.5, 10 / 3), (1.0, 2.0), (1.5, 1.69814), (2.0, math.pi / 2), (3.0, 1.460998)],
)
def test_fit_solves_the_moment_ratio(shape, ratio):
    # Two sizes with the wanted moments: k ones among n entries, the others 0, have ratio n / k.
    n = 1_000_000
    w = torch.zeros(n, dtype=F64)
    w[: round(n / ratio)] = 0.25
    nu, alpha = estimate_shape(w)
    assert nu.item() == pytest.approx(shape, rel=1e-4)  # the ratio is rounded to six digits
    fitted = GeneralizedGaussian(0.0, alpha, nu)
    assert fitted.variance.item() == pytest.approx(w.square().mean().item(), rel=1e-9)


@pytest.mark.parametrize("method", ["ratio", "mle"])
@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0])
def test_fit_finds_the_shape_of_many_samples(shape, method):
    torch.manual_seed(1)
    n = 100_000
    law = GeneralizedGaussian(0.0, 0.03, torch.tensor(shape, dtype=F64))
    # One sample in each of n strata: independent ones have a standard error of 0.013 at shape 2,
    # and would lie within 0.02 for seven seeds in eight alone.
    strata = (torch.arange(n) + torch.rand(n, dtype=F64).clamp(0.01, 0.99)) / n
    nu, alpha = estimate_shape(law.icdf(strata), method=method)
    assert nu.item() == pytest.approx(shape, abs=0.002)
    assert alpha.item() == pytest.approx(0.03, rel=0.01)


def test_likelihood_is_highest_at_its_fit():
    torch.manual_seed(0)
    w = torch.distributions.StudentT(4.0).sample((2000,)).double()
    nu, alpha = estimate_shape(w, method="mle")
    likelihood = lambda n, a: GeneralizedGaussian(0.0, a, n).log_prob(w).sum()
    best = likelihood(nu, alpha)
    for factor in (0.98, 1.02):
        assert likelihood(nu * factor, alpha) < best
        assert likelihood(nu, alpha * factor) < best


@pytest.mark.parametrize("method", ["ratio", "mle"])
def test_fit_follows_the_scale_of_tiny_and_half_precision_weights(method):
    torch.manual_seed(0)
    w = torch.randn(10_000)
    nu, alpha = estimate_shape(w, method=method)
    tiny, tiny_alpha = estimate_shape(w * 1e-30, method=method)  # squares underflow float32
    assert tiny.item() == pytest.approx(nu.item(), rel=1e-5)
    assert tiny_alpha.item() == pytest.approx(alpha.item() * 1e-30, rel=1e-5)
    half, _ = estimate_shape(w.bfloat16(), method=method)
    assert half.item() == pytest.approx(nu.item(), rel=0.01)


def test_fit_is_clamped_and_detached():
    w = torch.ones(10, requires_grad=True)
    nu, alpha = estimate_shape(w)
    assert nu.item() == pytest.approx(10)
    assert not nu.requires_grad
    assert not alpha.requires_grad
    spike = torch.zeros(100_000)
    spike[0] = 1.0
    assert estimate_shape(spike)[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize(("fan", "size"), [("in", 27 * 9), ("out", 300 * 9)])
@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_initial_weights_have_the_variance_and_the_shape(shape, fan, size):
    torch.manual_seed(0)
    w = torch.empty(300, 27, 3, 3, requires_grad=True)
    assert gg_init_(w, shape=shape, xi=2.0, fan=fan) is w
    assert w.requires_grad
    # 72900 draws: the variance of heavy tails has a relative error of 1.9 % (kurtosis 25.2).
    assert w.var().item() == pytest.approx(2 / size, rel=0.06)
    assert estimate_shape(w)[0].item() == pytest.approx(shape, abs=0.04)


def test_initial_weights_come_from_the_generator():
    draw = lambda: gg_init_(torch.empty(8, 8), generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    assert torch.equal(draw(), draw())
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input_names_the_argument():
    w = torch.ones(3, 3)
    for exception, name, call in (
        (TypeError, "w must", lambda: estimate_shape([1.0])),
        (TypeError, "w must", lambda: estimate_shape(torch.ones(3, dtype=torch.int32))),
        (ValueError, "w must not be empty", lambda: estimate_shape(torch.ones(0))),
        (ValueError, "w must have", lambda: estimate_shape(torch.zeros(3))),
        (ValueError, "w must be finite", lambda: estimate_shape(torch.tensor([1.0, math.nan]))),
        (ValueError, "method must", lambda: estimate_shape(w, method="moments")),
        (ValueError, "shape must", lambda: gg_init_(w, shape=0.0)),
        (ValueError, "shape must", lambda: gg_init_(w, shape=11.0)),
        (ValueError, "xi must", lambda: gg_init_(w, xi=0.0)),
        (ValueError, "fan must", lambda: gg_init_(w, fan="both")),
        (ValueError, "w must", lambda: gg_init_(torch.ones(3))),
        (TypeError, "w must", lambda: gg_init_(torch.ones(3, 3, dtype=torch.int64))),
        (TypeError, "generator must", lambda: gg_init_(w, generator=0)),
    ):
        with pytest.raises(exception, match=name):
            call()
    assert torch.equal(w, torch.ones(3, 3))
