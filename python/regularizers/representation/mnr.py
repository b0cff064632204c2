"""Multiple negatives ranking: each sentence finds its partner among all partners of the batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_floating,
    check_one_of,
    check_same_device,
    check_same_dtype,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import gather_batch
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops import pairwise_logsumexp
from regularizers.ops._operator import accumulate_dtype, full_precision
from regularizers.representation._in_batch import check_pairs, fold_scale, ranking_rows

Targets = Literal["argmax", "soft", "code"]
_TARGETS = ("argmax", "soft", "code")
_BLOCK = 1024  # rows of similarities at a time, where targets are looked for


def mnr_loss(
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    negatives: Tensor | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Rank the partner of each row of ``a`` above all other rows of ``b``.

    .. math::
        L = -\frac1N \sum_i \log \frac{e^{\gamma \langle a_i, b_i \rangle}}
        {\sum_j e^{\gamma \langle a_i, b_j \rangle} + \sum_m e^{\gamma \langle a_i, c_m \rangle}}

    One direction only: swap ``a`` and ``b`` for the other, and take the mean of both for the loss
    of CLIP. Neither the logits nor anything of their size is stored where a kernel serves
    :func:`regularizers.ops.pairwise_logsumexp`.

    Args:
        a: ``[N, D]``, such as embeddings of questions; N at least 2.
        b: their partners, ``[N, D]``.
        scale: :math:`\gamma`, 1 / temperature, above 0; a number, or a tensor with no dimensions,
            which may be learnt. The defaults here are those of the authors' code; start new work
            with ``scale=20, normalize=True``.
        normalize: compare by cosine; a row of zeros has similarity 0 to all.
        negatives: c, ``[M, D]``, further columns that are nobody's partner (mined ones).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one entry a row of ``a``.
        process_group: processes whose batches are one: rows of all are ranked among columns of
            all.

    Returns:
        The loss, with no dimensions or ``[N]`` (N x world size over a group); float64 for float64,
        else float32.

    Raises:
        TypeError: a tensor is not floating point or of another dtype than ``a``.
        ValueError: shapes do not fit, N is below 2, or an option is out of range.

    Example:
        >>> mnr_loss(torch.eye(3), torch.eye(3))
        tensor(0.5514)
        >>> mnr_loss(torch.eye(3), torch.eye(3), scale=20)
        tensor(4.1223e-09)

    Source:
        L. Hallee, R. Kapur, A. Patel, J. P. Gleghorn, B. Khomtchouk, "Contrastive Learning and
        Mixture of Experts Enables Precise Vector Embeddings", 2024, arXiv 2401.15713; the loss is
        that of M. Henderson et al., 2017, arXiv 1705.00652. Authors' code read. Its function of
        this name compares each row with its partner alone, and so has no negatives; the formula
        above is what its comments describe. ``sentence_transformers``' loss is this one with
        ``scale=20, normalize=True``; NT-Xent differs: there the other rows of ``a`` are negatives,
        too.
    """
    check_pairs("a", a, "b", b)
    check_one_of("reduction", reduction, REDUCTIONS)
    others = []
    if negatives is not None:
        check_floating("negatives", negatives)
        check_same_dtype("negatives", negatives, "a", a)
        check_same_device("negatives", negatives, "a", a)
        if negatives.dim() != 2 or negatives.shape[1] != a.shape[1]:
            raise ValueError(
                f"negatives must have shape [M, {a.shape[1]}], got {list(negatives.shape)}"
            )
        others = [_prepared(negatives, normalize, process_group)]
    rows, factor = fold_scale(_prepared(a, normalize, process_group), scale)
    columns = torch.cat([_prepared(b, normalize, process_group), *others])
    return reduce_rows(ranking_rows(rows, columns, scale=factor), reduction)


def mnr_plus_loss(
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    targets: Targets = "argmax",
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Rank partners in both directions; what counts as partner follows from similarities within.

    .. math::
        S = \tfrac12 (a a^\top + b b^\top), \qquad T = \operatorname{softmax}_j(\gamma S), \qquad
        L = \tfrac12 \big[ \mathrm{CE}(\gamma a b^\top, T) + \mathrm{CE}(\gamma b a^\top, T') \big]

    ``"argmax"`` takes for the positive of row i the j of the largest :math:`S_{ij}`, in both
    directions. With ``normalize`` that is i itself unless two samples are the same in both
    batches: the symmetric loss of CLIP. Without, it need not be: for ``a = b = [[1, 0], [3, 0]]``
    both rows get the longer one. ``"soft"`` takes T for target probabilities, and for the other
    direction its transpose with rows scaled to sum 1. T is a constant for derivatives.

    ``"code"`` is what the authors' code does: the targets of the other direction are the largest
    entries of the columns of T, whose rows are normalised. There a sample with few neighbours,
    which has its row's probability for itself, can be the target of a neighbour with many, also
    where all norms are 1.

    Args:
        a: ``[N, D]``, N at least 2.
        b: their partners, ``[N, D]``.
        scale: :math:`\gamma`, as in :func:`mnr_loss`; no gradient flows into it through T.
        normalize: compare by cosine.
        targets: ``"argmax"``, ``"soft"`` or ``"code"``.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the mean of both directions, sample by
            sample.
        process_group: processes whose batches are one.

    Returns:
        The loss, with no dimensions or ``[N]`` (N x world size over a group); float64 for float64,
        else float32.

    Raises:
        TypeError: a tensor is not floating point, or ``b`` is of another dtype than ``a``.
        ValueError: shapes differ, N is below 2, or an option is out of range.

    Example:
        >>> a, b = torch.randn(2, 8, 4)
        >>> both = [mnr_loss(x, y, normalize=True) for x, y in ((a, b), (b, a))]
        >>> torch.allclose(mnr_plus_loss(a, b, normalize=True), sum(both) / 2)
        True

    Source:
        L. Hallee et al., 2024, arXiv 2401.15713; authors' code read, where T is multiplied by the
        temperature that the logits are divided by (they train with 1); here both have
        :math:`\gamma`.
    """
    check_pairs("a", a, "b", b)
    check_one_of("targets", targets, _TARGETS)
    check_one_of("reduction", reduction, REDUCTIONS)
    rows, columns = (_prepared(x, normalize, process_group) for x in (a, b))
    # <[a_i, b_i], [a_j, b_j]> / 2 is S_ij.
    both = torch.cat([rows, columns], dim=1).detach()
    scaled, factor = fold_scale(rows, scale)
    tempered = both * (scale.detach().to(both) if isinstance(scale, Tensor) else factor) / 2
    if targets == "soft":
        forward = _soft_rows(scaled, columns, tempered, both, factor)
        log_sums = pairwise_logsumexp(tempered, both).logsumexp
        backward = _soft_rows(columns, scaled, tempered, both, factor, -log_sums)
    else:
        of_rows, of_columns = _largest(tempered, both)
        of_columns = of_columns if targets == "code" else of_rows
        forward = ranking_rows(scaled, columns, scale=factor, positive=of_rows)
        backward = ranking_rows(columns, scaled, scale=factor, positive=of_columns)
    return reduce_rows((forward + backward) / 2, reduction)


def _prepared(x: Tensor, normalize: bool, group: dist.ProcessGroup | None) -> Tensor:
    whole = gather_batch(x.to(accumulate_dtype(x.dtype)), group)
    return unit(whole) if normalize else whole


@torch.no_grad()
def _largest(tempered: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the rows of T, and where its columns are largest, a block of rows at a time."""
    of_rows = []
    best = both.new_full((len(both),), -torch.inf)
    of_columns = torch.zeros_like(best, dtype=torch.int64)
    with full_precision(both.device):
        for number, block in enumerate(tempered.split(_BLOCK)):
            scores = block @ both.T
            of_rows.append(scores.argmax(1))
            value, index = (scores - scores.logsumexp(1, keepdim=True)).max(0)
            of_columns = torch.where(value > best, index + number * _BLOCK, of_columns)
            best = torch.maximum(best, value)
    return torch.cat(of_rows), of_columns


def _soft_rows(
    queries: Tensor,
    columns: Tensor,
    tempered: Tensor,
    both: Tensor,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    r"""Return the cross-entropy with targets :math:`T_{ij} \propto e^{\gamma S_{ij} + b_j}`.

    :math:`\sum_j T_{ij} s_{ij} = \gamma \langle q_i, \sum_j T_{ij} c_j \rangle`, and the inner sum
    is attention: one more operator that does not store the matrix, where a fused one serves.
    """
    if bias is not None:
        tempered = torch.cat([tempered, torch.ones_like(bias)[:, None]], dim=1)
        both = torch.cat([both, bias[:, None]], dim=1)
    with full_precision(queries.device):
        expected = F.scaled_dot_product_attention(
            tempered[None], both[None], columns[None], scale=1.0
        )[0]
    all_scores = pairwise_logsumexp(queries, columns, scale=scale, exclude_self=False)
    return all_scores.logsumexp - scale * (queries * expected).sum(1)
