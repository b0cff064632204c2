"""Regularized transport between two histograms: entropic, quadratic, sparsity-constrained."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regularizers import backend
from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from regularizers._shared.reductions import Reduction, reduce_rows
from regularizers.ops._operator import accumulate_dtype, transformed
from regularizers.ops.sparse_ot import (
    DUAL,
    ENTROPIC,
    PLAN,
    QUADRATIC,
    SPARSE_PLAN,
)
from regularizers.ops.transport_potentials import SOLVERS

Formulation = Literal["semi_dual", "dual"]
Solver = Literal["lbfgs", "newton", "adam", "bcd"]


class OTRegularizer(ABC):
    r"""A regularizer of transport plans, column by column: :math:`\sum_j \Omega(t_j)`.

    The three that the solvers know are :class:`Entropic`, :class:`SquaredL2` and
    :class:`SparsityConstrained`.

    Args:
        gamma: strength, above 0, in units of the cost (entropic) or of cost per mass (quadratic).

    Raises:
        ValueError: ``gamma`` is not positive and finite.

    Example:
        >>> isinstance(SquaredL2(), OTRegularizer)
        True

    Source:
        M. Blondel, V. Seguy, A. Rolet, 2017, arXiv 1710.06276.
    """

    code: ClassVar[int]

    def __init__(self, gamma: float = 1.0) -> None:
        check_positive("gamma", gamma)
        self.gamma = float(gamma)

    def nonzeros(self, rows: int) -> int:
        """Return how many nonzeros a column of so many rows may have."""
        return rows

    @abstractmethod
    def value(self, plan: Tensor) -> Tensor:
        """Return the sum of Omega over the last two dimensions of a plan, ``[*]``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma:g})"


class Entropic(OTRegularizer):
    r"""Negative entropy: plans are dense and smooth.

    .. math:: \Omega(t) = \gamma \sum_i t_i \log t_i, \qquad
        t_j = b_j\, \mathrm{softmax}\big((\alpha - c_j) / \gamma\big)

    The plan is Sinkhorn's with epsilon = gamma.

    Args:
        gamma: strength, above 0, in units of the cost.

    Raises:
        ValueError: ``gamma`` is not positive and finite.

    Example:
        >>> Entropic(0.1)
        Entropic(gamma=0.1)

    Source:
        M. Cuturi, 2013, arXiv 1306.0895; in this form arXiv 1710.06276.
    """

    code = ENTROPIC

    def value(self, plan: Tensor) -> Tensor:
        """Return the sum of Omega over the last two dimensions of a plan, ``[*]``."""
        total: Tensor = self.gamma * torch.special.xlogy(plan, plan).sum((-2, -1))
        return total


class SquaredL2(OTRegularizer):
    r"""Squared norm: plans are sparse, how sparse depends on gamma.

    .. math:: \Omega(t) = \tfrac{\gamma}{2} \|t\|^2, \qquad
        t_j = P_{b_j \Delta}\big((\alpha - c_j) / \gamma\big)

    Args:
        gamma: strength, above 0, in units of cost per mass.

    Raises:
        ValueError: ``gamma`` is not positive and finite.

    Example:
        >>> SquaredL2()
        SquaredL2(gamma=1)

    Source:
        M. Blondel, V. Seguy, A. Rolet, 2017, arXiv 1710.06276; formulas read in POT's
        ``ot.smooth``.
    """

    code = QUADRATIC

    def value(self, plan: Tensor) -> Tensor:
        """Return the sum of Omega over the last two dimensions of a plan, ``[*]``."""
        return 0.5 * self.gamma * plan.square().sum((-2, -1))


class SparsityConstrained(SquaredL2):
    r"""Squared norm with at most k nonzeros in every column of the plan.

    .. math:: \Omega(t) = \tfrac{\gamma}{2} \|t\|^2 + [\|t\|_0 \le k], \qquad
        t_j = P_{b_j \Delta}\big(\mathrm{top}_k(\alpha - c_j) / \gamma\big)

    The primal is not convex, its dual is. Where scores tie at the k-th place of the optimum, the
    plan misses the row sums: look at ``row_error``. The smaller k, the more often that is so; with
    k = 1 the dual is that of unregularized transport but for a constant.

    Args:
        gamma: strength, above 0.
        k: nonzeros of a column at most, at least 1.

    Raises:
        TypeError: ``k`` is not an int.
        ValueError: ``gamma`` is not positive and finite, or ``k`` is below 1.

    Example:
        >>> SparsityConstrained(k=2)
        SparsityConstrained(gamma=1, k=2)

    Source:
        T. Liu, J. Puigcerver, M. Blondel, 2022, arXiv 2209.15466; formulas read in POT's
        ``ot.smooth``.
    """

    def __init__(self, gamma: float = 1.0, k: int = 1) -> None:
        super().__init__(gamma)
        check_at_least("k", k, 1)
        self.k = k

    def nonzeros(self, rows: int) -> int:
        """Return how many nonzeros a column of so many rows may have."""
        return min(self.k, rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(gamma={self.gamma:g}, k={self.k})"


class RegularizedOTOutput(NamedTuple):
    """A solved transport problem; the batch dimension is there when C has one.

    Example:
        >>> found = regularized_ot(torch.rand(6, 4), regularizer=SquaredL2())
        >>> found.plan.shape, found.nnz.shape
        (torch.Size([6, 4]), torch.Size([4]))
    """

    plan: Tensor
    """T ``[B, m, n]``; differentiable in C, a and b, to first order."""
    value: Tensor
    """``[B]``, the primal value <T, C> + Omega(T); its gradient is that of ``dual_value``."""
    dual_value: Tensor
    """``[B]``, at most the optimum; differentiable in C, a and b, to second order."""
    alpha: Tensor
    """``[B, m]``, potentials of the rows, up to a constant; differentiable to first order."""
    beta: Tensor
    """``[B, n]``, those of the columns (of the semi-dual: its multipliers)."""
    nnz: Tensor
    """``[B, n]``, nonzeros of each column."""
    row_error: Tensor
    """``[B]``, misplaced mass of the rows: the sum of their absolute errors."""
    col_error: Tensor
    """``[B]``, that of the columns; rounding only in the semi-dual."""
    n_iter: Tensor
    """``[B]``, iterations of the solver."""
    converged: Tensor
    """``[B]``, whether no marginal is off by ``tol`` or more."""


def regularized_ot(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    regularizer: OTRegularizer,
    formulation: Formulation = "semi_dual",
    solver: Solver = "lbfgs",
    max_iter: int = 500,
    tol: float = 1e-6,
    lr: float = 1e-2,
    alpha0: Tensor | None = None,
    beta0: Tensor | None = None,
    strict: bool = False,
) -> RegularizedOTOutput:
    r"""Solve regularized optimal transport between histograms a and b.

    .. math:: \min_{T \ge 0} \langle T, C \rangle + \sum_j \Omega(t_j), \qquad
        T 1 = a, \quad T^\top 1 = b

    through its dual or semi-dual (columns solved exactly), which are concave and smooth but for
    ties of the sparse regularizer:

    .. math:: D(\alpha, \beta) = \alpha^\top a + \beta^\top b
            - \sum_j \Omega^*_+(\alpha + \beta_j - c_j), \qquad
        D(\alpha) = \alpha^\top a - \sum_j \Omega^*_{b_j}(\alpha - c_j)

    Gradients never go through the solver. The value has that of the envelope theorem
    (:math:`T, \alpha, \beta` in C, a, b), plan and potentials that of the optimality conditions,
    one linear system by conjugate gradients. Under ``torch.compile`` the solver is one node.

    The cost is taken as it is. Gamma and ``tol`` are easiest to choose for a C scaled to a largest
    entry of 1.

    Args:
        C: costs ``[m, n]`` or ``[B, m, n]``; infinite where transport is forbidden.
        a: row sums ``[m]`` or ``[B, m]``, at least 0; 1 / m when omitted.
        b: column sums ``[n]`` or ``[B, n]``, at least 0, with the sum of a; 1 / n when omitted.
        regularizer: :class:`Entropic`, :class:`SquaredL2` or :class:`SparsityConstrained`, whose k
            is for columns; transpose C for rows.
        formulation: ``"semi_dual"`` (exact column sums) or ``"dual"``.
        solver: ``"lbfgs"``; ``"newton"``, semi-smooth, few iterations at high precision;
            ``"adam"``, for kinks of a small k; ``"bcd"``, rows and columns in turn, not for
            :class:`SparsityConstrained` (Sinkhorn's algorithm when entropic).
        max_iter: iterations at most.
        tol: every marginal is to be met to less than this; in units of mass.
        lr: step of ``"adam"``, in units of the cost.
        alpha0: potentials to start from, ``[m]`` or ``[B, m]``; zeros when omitted.
        beta0: likewise ``[n]`` or ``[B, n]``, for the dual.
        strict: raise, rather than warn, when k nonzeros a column cannot serve all rows.

    Returns:
        :class:`RegularizedOTOutput`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: C holds NaN; a or b is negative, or their sums differ by more than 1e-4 of
            themselves; k n < m with ``strict``; a shape, device, option or number is wrong.
        NotImplementedError: under ``torch.func`` transforms and forward-mode differentiation.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> found = regularized_ot(cost, regularizer=SquaredL2(gamma=4.0))
        >>> found.plan, found.dual_value
        (tensor([[0.3750, 0.1250],
                [0.1250, 0.3750]]), tensor(0.8750))

    Source:
        T. Liu, J. Puigcerver, M. Blondel, 2022, arXiv 2209.15466; M. Blondel, V. Seguy, A. Rolet,
        2017, arXiv 1710.06276. Objectives read in POT's ``ot.smooth`` and checked against it; the
        Newton solver and the derivative of the plan are derived here and checked numerically.
    """
    problem = _Problem(C, a, b, regularizer, formulation, alpha0, beta0)
    alpha, beta, iterations = problem.solve(solver, max_iter, tol, lr, strict)
    dual_value, grad_alpha, _ = problem.objective(alpha, beta)
    plan_t = PLAN.kernel(problem.backend)(
        alpha, beta if problem.dual else None, problem.cost, problem.b, *problem.options
    )
    plan, cost = plan_t.detach().to(problem.b.dtype), problem.cost.detach()
    rows, columns = plan.sum(-2) - problem.a.detach(), plan.sum(-1) - problem.b.detach()
    linear = torch.where(plan > 0, plan * cost.to(plan.dtype), 0).sum((-2, -1))
    gap = linear + regularizer.value(plan) - dual_value.detach()
    worst = torch.maximum(grad_alpha.abs().amax(-1), columns.abs().amax(-1))
    found = RegularizedOTOutput(
        plan_t.mT,
        dual_value + gap,
        dual_value,
        alpha,
        beta,
        (plan_t > 0).sum(-1),
        rows.abs().sum(-1),
        columns.abs().sum(-1),
        iterations,
        worst < tol,
    )
    return found if C.dim() == 3 else RegularizedOTOutput(*(item[0] for item in found))


def sparse_plan(
    found: RegularizedOTOutput,
    C: Tensor,
    b: Tensor | None = None,
    *,
    regularizer: SparsityConstrained,
    formulation: Formulation = "semi_dual",
) -> tuple[Tensor, Tensor]:
    r"""Return the plan of a solved sparse problem as values and row numbers, without its zeros.

    .. math:: T_{r_{ij},\, j} = v_{ij}, \qquad i = 1, \dots, k

    Args:
        found: what :func:`regularized_ot` returned.
        C: the costs it was given.
        b: the column sums it was given.
        regularizer: the regularizer it was given.
        formulation: likewise.

    Returns:
        Values and int64 row numbers, both ``[k, n]`` or ``[B, k, n]``; columns with fewer nonzeros
        end with zeros at row 0.

    Raises:
        TypeError: ``regularizer`` is not :class:`SparsityConstrained`.
        ValueError: as :func:`regularized_ot`.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> regularizer = SparsityConstrained(k=1)
        >>> found = regularized_ot(cost, regularizer=regularizer)
        >>> sparse_plan(found, cost, regularizer=regularizer)
        (tensor([[0.5000, 0.5000]]), tensor([[0, 1]]))

    Source:
        T. Liu, J. Puigcerver, M. Blondel, 2022, arXiv 2209.15466.
    """
    if not isinstance(regularizer, SparsityConstrained):
        raise TypeError(
            f"regularizer must be SparsityConstrained, got {type(regularizer).__name__}"
        )
    problem = _Problem(C, None, b, regularizer, formulation, None, None)
    alpha, beta = (v if C.dim() == 3 else v.unsqueeze(0) for v in (found.alpha, found.beta))
    gamma, k, _ = problem.options
    values, rows = SPARSE_PLAN.kernel(problem.backend)(
        alpha, beta if problem.dual else None, problem.cost, problem.b, gamma, k
    )
    return (values.mT, rows.mT) if C.dim() == 3 else (values[0].T, rows[0].T)


class _Problem:
    """Checked arguments, as the operators take them: a batch, the cost transposed once."""

    def __init__(
        self,
        C: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        regularizer: OTRegularizer,
        formulation: str,
        alpha0: Tensor | None,
        beta0: Tensor | None,
    ) -> None:
        check_floating("C", C)
        if C.dim() not in (2, 3) or min(C.shape[-2:]) < 1:
            raise ValueError(f"C must have shape [m, n] or [B, m, n], got {list(C.shape)}")
        if not isinstance(regularizer, OTRegularizer):
            raise TypeError(
                "regularizer must be Entropic, SquaredL2 or SparsityConstrained, "
                f"got {type(regularizer).__name__}"
            )
        check_one_of("formulation", formulation, ("semi_dual", "dual"))
        if transformed():
            raise NotImplementedError(
                "regularized_ot has no rule for torch.func transforms and forward mode; use "
                "torch.autograd, and a batch dimension in place of vmap"
            )
        m, n = C.shape[-2:]
        self.regularizer = regularizer
        self.dual = formulation == "dual"
        self.backend = backend.forced_backend()
        batched = C if C.dim() == 3 else C.unsqueeze(0)
        self.cost = batched.mT.contiguous()
        self.a = self._side("a", a, m, 1 / m)
        self.b = self._side("b", b, n, 1 / n)
        self.alpha0 = None if alpha0 is None else self._side("alpha0", alpha0, m, 0.0).detach()
        self.beta0 = None if beta0 is None else self._side("beta0", beta0, n, 0.0).detach()
        gamma = torch.full((), regularizer.gamma, dtype=_scalar_dtype(C), device=C.device)
        self.options = (gamma, regularizer.nonzeros(m), regularizer.code)

    def _side(self, name: str, vector: Tensor | None, size: int, fill: float) -> Tensor:
        batch, dtype = self.cost.shape[0], accumulate_dtype(self.cost.dtype)
        if vector is None:
            return self.cost.new_full((batch, size), fill, dtype=dtype)
        check_floating(name, vector)
        check_same_device(name, vector, "C", self.cost)
        if vector.dim() == 2:
            check_shape(name, vector, (batch, size), f"[{size}] or [{batch}, {size}]")
        else:
            check_shape(name, vector, (size,), f"[{size}] or [{batch}, {size}]")
        return vector.to(dtype).expand(batch, size)

    def solve(
        self, solver: str, max_iter: int, tol: float, lr: float, strict: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha and beta, differentiable in cost, a and b, and the iterations."""
        check_one_of("solver", solver, SOLVERS)
        check_at_least("max_iter", max_iter, 1)
        check_positive("lr", lr)
        if not 0 <= tol < math.inf:
            raise ValueError(f"tol must be at least 0 and finite, got {tol}")
        if solver == "bcd" and isinstance(self.regularizer, SparsityConstrained):
            raise ValueError(
                "solver must be lbfgs, newton or adam with SparsityConstrained: at most k nonzeros "
                "a column couple the rows, which bcd solves one by one"
            )
        gamma, k, code = self.options
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.regularizers.transport_potentials(
            self.cost,
            self.a,
            self.b,
            gamma,
            self.alpha0,
            self.beta0,
            k,
            code,
            self.dual,
            solver,
            max_iter,
            float(tol),
            float(lr),
            strict,
            self.backend,
        )
        return found

    def objective(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the dual value with the gradient of the envelope theorem, and its slopes."""
        value, by_alpha, by_beta = DUAL.kernel(self.backend)(
            alpha,
            beta if self.dual else None,
            self.cost,
            self.a,
            self.b,
            *self.options,
            True,
        )
        return value.to(self.a.dtype), by_alpha, by_beta


def _scalar_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


class RegularizedOTLoss(nn.Module):
    r"""The optimal value of regularized transport as a loss.

    .. math:: L(C, a, b) = \min_{T 1 = a,\; T^\top 1 = b,\; T \ge 0}
        \langle T, C \rangle + \sum_j \Omega(t_j)

    computed as the dual value, a lower bound that the solver makes tight. The gradient in C is the
    plan, in a and b the potentials; no plan is made before the backward pass asks for it.

    Args:
        regularizer: :class:`Entropic`, :class:`SquaredL2` or :class:`SparsityConstrained`.
        formulation: ``"semi_dual"`` or ``"dual"``.
        solver: as for :func:`regularized_ot`.
        max_iter: iterations at most.
        tol: every marginal is to be met to less than this.
        lr: step of ``"adam"``.
        reduction: over a batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        C ``[m, n]`` or ``[B, m, n]``, a and b as for :func:`regularized_ot`, to a loss with no
        dimensions (``[B]`` for ``reduction="none"`` of a batch).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: as :func:`regularized_ot`; ``reduction`` is unknown.

    Example:
        >>> x, y = torch.randn(32, 2, requires_grad=True), torch.randn(24, 2)
        >>> loss = RegularizedOTLoss(SparsityConstrained(gamma=0.1, k=4))
        >>> loss(torch.cdist(x, y).square()).backward()
        >>> x.grad.shape
        torch.Size([32, 2])

    Source:
        T. Liu, J. Puigcerver, M. Blondel, 2022, arXiv 2209.15466; gradients by Danskin's theorem.
    """

    def __init__(
        self,
        regularizer: OTRegularizer,
        *,
        formulation: Formulation = "semi_dual",
        solver: Solver = "lbfgs",
        max_iter: int = 500,
        tol: float = 1e-6,
        lr: float = 1e-2,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(regularizer, OTRegularizer):
            raise TypeError(
                "regularizer must be Entropic, SquaredL2 or SparsityConstrained, "
                f"got {type(regularizer).__name__}"
            )
        check_one_of("formulation", formulation, ("semi_dual", "dual"))
        check_one_of("solver", solver, SOLVERS)
        check_one_of("reduction", reduction, ("mean", "sum", "none"))
        self.regularizer = regularizer
        self.formulation: Formulation = formulation
        self.solver: Solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.lr = lr
        self.reduction: Reduction = reduction

    def forward(self, C: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Return the loss."""
        problem = _Problem(C, a, b, self.regularizer, self.formulation, None, None)
        alpha, beta, _ = problem.solve(self.solver, self.max_iter, self.tol, self.lr, False)
        values = problem.objective(alpha, beta)[0].to(C.dtype)
        if C.dim() == 2:
            return values[0]
        return reduce_rows(values, self.reduction)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"{self.regularizer!r}, formulation={self.formulation}, solver={self.solver}"
