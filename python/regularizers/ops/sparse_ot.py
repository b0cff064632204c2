"""Duals and plans of regularized transport, without scratch of size n x m."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import Operator, accumulate_dtype, autocast_dtype, transformed
from regularizers.ops.sparse_projection import (
    PROJECTION_BACKWARD,
    largest,
    simplex_threshold,
)

Regularizer = Literal["entropic", "quadratic"]
REGULARIZERS = ("entropic", "quadratic")  # the place is the number that kernels take
ENTROPIC, QUADRATIC = range(2)


class TransportDual(NamedTuple):
    """Value of a transport (semi-)dual and its first derivatives."""

    value: Tensor
    """``[*]``; differentiable."""
    grad_alpha: Tensor
    """``[*, m]``: a minus the row sums of the plan at hand; no gradient flows through it."""
    grad_beta: Tensor
    """``[*, n]``: dual, b minus its column sums; semi-dual, the multipliers beta = d value / db."""


def transport_dual(
    alpha: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    beta: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    regularizer: Regularizer = "quadratic",
    k: int | None = None,
) -> TransportDual:
    r"""Evaluate the dual or semi-dual of regularized transport, in one read of the cost.

    .. math::
        D(\alpha, \beta) = \alpha^\top a + \beta^\top b
            - \sum_j \Omega^*_+(\alpha + \beta_j - c_j), \qquad
        D(\alpha) = \alpha^\top a - \sum_j \Omega^*_{b_j}(\alpha - c_j)

    with :math:`\Omega^*_+(s) = \max_{t \ge 0} s^\top t - \Omega(t)` and
    :math:`\Omega^*_b` the same over t of sum b; :math:`\Omega(t) = \gamma \sum t \log t`
    (``"entropic"``) or :math:`\frac{\gamma}{2} \|t\|^2` with at most k nonzeros (``"quadratic"``).
    The maximisers are the columns of the plan, :func:`regularized_plan`. Only the gradient in the
    cost, the plan itself, is of size n x m.

    Args:
        alpha: potentials of the rows, ``[*, m]``.
        cost: ``[*, n, m]``, transposed: row j holds the costs :math:`c_j` of column j of the plan.
            Infinite costs are forbidden places.
        a: row sums, ``[*, m]``.
        b: column sums, ``[*, n]``, at least 0.
        beta: potentials of the columns, ``[*, n]``: the dual; None: the semi-dual.
        gamma: strength of the regularizer, above 0; a number or a tensor with no dimensions. Not
            differentiated through.
        regularizer: ``"quadratic"`` or ``"entropic"``.
        k: nonzeros of a column at most, quadratic only; None for all.

    Returns:
        :class:`TransportDual`; the type of ``cost``, float32 for half types.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is of the wrong shape, on another device or out of range.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> half = torch.tensor([0.5, 0.5])
        >>> transport_dual(torch.zeros(2), cost, half, half, gamma=2.0).value
        tensor(0.5000)

    Source:
        M. Blondel, V. Seguy, A. Rolet, 2017, arXiv 1710.06276; T. Liu, J. Puigcerver, M. Blondel,
        2022, arXiv 2209.15466; formulas read in POT's ``ot.smooth``.
    """
    call = _transport_arguments(alpha, beta, cost, a, b, gamma, regularizer, k)
    alpha, _, cost, _, b, *_ = call
    found = _dual(*call) if transformed() else DUAL(*_as_batch(*call), False)
    value, grad_alpha, grad_beta = found
    return TransportDual(
        value.to(alpha.dtype).reshape(cost.shape[:-2]),
        grad_alpha.detach().reshape(alpha.shape),
        grad_beta.detach().reshape(b.shape),
    )


def regularized_plan(
    alpha: Tensor,
    cost: Tensor,
    b: Tensor,
    beta: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    regularizer: Regularizer = "quadratic",
    k: int | None = None,
) -> Tensor:
    r"""Return the plan that belongs to potentials: the maximisers of :func:`transport_dual`.

    .. math::
        t_j = P_{b_j \Delta}\big(\mathrm{top}_k(\alpha - c_j) / \gamma\big), \qquad
        t_j = \big[\mathrm{top}_k(\alpha + \beta_j - c_j)\big]_+ / \gamma

    in the quadratic semi-dual and dual; entropic, :math:`b_j\,\mathrm{softmax}` and
    :math:`\exp(s / \gamma - 1)`. Differentiable in the potentials, the cost and b.

    Args:
        alpha: potentials of the rows, ``[*, m]``.
        cost: ``[*, n, m]``, transposed.
        b: column sums, ``[*, n]``.
        beta: potentials of the columns, ``[*, n]``: the dual; None: the semi-dual.
        gamma: strength of the regularizer, above 0.
        regularizer: ``"quadratic"`` or ``"entropic"``.
        k: nonzeros of a column at most, quadratic only; None for all.

    Returns:
        ``[*, n, m]``, transposed as the cost is, in its dtype. Quadratic, a column with a NaN
        among its scores is NaN.

    Raises:
        TypeError: as :func:`transport_dual`.
        ValueError: likewise.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> regularized_plan(torch.zeros(2), cost, torch.tensor([0.5, 0.5]), gamma=4.0)
        tensor([[0.3750, 0.1250],
                [0.1250, 0.3750]])

    Source:
        As :func:`transport_dual`.
    """
    call = _transport_arguments(alpha, beta, cost, None, b, gamma, regularizer, k)
    alpha, beta, cost, _, b, strength, count, code = call
    if transformed():
        return _plan(alpha, beta, cost, b, strength, count, code)
    alpha, beta, cost_, _, b, *rest = _as_batch(*call)
    plan: Tensor = PLAN(alpha, beta, cost_, b, *rest)
    return plan.reshape(cost.shape)


def sparse_regularized_plan(
    alpha: Tensor,
    cost: Tensor,
    b: Tensor,
    beta: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    k: int,
) -> tuple[Tensor, Tensor]:
    r"""Return a quadratic plan with at most k nonzeros a column as values and row numbers.

    The entries of :func:`regularized_plan`, without its n x m zeros.

    Args:
        alpha: potentials of the rows, ``[*, m]``.
        cost: ``[*, n, m]``, transposed.
        b: column sums, ``[*, n]``.
        beta: potentials of the columns, ``[*, n]``: the dual; None: the semi-dual.
        gamma: strength of the regularizer, above 0.
        k: nonzeros of a column at most.

    Returns:
        Values and int64 row numbers, both ``[*, n, min(k, m)]``; a column with fewer nonzeros ends
        with zeros at row 0. Values are differentiable as :func:`regularized_plan` is.

    Raises:
        TypeError: as :func:`transport_dual`.
        ValueError: likewise.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> values, rows = sparse_regularized_plan(torch.zeros(2), cost, torch.ones(2), k=1)
        >>> values.T, rows.T
        (tensor([[1., 1.]]), tensor([[0, 1]]))

    Source:
        As :func:`transport_dual`.
    """
    call = _transport_arguments(alpha, beta, cost, None, b, gamma, "quadratic", k)
    alpha, beta, cost, _, b, strength, count, _ = call
    if transformed():
        plan = _plan(alpha, beta, cost, b, strength, count, QUADRATIC)
        return _sparse(plan, count)
    alpha, beta, cost_, _, b, *_ = _as_batch(*call)
    values, rows = SPARSE_PLAN(alpha, beta, cost_, b, strength, count)
    shape = (*cost.shape[:-1], count)
    return values.reshape(shape), rows.reshape(shape)


_Call = tuple[Tensor, Tensor | None, Tensor, Any, Tensor, Tensor, int, int]


def _transport_arguments(
    alpha: Tensor,
    beta: Tensor | None,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor,
    gamma: float | Tensor,
    regularizer: str,
    k: int | None,
) -> _Call:
    """Check the public functions' arguments; vectors come in the type that sums are made in."""
    check_floating("cost", cost)
    if cost.dim() < 2 or cost.shape[-1] < 1:
        raise ValueError(f"cost must have shape [*, n, m >= 1], got {list(cost.shape)}")
    batch, n, m = cost.shape[:-2], cost.shape[-2], cost.shape[-1]
    check_one_of("regularizer", regularizer, REGULARIZERS)
    code = REGULARIZERS.index(regularizer)
    if k is not None:
        check_at_least("k", k, 1)
        if code == ENTROPIC:
            raise ValueError("k must be None with the entropic regularizer: its plans are dense")
    if autocast_dtype(cost.device) is not None and cost.dtype != torch.float64:
        cost = cost.float()
    dtype = accumulate_dtype(cost.dtype)
    sides = {"alpha": (alpha, m), "beta": (beta, n), "a": (a, m), "b": (b, n)}
    wide: dict[str, Any] = {}
    for name, (vector, size) in sides.items():
        if vector is not None:
            check_floating(name, vector)
            check_shape(name, vector, (*batch, size), f"{[*batch, size]} as cost has it")
            check_same_device(name, vector, "cost", cost)
            vector = vector.to(dtype)
        wide[name] = vector
    strength = scheduled("gamma", gamma, cost, check_positive)
    count = m if k is None else min(k, m)
    return wide["alpha"], wide["beta"], cost, wide["a"], wide["b"], strength, count, code


def _as_batch(
    alpha: Tensor, beta: Tensor | None, cost: Tensor, a: Any, b: Tensor, *rest: Any
) -> tuple[Any, ...]:
    """Merge the batch dimensions into one, as the operators take them."""
    count = math.prod(cost.shape[:-2])  # -1 would be ambiguous where there are no columns
    vectors = (None if v is None else v.reshape(count, v.shape[-1]) for v in (alpha, beta, a, b))
    alpha, beta, a, b = vectors  # type: ignore[assignment]
    return alpha, beta, cost.reshape(count, *cost.shape[-2:]), a, b, *rest


def _scores(alpha: Tensor, beta: Tensor | None, cost: Tensor) -> Tensor:
    """Return s [*, n, m]: alpha - c_j, of the dual alpha + beta_j - c_j."""
    s = alpha.unsqueeze(-2) - cost.to(alpha.dtype)
    return s if beta is None else s + beta.unsqueeze(-1)


def _wide_plan(s: Tensor, dual: bool, b: Tensor, gamma: Tensor, k: int, regularizer: int) -> Tensor:
    """Compute the plan [*, n, m] from scores in plain, differentiable PyTorch."""
    if regularizer == ENTROPIC:
        return (s / gamma - 1).exp() if dual else b.unsqueeze(-1) * (s / gamma).softmax(-1)
    top, order = largest(s, k)
    kept = top.relu() if dual else (top - simplex_threshold(top, gamma * b)).relu()
    plan = torch.zeros_like(s).scatter(-1, order, kept / gamma)
    return torch.where(s.isnan().any(-1, keepdim=True), torch.nan, plan)


def _multipliers(s: Tensor, plan: Tensor, b: Tensor, gamma: Tensor, regularizer: int) -> Tensor:
    """Return beta [*, n] of the semi-dual: s_i + beta_j = d Omega / d t_i on the support.

    A column without mass has -max s, the limit of the quadratic case.
    """
    if regularizer == ENTROPIC:
        support = gamma * ((s / gamma).logsumexp(-1) - b.clamp(min=torch.finfo(b.dtype).tiny).log())
        return torch.where(b > 0, gamma - support, -s.amax(-1))
    on = plan > 0
    mean = torch.where(on | plan.isnan(), s - gamma * plan, 0).sum(-1) / on.sum(-1).clamp(min=1)
    return -torch.where(b > 0, mean, s.amax(-1))


def _dual(
    alpha: Tensor,
    beta: Tensor | None,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    gamma: Tensor,
    k: int,
    regularizer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the value and its derivatives in plain, differentiable PyTorch; the specification."""
    gamma = gamma.to(alpha.dtype)
    s = _scores(alpha, beta, cost)
    plan = _wide_plan(s, beta is not None, b, gamma, k, regularizer)
    on = plan != 0  # NaN too
    products = torch.where(on, s * plan, 0)
    if regularizer == ENTROPIC:
        omega = gamma * torch.where(on, plan * torch.where(on, plan, 1).log(), 0)
    else:
        omega = gamma / 2 * plan.square()
    value = (alpha * a).sum(-1) - (products - omega).sum((-2, -1))
    if beta is None:
        return value, a - plan.sum(-2), _multipliers(s, plan, b, gamma, regularizer)
    return value + (beta * b).sum(-1), a - plan.sum(-2), b - plan.sum(-1)


def _plan(
    alpha: Tensor,
    beta: Tensor | None,
    cost: Tensor,
    b: Tensor,
    gamma: Tensor,
    k: int,
    regularizer: int,
) -> Tensor:
    """Compute the plan [*, n, m] in plain, differentiable PyTorch; the specification."""
    s = _scores(alpha, beta, cost)
    plan = _wide_plan(s, beta is not None, b, gamma.to(s.dtype), k, regularizer)
    return plan.to(cost.dtype)


def _sparse(plan: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the nonzeros of a plan and their places, in order of place; zeros at 0 at the end."""
    order = (plan > 0).to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values = plan.gather(-1, order)
    return values, torch.where(values > 0, order, 0)


def _check_gamma(gamma: Tensor) -> None:
    if gamma.device.type == "cpu":
        check_positive("gamma", gamma.item())


def _value_dtype(cost: Tensor) -> torch.dtype:
    """Return the type of the value: sums of a whole plan are made in float64 where there is one."""
    return torch.float32 if cost.device.type == "mps" else torch.float64


def _dual_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *call, _ = arguments
    _check_gamma(call[5])
    value, grad_alpha, grad_beta = _dual(*call)
    return value.to(_value_dtype(call[2])), grad_alpha.contiguous(), grad_beta.contiguous()


def _dual_fake(
    alpha: Tensor, beta: Tensor | None, cost: Tensor, a: Tensor, b: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    value = cost.new_empty(cost.shape[0], dtype=_value_dtype(cost))
    return value, alpha.new_empty(alpha.shape), b.new_empty(b.shape)


def _dual_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*inputs[:6], *gradients)
    ctx.options = inputs[6:]


def _dual_rule(backend: str | None, ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    """Multiply the derivatives that the forward pass found; derive them again for a second order.

    ``envelope`` gives the potentials no gradient: at the optimum theirs is zero. The derivatives
    still depend on them, so that a second order sees potentials that are functions of the cost.
    """
    alpha, beta, cost, a, b, gamma, grad_alpha, grad_beta = ctx.saved_tensors
    k, regularizer, envelope = ctx.options
    needs = ctx.needs_input_grad
    scale = grad.to(alpha.dtype).unsqueeze(-1)
    again = torch.is_grad_enabled()
    plan = None
    if again or needs[2]:
        plan = PLAN.kernel(backend)(alpha, beta, cost, b, gamma, k, regularizer)
    if again:
        assert plan is not None
        strength, wide = gamma.to(alpha.dtype), plan.to(alpha.dtype)
        grad_alpha = a - wide.sum(-2)
        if beta is not None:
            grad_beta = b - wide.sum(-1)
        else:
            s = _scores(alpha, None, cost)
            grad_beta = _multipliers(s, wide, b, strength, regularizer)
    by_cost = None
    if plan is not None and needs[2]:
        by_cost = (scale.unsqueeze(-1) * plan).to(cost.dtype)
    return (
        None if envelope else scale * grad_alpha,
        None if envelope or beta is None else scale * grad_beta,
        by_cost,
        scale * alpha,
        scale * (grad_beta if beta is None else beta),
        *(None,) * 4,
    )


def _plan_reference(
    alpha: Tensor, beta: Tensor | None, cost: Tensor, b: Tensor, gamma: Tensor, *options: int
) -> Tensor:
    _check_gamma(gamma)
    return _plan(alpha, beta, cost, b, gamma, *options).contiguous()


def _plan_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[3], inputs[4], output)
    ctx.dual = inputs[1] is not None
    ctx.regularizer = inputs[6]


def _plan_rule(backend: str | None, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return J(grad) for the cost, its sums for the potentials, and what belongs to b."""
    b, gamma, plan = ctx.saved_tensors
    by_scores, by_b = plan_vjp(backend, grad, plan, b, gamma, ctx.dual, ctx.regularizer)
    by_alpha = by_scores.sum(-2, dtype=b.dtype)
    by_beta = by_scores.sum(-1, dtype=b.dtype) if ctx.dual else None
    by_cost = -by_scores.to(plan.dtype)
    return by_alpha, by_beta, by_cost, torch.zeros_like(b) if by_b is None else by_b, *(None,) * 3


def plan_vjp(
    backend: str | None,
    grad: Tensor,
    plan: Tensor,
    b: Tensor,
    gamma: Tensor,
    dual: bool,
    regularizer: int,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the cotangents of scores and b, :math:`J_j(v) = (w v - w (w^T v) / |w|) / gamma`.

    w is the support of the quadratic plan and the entropic plan itself; the dual has
    :math:`J_j(v) = w v / gamma`.
    """
    strength = gamma.to(b.dtype)
    if regularizer == QUADRATIC:
        by_scores, mean = PROJECTION_BACKWARD.kernel(backend)(grad, plan, not dual)
        return by_scores.to(b.dtype) / strength, None if dual else mean.to(b.dtype)
    wide, cotangent = plan.to(b.dtype), grad.to(b.dtype)
    if dual:
        return wide * cotangent / strength, None
    mass = torch.where(b > 0, b, 1)
    mean = torch.where(b > 0, (wide * cotangent).sum(-1) / mass, 0)
    return wide * (cotangent - mean.unsqueeze(-1)) / strength, mean


def _sparse_plan_reference(
    alpha: Tensor, beta: Tensor | None, cost: Tensor, b: Tensor, gamma: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    return _sparse(_plan_reference(alpha, beta, cost, b, gamma, k, QUADRATIC), k)


def _sparse_plan_fake(
    alpha: Tensor, beta: Tensor | None, cost: Tensor, b: Tensor, gamma: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    shape = (*cost.shape[:-1], k)
    return cost.new_empty(shape), cost.new_empty(shape, dtype=torch.int64)


def _sparse_plan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, rows = output
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(inputs[3], inputs[4], values, rows)
    ctx.rows = inputs[2].shape[-1]
    ctx.dual = inputs[1] is not None


def _sparse_plan_rule(backend: str | None, ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    """Differentiate the kept entries, then put them where they belong."""
    b, gamma, values, rows = ctx.saved_tensors
    by_scores, mean = PROJECTION_BACKWARD.kernel(backend)(grad, values, not ctx.dual)
    by_scores = by_scores / gamma.to(by_scores.dtype)
    dense = by_scores.new_zeros(*rows.shape[:-1], ctx.rows).scatter_add(-1, rows, by_scores)
    by_alpha = dense.sum(-2, dtype=b.dtype)
    by_beta = dense.sum(-1, dtype=b.dtype) if ctx.dual else None
    by_b = torch.zeros_like(b) if ctx.dual else mean.to(b.dtype)
    return by_alpha, by_beta, -dense, by_b, None, None


_POTENTIALS = "Tensor alpha, Tensor? beta, Tensor cost"
DUAL = Operator(
    "transport_dual",
    f"({_POTENTIALS}, Tensor a, Tensor b, Tensor gamma, SymInt k, int regularizer, bool envelope)"
    " -> (Tensor value, Tensor grad_alpha, Tensor grad_beta)",
    fake=_dual_fake,
    reference=_dual_reference,
    triton="sparse_ot:transport_dual",
    setup_context=_dual_context,
    backward=_dual_rule,
)
PLAN = Operator(
    "regularized_plan",
    f"({_POTENTIALS}, Tensor b, Tensor gamma, SymInt k, int regularizer) -> Tensor",
    fake=lambda alpha, beta, cost, *_: cost.new_empty(cost.shape),
    reference=_plan_reference,
    triton="sparse_ot:regularized_plan",
    setup_context=_plan_context,
    backward=_plan_rule,
)
SPARSE_PLAN = Operator(
    "transport_sparse_plan",
    f"({_POTENTIALS}, Tensor b, Tensor gamma, SymInt k) -> (Tensor values, Tensor rows)",
    fake=_sparse_plan_fake,
    reference=_sparse_plan_reference,
    triton="sparse_ot:transport_sparse_plan",
    setup_context=_sparse_plan_context,
    backward=_sparse_plan_rule,
)
