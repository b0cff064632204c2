"""Mutual information of a layer with input and label: bins and kernels that adapt to the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_module,
    check_one_of,
    check_positive,
    check_same_device,
    check_tensor,
    check_values,
)
from regularizers._shared.distributed import gather_batch, gather_rows
from regularizers._shared.taps import ActivationTap
from regularizers.ops._operator import accumulate_dtype
from regularizers.ops.pairwise import SameLabel, pairwise_logsumexp
from regularizers.ops.philox import philox_words

Bound = Literal["upper", "lower"]
BOUNDS = ("upper", "lower")


class LayerInformation(NamedTuple):
    """What a layer T knows of the input X and of the label Y.

    Attributes:
        input: I(X;T), no dimensions.
        label: I(T;Y), no dimensions.

    Example:
        >>> found = ebab_information(torch.arange(8.0)[:, None], torch.arange(8) % 2)
        >>> f"{found.input:.1f} bits of the input, {found.label:.1f} of the label"
        '3.0 bits of the input, 1.0 of the label'
    """

    input: Tensor
    label: Tensor


def ebab_edges(t: Tensor, *, num_bins: int = 30, low: float | None = None) -> Tensor:
    r"""Return bin edges that hold equal numbers of distinct activations, over all units together.

    .. math::
        \text{edges} = \big(\text{low},\ U_{\lfloor k |U| / n \rfloor},\ k = 0 \dots n - 1,\
        U_{|U| - 1}\big)

    U are the distinct values of the layer other than ``low``, in ascending order, and n is the
    number of bins. The saturated units (an atom of many equal values at ``low``) get one bin of
    their own, and repeated values do not distort the rest. A value v falls into bin
    (number of edges at most v) - 1.

    Args:
        t: activations ``[N, *]`` of one layer.
        num_bins: n, at least 1.
        low: the value at which a unit saturates, at most the least activation: 0 for ReLU and
            softplus, -1 for tanh. None: the least activation.

    Returns:
        ``[E]``, ascending, without repeats, E at most ``num_bins`` + 2; without gradient. Of a
        layer that is ``low`` throughout, one edge.

    Raises:
        TypeError: ``t`` is not a floating-point tensor.
        ValueError: N is below 2, ``num_bins`` below 1 or an activation below ``low``.

    Example:
        >>> t = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])
        >>> ebab_edges(t, num_bins=2, low=0.0)
        tensor([0., 1., 3., 8.])

    Source:
        I. Chelombiev, C. Houghton, C. O'Donnell, "Adaptive Estimators Show Information Compression
        in Deep Neural Networks", ICLR 2019, arXiv 1902.09037: entropy-based adaptive binning,
        reconstructed after the authors' code.
    """
    values = _activations("t", t).detach()
    check_at_least("num_bins", num_bins, 1)
    if low is not None:
        check_values((values < low).logical_not().all(), lambda: _below_low(values, low))
    distinct: Tensor = values.unique()
    start = distinct[:1] if low is None else distinct.new_full((1,), low)
    distinct = distinct[distinct != start]
    if len(distinct) == 0:
        return start
    place = torch.arange(num_bins, device=t.device) * len(distinct) // num_bins
    edges: Tensor = torch.cat([start, distinct[place], distinct[-1:]]).unique_consecutive()
    return edges


def _below_low(values: Tensor, low: float | None) -> str:
    return f"t must be at least low = {low}, got {values.min().item()}"


def binned_information(
    t: Tensor, labels: Tensor, *, edges: Tensor, base: float = 2.0
) -> LayerInformation:
    r"""Estimate what a deterministic layer knows of input and label, from binned activations.

    .. math::
        I(X;T) = H(T), \qquad I(T;Y) = H(T) + H(Y) - H(T, Y) = H(T) - \sum_y p(y) H(T \mid y)

    T is the row of bin numbers, H the entropy of its frequencies among the N samples. T is a
    function of X, so H(T | X) = 0 whether or not inputs repeat.

    Args:
        t: activations ``[N, *]``.
        labels: classes ``[N]``, integers.
        edges: ``[E]``, ascending, the first at most the least activation, as of
            :func:`ebab_edges`.
        base: of the logarithm, above 1: 2 for bits, e for nats.

    Returns:
        :class:`LayerInformation`, float64, without gradient; both NaN where an activation is.

    Raises:
        TypeError: ``t`` is not a floating-point tensor or ``labels`` are not integers.
        ValueError: N is below 2, or an argument is of the wrong shape or out of range.

    Example:
        >>> t = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])
        >>> edges, labels = torch.tensor([0.0, 1.0, 3.0, 8.0]), torch.tensor([0, 0, 1, 1])
        >>> i_xt, i_ty = binned_information(t, labels, edges=edges)
        >>> f"{i_xt:.1f} bits of the input, {i_ty:.1f} of the label"
        '2.0 bits of the input, 1.0 of the label'

    Source:
        I. Chelombiev et al., 2019, arXiv 1902.09037, after the authors' code. Rows are compared by
        a 64-bit hash: two different rows of a million are taken for equal with a probability of
        about one in a million.
    """
    values = _activations("t", t).detach()
    _check_labels(labels, t)
    check_tensor("edges", edges)
    check_same_device("edges", edges, "t", t)
    if edges.dim() != 1 or len(edges) == 0:
        raise ValueError(f"edges must have shape [E], got {list(edges.shape)}")
    _check_base(base)
    check_values(
        (values < edges[0]).logical_not().all(), lambda: _below_low(values, edges[0].item())
    )
    codes = torch.bucketize(values, edges.to(values.dtype), right=True) - 1
    _, pattern = _row_hash(codes).unique(return_inverse=True)
    _, label = labels.unique(return_inverse=True)
    h_t, h_y = _entropy(pattern), _entropy(label)
    h_joint = _entropy(pattern * (label.max() + 1) + label)
    nats = (h_t, (h_t + h_y - h_joint).clamp_min(0))  # rounding could take it below 0
    unknown = values.isnan().any()
    return LayerInformation(*(torch.where(unknown, torch.nan, h / math.log(base)) for h in nats))


def ebab_information(
    t: Tensor,
    labels: Tensor,
    *,
    num_bins: int = 30,
    low: float | None = None,
    base: float = 2.0,
) -> LayerInformation:
    """Estimate what a layer knows of input and label, with bins that adapt to its activations.

    :func:`binned_information` on :func:`ebab_edges`. No strictly increasing map of all activations
    that leaves ``low`` in its place changes the estimate.

    Args:
        t: activations ``[N, *]``.
        labels: classes ``[N]``, integers.
        num_bins: number of bins, at least 1.
        low: the value at which a unit saturates; None: the least activation.
        base: of the logarithm, above 1: 2 for bits, e for nats.

    Returns:
        :class:`LayerInformation`, float64, without gradient.

    Raises:
        TypeError: as :func:`binned_information`.
        ValueError: likewise.

    Example:
        >>> t, labels = torch.rand(100, 4), torch.arange(100) % 2
        >>> small, large = (ebab_information(s * t, labels, low=0.0) for s in (1, 8))
        >>> bool(small.input == large.input)
        True

    Source:
        I. Chelombiev et al., 2019, arXiv 1902.09037, after the authors' code.
    """
    edges = ebab_edges(t, num_bins=num_bins, low=low)
    return binned_information(t, labels, edges=edges, base=base)


def kde_information(
    t: Tensor,
    labels: Tensor,
    *,
    noise_var: float | None = None,
    adaptive_scale: float = 1e-3,
    bound: Bound = "upper",
    base: float = 2.0,
    process_group: dist.ProcessGroup | None = None,
) -> LayerInformation:
    r"""Bound what a layer with Gaussian noise knows of input and label, differentiably.

    .. math::
        I(X;T) = -\frac1N \sum_i \log \frac1N \sum_j e^{-\|t_i - t_j\|^2 / (2 v)}, \qquad
        I(T;Y) = I(X;T) - \sum_y p(y) \, I(X;T \mid y)

    This is the upper bound; the lower one has 8 v in the place of 2 v. :math:`I(X;T \mid y)` is
    the same estimate among the samples of class y. By default the noise adapts to the layer,
    :math:`v = \text{adaptive\_scale} \cdot \max |t|^2`, which makes both estimates independent of
    its scale. The N x N distances are never stored.

    Args:
        t: activations ``[N, *]``.
        labels: classes ``[N]``, integers.
        noise_var: v, in squared units of ``t``, above 0; None: adaptive.
        adaptive_scale: v in units of the squared largest activation, above 0; used where
            ``noise_var`` is None.
        bound: ``"upper"`` or ``"lower"``, of I(X;T). I(T;Y) is a difference of two bounds, and no
            bound itself.
        base: of the logarithm, above 1: 2 for bits, e for nats.
        process_group: processes whose batches count as one.

    Returns:
        :class:`LayerInformation`, float32 for half types.

    Raises:
        TypeError: ``t`` is not a floating-point tensor or ``labels`` are not integers.
        ValueError: N is below 2, or an argument is of the wrong shape or out of range.

    Example:
        >>> t, labels = torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1])
        >>> upper = kde_information(t, labels, noise_var=1.0)
        >>> lower = kde_information(t, labels, noise_var=1.0, bound="lower")
        >>> f"between {lower.input:.3f} and {upper.input:.3f} bits"
        'between 0.316 and 0.817 bits'

    Source:
        A. Kolchinsky, B. Tracey, 2017, arXiv 1706.02419, the bounds; I. Chelombiev et al., 2019,
        arXiv 1902.09037, the adaptive noise. The published code has a fixed 0.01 on this path,
        adds noise of that size and takes absolute values; the exponent 2, by which the estimate
        does not depend on the scale, and the constant were chosen here.
    """
    values = _activations("t", t)
    _check_labels(labels, t)
    check_one_of("bound", bound, BOUNDS)
    _check_base(base)
    check_positive("adaptive_scale", adaptive_scale)
    if noise_var is not None:
        check_positive("noise_var", noise_var)
    values = gather_batch(values.to(accumulate_dtype(t.dtype)), process_group)
    labels = gather_rows(labels, process_group)
    if noise_var is None:
        noise = adaptive_scale * values.abs().amax().square()
        width = torch.where(noise > 0, noise, 1).sqrt()  # a layer of zeros stays one
    else:
        width = values.new_full((), noise_var).sqrt()
    i_xt, within = kernel_information(values / width, bound=bound, labels=labels)
    return LayerInformation(i_xt / math.log(base), (i_xt - within) / math.log(base))


def kernel_information(
    t: Tensor, *, bound: Bound, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the bound for noise of variance 1, of all rows and within classes, in nats."""
    # Between Gaussians of one variance, Bhattacharyya's distance is a quarter of the divergence.
    scale = -0.5 if bound == "upper" else -0.125
    everywhere = _mean_surprise(t, scale, None)
    if labels is None:
        return everywhere, torch.zeros_like(everywhere)
    return everywhere, _mean_surprise(t, scale, SameLabel(labels))


def _mean_surprise(t: Tensor, scale: float, pairs: SameLabel | None) -> Tensor:
    """Return minus the mean logarithm of the mean kernel between a row and its pairs."""
    sums = pairwise_logsumexp(t, kind="sqdist", scale=scale, pairs=pairs, exclude_self=False)
    return (sums.pair_count.to(t.dtype).log() - sums.logsumexp).mean()


class InformationRow(NamedTuple):
    """One line of :meth:`InformationPlane.table`.

    Attributes:
        step: of the training.
        tap: name of the layer.
        input: I(X;T) of the layer.
        label: I(T;Y) of the layer.

    Example:
        >>> plane = InformationPlane(nn.Identity(), [""])
        >>> plane.record(torch.ones(4, 1), torch.arange(4), step=0)
        >>> plane.table()
        [InformationRow(step=0, tap='', input=0.0, label=0.0)]
    """

    step: int
    tap: str
    input: float
    label: float


Estimator = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
ESTIMATORS: dict[str, Estimator] = {"ebab": ebab_information, "kde": kde_information}


class InformationPlane:
    """Follow what the layers of a model know of input and label while it trains.

    Args:
        model: any module; recorded in ``eval()`` and put back into its mode.
        taps: qualified names of the submodules whose outputs are measured.
        estimator: ``"ebab"``, ``"kde"``, or a callable of activations ``[N, *]`` and labels ``[N]``
            that gives I(X;T) and I(T;Y): ``functools.partial(ebab_information, low=0.0)``.
        every: number of steps between two records, at least 1; :meth:`record` does nothing at the
            steps between.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a name is unknown, ``estimator`` is, or ``every`` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plane = InformationPlane(model, ["1", "2"], every=10)
        >>> x, y = torch.randn(50, 3), torch.arange(50) % 2
        >>> for step in range(20):
        ...     plane.record(x, y, step)
        >>> [(row.step, row.tap) for row in plane.table()]
        [(0, '1'), (0, '2'), (10, '1'), (10, '2')]

    Source:
        I. Chelombiev et al., 2019, arXiv 1902.09037; the plane is that of R. Shwartz-Ziv,
        N. Tishby, 2017, arXiv 1703.00810.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[str],
        *,
        estimator: Literal["ebab", "kde"] | Estimator = "ebab",
        every: int = 1,
    ) -> None:
        check_module("model", model)
        check_at_least("every", every, 1)
        if isinstance(estimator, str):
            check_one_of("estimator", estimator, tuple(ESTIMATORS))
            estimator = ESTIMATORS[estimator]
        ActivationTap(model, taps)  # complains of unknown names now, not at the first record
        self.model = model
        self.taps = tuple(taps)
        self.estimator: Estimator = estimator
        self.every = every
        self._rows: list[InformationRow] = []

    @torch.no_grad()
    def record(self, x: Tensor, y: Tensor, step: int) -> None:
        """Measure all taps on inputs ``x`` and labels ``y`` ``[N]``, at every ``every``-th step."""
        if step % self.every:
            return
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with ActivationTap(self.model, self.taps) as tap:
                self.model(x)
        finally:
            for module, mode in modes:
                module.training = mode
        for name in self.taps:
            i_xt, i_ty = self.estimator(tap[name], y)
            self._rows.append(InformationRow(step, name, i_xt.item(), i_ty.item()))

    def table(self) -> list[InformationRow]:
        """Return what was recorded, a row for each step and tap, in the order of recording."""
        return list(self._rows)


def _activations(name: str, t: Tensor) -> Tensor:
    """Return activations [N, D], N >= 2."""
    check_floating(name, t)
    if t.dim() == 0 or len(t) < 2:
        raise ValueError(f"{name} must have shape [samples >= 2, ...], got {list(t.shape)}")
    return t.reshape(len(t), -1)


def _check_labels(labels: Tensor, t: Tensor) -> None:
    check_tensor("labels", labels)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != t.shape[:1]:
        raise ValueError(
            f"labels must have shape [samples] = {list(t.shape[:1])}, got {list(labels.shape)}"
        )
    check_same_device("labels", labels, "t", t)


def _check_base(base: float) -> None:
    check_positive("base", base)
    if base <= 1:
        raise ValueError(f"base must be above 1, got {base}")


def _row_hash(codes: Tensor) -> Tensor:
    """Return a 64-bit hash [N] of rows of int64 [N, D]: a linear form with random coefficients."""
    seed = torch.zeros((), dtype=torch.int64, device=codes.device)
    low, high = philox_words(seed, 2 * codes.shape[1]).view(2, -1)
    found: Tensor = (codes * (low ^ (high << 32))).sum(1)
    return found


def _entropy(values: Tensor) -> Tensor:
    """Return the entropy of the frequencies of values, float64, in nats."""
    _, count = values.unique(return_counts=True)
    share = count.double() / len(values)
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy
