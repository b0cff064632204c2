"""Multiple negatives ranking: the facts of the sheet of paper 153, against dense cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from regularizers.representation import mnr, mnr_loss, mnr_plus_loss
from tests.harness import GraphRecorder, assert_equal_with_gradients


def _pairs(n=7, d=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, n, d, generator=generator, dtype=torch.float64).to(dtype)
    return a.requires_grad_(), b.requires_grad_()


def _unit(x):
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_loss_and_gradient_are_those_of_cross_entropy(scale, normalize):
    a, b = _pairs()
    prepare = _unit if normalize else lambda x: x
    logits = scale * prepare(a) @ prepare(b).T
    assert_equal_with_gradients(
        mnr_loss(a, b, scale=scale, normalize=normalize),
        F.cross_entropy(logits, torch.arange(7)),
        (a, b),
    )


def test_further_negatives_are_further_columns():
    a, b = _pairs()
    negatives = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    logits = 2 * _unit(a) @ _unit(torch.cat([b, negatives])).T
    assert_equal_with_gradients(
        mnr_loss(a, b, scale=2, normalize=True, negatives=negatives),
        F.cross_entropy(logits, torch.arange(7)),
        (a, b, negatives),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unit_vectors_give_the_known_losses(dtype):
    eye = torch.eye(3, dtype=dtype)
    assert mnr_loss(eye, eye).item() == pytest.approx(math.log(1 + 2 / math.e), rel=1e-6)
    # 4.12e-9 is far below the rounding of the two numbers near 20 whose difference it is.
    assert mnr_loss(eye, eye, scale=20).item() == pytest.approx(
        math.log1p(2 * math.exp(-20)), rel=1e-4
    )


def test_equal_embeddings_cost_the_logarithm_of_their_number():
    x = torch.ones(6, 4)
    torch.testing.assert_close(mnr_loss(x, x, scale=3), torch.tensor(math.log(6)))


def test_released_loss_does_not_see_negatives_and_this_one_does():
    # The released function compares a_i with b_i alone, and takes 0, 1, 2... for probabilities.
    a, b = _pairs()
    released = lambda a, b: F.cross_entropy(
        F.cosine_similarity(a, b, dim=-1), torch.arange(len(a)).to(a)
    )
    same = released(a, a)
    torch.testing.assert_close(same, released(b, b))
    assert same > 20
    assert mnr_loss(a, a, scale=20, normalize=True) < 0.1
    assert mnr_loss(a, b, scale=20, normalize=True) > 1


def test_shuffled_partners_cost_more():
    a, _ = _pairs()
    b = a.detach() + 0.1
    assert mnr_loss(a, b[[1, 2, 3, 4, 5, 6, 0]], normalize=True) > mnr_loss(a, b, normalize=True)


@pytest.mark.parametrize("loss", [mnr_loss, mnr_plus_loss])
def test_order_of_pairs_does_not_matter(loss):
    a, b = _pairs()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(loss(a[order], b[order]), loss(a, b))
    torch.testing.assert_close(
        loss(a[order], b[order], reduction="none"), loss(a, b, reduction="none")[order]
    )


def test_a_learned_scale_gets_the_gradient_of_cross_entropy():
    a, b = _pairs()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert_equal_with_gradients(
        mnr_loss(a, b, scale=scale),
        F.cross_entropy(scale * a @ b.T, torch.arange(7)),
        (scale, a, b),
    )


@pytest.mark.parametrize("targets", ["argmax", "soft"])
def test_a_scale_is_the_same_as_a_number_and_as_a_tensor(targets):
    a, b = _pairs()
    number, tensor = (
        mnr_plus_loss(a, b, scale=scale, normalize=True, targets=targets)
        for scale in (3.0, torch.tensor(3.0))
    )
    torch.testing.assert_close(number, tensor)


def _plus(a, b, scale, targets):
    """Return the loss from the whole matrices."""
    logits = scale * a @ b.T
    within = scale * (a @ a.T + b @ b.T).detach() / 2
    t = within.softmax(1)
    forward, backward = {
        "argmax": (t.argmax(1), within.T.softmax(1).argmax(1)),
        "code": (t.argmax(1), t.T.argmax(1)),
        "soft": (t, t.T / t.sum(0)[:, None]),
    }[targets]
    return (F.cross_entropy(logits, forward) + F.cross_entropy(logits.T, backward)) / 2


@pytest.mark.parametrize("targets", ["argmax", "soft", "code"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_plus_loss_and_gradient_are_those_of_the_matrices(scale, targets):
    a, b = _pairs()
    assert_equal_with_gradients(
        mnr_plus_loss(a, b, scale=scale, targets=targets), _plus(a, b, scale, targets), (a, b)
    )


def test_targets_are_found_block_by_block(monkeypatch):
    a, b = _pairs()
    expected = mnr_plus_loss(a, b, targets="code")
    monkeypatch.setattr(mnr, "_BLOCK", 3)
    torch.testing.assert_close(mnr_plus_loss(a, b, targets="code"), expected)


def test_plus_of_normalized_distinct_inputs_is_the_mean_of_both_directions():
    a, b = _pairs()
    both = mnr_loss(a, b, normalize=True) + mnr_loss(b, a, normalize=True)
    torch.testing.assert_close(mnr_plus_loss(a, b, normalize=True), both / 2)


def _crowd():
    """A lone direction, its neighbour, and a crowd on the neighbour's other side."""
    degrees = torch.tensor([0.0, 30.0, *torch.linspace(90, 91, 20)], dtype=torch.float64)
    angles = torch.deg2rad(degrees)
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_columns_of_the_released_targets_may_leave_the_diagonal_where_all_norms_are_one():
    x = _crowd()
    both = torch.cat([x, x], 1)
    of_rows, of_columns = mnr._largest(both / 2, both)
    assert torch.equal(of_rows, torch.arange(22))
    assert of_columns[1] == 0  # the lone direction has its row's probability for itself
    symmetric = mnr_loss(x, x)
    torch.testing.assert_close(mnr_plus_loss(x, x), symmetric)
    assert mnr_plus_loss(x, x, targets="code") > symmetric + 1e-3


def test_a_long_vector_becomes_the_positive_of_all_unless_inputs_are_normalized():
    a = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    both = torch.cat([a, a], 1)
    assert mnr._largest(both / 2, both)[0].tolist() == [1, 1]
    torch.testing.assert_close(mnr_plus_loss(a, a), F.cross_entropy(a @ a.T, torch.tensor([1, 1])))


@pytest.mark.parametrize("targets", ["argmax", "soft"])
def test_targets_are_constants_for_derivatives(targets):
    # With the targets' own gradient the loss of a alone would pull through both similarities.
    a, b = _pairs()
    (gradient,) = torch.autograd.grad(mnr_plus_loss(a, b, targets=targets), a)
    (expected,) = torch.autograd.grad(_plus(a, b, 1.0, targets), a)
    torch.testing.assert_close(gradient, expected)


def test_gradients_are_right_to_second_order():
    leaves = _pairs(n=4, d=3)
    for call in (
        lambda a, b: mnr_loss(a, b, scale=2.0, normalize=True),
        lambda a, b: mnr_plus_loss(a, b, scale=2.0),
    ):
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


def test_second_derivatives_with_soft_targets_are_those_of_the_matrices():
    a, b = _pairs()
    found = []
    for loss in (mnr_plus_loss(a, b, scale=2.0, targets="soft"), _plus(a, b, 2.0, "soft")):
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), (a, b)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("loss", [mnr_loss, mnr_plus_loss])
def test_reductions_agree(loss):
    a, b = _pairs()
    rows = loss(a, b, reduction="none")
    assert rows.shape == (7,)
    torch.testing.assert_close(loss(a, b), rows.mean())
    torch.testing.assert_close(loss(a, b, reduction="sum"), rows.sum())


@pytest.mark.parametrize("loss", [mnr_loss, mnr_plus_loss])
def test_half_types_give_the_float32_loss_of_their_values(loss):
    a, b = _pairs(dtype=torch.bfloat16)
    half = loss(a, b, scale=2.0, normalize=True)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(a.float(), b.float(), scale=2.0, normalize=True))
    half.backward()
    assert a.grad.dtype == torch.bfloat16


def test_a_row_of_zeros_is_similar_to_nothing_and_keeps_gradients_bounded():
    a, b = (x.detach() for x in _pairs())
    a[0] = 0
    a.requires_grad_()
    rows = mnr_loss(a, b, normalize=True, reduction="none")
    assert rows[0].item() == pytest.approx(math.log(7))
    rows.sum().backward()
    assert a.grad.abs().max() < 10  # F.normalize makes 1e12 of it


@pytest.mark.parametrize("targets", ["argmax", "soft", "code"])
def test_nan_comes_through(targets):
    a, b = (x.detach() for x in _pairs())
    b[2, 1] = math.nan
    assert mnr_loss(a, b).isnan()
    assert mnr_plus_loss(a, b, targets=targets).isnan()


@pytest.mark.parametrize("targets", ["argmax", "soft"])
def test_compiles_to_one_graph(targets, fresh_dynamo):
    a, b = _pairs()
    graphs = GraphRecorder()

    def both(a, b):
        one = mnr_loss(a, b, scale=20.0, normalize=True, negatives=b)
        return one + mnr_plus_loss(a, b, normalize=True, targets=targets)

    compiled = torch.compile(both, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(a, b), both(a, b))
    assert len(graphs) == 1


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("exception", "name", "call"),
    [
        (ValueError, "scale must", lambda: mnr_loss(X, X, scale=0.0)),
        (ValueError, "scale must", lambda: mnr_loss(X, X, scale=torch.ones(2))),
        (ValueError, "scale must", lambda: mnr_plus_loss(X, X, scale=-1.0)),
        (ValueError, "b must", lambda: mnr_loss(X, X[:2])),
        (TypeError, "b must", lambda: mnr_loss(X, X.double())),
        (TypeError, "a must", lambda: mnr_loss(X.long(), X)),
        (ValueError, "a must", lambda: mnr_loss(X[:1], X[:1])),
        (ValueError, "a must", lambda: mnr_plus_loss(X[0], X[0])),
        (ValueError, "negatives must", lambda: mnr_loss(X, X, negatives=torch.ones(3, 3))),
        (TypeError, "negatives must", lambda: mnr_loss(X, X, negatives=X.double())),
        (ValueError, "reduction must", lambda: mnr_loss(X, X, reduction="max")),
        (ValueError, "targets must", lambda: mnr_plus_loss(X, X, targets="hard")),
    ],
)
def test_bad_input_names_the_argument(exception, name, call):
    with pytest.raises(exception, match=name):
        call()
