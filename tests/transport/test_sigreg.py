"""SIGReg: the method contract and the facts of the sheet of paper 5."""

import pytest
import torch

from regularizers.transport import SIGReg, random_slices, sigreg
from tests.harness import MethodContract

ONE = torch.ones(1, 1, dtype=torch.float64)
NULL_MEAN = 1.052464  # sum_l w_l phi_l (1 - phi_l^2)


class TestSIGReg(MethodContract):
    def build(self, dtype):
        return SIGReg(num_slices=8)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 60).reshape(2, 5, 6).to(dtype).requires_grad_())

    def bad_inputs(self):
        z = torch.randn(4, 3)
        both = lambda: sigreg(z, slices=torch.eye(3), seed=1)
        return [
            (ValueError, "z must", lambda: sigreg(z[0])),
            (ValueError, "z must", lambda: sigreg(z[None, None])),
            (ValueError, "batch of at least 2", lambda: sigreg(z[:1])),
            (TypeError, "z must", lambda: sigreg(z.int())),
            (TypeError, "z must", lambda: sigreg([[1.0]])),
            (ValueError, "slices must", lambda: sigreg(z, slices=torch.eye(4))),
            (ValueError, "slices must not", both),
            (ValueError, "num_slices must", lambda: sigreg(z, num_slices=0)),
            (ValueError, "num_slices must", lambda: SIGReg(num_slices=0)),
            (ValueError, "num_knots must", lambda: sigreg(z, num_knots=1)),
            (ValueError, "num_knots must", lambda: SIGReg(num_knots=1)),
            (ValueError, "t_max must", lambda: sigreg(z, t_max=0.0)),
            (ValueError, "t_max must", lambda: SIGReg(t_max=-3.0)),
            (ValueError, "reduction must", lambda: sigreg(z, reduction="sum")),
        ]


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (torch.zeros(8, 1), 8 * 0.4020476),
        (torch.ones(8, 1), 8 * 1.186006),
        (torch.tensor([[-1.0], [1.0]]), 0.205659),
    ],
    ids=["zeros", "ones", "-1 and 1"],
)
def test_known_values(z, expected):
    found = sigreg(z.double(), slices=ONE)
    torch.testing.assert_close(found.item(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [16, 256])
def test_mean_under_the_null_does_not_depend_on_the_batch_size(rows):
    z = torch.randn(500, rows, 4, generator=torch.Generator().manual_seed(2))
    each = sigreg(z, slices=torch.eye(4), reduction="none")
    assert abs(each.mean() - NULL_MEAN) < 4 * each.std() / each.numel() ** 0.5


def test_mean_is_the_mean_of_all_views_and_slices():
    z = torch.randn(3, 10, 4, dtype=torch.float64)
    each = sigreg(z, num_slices=6, seed=1, reduction="none")
    assert each.shape == (3, 6)
    torch.testing.assert_close(sigreg(z, num_slices=6, seed=1), each.mean())


def test_gradient_without_reduction_is_that_of_the_mean():
    z = torch.randn(3, 10, 4, dtype=torch.float64, requires_grad=True)
    by_mean, by_each = (
        torch.autograd.grad(sigreg(z, num_slices=6, seed=1, reduction=reduction).mean(), z)
        for reduction in ("mean", "none")
    )
    torch.testing.assert_close(by_mean, by_each)


def test_a_batch_without_views_is_one_view():
    z = torch.randn(10, 4)
    assert torch.equal(sigreg(z, seed=1), sigreg(z[None], seed=1))


def test_slices_are_new_at_every_call():
    z = torch.randn(10, 4)
    assert sigreg(z) != sigreg(z)
    assert sigreg(z, seed=2) == sigreg(z, seed=2)


def test_gradient_vanishes_with_the_spread_of_a_collapsed_batch():
    # Sheet: .071, 7.1e-3, 7.1e-4 at spreads 1e-2, 1e-3, 1e-4.
    base = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0)).double()
    norms = []
    for spread in (1e-2, 1e-3, 1e-4):
        z = (spread * base).requires_grad_()
        (gradient,) = torch.autograd.grad(sigreg(z, num_slices=64, seed=1), z)
        norms.append(gradient.norm().item())
    assert norms[0] == pytest.approx(0.071, rel=0.15)
    assert norms[0] / norms[1] == pytest.approx(10, rel=0.01)
    assert norms[1] / norms[2] == pytest.approx(10, rel=0.01)


def test_gradient_of_exactly_zero_is_zero():
    z = torch.zeros(8, 4, requires_grad=True)
    sigreg(z, seed=1).backward()
    assert torch.equal(z.grad, torch.zeros(8, 4))


def test_nan_propagates():
    z = torch.randn(8, 4)
    z[3, 2] = torch.nan
    assert sigreg(z).isnan()


def test_half_precision_keeps_projections_in_float32():
    # Rounding p to bfloat16 moves the statistic by 0.03 here; rounding the loss by 0.004.
    z = torch.randn(256, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    slices = random_slices(64, 32, seed=1)
    found, exact = sigreg(z, slices=slices), sigreg(z.double(), slices=slices.double())
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        found = sigreg(z, slices=slices)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_function_compiles_with_fresh_slices(fresh_dynamo):
    compiled = torch.compile(sigreg, fullgraph=True, backend="aot_eager")
    z = torch.randn(10, 4, requires_grad=True)
    first, second = compiled(z), compiled(z)
    first.backward()
    assert first != second
    assert z.grad.isfinite().all()
