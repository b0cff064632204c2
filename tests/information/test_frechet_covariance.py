"""Fréchet cumulative covariance: the facts of the sheet of paper 128."""

import math

import pytest
import torch
from torch import nn

from regularizers.information import (
    FCCovLoss,
    fccov,
    fccov_kernel,
    fccov_loss,
    metric_distances,
)


def _line(*values):
    y = torch.tensor(values, dtype=torch.float64)
    return (y[:, None] - y).abs()


def _naive(u, dist):
    """The triple sum as it is written."""
    n = len(u)
    centred = (u - u.mean(0)).reshape(n, -1)
    inside = (dist.T[:, None, :] < dist.T[:, :, None]).to(u.dtype)  # centre, radius point, k
    return ((inside @ centred) / n).square().sum((0, 1)) / n**2


def _quadratic(count=200):
    """A response V = X^2 and three standardised predictors: X^2, X and noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    u = torch.stack([x**2, x, noise], dim=1)
    return (u - u.mean(0)) / u.std(0, correction=0), x**2


def test_worked_example_is_5_81sts():
    u = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert fccov(u, _line(0, 1, 3)) == pytest.approx(5 / 81, abs=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_quadratic_form_equals_the_triple_sum_with_and_without_ties(levels):
    u = torch.randn(9, 2, dtype=torch.float64)
    y = torch.randn(9, 2, dtype=torch.float64)
    if levels is not None:
        y = torch.randint(levels, (9, 1)).double()
    dist = metric_distances(y)
    torch.testing.assert_close(fccov(u, dist, reduction="none"), _naive(u, dist))


def test_components_add_up():
    u, dist = torch.randn(20, 3), metric_distances(torch.randn(20))
    each = fccov(u, dist, reduction="none")
    torch.testing.assert_close(fccov(u, dist), each.sum())
    torch.testing.assert_close(fccov(u[:, 1], dist), each[1])


def test_a_kernel_saves_the_sorting_and_change_nothing():
    u, dist = torch.randn(20, 3), metric_distances(torch.randint(4, (20, 1)).float())
    assert torch.equal(fccov(u, fccov_kernel(dist)), fccov(u, dist))


def test_value_takes_the_square_of_a_scale_and_no_shift():
    u, dist = torch.randn(30, dtype=torch.float64), metric_distances(torch.randn(30))
    torch.testing.assert_close(fccov(3 * u + 5, dist), 9 * fccov(u, dist))


def test_only_the_order_of_the_distances_counts():
    u, dist = torch.randn(30, dtype=torch.float64), metric_distances(torch.randn(30, 2))
    assert fccov(u, 10 * dist) == fccov(u, dist) == fccov(u, dist**3)


def test_an_outlier_of_the_response_changes_little():
    u, response = _quadratic()
    expected = fccov(u[:, 0], metric_distances(response))
    response = response.clone()
    response[5] = 1e6
    assert fccov(u[:, 0], metric_distances(response)) == pytest.approx(expected.item(), rel=0.1)


def test_value_does_not_depend_on_the_order_of_samples():
    u, response = _quadratic(50)
    place = torch.randperm(50)
    torch.testing.assert_close(
        fccov(u[place], metric_distances(response[place])), fccov(u, metric_distances(response))
    )


def test_it_sees_dependence_of_the_conditional_mean_alone():
    u, response = _quadratic()
    square, linear, noise = fccov(u, metric_distances(response), reduction="none")
    assert 0.03 < square < 0.05
    assert linear < 0.003
    assert noise < 0.003


def test_a_constant_predictor_or_response_gives_zero():
    assert fccov(torch.ones(10), metric_distances(torch.randn(10))) == 0
    assert fccov(torch.randn(10), torch.zeros(10, 10)) == 0


@pytest.mark.parametrize("levels", [None, 3])
def test_predictor_gets_its_derivative(levels):
    y = torch.randn(6, 1) if levels is None else torch.randint(levels, (6, 1)).float()
    kernel = fccov_kernel(metric_distances(y))
    u = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: fccov(u, kernel, reduction="none"), u)
    assert torch.autograd.gradgradcheck(lambda u: fccov(u, kernel), u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_give_float32(dtype):
    u, dist = torch.randn(20, 2).to(dtype), metric_distances(torch.randn(20))
    found = fccov(u, dist)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, fccov(u.float(), dist))


def test_nan_in_gives_nan_out():
    u = torch.tensor([0.0, torch.nan, 1.0, 2.0])
    assert fccov(u, metric_distances(torch.randn(4))).isnan()


def test_loss_is_the_penalty_less_the_dependence():
    f = torch.randn(40, 3, dtype=torch.float64)
    dist = metric_distances(torch.randn(40))
    covariance = torch.cov(f.T, correction=0)
    expected = 0.3 * (covariance - torch.eye(3)).square().sum() - fccov(f, dist)
    torch.testing.assert_close(fccov_loss(f, dist, lam=0.3), expected)
    torch.testing.assert_close(FCCovLoss(lam=0.3)(f, fccov_kernel(dist)), expected)


def test_white_predictors_pay_no_penalty():
    f = torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64)).Q
    f = f - f.mean(0)
    f = math.sqrt(40) * f @ torch.linalg.inv(torch.linalg.cholesky(f.T @ f)).T
    dist = metric_distances(torch.randn(40))
    torch.testing.assert_close(fccov_loss(f, dist, lam=1e3), -fccov(f, dist))


def test_scaling_has_a_balance_point():
    # -a^2 F + (a^2 - 1)^2 for variance 1: least at a^2 = 1 + F / 2.
    u, response = _quadratic()
    dist = metric_distances(response)
    f = u[:, :1]
    best = math.sqrt(1 + fccov(f, dist).item() / 2)
    losses = [fccov_loss(scale * best * f, dist).item() for scale in (0.5, 0.98, 1, 1.02, 2, 10)]
    assert min(losses) == losses[2]


def test_strength_may_be_a_tensor():
    f, dist = torch.randn(10, 2), metric_distances(torch.randn(10))
    found = fccov_loss(f, dist, lam=torch.tensor(0.5))
    torch.testing.assert_close(found, fccov_loss(f, dist, lam=0.5))


def test_loss_compiles(fresh_dynamo):
    f = torch.randn(20, 2, requires_grad=True)
    kernel = fccov_kernel(metric_distances(torch.randn(20)))
    loss = FCCovLoss(lam=0.5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(f, kernel), compiled(f, kernel)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, f)[0] for x in (found, expected)))


def test_distances_of_vectors_are_euclidean():
    y = torch.randn(5, 2, 3)
    expected = (y[:, None] - y).flatten(2).norm(dim=2)
    torch.testing.assert_close(metric_distances(y), expected)


def test_distances_on_the_sphere_are_angles():
    angle = torch.tensor([0.0, 1e-4, 1.0, math.pi], dtype=torch.float64)
    y = 3 * torch.stack([angle.cos(), angle.sin()], dim=1)
    expected = (angle[:, None] - angle).abs()
    torch.testing.assert_close(metric_distances(y, metric="sphere"), expected)


def test_wasserstein_distance_of_shifted_samples_is_the_shift():
    sample = torch.randn(50, dtype=torch.float64)
    y = torch.stack([sample, sample[torch.randperm(50)], sample + 2])
    expected = torch.tensor([[0.0, 0, 2], [0, 0, 2], [2, 2, 0]]).double()
    torch.testing.assert_close(metric_distances(y, metric="wasserstein1d"), expected)


def test_distances_of_matrices_are_those_of_their_logarithms():
    y = torch.stack([torch.eye(2), math.e * torch.eye(2)]).double()
    found = metric_distances(y, metric="spd_log")
    assert found[0, 1] == pytest.approx(math.sqrt(2))


def test_a_callable_gets_all_pairs():
    y = torch.randn(4, 3)
    manhattan = lambda a, b: (a - b).abs().sum(-1)
    torch.testing.assert_close(metric_distances(y, metric=manhattan), torch.cdist(y, y, p=1))


@pytest.mark.parametrize("metric", ["euclidean", "sphere", "wasserstein1d"])
def test_distances_pass_the_checks_of_the_kernel(metric):
    y = 100 + torch.randn(60, 7)
    fccov_kernel(metric_distances(y, metric=metric))


def test_bad_input_names_the_argument():
    u, dist = torch.randn(4), metric_distances(torch.randn(4))
    other = dist.clone()
    other[0, 1] += 1
    for exception, name, call in [
        (TypeError, "u must", lambda: fccov(u.int(), dist)),
        (ValueError, "u must", lambda: fccov(u[None, None], dist)),
        (ValueError, "dist must be of the N", lambda: fccov(u[:3], dist)),
        (ValueError, "reduction must", lambda: fccov(u, dist, reduction="mean")),
        (TypeError, "dist must", lambda: fccov_kernel(dist.int())),
        (ValueError, "dist must have shape", lambda: fccov_kernel(dist[:3])),
        (ValueError, "dist must have shape", lambda: fccov_kernel(dist[:2, :2])),
        (ValueError, "dist must be at least 0", lambda: fccov_kernel(-dist)),
        (ValueError, "dist must be symmetric", lambda: fccov_kernel(other)),
        (ValueError, "dist must be 0", lambda: fccov_kernel(dist + 1)),
        (ValueError, "dist must be at least 0", lambda: fccov_kernel(dist * torch.nan)),
        (ValueError, "lam must", lambda: FCCovLoss(lam=-1.0)),
        (ValueError, "f must", lambda: fccov_loss(u, dist)),
        (ValueError, "metric must", lambda: metric_distances(u, metric="cosine")),
        (ValueError, "y must", lambda: metric_distances(u, metric="sphere")),
        (ValueError, "y must be symm", lambda: metric_distances(SKEW, metric="spd_log")),
        (ValueError, "y must have eig", lambda: metric_distances(-EYES, metric="spd_log")),
    ]:
        with pytest.raises(exception, match=name):
            call()


EYES = torch.eye(2).expand(3, 2, 2)
SKEW = torch.tensor([[1.0, 0.5], [0.0, 1.0]]).expand(3, 2, 2)


@pytest.mark.slow
def test_training_finds_the_sufficient_predictor_of_a_circular_response():
    # Sheet of paper 128: the response lies on the circle at angle (x1^2 + x2^2) / 2.
    def draw(count):
        x = torch.randn(count, 5)
        angle = x[:, :2].square().sum(1) / 2
        return x, torch.stack([angle.cos(), angle.sin()], dim=1), angle

    (x, y, _), (new, _, truth) = draw(300), draw(500)
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    kernel = fccov_kernel(metric_distances(y, metric="sphere"))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)

    def correlation():
        with torch.no_grad():
            order = [v.argsort().argsort().double() for v in (net(new)[:, 0], truth)]
        return torch.corrcoef(torch.stack(order))[0, 1].abs()

    before = correlation()
    for _ in range(300):
        optimizer.zero_grad()
        fccov_loss(net(x), kernel, lam=0.1).backward()
        optimizer.step()
    assert before < 0.7
    assert correlation() > 0.9
