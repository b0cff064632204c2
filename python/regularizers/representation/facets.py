"""The different kinds of input that one unit responds to."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_at_least,
    check_floating,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    check_values,
)
from regularizers._shared.randomness import check_caller_draws
from regularizers.ops._operator import accumulate_dtype
from regularizers.representation._embedding import kmeans, pca, tsne


class Facets(NamedTuple):
    """The facets of a unit, the largest first.

    Args:
        mean_images: mean of the images nearest to a facet's centre, ``[k, C, H, W]``; where
            :func:`~regularizers.representation.maximize_activation` starts from.
        labels: facet of every image, int64 ``[N]``.
        embedding: the images on the map that was clustered, ``[N, 2]``.
        centers: of the facets on it, ``[k, 2]``.
        members: indices of the images that were averaged, int64, nearest to the centre first; one
            tensor a facet.

    Example:
        >>> codes, images = torch.randn(40, 8), torch.rand(40, 1, 6, 6)
        >>> facets = find_facets(codes, images, num_facets=2, embed="pca", nearest=5)
        >>> facets.mean_images.shape, len(facets.members[0])
        (torch.Size([2, 1, 6, 6]), 5)
    """

    mean_images: Tensor
    labels: Tensor
    embedding: Tensor
    centers: Tensor
    members: tuple[Tensor, ...]


@torch.no_grad()
def find_facets(
    codes: Tensor,
    images: Tensor,
    *,
    num_facets: int = 10,
    pca_dim: int = 50,
    embed: Literal["tsne", "pca"] = "tsne",
    perplexity: float = 30.0,
    nearest: int = 15,
    generator: torch.Generator | None = None,
) -> Facets:
    r"""Sort the inputs that activate a unit into kinds, and average the typical ones of each kind.

    .. math::
        y = \operatorname{tsne}(\operatorname{pca}(h)), \qquad
        c_1, \dots, c_k = \operatorname{kmeans}(y), \qquad
        \bar x_j = \operatorname{mean} \{x_i : y_i \text{ among the nearest to } c_j \text{ in its
        cluster}\}

    Codes h are the activations of a late layer (the paper: the last before the classifier), not
    pixels: images of one kind have to be near each other.

    Args:
        codes: h, ``[N, F]``, finite; the images that activate the unit most, a few hundred to a few
            thousand. The map takes memory and time of N x N pairs: 1000 steps.
        images: x, ``[N, C, H, W]``, floating-point, on the device of ``codes``.
        num_facets: k, from 1 to N.
        pca_dim: principal components before t-SNE, at least 1; fewer where the data have fewer.
        embed: ``"tsne"``, or ``"pca"``: the first two components, for codes that separate linearly.
        perplexity: of t-SNE, how many neighbours a point has, in [1, N).
        nearest: images averaged, at least 1; a smaller cluster averages all it has.
        generator: of the first centres of k-means, on the device of ``codes``; the rest draws
            nothing.

    Returns:
        :class:`Facets`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range or of the wrong shape, or ``codes`` is not finite.

    Example:
        >>> codes = torch.cat([torch.randn(20, 8), torch.randn(40, 8) + 9])
        >>> images = torch.cat([torch.zeros(20, 1, 6, 6), torch.ones(40, 1, 6, 6)])
        >>> facets = find_facets(codes, images, num_facets=2, perplexity=10)
        >>> facets.mean_images.mean((1, 2, 3))
        tensor([1., 0.])

    Source:
        A. Nguyen, J. Yosinski, J. Clune, "Multifaceted Feature Visualization", 2016, arXiv
        1602.03616; after the paper, whose code for this step is not public. t-SNE is exact and
        starts from the principal components, so its map is the same at every call.
    """
    check_floating("codes", codes)
    check_shape("codes", codes, (None, None), "[images, features]")
    check_floating("images", images)
    check_shape("images", images, (len(codes), None, None, None), "[images as codes, C, H, W]")
    check_same_device("images", images, "codes", codes)
    for name, value in (("num_facets", num_facets), ("pca_dim", pca_dim), ("nearest", nearest)):
        check_at_least(name, value, 1)
    check_one_of("embed", embed, ("tsne", "pca"))
    check_positive("perplexity", perplexity)
    if num_facets > len(codes):
        raise ValueError(f"num_facets must be at most the {len(codes)} images, got {num_facets}")
    if embed == "tsne" and not 1 <= perplexity < len(codes):
        raise ValueError(
            f"perplexity must be in [1, {len(codes)}), the number of images, got {perplexity}"
        )
    check_values(codes.isfinite().all(), lambda: "codes must be finite")
    if generator is not None:
        check_caller_draws(generator)
    wide = codes.to(accumulate_dtype(codes.dtype))
    scores = pca(wide, 2 if embed == "pca" else pca_dim)
    embedding = scores if embed == "pca" else tsne(scores, perplexity=perplexity)
    labels, centers = kmeans(embedding, num_facets, generator=generator)
    order = torch.bincount(labels, minlength=num_facets).argsort(descending=True, stable=True)
    centers, labels = centers[order], order.argsort()[labels]
    members = tuple(_typical(embedding, labels, centers, j, nearest) for j in range(num_facets))
    means = [images[m].to(accumulate_dtype(images.dtype)).mean(0) for m in members]
    return Facets(torch.stack(means).to(images.dtype), labels, embedding, centers, members)


def _typical(embedding: Tensor, labels: Tensor, centers: Tensor, facet: int, most: int) -> Tensor:
    inside = (labels == facet).nonzero().flatten()
    distance = (embedding[inside] - centers[facet]).square().sum(1)
    return inside[distance.argsort(stable=True)[:most]]
