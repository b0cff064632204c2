"""Two streams of one image, each held to its own concepts and contrasted with the other's."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
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
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import agree_on_seed
from regularizers._shared.entries import reduce_entries
from regularizers._shared.randomness import draw_seed
from regularizers._shared.reductions import REDUCTIONS, Reduction
from regularizers.ops._operator import accumulate_dtype, full_precision
from regularizers.ops.philox import philox_words

Gate = Literal["linear", "sigmoid"]
_GATES: tuple[str, ...] = get_args(Gate)


class StreamSplitter(nn.Module):
    r"""Divide tokens into two complementary streams.

    .. math::
        m = W x + c, \qquad a = \mathrm{MLP}_a(m \odot x), \qquad
        b = \mathrm{MLP}_b(x - m \odot x)

    What one stream is given is taken from the other. The MLPs are Linear-ReLU-Linear.

    Args:
        in_dim: features C of a token.
        out_dim: features D of either stream.
        hidden_dim: width of the MLPs; None for ``out_dim``.
        gate: ``"linear"``, the authors' m without bounds, or ``"sigmoid"``, which keeps it in
            (0, 1).

    Shape:
        ``[*, C]`` to twice ``[*, D]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> splitter = StreamSplitter(32, 8)
        >>> x = torch.randn(2, 49, 32)
        >>> a, b = splitter(x)
        >>> a.shape, b.shape
        (torch.Size([2, 49, 8]), torch.Size([2, 49, 8]))
        >>> torch.testing.assert_close(sum(splitter.split(x)), x)

    Source:
        W. Fan et al., "MeDSLIP: Medical Dual-Stream Language-Image Pre-training for Fine-grained
        Alignment", 2024, arXiv 2403.10635, authors' code.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, hidden_dim: int | None = None, gate: Gate = "linear"
    ) -> None:
        super().__init__()
        check_at_least("in_dim", in_dim, 1)
        check_at_least("out_dim", out_dim, 1)
        check_one_of("gate", gate, _GATES)
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        check_at_least("hidden_dim", hidden_dim, 1)
        self.in_dim = in_dim
        self.squash = gate == "sigmoid"
        self.gate = nn.Linear(in_dim, in_dim)
        self.stream_a = _mlp(in_dim, hidden_dim, out_dim)
        self.stream_b = _mlp(in_dim, hidden_dim, out_dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two parts before their MLPs, which add up to ``x``."""
        check_floating("x", x)
        if x.dim() < 1 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x must have shape [..., {self.in_dim}], got {list(x.shape)}")
        share = self.gate(x)
        if self.squash:
            share = share.sigmoid()
        part = share * x
        return part, x - part

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams a and b."""
        part_a, part_b = self.split(x)
        return self.stream_a(part_a), self.stream_b(part_b)


def _mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))


def prototype_contrastive_loss(
    features: Tensor,
    bank: Tensor,
    cooccurrence: Tensor,
    *,
    present: Tensor,
    num_negatives: int | None = 7,
    temperature: float = 1.0,
    normalize: bool = False,
    exclude_unknown: bool = False,
    clip: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Contrast each concept with the prototype of the other stream's concepts that go with it.

    .. math::
        L = \operatorname{mean}_{iq} \Big( \log \big(e^{s^+_{iq}} + \sum_{k \in N_{iq}}
        e^{s_{iqk}}\big) - s^+_{iq} \Big), \qquad
        s^+ = \Big\langle f, \frac{1}{|K^+|} \sum_{k \in K^+} t_k \Big\rangle / \tau, \qquad
        s_k = \langle f, t_k \rangle / \tau

    :math:`K^+_{iq}` are the concepts k whose entry in the table is 1, and :math:`N_{iq}` others,
    drawn without replacement. The mean is over the concepts that are present and have a positive;
    without any the loss is 0. The log-sum-exp is over rows of scores as large as the table that
    the caller holds, so there is no matrix to save.

    Args:
        features: f, one vector an image and concept of this stream, ``[B, Q, D]``.
        bank: t, the concepts of the other stream as text features, ``[K, D]``; no gradient.
        cooccurrence: which concepts of the other stream go with each of these, ``[B, Q, K]``: 1
            yes, 0 no, -1 unknown. Any type of numbers.
        present: bool ``[B, Q]``, which concepts are in the image.
        num_negatives: how many to draw, at least 1; None for all there are.
        temperature: :math:`\tau`, above 0.
        normalize: give features, prototypes and bank length 1 before the products.
        exclude_unknown: draw no negatives from the unknown entries. The authors' code draws from
            all that are not 1.
        clip: take entries above 1 for 1, where they are counts; else they are an error.
        seed: of the negatives, int or int64 tensor with no dimensions; drawn from the default
            generator when omitted. With a process group the largest seed serves all.
        generator: generator to draw the seed from; not inside ``torch.compile`` or activation
            checkpointing.
        reduction: over the concepts that count: ``"mean"``, ``"sum"``, or ``"none"`` for
            ``[B, Q]`` with 0 for the others.
        process_group: processes whose images are one batch (of equal sizes, for equal draws):
            the mean is over the concepts that count in all of them.

    Returns:
        The loss; float32 for half types.

    Raises:
        TypeError: a tensor is of the wrong type.
        ValueError: shapes do not fit, an option is out of range, an entry of the table is not -1, 0
            or 1, or a concept that counts has fewer negatives than asked for (the last two are
            device-side assertions on CUDA).

    Example:
        >>> table = torch.tensor([[[1, 1, 0, 0, -1]]])
        >>> f, bank = torch.zeros(1, 1, 4), torch.randn(5, 4)
        >>> here = torch.ones(1, 1, dtype=torch.bool)
        >>> prototype_contrastive_loss(f, bank, table, present=here, num_negatives=3)  # log 4
        tensor(1.3863)

    Source:
        W. Fan et al., 2024, arXiv 2403.10635, authors' code: no temperature and no normalisation,
        though its configuration names 0.07. There a present concept without a positive is
        contrasted with a prototype of zeros; here it does not count.
    """
    _check_features("features", features, None, None)
    check_floating("bank", bank)
    check_shape("bank", bank, (None, features.shape[2]), "[concepts, features]")
    check_same_device("bank", bank, "features", features)
    shape = (*features.shape[:2], len(bank))
    table = _checked_table(cooccurrence, shape, features, clip=clip)
    check_tensor("present", present)
    if present.dtype != torch.bool:
        raise TypeError(f"present must be bool, got {present.dtype}")
    check_shape("present", present, tuple(features.shape[:2]), "[batch, concepts] of features")
    check_positive("temperature", temperature)
    check_one_of("reduction", reduction, REDUCTIONS)
    positive = table == 1
    count = positive.sum(-1)
    counted = present & (count > 0)
    negative = table == 0 if exclude_unknown else ~positive
    if num_negatives is not None:
        check_at_least("num_negatives", num_negatives, 1)
        enough = ~counted | (negative.sum(-1) >= num_negatives)
        check_values(
            enough.all(),
            lambda: (
                f"num_negatives must be at most {int(negative.sum(-1)[counted].min())}, "
                f"the negatives of a concept that is present, got {num_negatives}"
            ),
        )
        drawn_from = agree_on_seed(draw_seed(seed, generator, features), process_group)
        negative = _draw(negative, num_negatives, drawn_from, process_group)
    dtype = accumulate_dtype(torch.promote_types(features.dtype, bank.dtype))
    f, t = features.to(dtype), bank.detach().to(dtype)
    with full_precision(f.device):
        prototype = positive.to(dtype) @ t / count.clamp_min(1)[..., None]
        if normalize:
            f, t, prototype = unit(f), unit(t), unit(prototype)
        score = (f * prototype).sum(-1) / temperature
        others = f @ t.T / temperature
    others = others.where(negative, -torch.inf)
    losses = torch.cat([score[..., None], others], -1).logsumexp(-1) - score
    return reduce_entries(losses, reduction, valid=counted, group=process_group)


def _draw(allowed: Tensor, count: int, seed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Keep ``count`` random entries of each row ``[B, Q, K]``: those with the largest words."""
    rows = allowed.shape[0] * allowed.shape[1]
    first = 0 if group is None else dist.get_rank(group) * rows
    streams = torch.arange(first, first + rows, device=allowed.device)
    words = philox_words(seed, allowed.shape[2], stream=streams).view(allowed.shape)
    chosen = words.where(allowed, -1).topk(min(count, allowed.shape[2]), dim=-1).indices
    return torch.zeros_like(allowed).scatter(-1, chosen, True) & allowed


def intra_image_contrastive_loss(
    a: Tensor,
    b: Tensor,
    cooccurrence: Tensor,
    *,
    temperature: float = 1.0,
    normalize: bool = False,
    ignore_index: int = -1,
    clip: bool = False,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Hold the products of the two streams' concepts in an image against which go together.

    .. math:: L = \operatorname{mean}_{ipq:\, y_{ipq} \ne -1}
        \mathrm{BCE}\big(\sigma(\langle a_{ip}, b_{iq} \rangle / \tau),\ y_{ipq}\big)

    The mean is over the known entries of the whole batch; without any the loss is 0. Unknown
    entries get no gradient.

    Args:
        a: concepts of the first stream, ``[B, P, D]``.
        b: of the second, ``[B, A, D]``.
        cooccurrence: y, ``[B, P, A]``: 1, 0, or ``ignore_index``. Any type of numbers.
        temperature: :math:`\tau`, above 0.
        normalize: give a and b length 1 first.
        ignore_index: the entry that stands for unknown.
        clip: take entries above 1 for 1, where they are counts; else they are an error.
        reduction: over the known entries: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B, P, A]``
            with 0 for the others.
        process_group: processes whose images are one batch: the mean is over the known entries of
            all, however many each has.

    Returns:
        The loss; float32 for half types.

    Raises:
        TypeError: a tensor is of the wrong type.
        ValueError: shapes do not fit, an option is out of range, or an entry of the table is none
            of the three (a device-side assertion on CUDA).

    Example:
        >>> a = torch.eye(2)[None]
        >>> b = torch.tensor([[[2.0, 0.0], [-2.0, 5.0]]])
        >>> intra_image_contrastive_loss(a, b, torch.tensor([[[1, 0], [0, -1]]]))
        tensor(0.3157)

    Source:
        W. Fan et al., 2024, arXiv 2403.10635, authors' code, which writes into the caller's table;
        this does not.
    """
    _check_features("a", a, None, None)
    _check_features("b", b, len(a), a.shape[2])
    check_same_device("b", b, "a", a)
    shape = (len(a), a.shape[1], b.shape[1])
    table = _checked_table(cooccurrence, shape, a, unknown=ignore_index, clip=clip)
    check_positive("temperature", temperature)
    check_one_of("reduction", reduction, REDUCTIONS)
    dtype = accumulate_dtype(torch.promote_types(a.dtype, b.dtype))
    a, b = a.to(dtype), b.to(dtype)
    if normalize:
        a, b = unit(a), unit(b)
    with full_precision(a.device):
        scores = a @ b.mT / temperature
    losses = F.binary_cross_entropy_with_logits(scores, (table == 1).to(dtype), reduction="none")
    return reduce_entries(losses, reduction, valid=table != ignore_index, group=process_group)


def _check_features(name: str, x: Tensor, batch: int | None, dim: int | None) -> None:
    check_floating(name, x)
    check_shape(name, x, (batch, None, dim), "[batch, concepts, features], as its partner")


def _checked_table(
    table: Tensor, shape: tuple[int, ...], like: Tensor, *, unknown: int = -1, clip: bool = False
) -> Tensor:
    """Return the table, clipped where that was asked for; the caller's stays as it is."""
    check_tensor("cooccurrence", table)
    check_shape("cooccurrence", table, shape, "[batch, concepts, concepts of the other stream]")
    check_same_device("cooccurrence", table, "features", like)
    if clip and table.dtype != torch.bool:
        # An unknown of another number than -1 must not be clipped away.
        table = table.where(table == unknown, table.clamp_max(1))
    known = (table == 0) | (table == 1) | (table == unknown)
    check_values(
        known.all(),
        lambda: f"cooccurrence must hold {unknown}, 0 and 1 alone, got {table[~known][0].item()}",
    )
    return table


class DualStreamTerms(NamedTuple):
    """The terms of :class:`DualStreamLoss`, each with no dimensions, before their weights.

    Attributes:
        total: the weighted sum.
        presence: cross-entropy of which concepts are in the image, of both streams.
        prototype: prototypical contrast, of both streams.
        intra: intra-image contrast.

    Example:
        >>> DualStreamTerms(*torch.tensor([3.0, 1.0, 1.0, 1.0])).total
        tensor(3.)
    """

    total: Tensor
    presence: Tensor
    prototype: Tensor
    intra: Tensor


class DualStreamLoss(nn.Module):
    r"""Train two streams: which concepts are there, and which of one go with which of the other.

    .. math:: L = w_1 (\mathrm{CE}_a + \mathrm{CE}_b) + w_2 (\mathrm{ProtoCL}_{a \to b} +
        \mathrm{ProtoCL}_{b \to a}) + w_3\, \mathrm{ICL}

    It owns the presence classifiers (two classes, shared by the concepts of a stream) and the
    linear maps f into the space of the other stream's bank. Concept vectors come from the caller's
    model: the paper decodes them from the tokens of each stream with a query for each concept.

    Args:
        dim: features D of a concept vector.
        bank_a: text features of the concepts of stream a, ``[P, T]``; buffers, no gradient.
        bank_b: of stream b, ``[A, T']``.
        presence_weight: :math:`w_1`, at least 0.
        prototype_weight: :math:`w_2`, at least 0.
        intra_weight: :math:`w_3`, at least 0.
        num_negatives: as for :func:`prototype_contrastive_loss`.
        temperature: of both contrasts.
        normalize: in both contrasts.
        exclude_unknown: as for :func:`prototype_contrastive_loss`.
        process_group: processes whose images are one batch.

    Shape:
        ``[B, P, D]``, ``[B, A, D]``, presences ``[B, P]``, ``[B, A]`` and a table ``[B, P, A]``,
        all three of 1, 0 and -1 (unknown), to :class:`DualStreamTerms`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape.

    Example:
        >>> loss = DualStreamLoss(16, torch.randn(5, 32), torch.randn(4, 32), num_negatives=2)
        >>> a, b = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
        >>> table = torch.eye(5, 4).long().expand(2, 5, 4)
        >>> loss(a, b, table.amax(2), table.amax(1), table).total.backward()

    Source:
        W. Fan et al., 2024, arXiv 2403.10635, authors' code: D = 256, T = 768, weights 1, AdamW at
        1e-4. A concept contrasts where its presence is known to be 1.
    """

    bank_a: Tensor
    bank_b: Tensor

    def __init__(
        self,
        dim: int,
        bank_a: Tensor,
        bank_b: Tensor,
        *,
        presence_weight: float = 1.0,
        prototype_weight: float = 1.0,
        intra_weight: float = 1.0,
        num_negatives: int | None = 7,
        temperature: float = 1.0,
        normalize: bool = False,
        exclude_unknown: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        for name, bank in (("bank_a", bank_a), ("bank_b", bank_b)):
            check_floating(name, bank)
            check_shape(name, bank, (None, None), "[concepts, features]")
            self.register_buffer(name, bank.detach().clone())
        for name, weight in (
            ("presence_weight", presence_weight),
            ("prototype_weight", prototype_weight),
            ("intra_weight", intra_weight),
        ):
            check_not_negative(name, weight)
        if num_negatives is not None:
            check_at_least("num_negatives", num_negatives, 1)
        check_positive("temperature", temperature)
        self.weights = (presence_weight, prototype_weight, intra_weight)
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.normalize = normalize
        self.exclude_unknown = exclude_unknown
        self.process_group = process_group
        self.presence_a = nn.Linear(dim, 2)
        self.presence_b = nn.Linear(dim, 2)
        self.project_a = nn.Linear(dim, bank_b.shape[1])
        self.project_b = nn.Linear(dim, bank_a.shape[1])

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        presence_a: Tensor,
        presence_b: Tensor,
        cooccurrence: Tensor,
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DualStreamTerms:
        """Return the terms; ``seed`` and ``generator`` are of the negatives."""
        _check_features("a", a, None, self.presence_a.in_features)
        _check_features("b", b, len(a), self.presence_a.in_features)
        presence = self._presence("presence_a", self.presence_a(a), presence_a)
        presence = presence + self._presence("presence_b", self.presence_b(b), presence_b)
        seed = draw_seed(seed, generator, a)
        # Another seed for the other direction, which draws from another bank.
        prototype = self._contrast(
            self.project_a(a), self.bank_b, cooccurrence, presence_a, seed
        ) + self._contrast(self.project_b(b), self.bank_a, cooccurrence.mT, presence_b, seed ^ 1)
        intra = intra_image_contrastive_loss(
            a,
            b,
            cooccurrence,
            temperature=self.temperature,
            normalize=self.normalize,
            process_group=self.process_group,
        )
        terms = (presence, prototype, intra)
        total = sum(
            (weight * term for weight, term in zip(self.weights, terms, strict=True)),
            start=torch.zeros_like(intra),
        )
        return DualStreamTerms(total, *terms)

    def _presence(self, name: str, logits: Tensor, presence: Tensor) -> Tensor:
        check_tensor(name, presence)
        check_shape(name, presence, tuple(logits.shape[:2]), "[batch, concepts]")
        known = (presence == 0) | (presence == 1)
        check_values(
            (known | (presence == -1)).all(), lambda: f"{name} must hold -1, 0 and 1 alone"
        )
        wide = logits.to(accumulate_dtype(logits.dtype)).flatten(0, 1)
        target = presence.where(known, 0).long().flatten()
        losses = F.cross_entropy(wide, target, reduction="none").view(presence.shape)
        return reduce_entries(losses, "mean", valid=known, group=self.process_group)

    def _contrast(
        self, features: Tensor, bank: Tensor, table: Tensor, presence: Tensor, seed: Tensor
    ) -> Tensor:
        return prototype_contrastive_loss(
            features,
            bank,
            table,
            present=presence == 1,
            num_negatives=self.num_negatives,
            temperature=self.temperature,
            normalize=self.normalize,
            exclude_unknown=self.exclude_unknown,
            seed=seed,
            process_group=self.process_group,
        )
