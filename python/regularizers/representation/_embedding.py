"""Principal components, t-SNE and k-means for a few thousand points; what finding facets needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regularizers.ops.code_search import nearest_code


def pca(x: Tensor, dim: int) -> Tensor:
    """Return the first ``dim`` principal components of ``x`` ``[N, F]``, at most min(N, F) of them.

    The sign of a component is that which makes its largest entry positive.
    """
    u, size, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    scores = (u * size)[:, :dim]
    largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    flipped: Tensor = scores * torch.where(largest < 0, -1.0, 1.0).to(x.dtype)
    return flipped


def tsne(x: Tensor, *, perplexity: float = 30.0, iterations: int = 1000) -> Tensor:
    r"""Return a planar map of ``x`` ``[N, F]`` in which neighbours stay neighbours, ``[N, 2]``.

    L. van der Maaten, G. Hinton, 2008: descent on
    :math:`\sum_{ij} P_{ij} \log (P_{ij} / Q_{ij})` with :math:`Q_{ij} \propto (1 + \|y_i -
    y_j\|^2)^{-1}`, all N x N pairs in every step. It starts from the principal components and draws
    nothing; exaggeration, momentum, gains and learning rate are those of scikit-learn.
    """
    joint = _joint_probabilities(_squared_distances(x), math.log(perplexity))
    y = pca(x, 2)
    if y.shape[1] < 2:
        y = torch.cat([y, torch.zeros_like(y)], dim=1)
    y = y * (1e-4 / y[:, 0].std().clamp_min(torch.finfo(y.dtype).tiny))
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    lr = max(len(x) / 12 / 4, 50.0)
    for step in range(iterations):
        exaggerated = step < iterations // 4
        gradient = _gradient(12 * joint if exaggerated else joint, y)
        gains = torch.where(velocity * gradient < 0, gains + 0.2, gains * 0.8).clamp_min(0.01)
        velocity = (0.5 if exaggerated else 0.8) * velocity - lr * gains * gradient
        y = y + velocity
    return y


def _squared_distances(x: Tensor) -> Tensor:
    square = x.square().sum(1)
    return (square[:, None] + square - 2 * x @ x.T).clamp_min_(0).fill_diagonal_(0)


def _joint_probabilities(distances: Tensor, entropy: float) -> Tensor:
    """Return P ``[N, N]``: symmetric, with rows of the given entropy before it was made so."""
    n = len(distances)
    # Rows are scaled by themselves, so that one bracket holds every width; the nearest neighbour
    # gets the exponent 0, so that no row underflows.
    near = distances + torch.diag(distances.new_full((n,), math.inf))
    offset = distances - near.min(1, keepdim=True).values
    scaled = offset / offset.mean(1, keepdim=True).clamp_min(torch.finfo(offset.dtype).tiny)
    low, high = scaled.new_full((n, 1), -20.0), scaled.new_full((n, 1), 20.0)
    for _ in range(40):  # log of the inverse width, by bisection
        middle = (low + high) / 2
        p = (-scaled * middle.exp()).exp_().fill_diagonal_(0)
        total = p.sum(1, keepdim=True)
        flat = total.log() + middle.exp() * (scaled * p).sum(1, keepdim=True) / total > entropy
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    p /= total
    return (p + p.T) / (2 * n)


def _gradient(joint: Tensor, y: Tensor) -> Tensor:
    closeness = (_squared_distances(y) + 1).reciprocal_().fill_diagonal_(0)
    force = (joint - closeness / closeness.sum()) * closeness
    return 4 * (force.sum(1, keepdim=True) * y - force @ y)


def kmeans(
    x: Tensor,
    k: int,
    *,
    starts: int = 10,
    max_iter: int = 300,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return labels ``[N]`` and centres ``[k, F]`` of the best of several runs of Lloyd's method.

    Each starts from k-means++ (D. Arthur, S. Vassilvitskii, 2007). A cluster that loses its last
    point takes the point that is farthest from its centre.
    """
    best = None
    for _ in range(starts):
        centers = _spread_out(x, k, generator)
        labels = nearest_code(x, centers)
        for _ in range(max_iter):
            centers = _means(x, labels, centers)
            before, labels = labels, nearest_code(x, centers)
            if torch.equal(before, labels):
                break
        cost = (x - centers[labels]).square().sum().item()
        if best is None or cost < best[0]:
            best = cost, labels, centers
    assert best is not None
    return best[1:]


def _spread_out(x: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    chosen = torch.randint(len(x), (1,), generator=generator, device=x.device)
    distance = (x - x[chosen]).square().sum(1)
    for _ in range(k - 1):
        weight = distance + (distance.sum() == 0)  # equal points: any of them
        following = torch.multinomial(weight, 1, generator=generator)
        chosen = torch.cat([chosen, following])
        distance = torch.minimum(distance, (x - x[following]).square().sum(1))
    return x[chosen]


def _means(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    sizes = torch.bincount(labels, minlength=len(centers))
    sums = torch.zeros_like(centers).index_add_(0, labels, x)
    means = sums / sizes.clamp_min(1).unsqueeze(1)
    empty = (sizes == 0).nonzero().flatten()
    far = (x - centers[labels]).square().sum(1).topk(len(empty)).indices
    means[empty] = x[far]
    return means
