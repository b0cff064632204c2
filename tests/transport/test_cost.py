"""Ground costs: agreement with the formulas, derivatives to second order, behaviour at kinks."""

import pickle

import pytest
import torch

from regularizers.transport.cost import (
    Arccos,
    Cosine,
    CostFn,
    Euclidean,
    Lp,
    SqEuclidean,
    TICost,
    as_cost,
)


def smooth_kernel(x, y):
    return (x.sin() @ y.cos().mT).square()


COSTS = [
    SqEuclidean(),
    SqEuclidean(scale=0.5),
    Euclidean(),
    Lp(0.5),
    Lp(1.5),
    Lp(2.0),
    Lp(3.0),
    Cosine(),
    Arccos(),
    TICost.power(1.5),
    TICost.power(2.0),
    TICost.power(3.0),
    as_cost(smooth_kernel),
]


def _name(cost):
    """Name a case the same in every process: the repr of a function holds its address."""
    return "callable" if "0x" in repr(cost) else repr(cost)


each_cost = pytest.mark.parametrize("cost", COSTS, ids=_name)

FORMULAS = {
    SqEuclidean(scale=0.5): lambda x, y: 0.5 * (x - y).square().sum(-1),
    Euclidean(): lambda x, y: (x - y).norm(dim=-1),
    Lp(1.5): lambda x, y: (x - y).norm(dim=-1) ** 1.5,
    Lp(2.0): lambda x, y: (x - y).square().sum(-1),
    Cosine(): lambda x, y: 1 - torch.cosine_similarity(x, y, dim=-1),
    Arccos(): lambda x, y: torch.cosine_similarity(x, y, dim=-1).acos(),
    TICost.power(3.0): lambda x, y: (x - y).abs().pow(3).sum(-1) / 3,
}


def points(n, d=3, dtype=torch.float64, batch=()):
    return torch.randn(*batch, n, d, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("cost", FORMULAS, ids=_name)
@pytest.mark.parametrize("d", [1, 3, 40])
def test_pairwise_and_paired_are_the_formula(cost, d):
    # 40 features take the distances from a matrix product, fewer from differences.
    x, y = points(6, d), points(7, d)
    formula = FORMULAS[cost]
    torch.testing.assert_close(cost.pairwise(x, y), formula(x[:, None], y))
    torch.testing.assert_close(cost.paired(x, y[:6]), formula(x, y[:6]))
    with torch.no_grad():
        torch.testing.assert_close(cost.pairwise(x, y), formula(x[:, None], y))


@each_cost
def test_paired_is_the_diagonal_of_pairwise(cost):
    x, y = points(5, batch=(2,)), points(5, batch=(2,))
    diagonal = cost.pairwise(x, y).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(cost.paired(x, y), diagonal)


@each_cost
def test_derivatives_are_right_to_second_order(cost):
    x, y = points(3), points(4)
    torch.autograd.gradcheck(cost.pairwise, (x, y), check_forward_ad=True)
    torch.autograd.gradgradcheck(cost.pairwise, (x, y))
    torch.autograd.gradcheck(cost.paired, (x, y[:3]), check_forward_ad=True)
    torch.autograd.gradgradcheck(cost.paired, (x, y[:3]))


@each_cost
def test_weighted_gradient_is_that_of_the_weighted_sum(cost):
    x, y, P = points(5), points(4), torch.rand(5, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad((P * cost.pairwise(x, y)).sum(), x)
    torch.testing.assert_close(cost.grad_x_weighted(x, y, P), expected)
    with torch.no_grad():
        torch.testing.assert_close(cost.grad_x_weighted(x, y, P), expected)


@each_cost
def test_weighted_gradient_is_differentiable_in_all_arguments(cost):
    P = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(cost.grad_x_weighted, (points(3), points(4), P))


@each_cost
def test_leading_dimensions_are_batches_and_broadcast(cost):
    x, y = points(4, batch=(2, 1)), points(5, batch=(3,))
    P = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    together = cost.pairwise(x, y)
    gradient = cost.grad_x_weighted(x, y, P)
    assert together.shape == (2, 3, 4, 5)
    assert gradient.shape == (2, 3, 4, 3)
    torch.testing.assert_close(together[1, 2], cost.pairwise(x[1, 0], y[2]))
    torch.testing.assert_close(gradient[1, 2], cost.grad_x_weighted(x[1, 0], y[2], P[1, 2]))


@each_cost
def test_functorch_transforms_agree_with_autograd(cost):
    x, y = points(4, batch=(2,)), points(5)
    total = lambda a: cost.pairwise(a, y).square().sum()
    (expected,) = torch.autograd.grad(cost.pairwise(x, y).square().sum(), x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(x), expected)


@pytest.mark.parametrize(
    "cost", [SqEuclidean(), Euclidean(), Arccos(), TICost.power(3.0), COSTS[-1]], ids=_name
)
def test_compiles_to_one_graph_with_the_same_gradients(cost, fresh_dynamo):
    def both(x, y, P):
        return cost.pairwise(x, y).sum() + cost.grad_x_weighted(x, y, P).square().sum()

    inputs = points(4), points(5), torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(both(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)


KINKED = [cost for cost in COSTS if not repr(cost).startswith("_Callable")]


@pytest.mark.parametrize("cost", KINKED, ids=_name)
@pytest.mark.parametrize("place", ["coincident", "opposed", "zero"])
def test_first_and_second_derivatives_are_finite_at_kinks(cost, place):
    x = torch.randn(4, 3, requires_grad=True)
    start = {"coincident": x, "opposed": -x, "zero": 0 * x}[place].detach().clone()
    y = start.requires_grad_()
    for value in (cost.pairwise(x, y), cost.paired(x, y)):
        first = torch.autograd.grad(value.sum(), (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))
        assert all(g.isfinite().all() for g in (value, *first, *second))
    assert cost.grad_x_weighted(x, y, torch.ones(4, 4)).isfinite().all()


@pytest.mark.parametrize("cost", [Euclidean(), Lp(0.5), Lp(1.5), Arccos()], ids=_name)
def test_gradient_at_distance_0_is_0(cost):
    x = torch.randn(4, 3, requires_grad=True)
    gradient = torch.autograd.grad(cost.paired(x, x.detach()).sum(), x)[0]
    assert torch.equal(gradient, torch.zeros(4, 3))
    assert torch.equal(cost.grad_x_weighted(x, x, torch.eye(4)), torch.zeros(4, 3))


@pytest.mark.parametrize("cost", [Euclidean(), Lp(1.5)], ids=_name)
@pytest.mark.parametrize("differentiated", [True, False])
def test_coincident_points_have_cost_exactly_0(cost, differentiated):
    # A matrix product would give sqrt(2^-23) = 3e-4 in place of 0.
    x = torch.randn(50, 16, requires_grad=differentiated)
    assert torch.equal(cost.pairwise(x, x).diagonal(), torch.zeros(50))


@pytest.mark.parametrize("cost", [SqEuclidean(), SqEuclidean(0.5), Cosine()], ids=_name)
def test_costs_are_never_negative_by_rounding(cost):
    x = torch.randn(200, 3)
    assert cost.pairwise(x, x).min() >= 0


def test_clamp_leaves_the_curvature_where_rounding_went_below_0():
    x = torch.randn(200, 3)
    centred = x - x.mean(0)
    squares = centred.square().sum(-1)
    unclamped = squares[:, None] + squares - 2 * centred @ centred.mT
    assert (unclamped.diagonal() < 0).any()  # else this test shows nothing
    hessian = torch.func.hessian(lambda a: SqEuclidean().pairwise(a, x).diagonal().sum())(x)
    curvature = hessian.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)
    torch.testing.assert_close(curvature, torch.full((200, 3), 2.0))


def test_clouds_far_from_the_origin_keep_their_digits():
    x, y = torch.randn(30, 3), torch.randn(40, 3)
    near, far = SqEuclidean().pairwise(x, y), SqEuclidean().pairwise(x + 1000, y + 1000)
    # Adding 1000 rounds the points to 6e-5, which moves costs by 1e-3; without centring the
    # product rounds 1e6 and costs are off by 0.1 and more.
    torch.testing.assert_close(near, far, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("angle", [1e-4, 1.0, 3.1415])
def test_small_and_large_angles_keep_their_digits(angle):
    x = torch.tensor([[1.0, 0.0]])
    y = torch.tensor([[angle, 0.0]]).double()
    y = torch.stack([y[:, 0].cos(), y[:, 0].sin()], -1).float()
    # arccos of the float32 cosine gives 0 for 1e-4.
    expected = torch.tensor([[angle]])
    torch.testing.assert_close(Arccos().pairwise(x, y), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_points_have_float32_costs(dtype):
    x, y = torch.randn(4, 3).to(dtype), torch.randn(5, 3).to(dtype)
    for cost in COSTS:
        found = cost.pairwise(x, y)
        assert found.dtype == torch.float32
        assert torch.equal(found, cost.pairwise(x.float(), y.float()))


@each_cost
def test_no_points_give_no_costs(cost):
    x, y = torch.empty(0, 3), torch.randn(5, 3)
    assert cost.pairwise(x, y).shape == (0, 5)
    assert cost.pairwise(y, x).shape == (5, 0)
    assert torch.equal(cost.grad_x_weighted(y, x, torch.empty(5, 0)), torch.zeros(5, 3))


def test_autocast_leaves_costs_alone():
    x, y, P = torch.randn(4, 3), torch.randn(5, 3), torch.rand(4, 5)
    for cost in COSTS[:-1]:
        expected = cost.pairwise(x, y), cost.grad_x_weighted(x, y, P)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = cost.pairwise(x, y), cost.grad_x_weighted(x, y, P)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_conjugate_gradient_inverts_the_gradient(p):
    cost = TICost.power(p)
    z = points(20)
    (gradient,) = torch.autograd.grad(cost.h(z).sum(), z)
    torch.testing.assert_close(cost.grad_h_conj(gradient), z)


def test_costs_are_immutable_values():
    assert SqEuclidean() == SqEuclidean(scale=1.0)
    assert SqEuclidean(0.5) != SqEuclidean()
    assert TICost.power(3) == TICost.power(3)
    assert len({Lp(2.0), Lp(2.0), Lp(3.0)}) == 2
    assert repr(SqEuclidean(0.5)) == "SqEuclidean(scale=0.5)"
    with pytest.raises(AttributeError):
        SqEuclidean().scale = 2.0
    for cost in COSTS[:-1]:
        assert pickle.loads(pickle.dumps(cost)) == cost


def test_costs_tell_which_streaming_kernel_serves_them():
    assert {repr(c): c.streaming for c in COSTS if c.streaming} == {
        "SqEuclidean(scale=1.0)": "sqeuclidean",
        "SqEuclidean(scale=0.5)": "sqeuclidean",
        "Euclidean()": "euclidean",
        "Cosine()": "cosine",
    }
    assert SqEuclidean(0.5).scale == 0.5
    assert Euclidean().scale == 1.0


def test_as_cost_leaves_costs_alone_and_wraps_functions():
    cost = Euclidean()
    assert as_cost(cost) is cost
    wrapped = as_cost(smooth_kernel)
    assert isinstance(wrapped, CostFn)
    assert wrapped == as_cost(smooth_kernel)
    assert wrapped.streaming is None


@pytest.mark.parametrize(
    ("exception", "match", "call"),
    [
        (ValueError, "scale must", lambda: SqEuclidean(0.0)),
        (ValueError, "scale must", lambda: SqEuclidean(float("inf"))),
        (TypeError, "scale must", lambda: SqEuclidean(torch.ones(()))),
        (ValueError, "p must", lambda: Lp(-1.0)),
        (TypeError, "p must", lambda: Lp("2")),
        (ValueError, "p must be above 1", lambda: TICost.power(1.0)),
        (TypeError, "h must", lambda: TICost(3)),
        (TypeError, "grad_h_conj must", lambda: TICost(abs, 3)),
        (ValueError, "h must return", lambda: TICost(torch.sum).paired(*[torch.ones(2, 3)] * 2)),
        (TypeError, "cost must be an instance", lambda: as_cost(Euclidean)),
        (TypeError, "cost must", lambda: as_cost("euclidean")),
        (
            ValueError,
            "cost must return",
            lambda: as_cost(torch.mul).pairwise(torch.ones(2, 3), torch.ones(2, 3)),
        ),
        (TypeError, "x must", lambda: Lp(1.0).pairwise([1.0], torch.ones(2, 3))),
        (TypeError, "y must", lambda: Lp(1.0).pairwise(torch.ones(2, 3), torch.ones(2, 3).long())),
        (
            TypeError,
            "y must",
            lambda: Lp(1.0).pairwise(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)),
        ),
        (ValueError, "x must", lambda: Cosine().pairwise(torch.ones(3), torch.ones(2, 3))),
        (ValueError, "y must", lambda: Cosine().pairwise(torch.ones(2, 3), torch.ones(3))),
        (ValueError, "y must", lambda: Cosine().pairwise(torch.ones(2, 3), torch.ones(2, 4))),
        (ValueError, "y must", lambda: Cosine().paired(torch.ones(2, 3), torch.ones(3, 3))),
        (
            ValueError,
            "P must",
            lambda: Cosine().grad_x_weighted(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 2)),
        ),
    ],
)
def test_bad_input_names_the_argument(exception, match, call):
    with pytest.raises(exception, match=match):
        call()
