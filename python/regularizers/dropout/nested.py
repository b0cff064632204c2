"""Nested dropout of features against label noise, its search for k, and nested co-teaching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_not_negative,
    check_one_of,
    check_tensor,
)
from regularizers._shared.prefix import check_prefix_length
from regularizers.dropout.prefix import PrefixDistribution, prefix_mask
from regularizers.robustness.co_teaching import small_loss_select


def nested_dropout(x: Tensor, k: int | Tensor, *, dim: int = -1) -> Tensor:
    r"""Keep the first ``k`` features, zero the others.

    .. math:: \tilde x_d = x_d\, 1[d < k]

    Nothing is rescaled, and the order of the features matters: that is the point. Behind it stands
    a linear classifier with its bias; where that is all, :func:`regularizers.ops.prefix_linear`
    does both with a smaller product.

    Args:
        x: features, ``num_features`` of them along ``dim``.
        k: how many to keep, in [1, num_features]: an int, or an int64 tensor over leading
            dimensions of ``x``.
        dim: the dimension of the features.

    Returns:
        The shape of ``x``; ``x`` itself where k is an int and keeps everything.

    Raises:
        TypeError: as :func:`regularizers.dropout.prefix_mask`.
        ValueError: likewise.

    Example:
        >>> nested_dropout(torch.ones(2, 4), 3)
        tensor([[1., 1., 1., 0.],
                [1., 1., 1., 0.]])

    Source:
        "Compressing Features for Learning with Noisy Labels", 2022, arXiv 2206.13140; formula from
        the authors' code.
    """
    return prefix_mask(x, k, dim)


class NestedDropout(nn.Module):
    r"""Keep a random prefix of the features in training, the best prefix in evaluation.

    .. math::
        \tilde x_d = x_d\, 1[d < k], \qquad
        P(k = i) \propto \exp\!\big(-((i - \mathrm{mean}) / \mathrm{std})^2\big),
        \quad i = 1, \dots, N

    One k for the mini-batch, as in the authors' code. There is no factor 1/2 in the exponent and no
    rescaling. In ``eval()`` the first ``k_eval`` features stay; find that length on validation data
    with :func:`regularizers.ops.prefix_accuracy` and :func:`select_prefix`, and assign it.

    Args:
        num_features: N, the size of ``dim``.
        distribution: ``"gaussian"``, ``"uniform"`` on 1, ..., N, or a law of N lengths.
        mean: of the Gaussian law.
        std: of the Gaussian law, above 0; 10 for CIFAR-10 with 512 features, 100 for CIFAR-100 and
            Clothing1M.
        per_sample: draw a k for each index of the first dimension (not in the paper).
        dim: the dimension of the features.

    Shape:
        Any shape with N along ``dim``, to the same.

    Attributes:
        k_eval: int64 tensor with no dimensions, N at first, saved in the state dict; assign an int.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the law has another number of lengths than N;
            in a call, ``dim`` of the input has another size.

    Example:
        >>> layer = NestedDropout(512, std=10.0)
        >>> features = torch.randn(32, 512)
        >>> kept = (layer(features) != 0).any(0).sum()  # one prefix for the batch
        >>> layer.k_eval = 12
        >>> int((layer.eval()(features) != 0).any(0).sum())
        12

    Source:
        "Compressing Features for Learning with Noisy Labels", 2022, arXiv 2206.13140; law, one k a
        batch and defaults from the authors' code. ``per_sample`` and other laws are extensions.
    """

    k_eval: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        distribution: Literal["gaussian", "uniform"] | PrefixDistribution = "gaussian",
        mean: float = 0.0,
        std: float = 10.0,
        per_sample: bool = False,
        dim: int = -1,
    ) -> None:
        super().__init__()
        check_at_least("num_features", num_features, 1)
        if isinstance(distribution, PrefixDistribution):
            if distribution.num_features != num_features:
                raise ValueError(
                    f"distribution must have num_features = {num_features} lengths, "
                    f"got {distribution.num_features}"
                )
        else:
            check_one_of("distribution", distribution, ("gaussian", "uniform"))
            distribution = (
                PrefixDistribution.gaussian(num_features, mean, std)
                if distribution == "gaussian"
                else PrefixDistribution.uniform(1, num_features)
            )
        self.num_features = num_features
        self.distribution = distribution
        self.per_sample = per_sample
        self.dim = dim
        self.register_buffer("k_eval", torch.tensor(num_features))

    def __setattr__(self, name: str, value: Any) -> None:
        """Write an assigned ``k_eval`` into its tensor, so that a compiled model sees it."""
        if name == "k_eval" and name in self.__dict__.get("_buffers", {}):
            k = int(value) if isinstance(value, Tensor) else value
            check_prefix_length(k, self.num_features)
            self.k_eval.fill_(k)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        x: Tensor,
        *,
        k: int | Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return ``x`` with a prefix kept: of length ``k`` if given, else drawn or ``k_eval``."""
        check_tensor("x", x)
        if x.dim() == 0 or x.shape[self.dim] != self.num_features:
            raise ValueError(
                f"x must have {self.num_features} features along dimension {self.dim}, "
                f"got shape {list(x.shape)}"
            )
        if k is None:
            k = self.draw(x, seed=seed, generator=generator) if self.training else self.k_eval
        return prefix_mask(x, k, self.dim)

    def draw(
        self,
        x: Tensor,
        *,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw the length for a batch: int64 with no dimensions, or ``[B]`` with per_sample."""
        shape = x.shape[:1] if self.per_sample else ()
        return self.distribution.sample(shape, seed=seed, generator=generator)

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return (
            f"num_features={self.num_features}, k_eval={self.k_eval.item()}, "
            f"per_sample={self.per_sample}, dim={self.dim}"
        )


def select_prefix(correct: Tensor, total: int, *, penalty: float = 1e-5) -> tuple[int, float]:
    r"""Choose the prefix with the best accuracy, the shorter one of two that are level.

    .. math:: k^* = \operatorname{argmax}_k\ a_k - \mathrm{penalty}\,(k - 1), \qquad
        a_k = \mathrm{correct}_k / \mathrm{total}

    Args:
        correct: ``[D]``, right answers with the first k features, as
            :func:`regularizers.ops.prefix_accuracy` counts them (sums over batches are fine).
        total: number of samples.
        penalty: accuracy that a further feature has to bring; not negative.

    Returns:
        The length k* and its plain accuracy; the penalty only chooses.

    Raises:
        TypeError: ``correct`` is not a tensor, or ``total`` not an int.
        ValueError: ``correct`` is not of shape ``[D >= 1]`` or exceeds ``total``, or ``penalty`` is
            negative.

    Example:
        >>> select_prefix(torch.tensor([70, 90, 90, 80]), 100)
        (2, 0.9)

    Source:
        arXiv 2206.13140; penalty from the authors' code.
    """
    check_tensor("correct", correct)
    if correct.dim() != 1 or correct.numel() == 0:
        raise ValueError(f"correct must have shape [D >= 1], got {list(correct.shape)}")
    check_at_least("total", total, 1)
    check_not_negative("penalty", penalty)
    accuracy = correct.detach().to("cpu", torch.float64) / total
    if not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
        raise ValueError(f"correct must lie in [0, total = {total}]")
    score = accuracy - penalty * torch.arange(accuracy.numel(), dtype=torch.float64)
    best = int((score == score.max()).nonzero()[0])
    return best + 1, accuracy[best].item()


class CoTeachingStep(NamedTuple):
    """What :func:`nested_co_teaching_step` returns.

    ``loss_a`` and ``loss_b`` have no dimensions; ``index_a`` and ``index_b`` are the rows of the
    batch on which net A and net B were trained: those that the other net picked.

    Example:
        >>> CoTeachingStep._fields
        ('loss_a', 'loss_b', 'index_a', 'index_b')
    """

    loss_a: Tensor
    loss_b: Tensor
    index_a: Tensor
    index_b: Tensor


def nested_co_teaching_step(
    net_a: nn.Module,
    net_b: nn.Module,
    head_a: nn.Module,
    head_b: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    forget_rate: float = 0.2,
    dropout_a: nn.Module,
    dropout_b: nn.Module,
    exchange: Literal["split", "shared"] = "split",
    fallback_full: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> CoTeachingStep:
    r"""Let two networks teach each other on the samples of small loss, under feature compression.

    .. math::
        S_A = \text{the } \lfloor (1 - \tau) n_A \rfloor \text{ smallest } \mathrm{CE}_A, \qquad
        L_B = \frac{1}{|S_A|} \sum_{i \in S_A} \mathrm{CE}_B(x_i, y_i)

    and the other way round. Each net ranks in evaluation mode (nested dropout: the prefix
    ``k_eval``) and without a gradient; then each is trained on the other's picks, both with one
    shared random k, in whatever mode the modules are in. Batch norms that the caller has put into
    ``eval()`` stay frozen, as in the paper's second stage.

    Args:
        net_a: from inputs to features ``[B, D]``.
        net_b: likewise.
        head_a: from features to logits ``[B, C]``.
        head_b: likewise.
        x: inputs ``[B, *]``.
        y: int64 targets ``[B]``, some of them wrong.
        forget_rate: fraction :math:`\tau` left out, in [0, 1); 0.2 for CIFAR, 0.3 for Clothing1M.
            See :func:`regularizers.robustness.forget_rate_schedule`.
        dropout_a: between net and head: a :class:`NestedDropout`, or a plain dropout, the paper's
            other compressor (0.3 for CIFAR-10 and Clothing1M, 0.7 for CIFAR-100).
        dropout_b: likewise.
        exchange: ``"split"``, as in the authors' code: net A ranks the first half of the batch and
            net B the second (an odd batch gives A one more; the code drops it). ``"shared"``:
            classical co-teaching, both rank the whole batch.
        fallback_full: rank with all features where ``k_eval`` is 1, which the authors' code takes
            for a failed search.
        seed: of the shared k; drawn from the default generator when omitted.
        generator: generator to draw the seed from.

    Returns:
        ``(loss_a, loss_b, index_a, index_b)``. Step both optimizers on ``loss_a + loss_b``. For
        inference average the logits of both nets at one k.

    Raises:
        ValueError: an argument is out of range, only one dropout is nested or their widths differ,
            or a half is so small that nothing would be selected.

    Example:
        >>> nets = [nn.Linear(4, 8) for _ in range(2)]
        >>> heads = [nn.Linear(8, 3) for _ in range(2)]
        >>> dropouts = [NestedDropout(8, std=4.0) for _ in range(2)]
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> step = nested_co_teaching_step(
        ...     *nets, *heads, x, y, dropout_a=dropouts[0], dropout_b=dropouts[1])
        >>> (step.loss_a + step.loss_b).backward()
        >>> len(step.index_a), bool((step.index_a >= 10).all())
        (8, True)

    Source:
        arXiv 2206.13140, after the authors' ``co_teaching_resnet`` code, with the count of
        ``small_loss_select`` and the odd sample as said above.
    """
    check_one_of("exchange", exchange, ("split", "shared"))
    _check_dropouts(dropout_a, dropout_b)
    check_tensor("x", x)
    rows = torch.arange(x.shape[0], device=x.device)
    half = (x.shape[0] + 1) // 2
    rows_a, rows_b = (rows[:half], rows[half:]) if exchange == "split" else (rows, rows)
    picks = []
    for (net, dropout, head), own in (
        ((net_a, dropout_a, head_a), rows_a),
        ((net_b, dropout_b, head_b), rows_b),
    ):
        ranks = _ranking_losses(net, dropout, head, x[own], y[own], fallback_full)
        picks.append(own[small_loss_select(ranks, forget_rate)])
    index_b, index_a = picks  # each net gets what the other picked
    k = None
    if isinstance(dropout_a, NestedDropout):
        k = dropout_a.distribution.sample(seed=seed, generator=generator)
    losses = [
        F.cross_entropy(head(_compress(dropout, net(x[index]), k)), y[index])
        for net, dropout, head, index in (
            (net_a, dropout_a, head_a, index_a),
            (net_b, dropout_b, head_b, index_b),
        )
    ]
    return CoTeachingStep(losses[0], losses[1], index_a, index_b)


def _check_dropouts(dropout_a: nn.Module, dropout_b: nn.Module) -> None:
    if isinstance(dropout_a, NestedDropout) != isinstance(dropout_b, NestedDropout):
        raise ValueError("dropout_b must be nested if and only if dropout_a is")
    widths = [d.num_features for d in (dropout_a, dropout_b) if isinstance(d, NestedDropout)]
    if len(set(widths)) > 1:
        raise ValueError(
            f"dropout_b must have the {widths[0]} features of dropout_a, got {widths[1]}"
        )


def _compress(dropout: nn.Module, features: Tensor, k: Tensor | int | None) -> Tensor:
    result: Tensor = dropout(features) if k is None else dropout(features, k=k)
    return result


def _ranking_losses(
    net: nn.Module, dropout: nn.Module, head: nn.Module, x: Tensor, y: Tensor, fallback_full: bool
) -> Tensor:
    k = None
    if fallback_full and isinstance(dropout, NestedDropout) and int(dropout.k_eval) == 1:
        k = dropout.num_features
    with torch.no_grad(), _evaluating(net, dropout, head):
        return F.cross_entropy(head(_compress(dropout, net(x), k)), y, reduction="none")


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode and afterwards each part back into the mode it was in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
