"""AdaMixUp: mixing intervals learned for each pair, kept out of the data by a discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_module,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_tensor,
)
from regularizers.mixing.functional import (
    check_labelled_batch,
    drawing,
    mix,
    mixed_cross_entropy,
    moved,
)

GateNoise = Literal["truncated_normal", "none"]
GATE_NOISES = ("truncated_normal", "none")
MIXED, REAL = 0, 1  # classes of the discriminator


class PolicyRegion(nn.Module):
    r"""Name for each pair of inputs the interval from which their mixing weight is drawn.

    .. math::
        (a, b, c) = \mathrm{softmax}(W_2 (W_1\, \phi(g))), \qquad
        g = \tfrac{1}{2} (m_1 \odot x_1 + m_2 \odot x_2), \qquad \lambda \in [a, a + b]

    with fresh noise :math:`m_1, m_2` of the inputs' shape: normal numbers cut off at 2 deviations,
    as in the authors' code. It tells the first input of a pair from the second. Without noise, or
    in ``eval()``, :math:`g = (x_1 + x_2) / 2`.

    Args:
        backbone: any module from a batch of inputs to features ``[B, feature_dim]`` (further
            dimensions are flattened); not that of the classifier.
        feature_dim: number of features.
        hidden: width between the two linear layers.
        activation: a module between them; None, as in the authors' code, for nothing.
        gate_noise: ``"truncated_normal"`` or ``"none"``.

    Shape:
        Two ``[B, *]`` to ``start`` a and ``width`` b, ``[B]`` each, with a, b >= 0, a + b <= 1.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the two inputs have different shapes.

    Example:
        >>> policy = PolicyRegion(nn.Linear(16, 32), feature_dim=32)
        >>> start, width = policy(torch.randn(8, 16), torch.randn(8, 16))
        >>> bool((start + width <= 1).all())
        True

    Source:
        H. Guo, Y. Mao, R. Zhang, "MixUp as Locally Linear Out-Of-Manifold Regularization", 2018,
        arXiv 1809.02499; from the authors' code (two-fold mixing; the three-fold regions of the
        paper are not in it).
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        hidden: int = 100,
        *,
        activation: nn.Module | None = None,
        gate_noise: GateNoise = "truncated_normal",
    ) -> None:
        super().__init__()
        check_module("backbone", backbone)
        check_at_least("feature_dim", feature_dim, 1)
        check_at_least("hidden", hidden, 1)
        check_one_of("gate_noise", gate_noise, GATE_NOISES)
        if activation is not None:
            check_module("activation", activation)
        self.backbone = backbone
        middle = [] if activation is None else [activation]
        self.head = nn.Sequential(nn.Linear(feature_dim, hidden), *middle, nn.Linear(hidden, 3))
        self.gate_noise: GateNoise = gate_noise

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Return start and width of the interval of each pair."""
        check_floating("x1", x1)
        check_floating("x2", x2)
        if x1.shape != x2.shape:
            raise ValueError(f"x2 must have the shape of x1 {list(x1.shape)}, got {list(x2.shape)}")
        logits: Tensor = self.head(self.backbone(self._gate(x1, x2)).flatten(1))
        start, width, _ = logits.softmax(-1).unbind(-1)
        return start, width

    def _gate(self, x1: Tensor, x2: Tensor) -> Tensor:
        if self.gate_noise == "none" or not self.training:
            return (x1 + x2) / 2
        first, second = (_truncated_normal_like(x) * x for x in (x1, x2))
        return (first + second) / 2


def _truncated_normal_like(x: Tensor) -> Tensor:
    """Draw normal numbers on the condition that they lie in [-2, 2], by inversion."""
    u = torch.rand(x.shape, device=x.device) * 2 - 1
    normal: Tensor = torch.erfinv(u * math.erf(2**0.5)) * 2**0.5
    return normal.clamp(-2, 2).to(x.dtype)


def sample_policy(
    start: Tensor, width: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw mixing weights from the intervals of a policy, differentiably.

    .. math:: \lambda = a + b u, \qquad u \sim \mathrm{U}(0, 1), \qquad
        \frac{\partial \lambda}{\partial a} = 1, \quad \frac{\partial \lambda}{\partial b} = u

    Args:
        start: a, ``[B]``.
        width: b, ``[B]``, with a, b >= 0 and a + b <= 1.
        generator: a generator on any device, as for :func:`sample_lambda`; None: PyTorch's default
            generator of the CPU.

    Returns:
        ``[B]``, in [0, 1]; every pair has a draw of its own.

    Raises:
        TypeError: ``start`` or ``width`` is not a floating-point tensor.
        ValueError: their shapes differ.

    Example:
        >>> lam = sample_policy(torch.tensor([0.0, 0.2]), torch.tensor([0.1, 0.0]))
        >>> bool(lam[0] <= 0.1), lam[1]
        (True, tensor(0.2000))

    Source:
        H. Guo et al., 2018, arXiv 1809.02499, from the authors' code.
    """
    check_floating("start", start)
    check_floating("width", width)
    check_shape("start", start, (None,), "[pairs]")
    if width.shape != start.shape:
        raise ValueError(f"width must have the shape of start, got {list(width.shape)}")
    u = torch.rand(start.shape, **drawing(generator))
    u = moved(u.to(start.dtype), start.device)
    return (start + width * u).clamp(max=1)  # a + b may round to more than 1


class AdaMixUpOutput(NamedTuple):
    """What :class:`AdaMixUp` computes in training.

    Args:
        loss: the sum of the next two.
        classification: mean cross-entropy on mixed and real rows.
        intrusion: mean cross-entropy of the discriminator.
        lam: ``[n]``, weights of the mixed pairs.

    Example:
        >>> policy = PolicyRegion(nn.Linear(4, 8), feature_dim=8)
        >>> model = AdaMixUp(nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2), policy)
        >>> found = model(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> found.lam.shape
        torch.Size([3])
    """

    loss: Tensor
    classification: Tensor
    intrusion: Tensor
    lam: Tensor


class AdaMixUp(nn.Module):
    r"""Train a classifier on mixes whose weights a policy learns, away from real data.

    A batch of 2n rows is halved into A and U. Each row of A gets a partner from the whole batch,
    and the policy names an interval for the pair:

    .. math::
        \tilde x = \lambda x_1 + (1 - \lambda) x_2, \quad \lambda = a + b u, \qquad
        L_{\mathrm{cls}} = \tfrac{1}{2n} \sum_{\tilde x, A} \mathrm{CE}, \qquad
        L_{\mathrm{int}} = \tfrac{1}{3n} \sum_{\tilde x, A, U}
        \mathrm{CE}(D(x), [x \text{ is real}])

    Classifier, discriminator and policy all minimise :math:`L = L_{\mathrm{cls}} +
    L_{\mathrm{int}}`; nothing is adversarial. The policy moves :math:`\lambda` to where mixes can
    be told from real data, so that they do not carry the wrong label where real data lie
    ("manifold intrusion"). Its gradient comes through the mixed input: :math:`\dot\lambda =
    \langle x_1 - x_2, \dot{\tilde x} \rangle`, found in the pass over memory that mixes gradients.

    By default the features of all 3n rows are computed in one pass. A batch norm then normalises
    mixed and real rows together. ``separate_passes=True`` gives the classifier's batch (mixed and
    A) and the discriminator's (mixed, A and U) a pass each, as in the authors' code, at 5/3 of the
    cost.

    In ``eval()`` the module is the classifier.

    Args:
        features: any module from ``[B, *]`` to what both heads take; shared by them.
        classifier: head to logits ``[B, C]``.
        intrusion_head: head to ``[B, 2]`` logits of "mixed" (0) and "real" (1), or ``[B, 1]`` of
            "real".
        policy: :class:`PolicyRegion`, or any module that takes two batches and returns (start,
            width).
        label_gradient: let the policy's gradient through the label weights too. The loss in the
            authors' code stops it there: False.
        separate_passes: see above.

    Shape:
        ``x`` ``[2n, *]`` and ``y`` ``[2n]`` int64 to an :class:`AdaMixUpOutput`. In ``eval()``:
        ``x`` ``[B, *]`` to logits ``[B, C]``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the batch is odd or empty, or ``y`` has another length.

    Example:
        >>> policy = PolicyRegion(nn.Linear(16, 32), feature_dim=32)
        >>> model = AdaMixUp(nn.Linear(16, 32), nn.Linear(32, 5), nn.Linear(32, 2), policy)
        >>> x, y = torch.randn(8, 16), torch.randint(5, (8,))
        >>> model(x, y).loss.backward()
        >>> model.eval()(x).shape
        torch.Size([8, 5])

    Source:
        H. Guo, Y. Mao, R. Zhang, 2018, arXiv 1809.02499; from the authors' code (``build_graph``):
        two-fold mixing, partners from the whole batch, coefficients 1 and 1. Training there: batch
        128, SGD 0.1 with momentum 0.9 for CIFAR, weight decay 1e-4.
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        intrusion_head: nn.Module,
        policy: nn.Module,
        *,
        label_gradient: bool = False,
        separate_passes: bool = False,
    ) -> None:
        super().__init__()
        check_module("features", features)
        check_module("classifier", classifier)
        check_module("intrusion_head", intrusion_head)
        check_module("policy", policy)
        self.features = features
        self.classifier = classifier
        self.intrusion_head = intrusion_head
        self.policy = policy
        self.label_gradient = label_gradient
        self.separate_passes = separate_passes

    def forward(self, x: Tensor, y: Tensor | None = None) -> AdaMixUpOutput | Tensor:
        """Return the loss and its parts in training, logits in ``eval()``."""
        if not self.training:
            logits: Tensor = self.classifier(self.features(x))
            return logits
        check_floating("x", x)
        if y is None:
            raise ValueError("y must be given in training, got None")
        check_labelled_batch(x, y, "x", "y")
        if x.shape[0] == 0 or x.shape[0] % 2 != 0:
            raise ValueError(f"x must have an even number of rows, at least 2, got {x.shape[0]}")
        n = x.shape[0] // 2
        partners = torch.randperm(2 * n, device=x.device)[:n]
        lam = sample_policy(*self.policy(x[:n], x[partners]))
        mixed = mix(x, partners, lam)
        z, real = self._heads(mixed, x)
        label_weight = lam if self.label_gradient else lam.detach()
        classification = (
            mixed_cross_entropy(z[:n], y[:n], y[partners], label_weight, reduction="sum")
            + F.cross_entropy(z[n:], y[:n], reduction="sum")
        ) / (2 * n)
        kinds = torch.full((3 * n,), REAL, device=x.device)
        kinds[:n] = MIXED
        intrusion = F.cross_entropy(real, kinds)
        return AdaMixUpOutput(classification + intrusion, classification, intrusion, lam)

    def _heads(self, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class logits of mixed and A [2n, C], and logits of being mixed or real [3n, 2]."""
        n = mixed.shape[0]
        everything = self.features(torch.cat([mixed, x]))
        labelled = (
            self.features(torch.cat([mixed, x[:n]]))
            if self.separate_passes
            else everything[: 2 * n]
        )
        real: Tensor = self.intrusion_head(everything)
        if real.shape[-1] == 1:
            real = F.pad(real, (1, 0))  # the logit of "mixed" is 0 then
        return self.classifier(labelled), real

    def extra_repr(self) -> str:
        """Describe the configuration."""
        return f"label_gradient={self.label_gradient}, separate_passes={self.separate_passes}"


def manifold_intrusion_rate(
    mixed_x: Tensor, mixed_hard_label: Tensor, data_x: Tensor, data_y: Tensor, radius: float
) -> float:
    r"""Measure how many mixes land on real data of another class.

    .. math:: \frac{1}{M} \bigl| \{ i : \min_j \|\tilde x_i - x_j\| \le r, \
        y_{j^*(i)} \ne \tilde y_i \} \bigr|

    where :math:`j^*(i)` is the real point nearest to mix i.

    Args:
        mixed_x: ``[M, *]``, the mixes.
        mixed_hard_label: ``[M]``, the label of the larger weight.
        data_x: ``[N, *]``, real points, in the space in which distances mean something.
        data_y: ``[N]``, their labels.
        radius: r, above 0: how near counts as landing on a point.

    Returns:
        The rate, in [0, 1]; NaN for no mixes.

    Raises:
        TypeError: points are not floating-point tensors.
        ValueError: lengths or shapes do not fit, there are no real points, or ``radius`` is not
            above 0.

    Example:
        >>> points, classes = torch.tensor([[0.0], [0.5], [1.0]]), torch.tensor([0, 1, 2])
        >>> mixes = torch.tensor([[0.2], [0.48], [0.7], [0.9]])
        >>> manifold_intrusion_rate(mixes, torch.tensor([0, 0, 2, 2]), points, classes, 0.1)
        0.25

    Source:
        H. Guo et al., 2018, arXiv 1809.02499, which names the effect; the measure is this
        library's.
    """
    check_floating("mixed_x", mixed_x)
    check_floating("data_x", data_x)
    check_positive("radius", radius)
    check_labelled_batch(mixed_x, mixed_hard_label, "mixed_x", "mixed_hard_label")
    check_labelled_batch(data_x, data_y, "data_x", "data_y")
    check_same_device("data_x", data_x, "mixed_x", mixed_x)
    if data_x.shape[0] == 0 or data_x.shape[1:] != mixed_x.shape[1:]:
        raise ValueError(
            f"data_x must hold at least one row of shape {list(mixed_x.shape[1:])}, "
            f"got {list(data_x.shape)}"
        )
    data = data_x.flatten(1) if data_x.dim() > 1 else data_x[:, None]
    intruders = 0
    chunk = max(1, (1 << 24) // data.shape[0])  # distances held at a time
    for rows, labels in zip(mixed_x.split(chunk), mixed_hard_label.split(chunk), strict=True):
        # Not by a matrix product: small distances would drown in its rounding.
        distances = torch.cdist(
            rows.reshape(-1, data.shape[1]), data, compute_mode="donot_use_mm_for_euclid_dist"
        )
        distance, nearest = distances.min(1)
        intruders += int(((distance <= radius) & (data_y[nearest] != labels)).sum())
    return intruders / mixed_x.shape[0] if mixed_x.shape[0] else float("nan")


def local_linearity_gap(
    model: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor, lam: float | Tensor
) -> Tensor:
    r"""Measure how far a model is from linear between pairs of inputs.

    .. math:: \| f(\lambda x_1 + (1 - \lambda) x_2) - \lambda f(x_1) - (1 - \lambda) f(x_2) \|

    Zero for an affine model; what MixUp drives down. The model runs once, on all three batches; put
    it in ``eval()`` if a layer computes statistics of the batch.

    Args:
        model: from ``[B, *]`` to ``[B, *out]``; any callable.
        x1: ``[B, *]``.
        x2: ``[B, *]``.
        lam: in [0, 1]: a number, or a tensor with no dimensions or ``[B]``.

    Returns:
        ``[B]``, differentiable.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes differ, or ``lam`` is outside [0, 1].

    Example:
        >>> gap = local_linearity_gap(nn.ReLU(), torch.tensor([[1.0]]), torch.tensor([[-1.0]]), 0.5)
        >>> gap
        tensor([0.5000])

    Source:
        H. Guo et al., 2018, arXiv 1809.02499, section on local linearity.
    """
    check_floating("x1", x1)
    check_tensor("x2", x2)
    if x1.shape != x2.shape:
        raise ValueError(f"x2 must have the shape of x1 {list(x1.shape)}, got {list(x2.shape)}")
    count = x1.shape[0]
    pairs = torch.cat([x1, x2])
    partners = torch.arange(count, 2 * count, device=x1.device)
    outputs = model(torch.cat([mix(pairs, partners, lam), pairs]))
    at_mix, at_ends = outputs[:count], outputs[count:]
    gap = (at_mix - mix(at_ends, partners, lam)).reshape(count, -1)
    norm: Tensor = torch.linalg.vector_norm(gap, dim=1)
    return norm
