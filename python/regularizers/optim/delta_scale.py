"""The rescaling q of pruned deltas: by search, by gradient, by a bound, by least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_positive,
    check_probability,
    check_shape,
)
from regularizers.ops._operator import accumulate_dtype
from regularizers.optim.delta import StateDelta


def search_q(
    score: Callable[[float], float],
    *,
    low: float,
    high: float = 1.0,
    step: float = 0.1,
    refine: float = 0.1,
    patience: int = 3,
) -> float:
    r"""Search the q with the best score: a coarse grid from the left, then a finer one around it.

    The grid low, low + step, ... ends at ``high``, or once more than ``patience`` scores in a row
    were worse than the best. Then the neighbourhood best :math:`\pm` step is searched with steps of
    step times ``refine``. Use the same masks for every q (a fixed seed; :func:`seeded_score`), or
    the search follows noise.

    Args:
        score: what is maximised: a validation score, or minus :func:`output_change`.
        low: least q, above 0; 1 - p.
        high: largest q.
        step: of the coarse grid, above 0.
        refine: fine step as a part of the coarse one, in (0, 1]; 1: no refinement.
        patience: how many worse scores in a row are borne, at least 0.

    Returns:
        The best q seen, the smallest of equal ones.

    Raises:
        ValueError: an option is out of its range, or a score is NaN.

    Example:
        >>> round(search_q(lambda q: -((q - 0.34) ** 2), low=0.01), 2)
        0.34

    Source:
        DAREx, ICLR 2025, arXiv 2410.09344; ``patience`` as in the authors' code, where 3 stops at
        the fourth worse score.
    """
    check_positive("low", low)
    check_positive("high", high)
    check_positive("step", step)
    check_positive("refine", refine)
    check_at_least("patience", patience, 0)
    if high < low:
        raise ValueError(f"high must be at least low = {low}, got {high}")
    if refine > 1:
        raise ValueError(f"refine must lie in (0, 1], got {refine}")
    seen: dict[float, float] = {}

    def evaluate(q: float) -> float:
        value = float(score(q))
        if math.isnan(value):
            raise ValueError(f"score must not be NaN, got it at q = {q}")
        seen[q] = value
        return value

    best, worse = -math.inf, 0
    for i in range(1 + math.floor((high - low) / step + 1e-9)):
        value = evaluate(low + i * step)
        if value > best:
            best, worse = value, 0
        else:
            worse += 1
            if worse > patience:
                break
    centre = max(seen, key=lambda q: (seen[q], -q))
    fine = step * refine
    count = math.floor(step / fine + 1e-9)
    for i in range(1 - count, count):
        q = centre + i * fine
        if i != 0 and low <= q <= high:
            evaluate(q)
    return max(seen, key=lambda q: (seen[q], -q))


def seeded_score(
    evaluate: Callable[[float, int], float], *, num_seeds: int = 4, seed: int = 0
) -> Callable[[float], float]:
    """Return a score of q that is a mean over masks, the same for every q, less one outlier.

    Args:
        evaluate: from q and a seed for :func:`darex` to a score.
        num_seeds: number of masks, at least 1; from 3 on, the score farthest from the median is
            left out.
        seed: the first seed; the others follow.

    Returns:
        A function of q, for :func:`search_q`.

    Raises:
        ValueError: ``num_seeds`` is below 1.

    Example:
        >>> score = seeded_score(lambda q, seed: q + (100.0 if seed == 2 else seed))
        >>> score(0.0)  # of 0, 1, 100 and 3
        1.3333333333333333

    Source:
        DAREx, arXiv 2410.09344: 4 seeds and one outlier removed.
    """
    check_at_least("num_seeds", num_seeds, 1)

    def score(q: float) -> float:
        values = sorted(float(evaluate(q, seed + i)) for i in range(num_seeds))
        if len(values) > 2:
            middle = (values[(num_seeds - 1) // 2] + values[num_seeds // 2]) / 2
            values.remove(max(values, key=lambda value: abs(value - middle)))
        return sum(values) / len(values)

    return score


def learn_q(
    loss: Callable[[dict[str, Tensor]], Tensor],
    layers: Sequence[str],
    *,
    p: float = 0.99,
    lr: float = 1e-2,
    max_iter: int = 200,
    patience: int = 5,
) -> dict[str, float]:
    r"""Learn one q for each layer by Adam, with early stopping.

    Args:
        loss: from a dict of q, tensors with no dimensions, to a loss that is differentiable in
            them: :func:`darex` with that dict and a fixed seed, ``torch.func.functional_call`` with
            its result, a criterion.
        layers: names of modules, the keys of that dict.
        p: drop probability, in (0, 1); q starts at 1 - p and is held in [1 - p, 1].
        lr: learning rate.
        max_iter: steps at most.
        patience: steps without a better loss until it stops.

    Returns:
        The q of the least loss seen, by layer.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> loss = lambda q: (q["fc1"] - 0.2) ** 2 + (q["fc2"] - 0.21) ** 2
        >>> {name: round(q, 1) for name, q in learn_q(loss, ["fc1", "fc2"]).items()}
        {'fc1': 0.2, 'fc2': 0.2}

    Source:
        DAREx, arXiv 2410.09344, the per-layer q: Adam with learning rate 0.01, early stopping
        after 5.
    """
    check_probability("p", p)
    check_positive("lr", lr)
    check_at_least("max_iter", max_iter, 1)
    check_at_least("patience", patience, 1)
    if not layers:
        raise ValueError("layers must name at least one module")
    q = {name: torch.full((), 1 - p, requires_grad=True) for name in layers}
    optimizer = torch.optim.Adam(q.values(), lr=lr)
    best, worse = math.inf, 0
    found = dict.fromkeys(layers, 1 - p)
    for _ in range(max_iter):
        optimizer.zero_grad()
        value = loss(q)
        if value.item() < best:
            best, worse = value.item(), 0
            found = {name: scale.item() for name, scale in q.items()}
        else:
            worse += 1
            if worse >= patience:
                break
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for scale in q.values():
                scale.clamp_(1 - p, 1.0)
    return found


def analytic_q(
    c: Tensor,
    p: float,
    *,
    eta: float = 0.45,
    gamma: float = 0.95,
    match_reference: bool = False,
    stop_fraction: float = 0.8,
) -> Tensor:
    r"""Return the q of each output that minimises a bound of its change, without data or labels.

    .. math::
        \min_q \Big| \eta \Big(1 - \frac{1 - p}{q}\Big) \sum_j c_j + \frac{\eta^2 \Phi(p)}{4 q^2}
        \sum_j c_j^2 + \log \frac{2}{1 - \gamma} \Big|, \qquad
        \Phi(p) = \frac{1 - 2p}{\log \frac{1 - p}{p}}

    over q = 1 - p, 1 - p + 0.001, ..., 0.998. The paper gives a layer the mean of its rows' q
    (:func:`analytic_layer_q`). With p = 0 nothing is dropped and q is 1.

    Args:
        c: ``[m, n]``, :math:`c_{ij} = \delta_{ij} \bar x_j`: deltas times mean inputs.
        p: drop probability, in [0, 1).
        eta: :math:`\eta`, above 0. The paper tunes it: CoLA .37, SST-2 1.01, MRPC .27, STS-B .36.
        gamma: probability with which the bound holds, in [0, 1).
        match_reference: search as the authors' code does, from below until ``stop_fraction`` of the
            rows have once not improved; then some rows miss their minimum.
        stop_fraction: part of the rows, in (0, 1].

    Returns:
        ``[m]``, float32 (float64 for float64).

    Raises:
        TypeError: ``c`` is not a floating-point tensor.
        ValueError: ``c`` is no matrix, or an option is out of its range.

    Example:
        >>> c = torch.tensor([[0.5] * 20, [-0.5] * 20])
        >>> analytic_q(c, 0.9)
        tensor([0.4100, 0.7140])

    Source:
        DAREx, ICLR 2025, arXiv 2410.09344. The released search runs in half precision, where
        neighbouring q tie; this one in float32 or better.
    """
    check_floating("c", c)
    check_shape("c", c, (None, None), "[m, n]")
    check_fraction("p", p)
    check_positive("eta", eta)
    check_fraction("gamma", gamma)
    if not 0 < stop_fraction <= 1:
        raise ValueError(f"stop_fraction must lie in (0, 1], got {stop_fraction}")
    wide = c.detach().to(accumulate_dtype(c.dtype))
    if p == 0:
        return wide.new_ones(len(c))
    count = max(math.floor((0.998 - (1 - p)) / 0.001 + 1e-9), 0) + 1
    q = (1 - p) + 0.001 * torch.arange(count, dtype=torch.float64)
    q = q.to(c.device, wide.dtype)[:, None]
    bias = eta * (1 - (1 - p) / q) * wide.sum(1)
    spread = eta**2 * sub_gaussian_factor(p) / (4 * q * q) * wide.square().sum(1)
    bound = (bias + spread + math.log(2 / (1 - gamma))).abs()  # [count, m]
    if match_reference:
        # A row has "passed" once a value did not go below the least before it; ties count.
        least = bound.cummin(0).values
        passed = torch.cat((bound.new_zeros(1, len(c)), (bound[1:] >= least[:-1]).to(wide.dtype)))
        enough = passed.cummax(0).values.mean(1) >= stop_fraction
        seen = int(enough.to(torch.int8).argmax()) + 1 if bool(enough.any()) else count
        bound = bound[:seen]
    return q[bound.argmin(0), 0]


def sub_gaussian_factor(p: float) -> float:
    r"""Return :math:`\Phi(p) = (1 - 2p) / \log((1 - p) / p)`, how far a Bernoulli variable strays.

    Example:
        >>> round(sub_gaussian_factor(0.9), 6)
        0.364096
    """
    if p in (0.0, 1.0):
        return 0.0
    return 0.5 if abs(p - 0.5) < 1e-9 else (1 - 2 * p) / math.log((1 - p) / p)


def analytic_layer_q(
    delta: StateDelta,
    means: Mapping[str, Tensor],
    p: float,
    *,
    eta: float = 0.45,
    gamma: float = 0.95,
    match_reference: bool = False,
) -> dict[str, float]:
    """Return the mean of :func:`analytic_q` over the rows of each layer, for :func:`darex`.

    Args:
        delta: what fine-tuning changed.
        means: mean inputs ``[n]`` by module, from :meth:`ActivationMean.means`; layers without a
            delta are left out. A bias counts as an input that is always 1.
        p: drop probability.
        eta: as :func:`analytic_q`.
        gamma: as :func:`analytic_q`.
        match_reference: as :func:`analytic_q`.

    Returns:
        q by module.

    Raises:
        ValueError: no layer has both, or an option is out of its range.

    Example:
        >>> before = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)}
        >>> after = {"fc.weight": torch.full((2, 3), -1.0), "fc.bias": torch.zeros(2)}
        >>> q = analytic_layer_q(StateDelta(after, before), {"fc": torch.ones(3)}, 0.9)
        >>> {name: round(value, 3) for name, value in q.items()}
        {'fc': 0.998}

    Source:
        DAREx, arXiv 2410.09344.
    """
    found = {}
    for name, mean in means.items():
        weight = delta.deltas.get(f"{name}.weight")
        if weight is None:
            continue
        c = weight * mean.to(weight)
        bias = delta.deltas.get(f"{name}.bias")
        if bias is not None:
            c = torch.cat((c, bias[:, None]), dim=1)
        q = analytic_q(c, p, eta=eta, gamma=gamma, match_reference=match_reference)
        found[name] = q.mean().item()
    if not found:
        raise ValueError("means must name a layer that has a delta")
    return found


def mse_q(s2: Tensor | float, v: Tensor | float, p: float) -> Tensor:
    r"""Return the q with the least mean squared error of a linear layer's output.

    .. math:: q^* = (1 - p) + p \frac{V}{S^2}, \qquad
        S^2 = \mathbb E \Big(\sum_j c_j\Big)^2, \quad V = \mathbb E \sum_j c_j^2

    with :math:`c_j = \delta_j x_j`. The error is :math:`S^2 (1 - (1 - p)/q)^2 + V p (1 - p) / q^2`.
    Where deltas add up (:math:`S^2 \gg V`), q is DARE's; where they cancel, it is near 1 or above.

    Args:
        s2: :math:`S^2`, at least 0: mean square of the change of the output, ``[*]``.
        v: V, at least 0, likewise: :math:`x^2` times :math:`\delta^2`.
        p: drop probability, in [0, 1).

    Returns:
        ``[*]``; infinite where :math:`S^2 = 0 < V`: drop everything. 1 - p where both are 0.

    Raises:
        ValueError: ``p`` is out of its range.

    Example:
        >>> delta, x = torch.tensor([[0.02, 0.03, 0.01]]), torch.tensor([[1.0, 0.5, 1.0]])
        >>> mse_q((x @ delta.T).square().mean(), (x**2 @ delta.T**2).mean(), p=0.99)
        tensor(0.3644)

    Source:
        The library's, exact for one linear layer; DAREx, arXiv 2410.09344, minimises a bound
        instead.
    """
    check_fraction("p", p)
    top = torch.as_tensor(v)
    ratio = top / torch.as_tensor(s2, dtype=top.dtype, device=top.device)
    return (1 - p) + p * torch.where(top == 0, 0, ratio)
