"""Losses of two-tower retrieval: in-batch softmax, contrast of two views, spreading out."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from regularizers._shared.checks import (
    check_floating,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import gather_batch, gather_rows
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops._operator import accumulate_dtype, full_precision
from regularizers.representation._in_batch import check_pairs, check_rows, ranking_rows

Form = Literal["softmax", "second_moment"]
_FORMS = ("softmax", "second_moment")


def batch_contrastive_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Find each item's second view among the second views of the batch.

    .. math::
        L = -\frac1B \sum_i \log \frac{e^{\langle z_i, z'_i \rangle / \tau}}
        {\sum_j e^{\langle z_i, z'_j \rangle / \tau}}, \qquad \|z_i\| = \|z'_i\| = 1

    The item tower makes both embeddings, of two views by :class:`ItemAugmenter`; alpha times the
    loss is added to :func:`batch_softmax_loss`. Draw the items *uniformly from the catalogue*, not
    from the log of the main loss: there popular items come again and again, as negatives of
    themselves, and rare ones, which this loss is for, hardly ever.

    Args:
        z1: embeddings of the first views, ``[B, D]``, of any norm; B at least 2.
        z2: of the second views.
        temperature: :math:`\tau`, above 0.
        symmetric: take the mean with the loss of ``z2`` among ``z1``.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one entry an item.
        process_group: processes whose batches are one.

    Returns:
        The loss, with no dimensions or ``[B]`` (B x world size over a group); float64 for float64,
        else float32. log B where all embeddings are equal.

    Raises:
        TypeError: a tensor is not floating point, or ``z2`` is of another dtype.
        ValueError: shapes differ, B is below 2, or an option is out of range.

    Example:
        >>> import torch
        >>> batch_contrastive_loss(torch.ones(4, 8), torch.ones(4, 8))
        tensor(1.3863)

    Source:
        T. Yao et al., "Self-supervised Learning for Large-scale Item Recommendations", CIKM 2021,
        arXiv 2007.12865; formula from public notes on the paper. The paper tunes the temperature
        and alpha (0.1 to 1); 0.1 is chosen here. First views are no negatives of each other, as
        they are in SimCLR's NT-Xent.
    """
    check_pairs("z1", z1, "z2", z2)
    check_positive("temperature", temperature)
    check_one_of("reduction", reduction, REDUCTIONS)
    first, second = (unit(_whole(z, process_group)) for z in (z1, z2))
    rows = ranking_rows(first, second, scale=1 / temperature)
    if symmetric:
        rows = (rows + ranking_rows(second, first, scale=1 / temperature)) / 2
    return reduce_rows(rows, reduction)


def batch_softmax_loss(
    query: Tensor,
    item: Tensor,
    *,
    temperature: float,
    log_q: Tensor | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Find each query's item among the items of the batch: the main loss of two towers.

    .. math::
        s_{ij} = \langle q_i, x_j \rangle / \tau - \log Q_j, \qquad
        L = -\frac1B \sum_i \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}

    Popular items are in many batches, and would be pushed away more than others;
    :math:`-\log Q_j` makes up for it, in the positive's score, too.

    Args:
        query: q, ``[B, D]``, B at least 2; used as it is, so normalise it for cosines.
        item: x, ``[B, D]``.
        temperature: :math:`\tau`, above 0.
        log_q: ``[B]``, logarithm of how probably each item is in a batch (up to a constant: its
            share of the log will do); 0 when omitted. No gradient flows into it.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one entry a query.
        process_group: processes whose batches are one.

    Returns:
        The loss, with no dimensions or ``[B]`` (B x world size over a group); float64 for float64,
        else float32.

    Raises:
        TypeError: a tensor is not floating point, or ``item`` is of another dtype.
        ValueError: shapes do not fit, B is below 2, or an option is out of range.

    Example:
        >>> import torch
        >>> query, item = torch.randn(2, 64, 16)
        >>> share = torch.rand(64)
        >>> loss = batch_softmax_loss(query, item, temperature=1.0, log_q=share.log())
        >>> loss.shape
        torch.Size([])

    Source:
        T. Yao et al., CIKM 2021, arXiv 2007.12865; the correction is that of X. Yi et al.,
        "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", RecSys
        2019. An item that stands in the batch twice is a negative of its own query here.
    """
    check_pairs("query", query, "item", item)
    check_positive("temperature", temperature)
    check_one_of("reduction", reduction, REDUCTIONS)
    rows, columns = (_whole(x, process_group) for x in (query, item))
    bias = None
    if log_q is not None:
        check_floating("log_q", log_q)
        check_shape("log_q", log_q, (len(query),), "[batch] as query has")
        check_same_device("log_q", log_q, "query", query)
        bias = -gather_rows(log_q.to(rows.dtype), process_group)
    return reduce_rows(
        ranking_rows(rows, columns, scale=1 / temperature, column_bias=bias), reduction
    )


def spread_out_loss(
    z: Tensor,
    *,
    form: Form = "softmax",
    temperature: float = 0.1,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Push the embeddings of a batch apart: the baseline without views.

    .. math::
        \text{softmax} = -\frac1B \sum_i \log \frac{e^{1/\tau}}{\sum_j e^{\langle z_i, z_j \rangle
        / \tau}}, \qquad
        \text{second moment} = M_1^2 + \max(0, M_2 - 1/D), \quad
        M_k = \operatorname{mean}_{i \ne j} \langle z_i, z_j \rangle^k, \qquad \|z_i\| = 1

    The first is :func:`batch_contrastive_loss` with ``z2 = z1``; the second has the moments that
    independent uniform directions have (0 and 1/D) for its optimum, in O(B D^2) operations.

    Args:
        z: ``[B, D]``, of any norm; B at least 2.
        form: ``"softmax"`` or ``"second_moment"``.
        temperature: :math:`\tau`, above 0; for ``"softmax"``.
        process_group: processes whose batches are one.

    Returns:
        The loss, with no dimensions; float64 for float64, else float32.

    Raises:
        TypeError: ``z`` is not floating point.
        ValueError: B is below 2, or an option is out of range.

    Example:
        >>> import torch
        >>> spread_out_loss(torch.eye(4), form="second_moment")
        tensor(0.)
        >>> spread_out_loss(torch.ones(4, 4))
        tensor(1.3863)

    Source:
        T. Yao et al., CIKM 2021, arXiv 2007.12865, the spread-out baseline; ``"second_moment"``
        is the regularizer of X. Zhang, F. X. Yu, S. Kumar, S.-F. Chang, "Learning Spread-out Local
        Feature Descriptors", 2017, arXiv 1708.06320, over all pairs of the batch.
    """
    check_rows("z", z)
    check_one_of("form", form, _FORMS)
    check_positive("temperature", temperature)
    directions = unit(_whole(z, process_group))
    if form == "softmax":
        return ranking_rows(directions, directions, scale=1 / temperature).mean()
    pairs = len(directions) * (len(directions) - 1)
    norms = directions.square().sum(1)
    with full_precision(z.device):
        gram = directions.T @ directions
    first = (directions.sum(0).square().sum() - norms.sum()) / pairs
    second = (gram.square().sum() - norms.square().sum()) / pairs
    return first.square() + (second - 1 / directions.shape[1]).clamp(min=0)


def _whole(z: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return gather_batch(z.to(accumulate_dtype(z.dtype)), group)
