"""SIGReg: embeddings are asked to be N(0, I) by the Epps-Pulley test along random slices."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from regularizers._shared.checks import check_at_least, check_one_of
from regularizers.ops._operator import loss_dtype
from regularizers.transport.sketching import EppsPulley, SlicedRegularizer, as_views, slices_for


def sigreg(
    z: Tensor,
    *,
    num_slices: int = 256,
    slices: Tensor | None = None,
    num_knots: int = 17,
    t_max: float = 3.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Literal["mean", "none"] = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Compute the mean Epps-Pulley statistic of an embedding batch along random slices.

    .. math::
        L = \frac{1}{V K} \sum_{v,k} B \sum_{l} w_l \varphi_l
        \Big[ \big(\tfrac1B \sum_n \cos t_l p_{vnk} - \varphi_l\big)^2
        + \big(\tfrac1B \sum_n \sin t_l p_{vnk}\big)^2 \Big], \qquad p = z A

    with knots :math:`t_l = l\, t_{\max} / (L - 1)`, :math:`\varphi_l = e^{-t_l^2 / 2}` and the
    weights of the trapezoid rule. Under N(0, I) the mean is :math:`\sum_l w_l \varphi_l (1 -
    \varphi_l^2)`, 1.052 with the defaults, for every batch size: the least value is not 0. Near a
    collapsed batch the gradient vanishes with the spread of the embeddings;
    :func:`~regularizers.transport.visreg` does not share that.

    Over a process group, sums of the characteristic function are added up, so that the loss is
    that of the concatenated batch (local batches may differ in size). Gradients are added up
    likewise: with the mean over processes that ``DistributedDataParallel`` takes, parameters get
    those of the concatenated batch. Every process draws the same slices.

    Args:
        z: embeddings ``[V, B, D]`` (views x batch x dim) or ``[B, D]``, B at least 2; statistics
            are of every view by itself.
        num_slices: K; the paper trains with 256 to 4096.
        slices: ``[D, K]`` with columns of norm 1, in place of random ones.
        num_knots: L, at least 2, the knot 0 included.
        t_max: last knot, above 0.
        seed: of the slices, int or int64 tensor with no dimensions; drawn from the default
            generator when omitted. With a process group the largest seed serves all.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.
        reduction: ``"mean"`` over views and slices, or ``"none"``.
        process_group: processes whose batches are one; the loss is that of the whole.

    Returns:
        The loss, a tensor with no dimensions, or ``[V, K]`` for ``reduction="none"``; dtype of
        ``z``, float32 under autocast.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of range or of the wrong shape. NaN in ``z`` gives NaN.

    Example:
        >>> z = torch.randn(2, 128, 16, requires_grad=True)
        >>> loss = sigreg(z, num_slices=64)
        >>> loss.backward()
        >>> sigreg(z, num_slices=64, reduction="none").shape
        torch.Size([2, 64])

    Source:
        R. Balestriero, Y. LeCun, "LeJEPA", 2025, arXiv 2511.08544, authors' code read; baseline of
        VISReg (2026, arXiv 2606.02572). The authors' code wants L odd; the trapezoid rule does
        not.
    """
    statistic = EppsPulley(num_knots, t_max)
    check_at_least("num_slices", num_slices, 1)
    check_one_of("reduction", reduction, ("mean", "none"))
    z = as_views(z)
    slices = slices_for(
        z,
        num_slices,
        slices=slices,
        seed=seed,
        generator=generator,
        process_group=process_group,
    )
    if reduction == "none":
        return statistic.each(z, slices, process_group=process_group).to(loss_dtype(z))
    return statistic(z, slices, process_group=process_group)


class SIGReg(SlicedRegularizer):
    r"""The module of :func:`sigreg`: new random slices at every call.

    .. math:: L = \frac{1}{V K} \sum_{v,k} \mathrm{EppsPulley}(\{ \langle z_{vn}, w_k \rangle \}_n)

    Args:
        num_slices: K, at least 1.
        num_knots: L, at least 2.
        t_max: last knot, above 0.
        process_group: processes whose batches are one, or None.

    Shape:
        ``[V, B, D]`` or ``[B, D]`` to a loss with no dimensions.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> regularizer = SIGReg(num_slices=64)
        >>> z = torch.randn(128, 16, requires_grad=True)
        >>> regularizer(z).backward()

    Source:
        R. Balestriero, Y. LeCun, "LeJEPA", 2025, arXiv 2511.08544, authors' code read.
    """

    def __init__(
        self,
        *,
        num_slices: int = 256,
        num_knots: int = 17,
        t_max: float = 3.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            EppsPulley(num_knots, t_max), num_slices=num_slices, process_group=process_group
        )
