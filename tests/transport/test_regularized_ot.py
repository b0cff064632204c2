"""Regularized transport: the facts of the sheet of paper 122, derivatives, agreement with POT."""

import contextlib
import io
import warnings

import pytest
import torch
from torch import nn

import regularizers
from regularizers.ops import transport_dual
from regularizers.transport import (
    Entropic,
    RegularizedOTLoss,
    SparsityConstrained,
    SquaredL2,
    regularized_ot,
    sparse_plan,
)
from tests.harness import MethodContract

TIGHT = {"tol": 1e-12, "max_iter": 1000}
KINKS = {"tol": 1e-12, "max_iter": 200}  # where ties keep the marginals from being met
FORMULATIONS = ("semi_dual", "dual")
SMOOTH = (SquaredL2(0.7), Entropic(0.2), SparsityConstrained(0.7, 8))  # k above every support


def _cost(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def _histogram(size, seed):
    return (_cost(size, seed=seed) + 0.2) / (_cost(size, seed=seed) + 0.2).sum()


def _pot(function, *arguments, **options):
    """Call POT without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = function(*(t.numpy() for t in arguments), log=True, **options)
    return torch.from_numpy(plan), -log["fun" if "fun" in log else "res"]["fun"]


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("solver", ["lbfgs", "newton", "bcd"])
@pytest.mark.parametrize(
    ("gamma", "entry", "value"),
    [(0.5, 0.5, 0.125), (2, 0.5, 0.5), (4, 0.375, 0.875), (8, 0.3125, 1.4375)],
)
def test_two_by_two_by_hand(formulation, solver, gamma, entry, value):
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    options = {"formulation": formulation, "solver": solver, **TIGHT}
    found = regularized_ot(cost, regularizer=SquaredL2(gamma), **options)
    expected = torch.tensor([[entry, 0.5 - entry], [0.5 - entry, entry]], dtype=torch.float64)
    torch.testing.assert_close(found.plan, expected, atol=1e-9, rtol=0)
    for number in (found.value, found.dual_value):
        assert number.item() == pytest.approx(value, abs=1e-9)


def test_strong_quadratic_term_spreads_the_plan_evenly():
    plan = regularized_ot(_cost(7, 5), regularizer=SquaredL2(1e4), tol=1e-10).plan
    assert (plan - 1 / 35).abs().max() < 1e-4  # the sheet's 6e-5, another instance


def test_weak_regularizer_gives_the_value_of_unregularized_transport():
    ot = pytest.importorskip("ot")
    cost, a, b = _cost(7, 6), _histogram(7, 1), _histogram(6, 2)
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    for regularizer in (SquaredL2(1e-3), SparsityConstrained(1e-3, 4), Entropic(1e-3)):
        options = {"tol": 1e-7, "max_iter": 5000, "solver": "newton"}
        found = regularized_ot(cost, a, b, regularizer=regularizer, **options)
        linear = (found.plan * cost).sum().item()
        # Quadratic: exact below a threshold of gamma; entropic: off by gamma log(mn) at most.
        assert linear == pytest.approx(exact, abs=1e-5 if regularizer.code else 4e-3)


def test_dual_value_does_not_fall_as_k_does():
    cost = _cost(10, 6)
    values = [
        regularized_ot(cost, regularizer=SparsityConstrained(1.0, k), **KINKS).dual_value.item()
        for k in (2, 3, 4, 10)
    ]
    quadratic = regularized_ot(cost, regularizer=SquaredL2(1.0), **TIGHT).dual_value.item()
    assert values[0] > values[1] > values[2] > values[3]
    assert values[3] == pytest.approx(quadratic, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_columns_have_at_most_k_nonzeros_and_their_mass(k):
    regularizer = SparsityConstrained(1.0, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = regularized_ot(_cost(10, 6), regularizer=regularizer, max_iter=50)
    assert found.nnz.max() <= k
    torch.testing.assert_close(found.plan.sum(0), torch.full((6,), 1 / 6, dtype=torch.float64))


def test_ties_leave_a_row_error_that_is_reported():
    cost = _cost(10, 6)
    errors = []
    for k in (2, 3, 10):
        found = regularized_ot(cost, regularizer=SparsityConstrained(1.0, k), **KINKS)
        row_error = (found.plan.sum(1) - 0.1).abs().sum()
        torch.testing.assert_close(found.row_error, row_error)
        assert found.converged == (k == 10)
        errors.append(row_error.item())
    assert errors[0] > errors[1] > 1e-3 > 1e-9 > errors[2]


def test_one_nonzero_a_column_is_unregularized_semi_dual_and_a_constant():
    # For any alpha, not only at the optimum.
    cost, a, b = _cost(10, 6), _histogram(10, 1), _histogram(6, 2)
    alpha = _cost(10, seed=3)
    sparse = transport_dual(alpha, cost.T, a, b, gamma=0.7, k=1).value
    plain = alpha @ a - b @ (alpha[:, None] - cost).amax(0) + 0.35 * b.square().sum()
    torch.testing.assert_close(sparse, plain)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("regularizer", SMOOTH, ids=repr)
def test_permuting_rows_and_columns_permutes_the_plan(regularizer, formulation):
    cost, rows, columns = _cost(6, 5), torch.randperm(6), torch.randperm(5)
    options = {"regularizer": regularizer, "formulation": formulation, **TIGHT}
    plan = regularized_ot(cost, **options).plan
    permuted = regularized_ot(cost[rows][:, columns], **options).plan
    torch.testing.assert_close(permuted, plan[rows][:, columns], atol=1e-8, rtol=0)


@pytest.mark.parametrize("regularizer", SMOOTH, ids=repr)
def test_adding_to_rows_and_columns_of_the_cost_shifts_the_value_alone(regularizer):
    cost, a, b = _cost(6, 5), _histogram(6, 1), _histogram(5, 2)
    u, v = _cost(6, seed=3), _cost(5, seed=4)
    before = regularized_ot(cost, a, b, regularizer=regularizer, **TIGHT)
    after = regularized_ot(cost + u[:, None] + v, a, b, regularizer=regularizer, **TIGHT)
    torch.testing.assert_close(after.plan, before.plan, atol=1e-8, rtol=0)
    torch.testing.assert_close(after.value, before.value + a @ u + b @ v)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("kind", ["l2", "kl", "sparsity_constrained"])
def test_agrees_with_pot(kind, formulation):
    ot = pytest.importorskip("ot")
    cost, a, b = _cost(7, 6), _histogram(7, 1), _histogram(6, 2)
    # k above every support of this instance: there is no tie, and one solution.
    regularizer = {
        "l2": SquaredL2(0.5),
        "kl": Entropic(0.5),
        "sparsity_constrained": SparsityConstrained(0.5, 5),
    }[kind]
    function = ot.smooth.smooth_ot_semi_dual if formulation == "semi_dual" else None
    function = function or ot.smooth.smooth_ot_dual
    options = {"reg_type": kind, "stopThr": 1e-17, "numItermax": 5000, "max_nz": 5}
    plan, value = _pot(function, a, b, cost, reg=0.5, **options)
    for solver in ("lbfgs", "newton"):
        options = {"formulation": formulation, "solver": solver, **TIGHT}
        found = regularized_ot(cost, a, b, regularizer=regularizer, **options)
        assert found.dual_value.item() == pytest.approx(value, abs=1e-9)
        # POT's own row error is 1e-8: its plan cannot agree to more.
        torch.testing.assert_close(found.plan, plan, atol=1e-7, rtol=0)


@pytest.mark.parametrize("solver", ["lbfgs", "newton", "bcd"])
@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("regularizer", [SquaredL2(1.0), Entropic(0.3)], ids=repr)
def test_solvers_and_formulations_agree(regularizer, formulation, solver):
    cost = _cost(3, 7, 5)
    exact = regularized_ot(cost, regularizer=regularizer, solver="newton", **TIGHT)
    options = {"formulation": formulation, "solver": solver, "max_iter": 2000, "tol": 1e-7}
    found = regularized_ot(cost, regularizer=regularizer, **options)
    assert found.converged.all()
    torch.testing.assert_close(found.plan, exact.plan, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.dual_value, exact.dual_value, atol=1e-9, rtol=0)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_adam_comes_close_also_at_kinks(formulation):
    cost = _cost(2, 10, 6)
    for regularizer in (SquaredL2(1.0), Entropic(0.3), SparsityConstrained(1.0, 2)):
        options = {"regularizer": regularizer, "formulation": formulation}
        exact = regularized_ot(cost, **options).dual_value
        found = regularized_ot(cost, solver="adam", **options).dual_value
        # A first-order method with a fixed budget: three digits.
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_newton_needs_few_iterations():
    found = regularized_ot(_cost(7, 6), regularizer=SquaredL2(1.0), solver="newton", tol=1e-14)
    assert found.n_iter <= 12
    assert found.row_error < 1e-13


def test_newton_hands_kinks_over_to_lbfgs():
    cost, regularizer = _cost(10, 6), SparsityConstrained(1.0, 2)
    newton, lbfgs = (
        regularized_ot(cost, regularizer=regularizer, solver=solver).dual_value
        for solver in ("newton", "lbfgs")
    )
    torch.testing.assert_close(newton, lbfgs, rtol=1e-4, atol=0)


def test_items_of_a_batch_do_not_see_each_other():
    cost = _cost(3, 8, 6)
    regularizer = SquaredL2(1.0)
    together = regularized_ot(cost, regularizer=regularizer, **TIGHT)
    for item in range(3):
        alone = regularized_ot(cost[item], regularizer=regularizer, **TIGHT)
        torch.testing.assert_close(together.plan[item], alone.plan, atol=1e-9, rtol=0)
        assert together.n_iter[item] == alone.n_iter


def test_a_warm_start_needs_no_iteration():
    cost, regularizer = _cost(8, 6), SquaredL2(1.0)
    first = regularized_ot(cost, regularizer=regularizer)
    assert regularized_ot(cost, regularizer=regularizer, alpha0=first.alpha).n_iter == 0


def test_float32_reaches_the_default_tolerance():
    cost = _cost(40, 30).float()
    for regularizer in (SquaredL2(1.0), Entropic(0.1), SparsityConstrained(1.0, 10)):
        found = regularized_ot(cost, regularizer=regularizer)
        assert found.converged, regularizer
        assert found.plan.dtype == torch.float32


def test_weak_duality_at_any_iterate():
    cost = _cost(9, 7)
    optimum = regularized_ot(cost, regularizer=SquaredL2(0.5), **TIGHT).value
    for count in (1, 3, 6):
        found = regularized_ot(cost, regularizer=SquaredL2(0.5), max_iter=count)
        assert found.dual_value <= optimum + 1e-12


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("regularizer", SMOOTH, ids=repr)
def test_gradients_of_value_are_plan_and_potentials(regularizer, formulation):
    cost, a, b = (t.requires_grad_() for t in (_cost(6, 5), _histogram(6, 1), _histogram(5, 2)))
    options = {"regularizer": regularizer, "formulation": formulation, **TIGHT}
    found = regularized_ot(cost, a, b, **options)
    for value in (found.value, found.dual_value):
        by_cost, by_a, by_b = torch.autograd.grad(value, (cost, a, b), retain_graph=True)
        torch.testing.assert_close(by_cost, found.plan.detach())
        torch.testing.assert_close(by_a, found.alpha.detach())
        torch.testing.assert_close(by_b, found.beta.detach())


def _differentiable(regularizer, formulation, pick):
    """A function of cost and logits: masses keep their equal sums when a logit moves."""

    def call(cost, a, b):
        options = {"formulation": formulation, "solver": "newton", "tol": 1e-11}
        a, b = a.softmax(-1), b.softmax(-1)
        return pick(regularized_ot(cost, a, b, regularizer=regularizer, **options))

    leaves = (_cost(4, 3), _cost(4, seed=1), _cost(3, seed=2))
    return call, tuple(leaf.requires_grad_() for leaf in leaves)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("regularizer", SMOOTH, ids=repr)
def test_derivatives_agree_with_finite_differences(regularizer, formulation):
    outputs = {
        "value": lambda found: found.dual_value,
        "plan": lambda found: found.plan,
        "potentials": lambda found: found.alpha[:, None] + found.beta,
    }
    for pick in outputs.values():
        call, leaves = _differentiable(regularizer, formulation, pick)
        # Steps of 1e-5 on solutions exact to 1e-11.
        assert torch.autograd.gradcheck(call, leaves, eps=1e-5, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("regularizer", SMOOTH, ids=repr)
def test_value_has_a_second_derivative(regularizer):
    call, leaves = _differentiable(regularizer, "semi_dual", lambda found: found.dual_value)
    assert torch.autograd.gradgradcheck(call, leaves, eps=1e-5, atol=2e-5, rtol=1e-4)


def test_second_derivative_of_a_plan_is_an_error():
    cost = _cost(4, 3).requires_grad_()
    plan = regularized_ot(cost, regularizer=SquaredL2(1.0)).plan
    (gradient,) = torch.autograd.grad(plan.square().sum(), cost, create_graph=True)
    with pytest.raises(NotImplementedError, match="first order"):
        gradient.sum().backward()


def test_functorch_and_forward_mode_are_refused():
    call = lambda cost: regularized_ot(cost, regularizer=SquaredL2(1.0)).dual_value
    with pytest.raises(NotImplementedError, match=r"torch\.autograd"):
        torch.func.grad(call)(_cost(4, 3))


def test_the_loss_makes_no_plan_before_backward():
    cost = _cost(50, 40).requires_grad_()
    counter = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counter.append(str(function))
            return function(*args, **(kwargs or {}))

    with Count():
        loss = RegularizedOTLoss(SparsityConstrained(0.5, 5))(cost)
    assert not any("regularized_plan" in name for name in counter)
    loss.backward()
    assert cost.grad.sum() == pytest.approx(1.0)


def test_reference_backend_gives_the_same_solution():
    cost = _cost(6, 5)
    expected = regularized_ot(cost, regularizer=SquaredL2(1.0), **TIGHT).plan
    with regularizers.use_backend("reference"):
        found = regularized_ot(cost, regularizer=SquaredL2(1.0), **TIGHT).plan
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_a_row_or_column_without_mass_stays_empty():
    a, b = _histogram(6, 1), _histogram(5, 2)
    a[2], b[3] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    for regularizer in SMOOTH:
        for formulation in FORMULATIONS:
            options = {"regularizer": regularizer, "formulation": formulation}
            found = regularized_ot(_cost(6, 5), a, b, **options)
            assert found.plan[2].abs().max() < 1e-5
            assert (found.plan[:, 3] == 0).all()
            assert found.value.isfinite()


def test_forbidden_places_stay_empty():
    cost = _cost(6, 5)
    cost[2, 1:3] = torch.inf
    for regularizer in SMOOTH:
        found = regularized_ot(cost, regularizer=regularizer)
        assert (found.plan[2, 1:3] == 0).all()
        assert found.converged
        assert found.value.isfinite()


def test_values_and_row_numbers_make_up_the_plan():
    for shape in ((30, 12), (2, 30, 12)):
        cost, regularizer = _cost(*shape), SparsityConstrained(1.0, 4)
        for formulation in FORMULATIONS:
            options = {"regularizer": regularizer, "formulation": formulation}
            found = regularized_ot(cost, max_iter=20, **options)
            values, rows = sparse_plan(found, cost, **options)
            assert values.shape == (*shape[:-2], 4, 12)
            dense = torch.zeros_like(found.plan).scatter_add(-2, rows, values)
            assert torch.equal(dense, found.plan)


def test_too_few_places_warn_or_raise():
    cost = _cost(10, 3)
    regularizer = SparsityConstrained(1.0, 3)
    with pytest.warns(UserWarning, match="k must be at least 4"):
        regularized_ot(cost, regularizer=regularizer, max_iter=5)
    with pytest.raises(ValueError, match="k must be at least 4"):
        regularized_ot(cost, regularizer=regularizer, strict=True)


def test_bad_input_names_the_argument():
    cost, quadratic = _cost(4, 3), SquaredL2(1.0)
    nan = cost.clone()
    nan[1, 1] = torch.nan
    ones = torch.ones(3, dtype=torch.float64)

    def call(C=cost, a=None, b=None, **options):
        return lambda: regularized_ot(C, a, b, **{"regularizer": quadratic, **options})

    cases = [
        (ValueError, "gamma must", lambda: SquaredL2(0.0)),
        (ValueError, "gamma must", lambda: Entropic(-1.0)),
        (ValueError, "k must", lambda: SparsityConstrained(1.0, 0)),
        (TypeError, "k must", lambda: SparsityConstrained(1.0, 1.5)),
        (TypeError, "C must", call(C=[1.0])),
        (ValueError, "C must", call(C=cost[0])),
        (ValueError, "C must not contain NaN", call(C=nan)),
        (ValueError, "a must", call(a=torch.tensor([0.5, 0.7, -0.2, 0.0]).double())),
        (ValueError, "a must", call(a=ones)),
        (ValueError, "b must", call(b=ones[:2])),
        (ValueError, "b must", call(b=ones * torch.nan)),
        (ValueError, "a and b must", call(b=ones)),
        (TypeError, "regularizer must", call(regularizer="l2")),
        (ValueError, "formulation must", call(formulation="primal")),
        (ValueError, "solver must", call(solver="sgd")),
        (ValueError, "solver must", call(solver="bcd", regularizer=SparsityConstrained(1.0, 2))),
        (ValueError, "max_iter must", call(max_iter=0)),
        (ValueError, "tol must", call(tol=-1.0)),
        (ValueError, "lr must", call(lr=0.0)),
        (ValueError, "alpha0 must", call(alpha0=ones)),
        (TypeError, "regularizer must", lambda: sparse_plan(None, cost, regularizer=quadratic)),
    ]
    for exception, message, bad in cases:
        with pytest.raises(exception, match=message):
            bad()


class _LearnedCost(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.points = nn.Parameter(_cost(5, 2).to(dtype))
        self.register_buffer("others", _cost(4, 2, seed=1).to(dtype))
        self.loss = RegularizedOTLoss(SquaredL2(0.5))

    def forward(self):
        return self.loss((self.points[:, None] - self.others).square().sum(-1))


class TestRegularizedOTLoss(MethodContract):
    def build(self, dtype):
        return _LearnedCost(dtype)

    def call(self, module, dtype):
        return module()

    def bad_inputs(self):
        loss = RegularizedOTLoss(SquaredL2(1.0))
        return [
            (TypeError, "regularizer must", lambda: RegularizedOTLoss("l2")),
            (ValueError, "solver must", lambda: RegularizedOTLoss(SquaredL2(1.0), solver="sgd")),
            (ValueError, "reduction must", lambda: RegularizedOTLoss(SquaredL2(), reduction="no")),
            (
                ValueError,
                "formulation must",
                lambda: RegularizedOTLoss(SquaredL2(), formulation="no"),
            ),
            (ValueError, "C must", lambda: loss(torch.ones(3))),
        ]


def test_reductions_of_the_loss():
    cost = _cost(3, 5, 4)
    none, mean, total = (
        RegularizedOTLoss(SquaredL2(1.0), reduction=reduction)(cost)
        for reduction in ("none", "mean", "sum")
    )
    assert none.shape == (3,)
    torch.testing.assert_close(mean, none.mean())
    torch.testing.assert_close(total, none.sum())


def test_gradient_flow_on_the_loss_moves_points_onto_their_target():
    # End to end, against the same number of steps on plain nearest-neighbour distance.
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(24, 2, generator=generator)
    start = 0.1 * torch.randn(24, 2, generator=generator)

    def flow(loss):
        points = start.clone().requires_grad_()
        for _ in range(60):
            cost = (points[:, None] - target).square().sum(-1)
            (gradient,) = torch.autograd.grad(loss(cost), points)
            with torch.no_grad():
                points -= 6.0 * gradient
        return torch.cdist(target, points.detach()).amin(1).mean()

    transport = flow(RegularizedOTLoss(SparsityConstrained(0.5, 4), tol=1e-4, max_iter=50))
    nearest = flow(lambda cost: cost.amin(1).mean())
    assert transport < 0.5 * nearest
