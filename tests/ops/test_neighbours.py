"""nearest_neighbour: exact distances with derivatives, the others of a batch, bad input."""

import pytest
import torch
from torch.nn import functional

from regularizers.ops import nearest_neighbour
from tests.harness import DTYPES

LINE = torch.tensor([[0.0], [1.0], [3.0], [3.5]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distance_and_index_are_those_of_all_distances(dtype):
    x, bank = torch.randn(2, 30, 7).to(dtype), torch.randn(50, 7).to(dtype)
    distance = (x[..., None, :].double() - bank.double()).square().sum(-1)
    squares, index = nearest_neighbour(x, bank)
    assert squares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(squares.double(), distance.amin(-1), rtol=1e-5, atol=0)
    assert torch.equal(index, distance.argmin(-1))


def test_without_a_bank_no_point_is_its_own_neighbour():
    squares, index = nearest_neighbour(LINE)
    assert index.tolist() == [1, 0, 3, 2]
    assert squares.tolist() == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_without_a_bank_neighbours_are_nearest_at_any_scale(spread):
    x = spread * torch.randn(200, 5)
    distance = (x[:, None].double() - x.double()).square().sum(-1).fill_diagonal_(torch.inf)
    assert torch.equal(nearest_neighbour(x)[1], distance.argmin(1))


def test_equal_points_are_at_distance_zero_of_each_other():
    squares, index = nearest_neighbour(torch.randn(10, 4).repeat(2, 1) + 1e3)
    assert torch.equal(index, torch.arange(20).roll(10))
    assert squares.eq(0).all()


def test_distance_has_first_and_second_derivatives_in_both_arguments():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    call = lambda *tensors: nearest_neighbour(*tensors)[0]
    assert torch.autograd.gradcheck(call, (x, bank))
    assert torch.autograd.gradgradcheck(call, (x, bank))
    assert torch.autograd.gradcheck(call, (x,))


def test_forward_mode_and_functorch_agree_with_autograd():
    x, bank = torch.randn(5, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    call = lambda x: nearest_neighbour(x, bank)[0].sum()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(call)(x), expected)
    tangent = torch.randn_like(x)
    _, derivative = torch.func.jvp(call, (x,), (tangent,))
    torch.testing.assert_close(derivative, (expected * tangent).sum())


def test_of_unit_vectors_the_nearest_has_the_largest_cosine():
    x, bank = functional.normalize(torch.randn(20, 4)), functional.normalize(torch.randn(30, 4))
    squares, index = nearest_neighbour(x, bank)
    cosine, expected = (x @ bank.T).max(1)
    assert torch.equal(index, expected)
    torch.testing.assert_close(squares, 2 - 2 * cosine)


def test_a_point_that_is_not_finite_has_no_finite_distance():
    x = torch.tensor([[torch.nan], [torch.inf], [0.9]])
    squares, index = nearest_neighbour(x, LINE)
    assert index.tolist() == [0, 0, 1]
    assert squares.isfinite().tolist() == [False, False, True]


def test_compiles_to_one_graph(fresh_dynamo):
    x = torch.randn(12, 3)
    for arguments in ((x, LINE.expand(4, 3)), (x,)):
        compiled = torch.compile(nearest_neighbour, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), nearest_neighbour(*arguments))


def test_autocast_takes_the_wider_type():
    x, bank = torch.randn(5, 3), torch.randn(4, 3).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_neighbour(x, bank)
    torch.testing.assert_close(found, nearest_neighbour(x, bank.float()))


@pytest.mark.parametrize(
    ("exception", "name", "arguments"),
    [
        (TypeError, "x must", ([1.0],)),
        (TypeError, "x must", (torch.arange(3),)),
        (ValueError, "x must", (torch.ones(1, 2),)),
        (ValueError, "x must", (torch.ones(2, 3, 4),)),
        (ValueError, "x must", (torch.tensor(1.0), torch.ones(4, 2))),
        (TypeError, "bank must", (torch.ones(2, 3), 5)),
        (TypeError, "bank must", (torch.ones(2, 3), torch.ones(4, 3).double())),
        (ValueError, "bank must", (torch.ones(2, 3), torch.ones(4, 2))),
        (ValueError, "bank must", (torch.ones(2, 3), torch.ones(0, 3))),
    ],
)
def test_bad_input_names_the_argument(exception, name, arguments):
    with pytest.raises(exception, match=name):
        nearest_neighbour(*arguments)
