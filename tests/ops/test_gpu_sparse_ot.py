"""Sparse transport on a CUDA device: the values of the CPU, whole solutions, repeatable bits."""

import pytest
import torch

from regularizers.ops import sparse_projection, transport_dual
from regularizers.transport import Entropic, SparsityConstrained, SquaredL2, regularized_ot
from tests.harness import DTYPES, TOLERANCES

pytestmark = pytest.mark.gpu


def _cost(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections_agree_with_the_cpu(dtype):
    v = torch.randn(37, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for k in (None, 1, 10, 200):
        found = sparse_projection(v.cuda(), k=k).cpu()
        torch.testing.assert_close(found, sparse_projection(v, k=k), **TOLERANCES[dtype])


def test_duals_agree_with_the_cpu_and_repeat_bit_by_bit():
    cost, alpha = _cost(3, 500, 300), _cost(3, 300)
    a, b = torch.full((3, 300), 1 / 300), torch.full((3, 500), 1 / 500)
    for options in ({"k": 4}, {}, {"regularizer": "entropic"}):
        expected = transport_dual(alpha, cost, a, b, **options)
        on_device = [tensor.cuda() for tensor in (alpha, cost, a, b)]
        found, again = (transport_dual(*on_device, **options) for _ in range(2))
        for have, same, want in zip(found, again, expected, strict=True):
            assert torch.equal(have, same)
            torch.testing.assert_close(have.cpu(), want, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    "regularizer", [SquaredL2(1.0), Entropic(0.1), SparsityConstrained(1.0, 12)], ids=repr
)
def test_solutions_and_their_gradients_agree_with_the_cpu(regularizer):
    found = {}
    for device in ("cpu", "cuda"):
        cost = _cost(2, 60, 40).to(device).requires_grad_()
        result = regularized_ot(cost, regularizer=regularizer)
        result.plan.square().sum().backward()
        values = (result.dual_value, result.plan, cost.grad)
        found[device] = [value.detach().cpu() for value in values]
    # Two solutions to a marginal error of 1e-6; the gradient divides by gamma.
    for have, want in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)
