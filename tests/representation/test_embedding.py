"""Principal components, t-SNE and k-means beside scikit-learn's."""

import pytest
import torch

from regularizers.representation._embedding import (
    _joint_probabilities,
    _squared_distances,
    kmeans,
    pca,
    tsne,
)

cluster = pytest.importorskip("sklearn.cluster")
decomposition = pytest.importorskip("sklearn.decomposition")
manifold = pytest.importorskip("sklearn.manifold")


def _blobs(points=30, blobs=4, dim=10):
    centers = 6 * torch.randn(blobs, dim)
    return (centers[:, None] + torch.randn(blobs, points, dim)).flatten(0, 1)


def test_components_are_those_of_scikit_learn_up_to_sign():
    x = torch.randn(40, 7, dtype=torch.float64)
    expected = torch.tensor(decomposition.PCA(3).fit_transform(x.numpy()))
    torch.testing.assert_close(pca(x, 3).abs(), expected.abs())


def test_sign_of_a_component_does_not_depend_on_the_order_of_the_points():
    x = torch.randn(40, 7, dtype=torch.float64)
    torch.testing.assert_close(pca(x.flip(0), 3), pca(x, 3).flip(0))


def test_components_are_as_many_as_there_are():
    assert pca(torch.randn(4, 7), 50).shape == (4, 4)


def test_neighbourhoods_have_the_perplexity():
    x = torch.randn(50, 5, dtype=torch.float64) * torch.logspace(-3, 3, 50).double()[:, None]
    joint = _joint_probabilities(_squared_distances(x), torch.tensor(9.0).log().item())
    assert joint.sum().item() == pytest.approx(1.0)
    expected = manifold._t_sne._joint_probabilities(_squared_distances(x).float().numpy(), 9.0, 0)
    condensed = joint[tuple(torch.triu_indices(50, 50, 1))]
    # scikit-learn stops its search at an entropy 1e-5 away, in float32
    torch.testing.assert_close(condensed, torch.tensor(expected), rtol=2e-2, atol=1e-6)


def _divergence(x, y, perplexity):
    joint = _joint_probabilities(_squared_distances(x), torch.tensor(perplexity).log().item())
    closeness = (1 / (1 + _squared_distances(y))).fill_diagonal_(0)
    ratio = joint / (closeness / closeness.sum()).clamp_min(1e-12)
    return (joint * ratio.clamp_min(1e-12).log()).sum().item()


def test_map_is_as_good_as_that_of_scikit_learn():
    torch.set_num_threads(1)
    x = _blobs()
    theirs = manifold.TSNE(perplexity=15.0, init="pca", method="exact", random_state=0)
    reached = _divergence(x, torch.tensor(theirs.fit_transform(x.numpy())), 15.0)
    assert _divergence(x, tsne(x, perplexity=15.0), 15.0) < 1.1 * reached


def test_map_keeps_neighbours():
    x = _blobs(points=20)
    label = torch.arange(4).repeat_interleave(20)
    distances = _squared_distances(tsne(x, perplexity=10.0)) + torch.diag(torch.full((80,), 1e9))
    assert torch.equal(label[distances.argmin(1)], label)


def test_map_of_equal_points_is_finite():
    assert tsne(torch.ones(12, 3), perplexity=4.0, iterations=20).isfinite().all()
    assert tsne(torch.randn(12, 1), perplexity=4.0, iterations=20).shape == (12, 2)


def test_clusters_cost_what_scikit_learn_finds():
    x = torch.randn(200, 2, dtype=torch.float64)
    theirs = cluster.KMeans(6, n_init=10, random_state=0).fit(x.numpy())
    labels, centers = kmeans(x, 6, generator=torch.Generator().manual_seed(0))
    cost = (x - centers[labels]).square().sum().item()
    # Both keep the best of ten starts; the optimum differs between them by a per cent or two.
    assert cost < 1.03 * theirs.inertia_


def test_centres_are_the_means_of_their_clusters():
    x = torch.randn(60, 3, dtype=torch.float64)
    labels, centers = kmeans(x, 5)
    for j in range(5):
        torch.testing.assert_close(centers[j], x[labels == j].mean(0))


def test_as_many_clusters_as_points_and_equal_points_work():
    labels, _ = kmeans(torch.randn(6, 2), 6)
    assert labels.unique().numel() == 6
    labels, centers = kmeans(torch.ones(6, 2), 3)
    assert torch.equal(centers[labels], torch.ones(6, 2))


def test_a_cluster_that_empties_takes_the_farthest_point():
    from regularizers.representation._embedding import _means

    x = torch.tensor([[0.0], [1.0], [10.0]])
    centers = _means(x, torch.tensor([0, 0, 0]), torch.tensor([[0.0], [99.0]]))
    assert centers[1].item() == 10.0
