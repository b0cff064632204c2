"""Trees that pay for what they reveal: the facts of the sheet of paper 167."""

import math

import pytest
import torch

from regularizers.information import MIDTreeClassifier


def _data(count=400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    noise = 0.5 * torch.randn(count, generator=generator)
    return x, (x[:, 0] * x[:, 1] + noise > 0).long() + (x[:, 2] > 1).long()


def _tree(x, y, **options):
    return MIDTreeClassifier(**{"max_depth": 5, "lambda_mi": 0.0} | options).fit(x, y)


def _entropy(*shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


def _split_costs(tree, x):
    """Sum over internal nodes of w h(p), from the paths of the training samples."""
    nodes = tree._nodes
    mass = nodes.count.sum(1) / len(x)
    cost = 0.0
    for node in range(len(mass)):
        if nodes.feature[node] >= 0:
            share = (mass[nodes.child[node]] / mass[node]).tolist()
            cost += mass[node].item() * _entropy(*share)
    return cost


def test_without_lambda_it_is_the_entropy_tree_of_scikit_learn():
    reference = pytest.importorskip("sklearn.tree").DecisionTreeClassifier
    x, y = _data()
    fitted = reference(criterion="entropy", max_depth=5, random_state=0).fit(x.numpy(), y.numpy())
    tree = _tree(x, y)
    assert tree.num_leaves == fitted.get_n_leaves()
    new = torch.randn(300, 4)
    torch.testing.assert_close(
        tree.predict_proba(new.double()), torch.from_numpy(fitted.predict_proba(new.numpy()))
    )


@pytest.mark.parametrize("lambda_mi", [1.0, 2.5])
def test_lambda_of_one_or_more_leaves_the_root_alone(lambda_mi):
    x, y = _data()
    tree = _tree(x, y, lambda_mi=lambda_mi)
    assert tree.num_leaves == 1
    assert tree.leaf_information() == 0
    assert (tree.predict(x) == y.mode().values).all()


@pytest.mark.parametrize(("lambda_mi", "leaves"), [(0.99, 2), (1.0, 1)])
def test_a_perfect_balanced_split_is_kept_below_lambda_one(lambda_mi, leaves):
    x, y = torch.arange(6.0)[:, None], torch.tensor([0, 0, 0, 1, 1, 1])
    tree = _tree(x, y, lambda_mi=lambda_mi)
    assert tree.num_leaves == leaves
    assert tree.leaf_information() == pytest.approx(math.log(leaves))


def test_leaf_information_is_the_sum_of_the_split_costs():
    x, y = _data()
    for lambda_mi in (0.0, 0.05, 0.2):
        tree = _tree(x, y, lambda_mi=lambda_mi)
        assert tree.num_leaves > 1
        assert tree.leaf_information() == pytest.approx(_split_costs(tree, x))
        assert tree.leaf_information() <= math.log(tree.num_leaves) + 1e-12


def test_leaf_information_of_unequal_leaves():
    x = torch.arange(10.0)[:, None]
    tree = _tree(x, (x[:, 0] > 8).long())
    assert tree.leaf_information() == pytest.approx(0.325083, abs=1e-6)


def test_more_lambda_never_reveals_more():
    x, y = _data()
    revealed = [
        _tree(x, y, lambda_mi=lambda_mi).leaf_information()
        for lambda_mi in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0)
    ]
    assert revealed == sorted(revealed, reverse=True)


def test_released_labels_cost_nothing_where_none_changes():
    # Class 0 prevails on both sides of the best split: only the released vectors differ.
    x = torch.tensor([[0.0]] * 10 + [[1.0]] * 10)
    y = torch.tensor([0] * 10 + [0] * 6 + [1] * 4)
    vectors = _tree(x, y, lambda_mi=1.0)
    labels = _tree(x, y, lambda_mi=1.0, release="label")
    assert vectors.num_leaves == 1
    assert labels.num_leaves == 2
    assert labels.leaf_information() == 0


def test_released_labels_cost_their_entropy_where_they_change():
    x = torch.tensor([[0.0]] * 6 + [[1.0]] * 4)
    y = torch.tensor([0] * 6 + [1] * 4)
    cheap, dear = (_tree(x, y, lambda_mi=lambda_mi, release="label") for lambda_mi in (0.9, 1.1))
    assert cheap.leaf_information() == pytest.approx(_entropy(0.6, 0.4))
    assert dear.num_leaves == 1


def test_released_label_is_a_vector_of_zeros_and_a_one():
    x, y = _data()
    tree = _tree(x, y, release="label")
    released = tree.predict_proba(x)
    assert set(released.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(tree.classes[released.argmax(1)], tree.predict(x))


def test_two_leaves_with_one_label_count_as_one_release():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    tree = _tree(x, torch.tensor([0, 1, 0]), release="label")
    assert tree.num_leaves == 3
    assert tree.leaf_information() == pytest.approx(_entropy(2 / 3, 1 / 3))


def test_depth_and_leaf_size_are_kept():
    x, y = _data()
    tree = _tree(x, y, max_depth=2, min_samples=30)
    assert tree.num_leaves <= 4
    assert tree._nodes.count[tree._nodes.feature < 0].sum(1).min() >= 30


def test_classes_may_be_any_integers():
    x = torch.tensor([[0.0], [1.0]])
    tree = _tree(x, torch.tensor([-7, 12]))
    assert tree.predict(torch.tensor([[0.4], [0.6]])).tolist() == [-7, 12]


def test_neighbouring_numbers_are_divided():
    x = torch.tensor([[1.0], [1.0 + 2**-23]])
    tree = _tree(x, torch.tensor([0, 1]))
    assert tree.predict(x).tolist() == [0, 1]


def test_bad_input_names_the_argument():
    x, y = _data(10)
    fitted = _tree(x, y)
    for exception, name, call in [
        (ValueError, "max_depth must", lambda: MIDTreeClassifier(max_depth=0, lambda_mi=0.0)),
        (ValueError, "lambda_mi must", lambda: MIDTreeClassifier(max_depth=1, lambda_mi=-0.1)),
        (ValueError, "min_samples must", lambda: _tree(x, y, min_samples=0)),
        (ValueError, "release must", lambda: _tree(x, y, release="logits")),
        (TypeError, "x must", lambda: _tree(x.int(), y)),
        (ValueError, "x must", lambda: _tree(x[0], y)),
        (ValueError, "x must not be NaN", lambda: _tree(x * torch.nan, y)),
        (TypeError, "y must", lambda: _tree(x, y.float())),
        (ValueError, "y must", lambda: _tree(x, y[:5])),
        (ValueError, "x must have shape", lambda: fitted.predict(x[:, :2])),
        (
            RuntimeError,
            "fitted first",
            lambda: MIDTreeClassifier(max_depth=1, lambda_mi=0.0).predict(x),
        ),
    ]:
        with pytest.raises(exception, match=name):
            call()
