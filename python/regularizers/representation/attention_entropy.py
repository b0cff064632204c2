"""Attention entropy maximization: keep a few instances of a bag from taking all its attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
    check_values,
    known_range,
)
from regularizers._shared.entries import reduce_entries
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers._shared.scheduled import scheduled
from regularizers.ops._operator import accumulate_dtype

_LOG_OF_ZERO = -1000.0
# Rows of probabilities in half types add up to a little more than 1.
_ROUNDING = 1e-2


def attention_neg_entropy(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the negative entropy of the attention over the instances of a bag.

    .. math::
        L = \frac{1}{H} \sum_h \sum_n \alpha_{hn} \log \alpha_{hn}, \qquad
        \alpha_h = \operatorname{softmax}_n a_h

    between :math:`-\log N` (all instances alike) and 0 (one instance takes all). Added to a loss
    with a positive weight it spreads the attention. It takes the logits :math:`a`: the softmax of
    attention that is a softmax already is nearly flat, and its entropy says nothing. The value is
    exact however small the attention gets, where :math:`\log(\alpha + \epsilon)` is off for bags of
    :math:`10^4` instances.

    Args:
        logits: attention before the softmax, ``[*, H, N]``: bags, heads, instances.
        mask: bool ``[*, N]``, True for the instances that are there; None for all. What stands in
            the others, also NaN, plays no part. A logit of -inf is an instance without attention.
        normalize: divide by the logarithm of the number of instances, for values in [-1, 0].
        reduction: over the bags: ``"mean"``, ``"sum"``, or ``"none"`` for ``[*]``. Heads are always
            averaged, so that the weight of the term does not depend on their number.

    Returns:
        The negative entropy in nats; float32 for half types. 0 for a bag of one instance.

    Raises:
        TypeError: ``logits`` is not floating-point, or ``mask`` not bool.
        ValueError: ``logits`` has no instance, ``mask`` has another shape, leaves a bag empty (on
            CUDA a device-side assertion), or ``reduction`` is unknown.

    Example:
        >>> import math
        >>> attention_neg_entropy(torch.tensor([[0.0, 0.0, math.log(2)]]))
        tensor(-1.0397)
        >>> two = torch.tensor([True, True, False])
        >>> attention_neg_entropy(torch.tensor([[0.0, 0.0, 9.0]]), mask=two)  # -log 2
        tensor(-0.6931)

    Source:
        Y. Zhang et al., "AEM: Attention Entropy Maximization for Multiple Instance Learning based
        Whole Slide Image Classification", 2024, arXiv 2406.15303; the authors' code averages over
        heads as here. It trains on one bag a step; bags of a batch are averaged here.
    """
    mask = _check("logits", logits, mask, reduction)
    wide = logits.to(accumulate_dtype(logits.dtype))
    if mask is not None:
        wide = wide.where(mask[..., None, :], -torch.inf)
    log_weight = wide.log_softmax(-1)
    weight = log_weight.exp()
    # 0 log 0 = 0, in value and in gradient: below the bound every type's exponential is 0.
    log_weight = log_weight.clamp_min(_LOG_OF_ZERO)
    return _over_bags((weight * log_weight).sum(-1), logits, mask, normalize, reduction)


def attention_neg_entropy_from_probs(
    attn: Tensor,
    *,
    mask: Tensor | None = None,
    eps: float = 1e-12,
    normalize: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the negative entropy of attention of which only the probabilities are at hand.

    .. math:: L = \frac{1}{H} \sum_h \sum_n \alpha_{hn} \log \max(\alpha_{hn}, \epsilon)

    Use :func:`attention_neg_entropy` where there are logits: it loses no digits, and its gradient
    is that of the softmax as well.

    Args:
        attn: attention after the softmax, ``[*, H, N]``, in [0, 1]; rows that add up to 1 over the
            instances that are there.
        mask: as for :func:`attention_neg_entropy`; what stands elsewhere plays no part.
        eps: least probability in the logarithm, above 0. A bound, which leaves larger
            probabilities as they are, where adding it would shift all.
        normalize: as for :func:`attention_neg_entropy`.
        reduction: as for :func:`attention_neg_entropy`.

    Returns:
        The negative entropy in nats; float32 for half types.

    Raises:
        TypeError: ``attn`` is not floating-point, or ``mask`` not bool.
        ValueError: ``attn`` has no instance or values outside of [0, 1] (checked on CPU tensors
            outside of ``torch.compile``), ``eps`` is out of range, or as for
            :func:`attention_neg_entropy`.

    Example:
        >>> attention_neg_entropy_from_probs(torch.tensor([[0.25, 0.25, 0.25, 0.25]]))
        tensor(-1.3863)

    Source:
        Y. Zhang et al., 2024, arXiv 2406.15303, whose loss takes logits.
    """
    mask = _check("attn", attn, mask, reduction)
    check_positive("eps", eps)
    weight = attn.to(accumulate_dtype(attn.dtype))
    if mask is not None:
        weight = weight.where(mask[..., None, :], 0)
    values = known_range(weight.detach())
    if values is not None and (values[0] < 0 or values[1] > 1 + _ROUNDING):
        raise ValueError(
            f"attn must lie in [0, 1], got {values[0]} to {values[1]}: are these logits?"
        )
    rows = (weight * weight.clamp_min(eps).log()).sum(-1)
    return _over_bags(rows, attn, mask, normalize, reduction)


def _check(name: str, attention: Tensor, mask: Tensor | None, reduction: str) -> Tensor | None:
    check_floating(name, attention)
    check_one_of("reduction", reduction, REDUCTIONS)
    if attention.dim() < 2 or attention.shape[-1] == 0 or attention.shape[-2] == 0:
        raise ValueError(
            f"{name} must have shape [..., heads, instances], one at least of both, "
            f"got {list(attention.shape)}"
        )
    if mask is not None:
        shape = (*attention.shape[:-2], attention.shape[-1])
        _check_mask(mask, name, attention, shape)
    return mask


def _check_mask(mask: Tensor, name: str, other: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    check_shape("mask", mask, shape, f"[..., instances] of {name}")
    check_same_device("mask", mask, name, other)
    check_values(mask.any(-1).all(), lambda: "mask must leave an instance in every bag")


def _over_bags(
    rows: Tensor, attention: Tensor, mask: Tensor | None, normalize: bool, reduction: str
) -> Tensor:
    """Average the heads ``[*, H]`` and reduce over bags."""
    bags = rows.mean(-1)
    if normalize:
        if mask is None:
            count = bags.new_full((), attention.shape[-1])
        else:
            count = mask.sum(-1).to(bags.dtype)
        # A bag of one has entropy 0, and 0 / log 1 would be NaN.
        bags = bags / torch.where(count > 1, count, math.e).log()
    return reduce_entries(bags, reduction)


def aem_loss(
    logits: Tensor,
    attn_logits: Tensor,
    target: Tensor,
    *,
    weight: float | Tensor = 0.1,
    mask: Tensor | None = None,
    instance_logits: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Compute the loss of multiple instance learning with attention entropy maximization.

    .. math:: L = \mathrm{CE}(\mathrm{logits}, y) + \lambda \frac{1}{H} \sum_h \sum_n
        \alpha_{hn} \log \alpha_{hn}

    With ``instance_logits`` (DSMIL's head) the first term is half the cross-entropy of the bag and
    half that of the largest logit of each class over the instances.

    Args:
        logits: of the bags, ``[B, C]``.
        attn_logits: attention before the softmax, ``[B, H, N]``.
        target: classes of the bags, int64 ``[B]``.
        weight: :math:`\lambda`, at least 0; a number or a tensor with no dimensions. 0.1 is the
            paper's for CAMELYON17 with self-supervised features; it is tuned for each data set. 0
            gives the plain loss and its gradients.
        mask: bool ``[B, N]``, True for the instances that are there.
        instance_logits: of the instances, ``[B, N, C]``, or None.
        normalize: as for :func:`attention_neg_entropy`; for bags that differ much in size.
        reduction: over the bags: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B]``.

    Returns:
        The loss; float32 for half types.

    Raises:
        TypeError: a tensor is of the wrong type.
        ValueError: a shape does not fit, ``weight`` is negative, or as for
            :func:`attention_neg_entropy`.

    Example:
        >>> model = GatedAttentionMIL(16, 8, 2)
        >>> bags, target = torch.randn(4, 50, 16), torch.tensor([0, 1, 1, 0])
        >>> aem_loss(*model(bags), target, weight=0.1).backward()

    Source:
        Y. Zhang et al., 2024, arXiv 2406.15303, authors' code; the head with two terms is that of
        B. Li, Y. Li, K. Eliceiri, "DSMIL", 2020, arXiv 2011.08939.
    """
    check_floating("logits", logits)
    check_tensor("target", target)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape [bags, classes], got {list(logits.shape)}")
    check_floating("attn_logits", attn_logits)
    check_shape("attn_logits", attn_logits, (len(logits), None, None), "[bags, heads, instances]")
    check_shape("target", target, (len(logits),), "[bags of logits]")
    factor = scheduled("weight", weight, logits, check_not_negative)
    spread = attention_neg_entropy(attn_logits, mask=mask, normalize=normalize, reduction="none")
    losses = _cross_entropy(logits, target)
    if instance_logits is not None:
        check_floating("instance_logits", instance_logits)
        shape = (len(logits), attn_logits.shape[-1], logits.shape[1])
        check_shape("instance_logits", instance_logits, shape, "[bags, instances, classes]")
        if mask is not None:
            instance_logits = instance_logits.where(mask[..., None], -torch.inf)
        losses = 0.5 * losses + 0.5 * _cross_entropy(instance_logits.amax(1), target)
    return reduce_entries(losses + factor.to(spread.dtype) * spread, reduction)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(accumulate_dtype(logits.dtype)), target, reduction="none")


class GatedAttentionMIL(nn.Module):
    r"""Classify a bag by attention over its instances, and show the logits of the attention.

    .. math::
        a_{hn} = w_h \cdot (\tanh(V x_n) \odot \sigma(U x_n)), \qquad
        z_h = \sum_n \operatorname{softmax}_n(a_h)_n\, x_n, \qquad
        \mathrm{logits} = W [z_1; \dots; z_H] + b

    Args:
        in_dim: features of an instance.
        hidden: width of the attention network.
        num_classes: C.
        heads: H; the pooled features of the heads are laid end to end.
        gated: False for attention without the gate :math:`\sigma(U x)`.

    Shape:
        ``[B, N, in_dim]`` to ``[B, C]`` and ``[B, H, N]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape, or a bag is empty.

    Example:
        >>> model = GatedAttentionMIL(16, 8, 2, heads=3)
        >>> mask = torch.arange(50) < torch.tensor([[50], [20]])
        >>> logits, attn_logits = model(torch.randn(2, 50, 16), mask)
        >>> logits.shape, attn_logits.shape
        (torch.Size([2, 2]), torch.Size([2, 3, 50]))

    Source:
        M. Ilse, J. Tomczak, M. Welling, "Attention-based Deep Multiple Instance Learning", 2018,
        arXiv 1802.04712, the model that arXiv 2406.15303 regularizes. How several heads are joined
        is the choice made here.
    """

    def __init__(
        self, in_dim: int, hidden: int, num_classes: int, *, heads: int = 1, gated: bool = True
    ) -> None:
        super().__init__()
        for name, size in (
            ("in_dim", in_dim),
            ("hidden", hidden),
            ("num_classes", num_classes),
            ("heads", heads),
        ):
            check_at_least(name, size, 1)
        self.in_dim = in_dim
        self.content = nn.Linear(in_dim, hidden)
        self.gate = nn.Linear(in_dim, hidden) if gated else None
        self.attention = nn.Linear(hidden, heads)
        self.head = nn.Linear(heads * in_dim, num_classes)

    def forward(self, bag: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits of the classes and those of the attention.

        Args:
            bag: instances ``[B, N, in_dim]``.
            mask: bool ``[B, N]``, True for the instances that are there. The attention logits of
                the others mean nothing: hand the mask on to the loss.
        """
        check_floating("bag", bag)
        check_shape("bag", bag, (None, None, self.in_dim), f"[bags, instances, {self.in_dim}]")
        if bag.shape[1] == 0:
            raise ValueError(f"bag must have instances, got shape {list(bag.shape)}")
        if mask is not None:
            _check_mask(mask, "bag", bag, (bag.shape[0], bag.shape[1]))
            bag = bag.where(mask[..., None], 0)  # padding may hold NaN, and 0 NaN = NaN
        hidden = self.content(bag).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(bag).sigmoid()
        attn_logits: Tensor = self.attention(hidden).transpose(1, 2)
        seen = attn_logits
        if mask is not None:
            seen = seen.where(mask[:, None], -torch.inf)
        pooled = seen.softmax(-1) @ bag
        return self.head(pooled.flatten(1)), attn_logits
