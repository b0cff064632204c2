"""Random slices and the one-dimensional statistics along them."""

import math

import pytest
import torch

from regularizers.ops.philox import philox_words
from regularizers.transport import (
    CramerVonMises,
    EppsPulley,
    GaussianQuantile,
    Moments,
    SlicedRegularizer,
    random_slices,
    sigreg,
    sliced_gaussian_wasserstein,
    visreg,
)
from tests.harness import GraphRecorder, MethodContract

STATISTICS = [EppsPulley(), GaussianQuantile(), CramerVonMises(), Moments()]
NULL_MEANS = [(EppsPulley(), 1.052464), (CramerVonMises(), 1 / 6), (Moments(), 4.0)]


class TestSlicedRegularizer(MethodContract):
    def build(self, dtype):
        return SlicedRegularizer(CramerVonMises(), num_slices=8)

    def call(self, module, dtype):
        z = torch.linspace(-1, 1, 60).reshape(2, 5, 6).to(dtype).requires_grad_()
        return module(z)

    def bad_inputs(self):
        regularizer = SlicedRegularizer(EppsPulley())
        return [
            (TypeError, "statistic must", lambda: SlicedRegularizer(lambda z, slices: 0)),
            (ValueError, "num_slices must", lambda: SlicedRegularizer(Moments(), num_slices=0)),
            (ValueError, "z must", lambda: regularizer(torch.ones(3))),
            (ValueError, "z must", lambda: regularizer(torch.ones(1, 1, 3, 3))),
            (ValueError, "batch of at least 2", lambda: regularizer(torch.ones(1, 3))),
            (ValueError, "z must", lambda: regularizer(torch.ones(0, 4, 3))),
            (TypeError, "z must", lambda: regularizer(torch.ones(4, 3).long())),
            (ValueError, "num_knots must", lambda: EppsPulley(num_knots=1)),
            (ValueError, "t_max must", lambda: EppsPulley(t_max=-1.0)),
            (ValueError, "clamp must", lambda: GaussianQuantile(clamp=0.5)),
            (ValueError, "order must", lambda: Moments(order=0)),
            (ValueError, "dim must", lambda: random_slices(0, 1)),
            (ValueError, "num_slices must", lambda: random_slices(1, 0)),
            (ValueError, "groups must", lambda: random_slices(1, 1, groups=0)),
            (TypeError, "dtype must", lambda: random_slices(1, 1, dtype=torch.float16)),
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 40])
def test_slices_have_norm_one(dim, dtype):
    norms = torch.linalg.vector_norm(random_slices(dim, 50, seed=1, dtype=dtype), dim=0)
    torch.testing.assert_close(norms, torch.ones(50, dtype=dtype))


def test_slices_are_box_muller_of_the_philox_words():
    words = philox_words(torch.tensor(9), 8).double()
    u = ((words[:4].long() ^ 2**31) // 2**9 + 0.5) / 2**23  # words count as signed numbers
    angle = torch.where(words[4:] < 2**31, words[4:], words[4:] - 2**32) * (math.tau / 2**32)
    g = torch.cat([(-2 * u.log()).sqrt() * angle.cos(), (-2 * u.log()).sqrt() * angle.sin()])
    expected = g.view(4, 2) / g.view(4, 2).norm(dim=0)
    found = random_slices(4, 2, seed=9, dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_slices_of_a_seed_are_the_same_and_of_another_are_not():
    assert torch.equal(random_slices(5, 7, seed=3), random_slices(5, 7, seed=torch.tensor(3)))
    assert not torch.equal(random_slices(5, 7, seed=3), random_slices(5, 7, seed=4))


def test_groups_of_slices_differ():
    groups = random_slices(5, 7, groups=3, seed=3)
    assert groups.shape == (3, 5, 7)
    assert not torch.equal(groups[0], groups[1])


def test_slices_are_uniform_on_the_sphere():
    # Mean 0 and covariance I / D within five standard deviations of 2^17 draws.
    slices = random_slices(4, 2**17, seed=11, dtype=torch.float64)
    assert slices.mean(1).abs().max() < 5 * (0.25 / 2**17) ** 0.5
    covariance = slices @ slices.T / 2**17
    assert (covariance - torch.eye(4) / 4).abs().max() < 5 * 0.2 / 2**8.5


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
def test_statistic_is_least_near_the_standard_normal(statistic):
    z = torch.randn(1, 512, 4, generator=torch.Generator().manual_seed(1))
    slices = random_slices(4, 64, seed=1)
    null = statistic(z, slices)
    for other in (0.3 * z, 2 * z, z + 1, z.sign()):
        assert statistic(other, slices) > null


@pytest.mark.parametrize(("statistic", "mean"), NULL_MEANS, ids=lambda v: type(v).__name__)
def test_statistic_has_its_stated_mean_under_the_null(statistic, mean):
    torch.set_num_threads(1)  # many small calls
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1000, 64, 1, generator=generator, dtype=torch.float64)
    slices = torch.ones(1, 1, dtype=torch.float64)
    found = torch.stack([statistic(view[None], slices) for view in z])
    error = found.std() / len(z) ** 0.5
    assert abs(found.mean() - mean) < 4 * error


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
def test_statistic_does_not_depend_on_the_order_of_samples(statistic):
    z = torch.randn(2, 60, 5, dtype=torch.float64)
    slices = random_slices(5, 20, seed=1, dtype=torch.float64)
    shuffled = z[:, torch.randperm(60)]
    torch.testing.assert_close(statistic(z, slices), statistic(shuffled, slices))


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
def test_statistic_is_of_every_view_by_itself(statistic):
    z = torch.randn(3, 20, 5, dtype=torch.float64)
    slices = random_slices(5, 6, seed=1, dtype=torch.float64)
    views = torch.stack([statistic(view[None], slices) for view in z])
    torch.testing.assert_close(statistic(z, slices), views.mean())


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: type(s).__name__)
def test_gradient_of_statistic_passes_gradcheck(statistic):
    z = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    slices = random_slices(3, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: statistic(z, slices), z)


def test_quantiles_are_those_of_the_normal_distribution():
    # scipy.stats.norm.ppf(i / 5); exact in both tails also in float32.
    found = GaussianQuantile().quantiles(4, torch.empty(0))
    expected = torch.tensor([-0.84162123, -0.2533471, 0.2533471, 0.84162123])
    torch.testing.assert_close(found, expected)
    tail = GaussianQuantile().quantiles(65536, torch.empty(0))
    exact = GaussianQuantile().quantiles(65536, torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(tail, exact.float())


def test_clamped_quantiles_stop_at_the_bound():
    found = GaussianQuantile(clamp=0.1).quantiles(99, torch.empty(0, dtype=torch.float64))
    bound = torch.special.ndtri(torch.tensor(0.9, dtype=torch.float64))
    assert found.max() == bound
    assert found.min() == -bound


def test_moments_are_the_mean_and_variance_first():
    z = torch.randn(1, 50, 1, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    expected = 50 * (z.mean() ** 2 + (z.square().mean() - 1) ** 2 / 2)
    torch.testing.assert_close(Moments(order=2)(z, one), expected)


@pytest.mark.parametrize("loss", [sigreg, visreg, sliced_gaussian_wasserstein])
def test_batches_of_any_size_share_one_dynamic_graph(loss, fresh_dynamo):
    graphs = GraphRecorder()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=graphs)
    for rows in (5, 8, 13):
        z = torch.randn(3, rows, 4)
        seed = torch.tensor(rows)
        torch.testing.assert_close(compiled(z, seed=seed), loss(z, seed=seed))
    assert len(graphs) == 1
