"""A decision tree whose splits pay for what the released prediction reveals of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_not_negative,
    check_one_of,
    check_same_device,
    check_tensor,
)

Release = Literal["proba", "label"]
RELEASES = ("proba", "label")
# A split that gains no more than rounding is none: at lambda 1 a perfect split must go.
_LEAST_SCORE = 1e-12


class MIDTreeClassifier:
    r"""A decision tree that grows while a split tells more of the class than it costs.

    .. math::
        \text{score} = w \cdot IG - \lambda \left( H(\hat Y_{\text{after}}) - H(\hat Y) \right),
        \qquad I(X; \hat Y) = H(\hat Y)

    w is the mass of the node, IG the information gain of the split in nats. The released
    prediction is a function of the input, so what it reveals is its entropy. With
    ``release="proba"`` every leaf releases a vector of its own, and a split into shares p and
    1 - p raises the entropy by w h(p), h the binary entropy: lambda of 1 or more leaves the root
    alone. With ``release="label"`` only the majority label is released, and splits that change no
    label cost nothing. The best split of all leaves comes first, until no score is above 0.
    lambda = 0 gives an ordinary entropy tree (without splits of gain 0).

    Args:
        max_depth: longest path from the root, at least 1.
        lambda_mi: :math:`\lambda`, nats of gain asked for a nat revealed, at least 0.
        min_samples: samples that a leaf has at least, at least 1.
        release: what :meth:`predict_proba` releases: the ``"proba"`` of the leaf, or its
            ``"label"``, as a vector of zeros and a one.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> for lambda_mi in (0.9, 1.0):
        ...     tree = MIDTreeClassifier(max_depth=3, lambda_mi=lambda_mi).fit(x, y)
        ...     print(tree.num_leaves, f"{tree.leaf_information():.3f} nats")
        2 0.693 nats
        1 0.000 nats

    Source:
        T. Wang, Y. Zhang, R. Jia, "Improving Robustness to Model Inversion Attacks via Mutual
        Information Regularization", AAAI 2021, arXiv 2009.05241; the criterion is reconstructed
        from the abstract.
    """

    def __init__(
        self,
        *,
        max_depth: int,
        lambda_mi: float,
        min_samples: int = 1,
        release: Release = "proba",
    ) -> None:
        check_at_least("max_depth", max_depth, 1)
        check_not_negative("lambda_mi", lambda_mi)
        check_at_least("min_samples", min_samples, 1)
        check_one_of("release", release, RELEASES)
        self.max_depth = max_depth
        self.lambda_mi = lambda_mi
        self.min_samples = min_samples
        self.release: Release = release
        self._nodes: _Nodes | None = None

    def fit(self, x: Tensor, y: Tensor) -> MIDTreeClassifier:
        """Grow the tree on features ``[N, F]`` and integer classes ``[N]``; return it."""
        _check_features(x)
        check_tensor("y", y)
        if y.is_floating_point() or y.is_complex():
            raise TypeError(f"y must be integers, got {y.dtype}")
        if len(x) == 0 or y.shape != x.shape[:1]:
            raise ValueError(
                f"y must have shape [N >= 1] = {list(x.shape[:1])}, got {list(y.shape)}"
            )
        check_same_device("y", y, "x", x)
        classes, label = y.unique(return_inverse=True)
        self.classes: Tensor = classes
        self._nodes = self._grow(x.detach(), label, len(classes))
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Return the majority class of each sample's leaf, ``[N]``, the first of equal ones."""
        nodes = self._fitted()
        return self.classes[nodes.count[nodes.find(x)].argmax(1)]

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return what is released, ``[N, C]``, in the order of ``classes``, in the dtype of x."""
        nodes = self._fitted()
        count = nodes.count[nodes.find(x)]
        if self.release == "label":
            return F.one_hot(count.argmax(1), count.shape[1]).to(x.dtype)
        return (count / count.sum(1, keepdim=True)).to(x.dtype)

    def leaf_information(self) -> float:
        """Return the entropy of what is released over the training samples, in nats."""
        nodes = self._fitted()
        leaf = nodes.count[nodes.feature < 0]
        mass = leaf.sum(1)
        if self.release == "label":
            mass = torch.zeros_like(leaf[0]).index_add(0, leaf.argmax(1), mass)
        return float(_entropy(mass))

    @property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return int((self._fitted().feature < 0).sum())

    def _fitted(self) -> _Nodes:
        if self._nodes is None:
            raise RuntimeError("the tree must be fitted first")
        return self._nodes

    def _grow(self, x: Tensor, label: Tensor, classes: int) -> _Nodes:
        samples = len(x)
        every = torch.arange(samples, device=x.device)
        nodes = _Nodes(x, F.one_hot(label, classes).sum(0).double())
        leaves = [_Leaf(0, 0, every, self._splits(x, label, classes, every, 0))]
        while True:
            released = nodes.released_counts()
            scored = [self._best(leaf, released, samples, nodes) for leaf in leaves]
            place = max(range(len(leaves)), key=lambda i: scored[i][0])
            score, which = scored[place]
            if score <= _LEAST_SCORE:
                return nodes
            leaf = leaves.pop(place)
            assert leaf.splits is not None
            feature, threshold = leaf.splits.feature[which], leaf.splits.threshold[which]
            children = nodes.split(
                leaf.node, feature, threshold, leaf.splits.left[which], leaf.splits.right[which]
            )
            goes_left = x[leaf.rows, feature] <= threshold
            for node, rows in zip(
                children, (leaf.rows[goes_left], leaf.rows[~goes_left]), strict=True
            ):
                splits = self._splits(x, label, classes, rows, leaf.depth + 1)
                leaves.append(_Leaf(node, leaf.depth + 1, rows, splits))

    def _splits(
        self, x: Tensor, label: Tensor, classes: int, rows: Tensor, depth: int
    ) -> _Splits | None:
        """Return all splits of a node, or None where there are none."""
        if depth == self.max_depth or len(rows) < 2 * self.min_samples:
            return None
        value, order = x[rows].sort(dim=0)
        left = F.one_hot(label[rows], classes)[order].cumsum(0)[:-1].double()  # [n - 1, F, C]
        total = F.one_hot(label[rows], classes).sum(0).double()
        size = torch.arange(1, len(rows), device=x.device)
        large = (size >= self.min_samples) & (len(rows) - size >= self.min_samples)
        place, feature = ((value[1:] > value[:-1]) & large[:, None]).nonzero(as_tuple=True)
        if len(place) == 0:
            return None
        below, above = value[place, feature], value[place + 1, feature]
        middle = below + (above - below) / 2
        left = left[place, feature]
        return _Splits(
            feature=feature,
            # Between neighbouring numbers the middle rounds to either.
            threshold=torch.where(middle < above, middle, below),
            left=left,
            right=total - left,
        )

    def _best(
        self, leaf: _Leaf, released: Tensor, samples: int, nodes: _Nodes
    ) -> tuple[float, int]:
        """Return score and place of a leaf's best split."""
        if leaf.splits is None:
            return float("-inf"), -1
        if self.release == "proba" and leaf.best is not None:
            return leaf.best  # no split elsewhere changes it
        count = nodes.count[leaf.node]
        left, right = leaf.splits.left, leaf.splits.right
        sizes = torch.stack([left.sum(1), right.sum(1)], dim=1)
        within = (torch.stack([_entropy(left), _entropy(right)], dim=1) * sizes).sum(1)
        gain = (count.sum() * _entropy(count) - within) / samples
        if self.release == "proba":
            revealed = _entropy(sizes) * count.sum() / samples
        else:
            after = released.repeat(len(left), 1)
            after[:, count.argmax()] -= count.sum()
            for part, side in ((left, 0), (right, 1)):
                after.scatter_add_(1, part.argmax(1, keepdim=True), sizes[:, side : side + 1])
            revealed = _entropy(after) - _entropy(released)
        score, which = (gain - self.lambda_mi * revealed).max(0)
        leaf.best = (score.item(), int(which))
        return leaf.best


@dataclass
class _Splits:
    """Splits of a node: x[feature] <= threshold goes left; class counts [K, C] of both sides."""

    feature: Tensor
    threshold: Tensor
    left: Tensor
    right: Tensor


@dataclass
class _Leaf:
    node: int
    depth: int
    rows: Tensor
    splits: _Splits | None
    best: tuple[float, int] | None = None


class _Nodes:
    """The tree as arrays by node; feature -1 marks a leaf."""

    def __init__(self, x: Tensor, count: Tensor) -> None:
        self.num_features = x.shape[1]
        self.feature = torch.full((1,), -1, device=x.device)
        self.threshold = x.new_zeros(1)
        self.child = torch.zeros(1, 2, dtype=torch.int64, device=x.device)
        self.count = count[None]
        self.depth = torch.zeros(1, dtype=torch.int64, device=x.device)

    def split(
        self, node: int, feature: Tensor, threshold: Tensor, left: Tensor, right: Tensor
    ) -> tuple[int, int]:
        """Make a leaf an inner node; return the numbers of its children."""
        new = (len(self.feature), len(self.feature) + 1)
        self.feature = torch.cat([self.feature, self.feature.new_full((2,), -1)])
        self.threshold = torch.cat([self.threshold, self.threshold.new_zeros(2)])
        self.child = torch.cat([self.child, self.child.new_zeros(2, 2)])
        self.count = torch.cat([self.count, torch.stack([left, right])])
        self.depth = torch.cat([self.depth, (self.depth[node] + 1).expand(2)])
        self.feature[node], self.threshold[node] = feature, threshold
        self.child[node] = self.child.new_tensor(new)
        return new

    def released_counts(self) -> Tensor:
        """Return how many training samples get each label, [C]."""
        leaf = self.count[self.feature < 0]
        return torch.zeros_like(leaf[0]).index_add(0, leaf.argmax(1), leaf.sum(1))

    def find(self, x: Tensor) -> Tensor:
        """Return the leaf of each sample."""
        _check_features(x)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"x must have shape [N, {self.num_features}], as in fit, got {list(x.shape)}"
            )
        node = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for _ in range(int(self.depth.max())):
            feature = self.feature[node]
            value = x.gather(1, feature.clamp_min(0)[:, None])[:, 0]
            child = self.child[node, (value > self.threshold[node]).long()]
            node = torch.where(feature < 0, node, child)
        return node


def _check_features(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, F], got {list(x.shape)}")
    if bool(x.isnan().any()):
        raise ValueError("x must not be NaN, which no threshold divides")


def _entropy(count: Tensor) -> Tensor:
    """Return the entropy of counts along the last dimension, in nats."""
    entropy: Tensor = torch.special.entr(count / count.sum(-1, keepdim=True)).sum(-1)
    return entropy
