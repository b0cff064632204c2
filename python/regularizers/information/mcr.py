"""Modalities that compete for influence on a prediction, with contrast and a bottleneck."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_labels,
    check_not_negative,
    check_one_of,
    check_positive,
    check_tensor,
)
from regularizers._shared.directions import unit
from regularizers._shared.distributed import gather_batch, gather_rows
from regularizers._shared.reductions import REDUCTIONS, Reduction, reduce_rows
from regularizers.ops._operator import accumulate_dtype, full_precision
from regularizers.ops.pairwise import OtherLabel, pairwise_logsumexp

Kind = Literal["random", "different_index", "different_label", "same_label", "all_different_label"]
KINDS = ("random", "different_index", "different_label", "same_label", "all_different_label")
Strategy = Literal["greedy", "independent", "collaborative"]
STRATEGIES = ("greedy", "independent", "collaborative")
Permutation = tuple[Tensor, Tensor]


def jensen_shannon(p_logits: Tensor, q_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Compute the Jensen-Shannon divergence between distributions given by logits, in nats.

    .. math::
        \mathrm{JSD} = \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \qquad
        m = \tfrac12 (p + q)

    Unlike KL it is bounded, by log 2.

    Args:
        p_logits: ``[B, C]``, floating point, C at least 2.
        q_logits: of the same shape.
        reduction: over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        In [0, log 2], with no dimensions, or ``[B]``; float32 for half types.

    Raises:
        TypeError: logits are not floating point.
        ValueError: shapes differ or have no two classes, or ``reduction`` is unknown.

    Example:
        >>> p, q = torch.tensor([[30.0, -30.0]]), torch.tensor([[-30.0, 30.0]])
        >>> jensen_shannon(p, q)
        tensor(0.6931)

    Source:
        K. Kontras et al., "Balancing Multimodal Training Through Game-Theoretic Regularization",
        2024, arXiv 2411.07335, authors' code read.
    """
    _check_logits("p_logits", p_logits)
    _check_logits("q_logits", q_logits)
    check_one_of("reduction", reduction, REDUCTIONS)
    if p_logits.shape != q_logits.shape:
        raise ValueError(
            f"q_logits must have the shape of p_logits, {list(p_logits.shape)}, "
            f"got {list(q_logits.shape)}"
        )
    dtype = accumulate_dtype(torch.promote_types(p_logits.dtype, q_logits.dtype))
    # Probabilities below e^-10^4 are 0 either way, and 0 times a finite number is 0.
    log_p, log_q = (F.log_softmax(x.to(dtype), 1).clamp_min(-1e4) for x in (p_logits, q_logits))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return reduce_rows(0.5 * terms.sum(1), reduction)


def latent_permutations(
    labels: Tensor,
    *,
    num_samples: int = 1,
    kind: Kind = "random",
    generator: torch.Generator | None = None,
) -> list[Permutation]:
    r"""Draw which sample's latent goes in the place of which.

    .. math:: z_m[\mathrm{keep}] \leftarrow z_m[\mathrm{shuffle}]

    ``"random"`` permutes the batch, ``"different_index"`` cyclically, so that nothing stays,
    ``"different_label"`` gives every sample a partner of another label, ``"same_label"`` another
    sample of its label (samples alone with theirs are left out), and ``"all_different_label"``
    takes all ordered pairs of different labels once.

    Args:
        labels: ``[B]``, integers, B at least 2.
        num_samples: how many draws, at least 1.
        kind: of the draw.
        generator: generator of the device of ``labels``.

    Returns:
        ``num_samples`` pairs (shuffle, keep) of int64 indices of one length; one pair for
        ``"all_different_label"``.

    Raises:
        TypeError: ``labels`` are not integers.
        ValueError: an option is out of range, or fewer than 2 samples have a partner.

    Example:
        >>> labels = torch.tensor([0, 0, 1])
        >>> [(shuffle, keep)] = latent_permutations(labels, kind="different_label")
        >>> bool((labels[shuffle] != labels[keep]).all())
        True

    Source:
        K. Kontras et al., 2024, arXiv 2411.07335, authors' code read. There labels decide after a
        random permutation, which is drawn again until two samples are left.
    """
    check_tensor("labels", labels)
    check_labels("labels", labels, labels.shape[0] if labels.dim() else 0)
    check_at_least("num_samples", num_samples, 1)
    check_one_of("kind", kind, KINDS)
    if labels.shape[0] < 2:
        raise ValueError(f"labels must hold 2 samples or more, got {labels.shape[0]}")
    if kind == "all_different_label":
        keep, shuffle = (labels[:, None] != labels).nonzero(as_tuple=True)
        _check_partners(len(keep), kind)
        return [(shuffle, keep)]
    return [_permutation(labels, kind, generator) for _ in range(num_samples)]


def _permutation(labels: Tensor, kind: Kind, generator: torch.Generator | None) -> Permutation:
    count, device = labels.shape[0], labels.device
    keep = torch.arange(count, device=device)
    if kind in ("random", "different_index"):
        shuffle = torch.randperm(count, generator=generator, device=device)
        if kind == "different_index":
            shuffle = torch.empty_like(shuffle).scatter_(0, shuffle, shuffle.roll(1))
        return shuffle, keep
    same = labels[:, None] == labels
    allowed = ~same if kind == "different_label" else same & (keep[:, None] != keep)
    draw = torch.rand(count, count, generator=generator, device=device)
    shuffle = draw.masked_fill(~allowed, -1).argmax(1)
    keep = allowed.any(1).nonzero()[:, 0]
    _check_partners(len(keep), kind)
    return shuffle[keep], keep


def _check_partners(count: int, kind: str) -> None:
    if count < 2:
        raise ValueError(f"labels must give 2 samples a partner ({kind!r}), got {count}")


def nt_xent(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.5,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Contrast each pair of samples of one label with the samples of other labels.

    .. math::
        L = \operatorname{mean}_{(i, p)} - \log \frac{e^{s_{ip} / T}}
        {e^{s_{ip} / T} + \sum_{n:\, y_n \ne y_i} e^{s_{in} / T}}, \qquad
        s_{ij} = \cos(z_i, z_j)

    over all ordered pairs of two samples with one label. The other positives of i are not in the
    denominator. With one label a sample, shared by its modalities, this is the unsupervised form;
    with two modalities it is SimCLR's loss, as libraries have it under this name.
    Every pair has a loss of its own, so ``[N, N]`` losses are held at once.

    Args:
        z: ``[N, D]``, floating point; features of all modalities, one after the other.
        labels: ``[N]``, integers.
        temperature: T, above 0.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size.

    Returns:
        With no dimensions; 0 with a graph where no two samples share a label; float32 for half
        types.

    Raises:
        TypeError: ``z`` is not floating point, or ``labels`` are not integers.
        ValueError: a shape does not fit, or ``temperature`` is not above 0.

    Example:
        >>> z = torch.eye(2).repeat(2, 1)
        >>> nt_xent(z, torch.tensor([0, 1, 0, 1]))
        tensor(0.2395)

    Source:
        K. Kontras et al., 2024, arXiv 2411.07335, authors' code read.
    """
    check_floating("z", z)
    check_positive("temperature", temperature)
    if z.dim() != 2:
        raise ValueError(f"z must have shape [N, D], got {list(z.shape)}")
    check_labels("labels", labels, z.shape[0])
    rows = gather_batch(z.to(accumulate_dtype(z.dtype)), process_group)
    labels = gather_rows(labels, process_group)
    rows = unit(rows)
    away = pairwise_logsumexp(rows, scale=1 / temperature, pairs=OtherLabel(labels)).logsumexp
    with full_precision(rows.device):
        scores = rows @ rows.T / temperature
    index = torch.arange(len(rows), device=rows.device)
    positive = (labels[:, None] == labels) & (index[:, None] != index)
    # log(1 + e^(away - s)); without negatives away is -inf, and the loss and its gradient are 0.
    losses = F.softplus(away[:, None] - scores)
    return torch.where(positive, losses, 0 * scores).sum() / positive.sum().clamp_min(1)


class MCROutput(NamedTuple):
    """What :class:`MCR` gives.

    Attributes:
        total: to add to the loss of the task, with no dimensions.
        influence: Jensen-Shannon divergence that permuting each modality causes, ``[M]``, in
            nats, without gradient. The quantity to log: the game's own value says nothing.
        contrast: with no dimensions, without its weight; 0 where that is 0.
        bottleneck: likewise.

    Example:
        >>> z = [torch.randn(4, 3), torch.randn(4, 3)]
        >>> MCR(sum)(z, sum(z)).influence.shape
        torch.Size([2])
    """

    total: Tensor
    influence: Tensor
    contrast: Tensor
    bottleneck: Tensor


class MCR(nn.Module):
    r"""Let modalities compete for influence on the prediction that they share.

    .. math::
        D_m = \mathrm{JSD}\big(\mathrm{fusion}(z \text{ with } z_m \text{ permuted}),
        \mathrm{fusion}(z)\big)

    and the gradient of a modality's latent :math:`z_k` under the rule of the game is that of

    ================= =====================================================
    ``greedy``        :math:`-D_k + \frac{1}{M - 1} \sum_{m \ne k} D_m`
    ``independent``   :math:`-D_k`
    ``collaborative`` :math:`-\sum_m D_m`
    ================= =====================================================

    times ``weight``. In the greedy game each modality raises its own influence and lowers the
    others'; its *value* is 0 whatever happens, and what is shared inside ``fusion`` gets a gradient
    of 0: only the latents play. A projection of each modality that is to take part belongs in
    front of the ``features``, one inside ``fusion`` gets nothing. To this come, each with its
    weight, :func:`nt_xent` on all latents, and the bottleneck

    .. math:: \operatorname{mean} \big( [z_1, \dots, z_M] - g(\mathrm{sg}(\mathrm{logits}))
        \big)^2, \qquad g = W_2 \operatorname{relu}(W_1 \cdot)

    which bounds what latents hold beyond the prediction; g is trained with the model.

    ``fusion`` runs once more a modality, and in the greedy game twice. Dropout inside it draws
    other masks every time, and then what is shared gets 0 on average only.

    Args:
        fusion: latents to logits, ``Sequence[Tensor] -> [B, C]``. It belongs to the caller's
            model: it is not registered here, and not moved.
        weight: of the game, at least 0; at 0 influences are measured without a graph.
        strategy: ``"greedy"``, ``"independent"`` or ``"collaborative"``.
        num_samples: permutations a modality and step; concatenated.
        permutation: ``kind`` of :func:`latent_permutations`; every modality gets its own.
        contrast_weight: of the contrast, at least 0.
        temperature: of the contrast, above 0.
        contrast: positives are ``"label"``: samples of one label in any modality, or ``"pure"``:
            one sample's modalities.
        bottleneck_weight: of the bottleneck, at least 0; above 0 it needs the next two.
        feature_dims: D of each modality.
        num_classes: C.
        detach_reference: no gradient to ``logits``, also where the game would give them one.
        process_group: processes whose batches are one; the loss is that of the whole. Local
            batches must have one size; ``fusion`` sees all of them on every process.

    Shape:
        ``features``: M latents ``[B, D_m]`` (or ``[B, ...]`` where neither contrast nor bottleneck
        is on); ``logits`` ``[B, C]``, what ``fusion`` makes of them; ``labels`` ``[B]`` integers,
        or None where neither permutation nor contrast asks for them; to a :class:`MCROutput`,
        float32 for half types.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: there are fewer than 2 modalities, samples or classes, or something is out of
            range or does not fit.

    Example:
        >>> encoders = nn.ModuleList([nn.Linear(5, 8), nn.Linear(7, 8)])
        >>> head = nn.Linear(16, 3)
        >>> fusion = lambda latents: head(torch.cat(latents, 1))
        >>> game = MCR(fusion, weight=1.0, contrast_weight=0.1)
        >>> x, labels = [torch.randn(32, 5), torch.randn(32, 7)], torch.randint(3, (32,))
        >>> latents = [encoder(part) for encoder, part in zip(encoders, x)]
        >>> logits = fusion(latents)
        >>> (F.cross_entropy(logits, labels) + game(latents, logits, labels).total).backward()

    Source:
        K. Kontras et al., 2024, arXiv 2411.07335, authors' code read. There encoders run again
        for every permutation, in ``eval()``, and the greedy game has M^2 branches; here it takes
        2 M, with the same gradients. The division by M - 1 is this library's, and keeps the
        gradients of shared parameters at 0 for more than two modalities.
    """

    def __init__(
        self,
        fusion: Callable[[Sequence[Tensor]], Tensor],
        *,
        weight: float = 1.0,
        strategy: Strategy = "greedy",
        num_samples: int = 1,
        permutation: Kind = "random",
        contrast_weight: float = 0.0,
        temperature: float = 0.5,
        contrast: Literal["label", "pure"] = "label",
        bottleneck_weight: float = 0.0,
        feature_dims: Sequence[int] | None = None,
        num_classes: int | None = None,
        detach_reference: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not callable(fusion):
            raise TypeError(f"fusion must be callable, got {type(fusion).__name__}")
        for name, value in (
            ("weight", weight),
            ("contrast_weight", contrast_weight),
            ("bottleneck_weight", bottleneck_weight),
        ):
            check_not_negative(name, value)
        check_one_of("strategy", strategy, STRATEGIES)
        check_at_least("num_samples", num_samples, 1)
        check_one_of("permutation", permutation, KINDS)
        check_positive("temperature", temperature)
        check_one_of("contrast", contrast, ("label", "pure"))
        self._fusion = (fusion,)  # a tuple hides a module from the parameters of this one
        self.weight = weight
        self.strategy = strategy
        self.num_samples = num_samples
        self.permutation: Kind = permutation
        self.contrast_weight = contrast_weight
        self.temperature = temperature
        self.contrast = contrast
        self.bottleneck_weight = bottleneck_weight
        self.detach_reference = detach_reference
        self.process_group = process_group
        self.reconstruct: nn.Module | None = None
        if bottleneck_weight > 0:
            if feature_dims is None or num_classes is None:
                raise ValueError(
                    "feature_dims and num_classes must be given for a bottleneck, "
                    f"got {feature_dims} and {num_classes}"
                )
            check_at_least("feature_dims", min(feature_dims, default=0), 1)
            check_at_least("num_classes", num_classes, 2)
            self.reconstruct = nn.Sequential(
                nn.Linear(num_classes, max(feature_dims), bias=False),
                nn.ReLU(),
                nn.Linear(max(feature_dims), sum(feature_dims), bias=False),
            )

    def forward(
        self,
        features: Sequence[Tensor],
        logits: Tensor,
        labels: Tensor | None = None,
        *,
        permutations: Sequence[Permutation] | None = None,
        generator: torch.Generator | None = None,
    ) -> MCROutput:
        """Return the regularizer and its terms.

        Args:
            features: latents of the modalities.
            logits: what ``fusion`` makes of them.
            labels: of the samples.
            permutations: (shuffle, keep) for each modality, of the whole batch; drawn when omitted.
            generator: to draw with, of the device of the latents.
        """
        self._check(features, logits, labels)
        group = self.process_group
        latents = [gather_batch(z.flatten(1), group).unflatten(1, z.shape[1:]) for z in features]
        logits = gather_batch(logits, group)
        labels = None if labels is None else gather_rows(labels, group)
        if permutations is None:
            permutations = self._draw(latents, labels, generator)
        elif len(permutations) != len(latents):
            raise ValueError(
                f"permutations must have {len(latents)} entries, got {len(permutations)}"
            )
        game, influence = self._game(latents, logits, permutations)
        contrast = bottleneck = game.new_zeros(())
        total = self.weight * game
        if self.contrast_weight > 0:
            contrast = self._contrast(latents, labels)
            total = total + self.contrast_weight * contrast
        if self.reconstruct is not None:
            found = self.reconstruct(logits.detach())
            dtype = accumulate_dtype(found.dtype)
            bottleneck = F.mse_loss(torch.cat(latents, 1).to(dtype), found.to(dtype))
            total = total + self.bottleneck_weight * bottleneck
        return MCROutput(total, influence, contrast, bottleneck)

    def _draw(
        self, latents: Sequence[Tensor], labels: Tensor | None, generator: torch.Generator | None
    ) -> list[Permutation]:
        """Return a permutation for every modality, the same on all processes."""
        batch = latents[0]
        known = torch.arange(len(batch), device=batch.device) if labels is None else labels
        drawn = []
        for _ in latents:
            parts = latent_permutations(
                known, num_samples=self.num_samples, kind=self.permutation, generator=generator
            )
            columns = (torch.cat(column) for column in zip(*parts, strict=True))
            # The first process decides.
            shuffle, keep = (gather_rows(x, self.process_group)[: len(x)] for x in columns)
            drawn.append((shuffle, keep))
        return drawn

    def _game(
        self, latents: Sequence[Tensor], logits: Tensor, permutations: Sequence[Permutation]
    ) -> tuple[Tensor, Tensor]:
        """Return the value of the game, whose gradients are those of the table, and influences."""
        count = len(latents)
        greedy = self.strategy == "greedy"
        # In the greedy game the gradients of the reference cancel.
        detached = greedy or self.detach_reference or self.weight == 0
        reference = logits.detach() if detached else logits
        own, other = {
            "greedy": (-1.0, 1 / (count - 1)),
            "independent": (1.0, 0.0),
            "collaborative": (1.0, 1.0),
        }[self.strategy]
        game = reference.new_zeros((), dtype=accumulate_dtype(reference.dtype))
        influences = []
        for m, permutation in enumerate(permutations):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight > 0):
                factors = [own if k == m else other for k in range(count)]
                found = self._influence(latents, reference, m, permutation, factors)
                if greedy:
                    # The same number: it takes the value, and the gradient of what is shared.
                    game = game + found
                    game = game - self._influence(latents, reference, m, permutation, [0.0] * count)
                else:
                    game = game - found
            influences.append(found.detach())
        return game, torch.stack(influences)

    def _influence(
        self,
        latents: Sequence[Tensor],
        reference: Tensor,
        m: int,
        permutation: Permutation,
        factors: Sequence[float],
    ) -> Tensor:
        """Return D_m; the gradients that it gives to the latents are multiplied by factors."""
        shuffle, keep = permutation
        mixed = [
            _scale_gradient(z, factor)[shuffle if k == m else keep]
            for k, (z, factor) in enumerate(zip(latents, factors, strict=True))
        ]
        return jensen_shannon(self._fusion[0](mixed), reference[keep])

    def _contrast(self, latents: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        stacked = torch.cat([z.to(accumulate_dtype(z.dtype)) for z in latents])
        if self.contrast == "pure" or labels is None:
            labels = torch.arange(len(latents[0]), device=stacked.device)
        return nt_xent(stacked, labels.repeat(len(latents)), temperature=self.temperature)

    def _check(self, features: Sequence[Tensor], logits: Tensor, labels: Tensor | None) -> None:
        if len(features) < 2:
            raise ValueError(f"features must have 2 modalities or more, got {len(features)}")
        _check_logits("logits", logits)
        batch = logits.shape[0]
        if batch < 2:
            raise ValueError(f"logits must have 2 samples or more, got {batch}")
        for z in features:
            check_floating("features", z)
            if z.dim() < 2 or z.shape[0] != batch:
                raise ValueError(f"features must have shape [{batch}, ...], got {list(z.shape)}")
        flat = self.contrast_weight > 0 or self.reconstruct is not None
        if flat and any(z.dim() != 2 for z in features):
            raise ValueError("features must have shape [B, D] for a contrast or a bottleneck")
        widths = [z.shape[1] for z in features]
        if self.contrast_weight > 0 and len(set(widths)) > 1:
            raise ValueError(f"features must have one width for a contrast, got {widths}")
        by_label = self.contrast_weight > 0 and self.contrast == "label"
        if labels is not None:
            check_labels("labels", labels, batch)
        elif by_label or self.permutation not in ("random", "different_index"):
            raise ValueError("labels must be given for this permutation or contrast, got None")

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"weight={self.weight:g}, strategy={self.strategy!r}, num_samples={self.num_samples}, "
            f"permutation={self.permutation!r}, contrast_weight={self.contrast_weight:g}, "
            f"bottleneck_weight={self.bottleneck_weight:g}"
        )


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, with its gradient multiplied by a factor."""
    if factor == 1:
        return x
    constant = x.detach()
    return constant if factor == 0 else constant + factor * (x - constant)


def _check_logits(name: str, logits: Tensor) -> None:
    check_floating(name, logits)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"{name} must have shape [B, C >= 2], got {list(logits.shape)}")
