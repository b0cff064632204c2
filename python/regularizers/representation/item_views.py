"""Views of items for contrast: hide features that know of each other in different views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_fraction,
    check_one_of,
    check_same_device,
    check_same_dtype,
    check_values,
)
from regularizers._shared.randomness import check_caller_draws

Mask = Literal["cfm", "rfm"]
_MASKS = ("cfm", "rfm")


@torch.no_grad()
def feature_mutual_information(features: Tensor, cardinalities: Sequence[int]) -> Tensor:
    r"""Measure how much each categorical feature of a catalogue tells of each other one.

    .. math:: I_{ij} = \sum_{a, b} P(a, b) \log \frac{P(a, b)}{P(a) P(b)}, \qquad I_{ii} = H_i

    from counts over all items, once, before training. A feature with several values counts as one
    of its values drawn at random, so an item's pair of values weighs one over the number of its
    pairs; items without a value of i or j are left out of :math:`I_{ij}`. The tables of counts
    hold only pairs that occur: large vocabularies cost no memory.

    Args:
        features: int64 ``[N, K]``, values of N items; or ``[N, K, L]`` for up to L values of a
            feature, padded with -1.
        cardinalities: number of values of each of the K features; they are 0, ..., c - 1.

    Returns:
        ``[K, K]`` in nats, float64, symmetric, with entropies on the diagonal; 0 where no item has
        both features.

    Raises:
        TypeError: ``features`` is not an int64 tensor.
        ValueError: shapes do not fit, K is below 2, there is no item, or a value is out of range.

    Example:
        >>> colour = torch.arange(4).repeat(8)
        >>> features = torch.stack([colour, 3 - colour, torch.arange(8).repeat_interleave(4)], 1)
        >>> feature_mutual_information(features, [4, 4, 8]).round(decimals=3)
        tensor([[1.3860, 1.3860, 0.0000],
                [1.3860, 1.3860, 0.0000],
                [0.0000, 0.0000, 2.0790]], dtype=torch.float64)

    Source:
        T. Yao et al., CIKM 2021, arXiv 2007.12865; the estimate for features of several values is
        chosen here. Counts overestimate information by about (c_i - 1)(c_j - 1) / (2 N) where
        features are independent: merge rare values of large vocabularies first.
    """
    if not isinstance(features, Tensor) or features.dtype != torch.int64:
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features must be an int64 tensor, got {kind}")
    if features.dim() not in (2, 3) or features.shape[1] < 2 or features.numel() == 0:
        raise ValueError(
            f"features must have shape [N >= 1, K >= 2] or [N, K, L], got {list(features.shape)}"
        )
    if len(cardinalities) != features.shape[1]:
        raise ValueError(
            f"cardinalities must have {features.shape[1]} entries, got {len(cardinalities)}"
        )
    for size in cardinalities:
        check_at_least("cardinalities", size, 1)
    values = features[:, :, None] if features.dim() == 2 else features
    sizes = torch.tensor(list(cardinalities), device=features.device)[:, None]
    least = 0 if features.dim() == 2 else -1
    if bool(((values < least) | (values >= sizes)).any()):
        raise ValueError(
            f"features must hold values from {least} to below cardinalities {list(cardinalities)}"
        )
    count = features.shape[1]
    information = torch.zeros(count, count, dtype=torch.float64, device=features.device)
    for i in range(count):
        for j in range(i + 1):
            of_pair = _entropy(values[:, i]) if i == j else _information(values[:, i], values[:, j])
            information[i, j] = information[j, i] = of_pair
    return information


def _entropy(a: Tensor) -> Tensor:
    share = (a >= 0) / (a >= 0).sum(1, keepdim=True).clamp(min=1).double()
    return -_x_log_x(_probabilities(a.flatten(), share.flatten()))


def _information(a: Tensor, b: Tensor) -> Tensor:
    """Return the mutual information of two features ``[N, L]``: H(a) + H(b) - H(a, b)."""
    pairs = (a[:, :, None] >= 0) & (b[:, None, :] >= 0)
    share = (pairs / pairs.sum((1, 2), keepdim=True).clamp(min=1).double()).flatten()
    first, second = (
        x.expand(pairs.shape).flatten().clamp(min=0) for x in (a[:, :, None], b[:, None, :])
    )
    a_index, b_index = (x.unique(return_inverse=True)[1] for x in (first, second))
    both = a_index * (b_index.max() + 1) + b_index  # positions, since values might overflow
    of_a, of_b, of_both = (_x_log_x(_probabilities(x, share)) for x in (a_index, b_index, both))
    return (of_both - of_a - of_b).clamp(min=0)


def _probabilities(codes: Tensor, share: Tensor) -> Tensor:
    """Return the probability of each code that occurs."""
    known, index = codes.unique(return_inverse=True)
    summed = torch.zeros(len(known), dtype=share.dtype, device=share.device)
    summed.index_add_(0, index, share)
    return summed / summed.sum().clamp(min=torch.finfo(summed.dtype).tiny)


def _x_log_x(p: Tensor) -> Tensor:
    total: Tensor = torch.special.xlogy(p, p).sum()
    return total


def correlated_feature_mask(
    mi: Tensor,
    *,
    num_masked: int | None = None,
    size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw a feature and mask it with those that it shares most information with.

    .. math::
        s \sim \mathrm{Uniform}\{1, \dots, K\}, \qquad
        \text{masked} = \{s\} \cup \operatorname{top}_{n, j \ne s} I_{sj}

    What one view hides, the other shows; so no feature of a view gives its hidden neighbours away.

    Args:
        mi: I, ``[K, K]``, of :func:`feature_mutual_information`; K at least 2.
        num_masked: n, how many features are masked with the seed, in [1, K - 1]; floor(K / 2) when
            omitted. At most K - 1 features are masked in all, so that each view keeps one.
        size: number of masks, each with a seed of its own; one when omitted.
        generator: to draw from, on the device of ``mi``; not inside ``torch.compile``.

    Returns:
        Boolean ``[K]``, or ``[size, K]``; True is masked.

    Raises:
        TypeError: ``mi`` is not floating point.
        ValueError: ``mi`` is not square, has NaN, or a number is out of range.

    Example:
        >>> mi = torch.tensor([[1.0, 0.9, 0.0, 0.1], [0.9, 1.0, 0.1, 0.0],
        ...                    [0.0, 0.1, 1.0, 0.9], [0.1, 0.0, 0.9, 1.0]])
        >>> mask = correlated_feature_mask(mi, num_masked=1)  # {0, 1} or {2, 3}
        >>> bool(mask[0] == mask[1]), bool(mask[2] == mask[3]), int(mask.sum())
        (True, True, 2)

    Source:
        T. Yao et al., CIKM 2021, arXiv 2007.12865; one seed a batch as in the paper.
    """
    _check_information(mi)
    count = len(mi)
    masked = min(_masked("num_masked", num_masked, count) + 1, count - 1)
    rows = _rows(size)
    _check_generator(generator)
    seeds = torch.randint(count, (rows,), generator=generator, device=mi.device)
    chances = mi[seeds].scatter(1, seeds[:, None], torch.inf)
    mask = _scatter(chances.topk(masked, dim=1).indices, count)
    return mask[0] if size is None else mask


def random_feature_mask(
    num_features: int,
    *,
    num_masked: int | None = None,
    size: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Mask features at random, each set of n of the K being equally likely: the baseline.

    .. math:: \text{masked} \sim \mathrm{Uniform} \{M \subset \{1, \dots, K\} : |M| = n\}

    Args:
        num_features: K, at least 2.
        num_masked: n, in [1, K - 1]; floor(K / 2) when omitted.
        size: number of masks; one when omitted.
        generator: to draw from, on ``device``; not inside ``torch.compile``.
        device: of the mask; that of the generator when omitted.

    Returns:
        Boolean ``[K]``, or ``[size, K]``; True is masked.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is out of range.

    Example:
        >>> int(random_feature_mask(7).sum())
        3

    Source:
        T. Yao et al., CIKM 2021, arXiv 2007.12865, the random feature masking baseline.
    """
    check_at_least("num_features", num_features, 2)
    masked = _masked("num_masked", num_masked, num_features)
    rows = _rows(size)
    _check_generator(generator)
    if device is None and generator is not None:
        device = generator.device
    chances = torch.rand(rows, num_features, generator=generator, device=device)
    mask = _scatter(chances.topk(masked, dim=1).indices, num_features)
    return mask[0] if size is None else mask


class ItemAugmenter(nn.Module):
    r"""Make two views of embedded item features that have no feature in common.

    .. math::
        v^1_k = m_k d_k + (1 - m_k)\, \bar e_k, \qquad v^2_k = (1 - m_k)\, d_k + m_k \bar e_k

    with a mask m by :func:`correlated_feature_mask` or :func:`random_feature_mask`, learned
    embeddings :math:`d_k` of "this feature is hidden", and :math:`\bar e_k` the mean of those of
    the item's values that dropout leaves. Values are dropped only where an item has several of a
    feature; where all are dropped, or there is none, :math:`\bar e_k = d_k`. In ``eval()`` nothing
    is masked or dropped, and both views are the plain features, which is also what the main loss
    takes: ``augmenter.plain(embedded)``.

    Args:
        num_features: K, at least 2.
        dim: D, size of a feature's embedding.
        mi: ``[K, K]`` of :func:`feature_mutual_information`; needed for ``"cfm"``.
        mask: ``"cfm"``, correlated features together, or ``"rfm"``, at random.
        num_masked: n of the mask's function.
        value_dropout: probability that a value of several is dropped, in [0, 1).
        per_row: draw a mask for each item; the paper draws one for a batch.

    Shape:
        ``[B, K, D]``, or ``[B, K, L, D]`` for features of up to L values, to two views
        ``[B, K, D]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape, or ``mi`` is missing.

    Example:
        >>> table = nn.Embedding(50, 8)  # one table for the values of all features
        >>> item = torch.randint(50, (32, 6))
        >>> augmenter = ItemAugmenter(6, 8, mask="rfm")
        >>> tower = nn.Sequential(nn.Flatten(), nn.Linear(6 * 8, 16))
        >>> first, second = augmenter(table(item))
        >>> from regularizers.representation import batch_contrastive_loss
        >>> batch_contrastive_loss(tower(first), tower(second)).backward()

    Source:
        T. Yao et al., CIKM 2021, arXiv 2007.12865; two-stage augmentation reconstructed from
        public notes. What an item shows where all its values are dropped is chosen here.
    """

    mi: Tensor | None

    def __init__(
        self,
        num_features: int,
        dim: int,
        *,
        mi: Tensor | None = None,
        mask: Mask = "cfm",
        num_masked: int | None = None,
        value_dropout: float = 0.2,
        per_row: bool = False,
    ) -> None:
        super().__init__()
        check_at_least("num_features", num_features, 2)
        check_at_least("dim", dim, 1)
        check_one_of("mask", mask, _MASKS)
        check_fraction("value_dropout", value_dropout)
        _masked("num_masked", num_masked, num_features)
        if mi is not None:
            _check_information(mi)
            if len(mi) != num_features:
                raise ValueError(
                    f"mi must have shape [{num_features}, {num_features}], got {list(mi.shape)}"
                )
        elif mask == "cfm":
            raise ValueError("mi must be given for mask 'cfm'")
        self.register_buffer("mi", mi)
        self.mask: Mask = mask
        self.num_masked = num_masked
        self.value_dropout = value_dropout
        self.per_row = per_row
        self.default = nn.Parameter(torch.randn(num_features, dim) / dim**0.5)

    def forward(
        self,
        embedded: Tensor,
        valid_values: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return two views of the items.

        Args:
            embedded: ``[B, K, D]`` or ``[B, K, L, D]``.
            valid_values: boolean ``[B, K, L]`` for several values, False for padding.
            generator: to draw mask and dropout from; not inside ``torch.compile``.
        """
        if not self.training:
            plain = self.plain(embedded, valid_values)
            return plain, plain
        self._check(embedded, valid_values)
        size = len(embedded) if self.per_row else None
        if self.mask == "cfm":
            assert self.mi is not None
            mask = correlated_feature_mask(
                self.mi, num_masked=self.num_masked, size=size, generator=generator
            )
        else:
            mask = random_feature_mask(
                len(self.default),
                num_masked=self.num_masked,
                size=size,
                generator=generator,
                device=embedded.device,
            )
        if embedded.dim() == 4 and self.value_dropout > 0:
            valid_values = self._survivors(embedded, valid_values, generator)
        shown = self.plain(embedded, valid_values)
        return self.hide(shown, mask), self.hide(shown, ~mask)

    def plain(self, embedded: Tensor, valid_values: Tensor | None = None) -> Tensor:
        """Return the features ``[B, K, D]`` without augmentation: the mean of several values."""
        self._check(embedded, valid_values)
        if embedded.dim() == 3:
            return embedded
        if valid_values is None:
            return embedded.mean(2)
        valid = valid_values[..., None]
        total = torch.where(valid, embedded, 0).sum(2)
        count = valid.sum(2)
        return torch.where(count > 0, total / count.clamp(min=1), self.default.to(embedded.dtype))

    def hide(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return features ``[B, K, D]`` with those of a mask ``[K]`` or ``[B, K]`` hidden.

        Also the baseline that drops features in the main loss, without any contrast.
        """
        return torch.where(mask[..., None], self.default.to(features.dtype), features)

    def _survivors(
        self, embedded: Tensor, valid_values: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        shape = embedded.shape[:3]
        kept = torch.rand(shape, generator=generator, device=embedded.device) >= self.value_dropout
        if valid_values is None:
            return kept if shape[2] > 1 else torch.ones_like(kept)
        several = valid_values.sum(2, keepdim=True) > 1
        return valid_values & (kept | ~several)

    def _check(self, embedded: Tensor, valid_values: Tensor | None) -> None:
        check_floating("embedded", embedded)
        check_same_dtype("embedded", embedded, "the augmenter", self.default)
        count, dim = self.default.shape
        if embedded.dim() not in (3, 4) or (embedded.shape[1], embedded.shape[-1]) != (count, dim):
            raise ValueError(
                f"embedded must have shape [batch, {count}, {dim}] or "
                f"[batch, {count}, values, {dim}], got {list(embedded.shape)}"
            )
        if valid_values is None:
            return
        if not isinstance(valid_values, Tensor) or valid_values.dtype != torch.bool:
            raise TypeError("valid_values must be a boolean tensor")
        if embedded.dim() != 4 or valid_values.shape != embedded.shape[:3]:
            raise ValueError(
                "valid_values must have shape [batch, features, values] as embedded has, "
                f"got {list(valid_values.shape)}"
            )
        check_same_device("valid_values", valid_values, "embedded", embedded)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        count, dim = self.default.shape
        return f"{count}, {dim}, mask={self.mask!r}, value_dropout={self.value_dropout:g}"


def _scatter(index: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(index), count, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index, True)


def _check_information(mi: Tensor) -> None:
    check_floating("mi", mi)
    if mi.dim() != 2 or mi.shape[0] != mi.shape[1] or len(mi) < 2:
        raise ValueError(f"mi must have shape [K, K] with K >= 2, got {list(mi.shape)}")
    check_values(~mi.isnan().any(), lambda: "mi must not have NaN")


def _masked(name: str, value: int | None, count: int) -> int:
    if value is None:
        return count // 2
    check_at_least(name, value, 1)
    if value > count - 1:
        raise ValueError(f"{name} must lie in [1, {count - 1}], got {value}")
    return value


def _rows(size: int | None) -> int:
    if size is None:
        return 1
    check_at_least("size", size, 0)
    return size


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None:
        check_caller_draws(generator)
