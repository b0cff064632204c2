"""A router of tokens to experts by sparse transport: balanced by construction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regularizers._shared.checks import check_at_least, check_floating, check_positive
from regularizers.transport.regularized_ot import SparsityConstrained, regularized_ot


class SparseOTRouter(nn.Module):
    r"""Route tokens to experts: each expert takes at most k tokens and an equal part of the load.

    .. math:: T = \operatorname{argmin}_{T \ge 0} -\langle T, A \rangle + \tfrac{\gamma}{2} \|T\|^2,
        \quad T 1 = \tfrac{1}{N}, \quad T^\top 1 = \tfrac{1}{E}, \quad \|t_j\|_0 \le k

    for affinities A of N tokens to E experts. The router returns the weights

    .. math:: w_{ij} = N\, T_{ij}, \qquad y_i = \sum_j w_{ij}\, f_j(x_i)

    A token's weights sum to 1 up to ``row_error``, an expert's to N / E exactly; only pairs with
    :math:`w_{ij} > 0` need be computed, at most k for each expert. A token that no expert takes has
    zero weights: keep a residual connection around the experts.

    Weights are differentiable in the affinities by the optimality conditions of the transport
    problem; the solver is not unrolled. All tokens of a call are routed together, so a token's
    weights depend on the others, in ``eval()`` too.

    Args:
        k: tokens an expert takes at most; None: ``capacity_factor`` N / E, rounded up.
        capacity_factor: mean number of experts a token may have when k is None, at least 1.
        gamma: strength of the quadratic term, above 0, for weights: in units of affinity. Large
            values share tokens evenly among an expert's k, small ones give one expert a token.
        normalize: divide the weights of a served token by their sum.
        solver: ``"lbfgs"``, ``"newton"`` or ``"adam"``, as for :func:`regularized_ot`.
        max_iter: iterations at most.
        tol: the weights of a token are to sum to 1 within this.

    Shape:
        ``[tokens, experts]`` or ``[B, tokens, experts]`` to the same.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or k E < N: then some token cannot be served.

    Example:
        >>> tokens, experts = torch.randn(32, 8), [nn.Linear(8, 8) for _ in range(4)]
        >>> weights = SparseOTRouter()(tokens @ torch.randn(8, 4))
        >>> ((weights > 0).sum(0) <= 16).all()
        tensor(True)
        >>> output = sum(weights[:, j, None] * f(tokens) for j, f in enumerate(experts))

    Source:
        T. Liu, J. Puigcerver, M. Blondel, 2022, arXiv 2209.15466, section on vision mixtures of
        experts: C = -affinity, capacity through k. Weights as N T and ``capacity_factor`` are
        reconstructed.
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        capacity_factor: float = 2.0,
        gamma: float = 1.0,
        normalize: bool = False,
        solver: str = "lbfgs",
        max_iter: int = 100,
        tol: float = 1e-3,
    ) -> None:
        super().__init__()
        if k is not None:
            check_at_least("k", k, 1)
        if not 1.0 <= capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be at least 1, got {capacity_factor}")
        check_positive("gamma", gamma)
        check_at_least("max_iter", max_iter, 1)
        if solver not in ("lbfgs", "newton", "adam"):
            raise ValueError(f"solver must be 'lbfgs', 'newton' or 'adam', got {solver!r}")
        self.k = k
        self.capacity_factor = capacity_factor
        self.gamma = gamma
        self.normalize = normalize
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol

    def capacity(self, tokens: int, experts: int) -> int:
        """Return how many tokens an expert takes at most."""
        k = self.k if self.k is not None else math.ceil(self.capacity_factor * tokens / experts)
        if k * experts < tokens:
            raise ValueError(
                f"k must be at least tokens / experts = {tokens / experts:g} to serve every token, "
                f"got {k}"
            )
        return min(k, tokens)

    def forward(self, affinity: Tensor) -> Tensor:
        """Return the weights of every token and expert."""
        check_floating("affinity", affinity)
        if affinity.dim() not in (2, 3) or min(affinity.shape[-2:]) < 1:
            raise ValueError(
                "affinity must have shape [tokens, experts] or [B, tokens, experts], "
                f"got {list(affinity.shape)}"
            )
        tokens, experts = affinity.shape[-2:]
        # Weights w = N T meet gamma / (2 N) |w|^2: gamma N on T makes the trade-off between
        # affinity and spread that of one token, whatever N is.
        found = regularized_ot(
            -affinity,
            regularizer=SparsityConstrained(self.gamma * tokens, self.capacity(tokens, experts)),
            solver=self.solver,  # type: ignore[arg-type]
            max_iter=self.max_iter,
            tol=self.tol / tokens,
            lr=1e-2,
        )
        weights = tokens * found.plan
        if not self.normalize:
            return weights
        sums = weights.sum(-1, keepdim=True)
        return torch.where(sums > 0, weights / sums.clamp(min=torch.finfo(sums.dtype).tiny), 0)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        size = f"capacity_factor={self.capacity_factor:g}" if self.k is None else f"k={self.k}"
        return f"{size}, gamma={self.gamma:g}, normalize={self.normalize}"
