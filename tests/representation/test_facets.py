"""Facets: what is found, in which order, from which images."""

import pytest
import torch

from regularizers.representation import find_facets


def _two_kinds(first=20, second=40):
    codes = torch.cat([torch.randn(first, 8), torch.randn(second, 8) + 8])
    images = torch.arange(float(first + second)).view(-1, 1, 1, 1).expand(-1, 3, 4, 5)
    return codes, images, torch.arange(first + second) >= first


@pytest.mark.parametrize("embed", ["tsne", "pca"])
def test_two_separated_kinds_are_recovered(embed):
    codes, images, kind = _two_kinds()
    facets = find_facets(codes, images, num_facets=2, embed=embed, perplexity=10.0)
    # The larger facet is the first.
    assert torch.equal(facets.labels, torch.where(kind, 0, 1))
    assert facets.centers.shape == (2, 2)
    assert facets.embedding.shape == (60, 2)
    assert facets.mean_images.shape == (2, 3, 4, 5)


def test_mean_images_are_those_of_the_members():
    codes, images, _ = _two_kinds()
    facets = find_facets(codes, images, num_facets=2, embed="pca", nearest=7)
    for j, members in enumerate(facets.members):
        assert len(members) == 7
        assert (facets.labels[members] == j).all()
        torch.testing.assert_close(facets.mean_images[j], images[members].mean(0))


def test_members_are_the_nearest_of_their_cluster_in_order():
    codes, images, _ = _two_kinds()
    facets = find_facets(codes, images, num_facets=3, embed="pca", nearest=5)
    for j, members in enumerate(facets.members):
        distance = (facets.embedding - facets.centers[j]).norm(dim=1)
        inside = distance[facets.labels == j]
        torch.testing.assert_close(distance[members], inside.sort().values[:5])


def test_small_clusters_average_all_they_have():
    codes, images, _ = _two_kinds(first=3)
    facets = find_facets(codes, images, num_facets=2, embed="pca", nearest=10)
    assert sorted(facets.members[1].tolist()) == [0, 1, 2]


def test_equal_generators_give_equal_facets():
    codes, images = torch.randn(50, 4), torch.rand(50, 1, 2, 2)
    state = torch.get_rng_state()
    first, second = (
        find_facets(
            codes, images, num_facets=6, embed="pca", generator=torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    )
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_keep_their_dtype_and_need_no_graph(dtype):
    codes, images, _ = _two_kinds()
    facets = find_facets(codes.requires_grad_(), images.to(dtype), num_facets=2, embed="pca")
    assert facets.mean_images.dtype == dtype
    assert not facets.embedding.requires_grad


def test_bad_input_names_the_argument():
    codes, images = torch.randn(20, 4), torch.rand(20, 1, 2, 2)
    bad = codes.clone()
    bad[3, 1] = torch.nan
    for exception, name, call in [
        (ValueError, "num_facets must", lambda: find_facets(codes[:9], images[:9], embed="pca")),
        (ValueError, "num_facets must", lambda: find_facets(codes, images, num_facets=0)),
        (ValueError, "nearest must", lambda: find_facets(codes, images, nearest=0)),
        (ValueError, "pca_dim must", lambda: find_facets(codes, images, pca_dim=0)),
        (ValueError, "perplexity must", lambda: find_facets(codes, images, perplexity=20.0)),
        (ValueError, "perplexity must", lambda: find_facets(codes, images, perplexity=0.5)),
        (ValueError, "embed must", lambda: find_facets(codes, images, embed="umap")),
        (ValueError, "codes must", lambda: find_facets(codes[0], images)),
        (ValueError, "codes must", lambda: find_facets(bad, images, embed="pca")),
        (ValueError, "images must", lambda: find_facets(codes, images[:5])),
        (TypeError, "codes must", lambda: find_facets(codes.long(), images)),
        (TypeError, "images must", lambda: find_facets(codes, images.byte())),
    ]:
        with pytest.raises(exception, match=name):
            call()
