"""VISReg, sliced Wasserstein and VICReg: the method contract and the facts of paper 5."""

import pytest
import torch

from regularizers.transport import (
    VISReg,
    jepa_loss,
    random_slices,
    sliced_gaussian_wasserstein,
    vicreg_loss,
    visreg,
)
from tests.harness import MethodContract

ONE = torch.ones(1, 1, dtype=torch.float64)


class TestVISReg(MethodContract):
    def build(self, dtype):
        return VISReg(num_slices=8)

    def call(self, module, dtype):
        return module(torch.linspace(-1, 1, 60).reshape(2, 5, 6).to(dtype).requires_grad_())

    def bad_inputs(self):
        z = torch.randn(4, 3)
        return [
            *(
                case
                for loss in (visreg, sliced_gaussian_wasserstein, vicreg_loss)
                for case in (
                    (ValueError, "z must", lambda loss=loss: loss(z[0])),
                    (ValueError, "z must", lambda loss=loss: loss(z[None, None])),
                    (ValueError, "batch of at least 2", lambda loss=loss: loss(z[:1])),
                    (TypeError, "z must", lambda loss=loss: loss(z.int())),
                )
            ),
            (ValueError, "slices must", lambda: visreg(z, slices=torch.eye(4))),
            (ValueError, "num_slices must", lambda: visreg(z, num_slices=0)),
            (ValueError, "num_slices must", lambda: VISReg(num_slices=0)),
            (ValueError, "num_slices must", lambda: sliced_gaussian_wasserstein(z, num_slices=0)),
            (ValueError, "eps must", lambda: visreg(z, eps=-1.0)),
            (ValueError, "eps must", lambda: VISReg(eps=-1.0)),
            (ValueError, "scale_weight must", lambda: visreg(z, scale_weight=-1.0)),
            (ValueError, "shape_weight must", lambda: VISReg(shape_weight=float("nan"))),
            (TypeError, "center_weight must", lambda: visreg(z, center_weight="1")),
            (ValueError, "var_weight must", lambda: vicreg_loss(z, var_weight=-1.0)),
            (ValueError, "cov_weight must", lambda: vicreg_loss(z, cov_weight=-1.0)),
        ]


def _terms(z, **options):
    options = {"seed": 1, "eps": 0.0, **options}
    return visreg(z, return_terms=True, **options)[1]


def _collapsed(spread):
    base = torch.randn(2, 128, 16, generator=torch.Generator().manual_seed(0)).double()
    return (spread * base).requires_grad_()


def _gradient(z, term, **options):
    (gradient,) = torch.autograd.grad(_terms(z, num_slices=64, **options)[term], z)
    return gradient


@pytest.mark.parametrize(
    ("z", "scale", "center"), [([-1.0, 1.0], 0.0, 0.0), ([0.0, 3.0], 0.25, 2.25)]
)
def test_known_values(z, scale, center):
    z = torch.tensor(z, dtype=torch.float64)[:, None]
    found = {k: v.item() for k, v in _terms(z, slices=ONE, seed=None).items()}
    assert found == pytest.approx({"scale": scale, "shape": 0.324071, "center": center}, abs=1e-6)


def test_weights_multiply_the_terms():
    z = torch.randn(2, 10, 3, dtype=torch.float64)
    terms = _terms(z)
    weights = {"scale_weight": 2.0, "shape_weight": 3.0, "center_weight": 5.0}
    expected = 2 * terms["scale"] + 3 * terms["shape"] + 5 * terms["center"]
    torch.testing.assert_close(visreg(z, seed=1, eps=0.0, **weights), expected)


def test_shape_does_not_see_scale_and_shift():
    z = torch.randn(2, 20, 3, dtype=torch.float64)
    torch.testing.assert_close(_terms(z)["shape"], _terms(0.01 * z - 7)["shape"])


def test_terms_do_not_depend_on_the_order_of_samples():
    z = torch.randn(2, 20, 3, dtype=torch.float64)
    torch.testing.assert_close(_terms(z), _terms(z[:, torch.randperm(20)]))


def test_terms_are_of_every_view_by_itself():
    z = torch.randn(3, 20, 4, dtype=torch.float64)
    views = [_terms(view) for view in z]
    for name, term in _terms(z).items():
        torch.testing.assert_close(term, torch.stack([view[name] for view in views]).mean())


def test_deviation_is_that_of_the_population():
    z = torch.randn(20, 3, dtype=torch.float64)
    expected = ((z.std(0, correction=0) + 0.1 - 1) ** 2).mean()
    torch.testing.assert_close(_terms(z, eps=0.1)["scale"], expected)


def test_shape_gradient_is_that_with_a_constant_deviation():
    z = torch.randn(1, 30, 4, dtype=torch.float64, requires_grad=True)
    slices = random_slices(4, 20, seed=2, dtype=torch.float64)
    q = torch.special.ndtri(torch.arange(1, 31, dtype=torch.float64) / 31)[:, None]

    def shape(detached):
        centered = z - z.mean(1, keepdim=True)
        sigma = centered.norm(dim=1, keepdim=True) / 30**0.5
        sigma = sigma.detach() if detached else sigma
        return (((centered / sigma) @ slices).sort(1).values - q).square().mean()

    (found,) = torch.autograd.grad(_terms(z, slices=slices, seed=None)["shape"], z)
    (constant,) = torch.autograd.grad(shape(detached=True), z)
    (through,) = torch.autograd.grad(shape(detached=False), z)
    torch.testing.assert_close(found, constant)
    centered = (z - z.mean(1, keepdim=True)).detach()
    # Without the constant the loss would not depend on the scale at all.
    assert abs((through * centered).sum()) < 1e-12
    assert abs((found * centered).sum()) > 1e-3


@pytest.mark.parametrize(
    ("term", "figures"),
    [("scale", (0.0309, 0.0312, 0.0312)), ("shape", (0.245, 2.43, 22.4))],
)
def test_gradients_near_collapse_do_not_vanish(term, figures):
    # Sheet: the scale term's gradient tends to a constant, the shape term's grows. The slices are
    # of another draw than there.
    for spread, figure in zip((1e-2, 1e-3, 1e-4), figures, strict=True):
        norm = _gradient(_collapsed(spread), term, eps=1e-6).norm().item()
        assert norm == pytest.approx(figure, rel=0.15), spread


def test_gradients_at_exactly_zero():
    z = torch.zeros(16, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(_gradient(z, "scale", eps=1e-6), torch.zeros_like(z))
    shape = _gradient(z, "shape", eps=1e-6)
    assert shape.isfinite().all()
    assert 1e2 < shape.norm() < 1e7


def test_nan_propagates():
    z = torch.randn(8, 4)
    z[3, 2] = torch.nan
    assert visreg(z).isnan()
    assert sliced_gaussian_wasserstein(z).isnan()
    assert vicreg_loss(z).isnan()


def test_collapsed_encoder_recovers():
    # Sheet: N(0, I_8) data, linear 8 -> 16 encoder, SGD 0.1, clip 1, 400 steps, K = 64: mean
    # standard deviation .954 and .948. It stays below 1: the batch spans 8 dimensions of 16.
    torch.set_num_threads(1)  # tensors of a few kilobytes
    regularizer = VISReg(num_slices=64)

    def spread(start, lamb):
        generator = torch.Generator().manual_seed(0)
        encoder = torch.nn.Linear(8, 16)
        with torch.no_grad():
            encoder.weight.copy_(start * torch.randn(16, 8, generator=generator))
            encoder.bias.zero_()
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        for _ in range(400):
            x = torch.randn(128, 8, generator=generator)
            views = torch.stack([x, x + 0.1 * torch.randn(128, 8, generator=generator)])
            optimizer.zero_grad()
            jepa_loss(encoder(views), regularizer, lamb=lamb)[0].backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            return encoder(torch.randn(1024, 8, generator=generator)).std(0).mean().item()

    assert spread(1e-3, lamb=1.0) >= 0.9
    assert spread(1e-5, lamb=1.0) >= 0.9
    # The invariance alone asks for collapse.
    assert spread(1e-3, lamb=0.0) < 1e-2


def test_sliced_wasserstein_is_that_of_sorted_projections():
    z = torch.randn(2, 30, 4, dtype=torch.float64)
    slices = random_slices(4, 20, seed=2, dtype=torch.float64)
    q = torch.special.ndtri(torch.arange(1, 31, dtype=torch.float64) / 31)[:, None]
    expected = ((z @ slices).sort(1).values - q).square().mean()
    torch.testing.assert_close(sliced_gaussian_wasserstein(z, slices=slices), expected)


def test_vicreg_is_a_squared_hinge_and_the_covariance():
    z = torch.randn(2, 10, 3, dtype=torch.float64) * torch.tensor([0.5, 1.0, 2.0])
    rows = z.reshape(20, 3)
    hinge = torch.relu(1 - rows.std(0) - 1e-6).square().mean()
    c = rows.T.cov()
    expected = 25 * hinge + (c - c.diag().diag()).square().sum() / 3
    torch.testing.assert_close(vicreg_loss(z), expected)


def test_vicreg_gradient_of_equal_rows_is_finite():
    z = torch.ones(8, 4, requires_grad=True)
    vicreg_loss(z).backward()
    assert z.grad.isfinite().all()
