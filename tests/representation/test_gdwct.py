"""Group-wise whitening and coloring: the facts of the sheet of paper 94."""

import math

import pytest
import torch
from torch import nn

from regularizers.representation import (
    GroupWhiteningColoring,
    coloring_loss,
    coloring_matrix,
    exact_whiten_color,
    group_covariance,
    whitening_loss,
)
from tests.harness import DTYPES, MethodContract

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64, products in another order


def _maps(batch=3, channels=8, side=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, side, side, generator=generator, dtype=torch.float64)


def _white(groups=2, channels=8):
    """Maps whose group covariances are the identity to rounding."""
    x = _maps(8, channels, 8)
    return exact_whiten_color(x, _orthonormal(channels), groups=groups, eps=0.0)


def _orthonormal(channels):
    """Maps of mean 0 and covariance I in all channels together."""
    rows = torch.randn(4 * channels, channels, dtype=torch.float64)
    rows, _ = torch.linalg.qr(rows - rows.mean(0))
    return (rows * math.sqrt(4 * channels - 1)).view(4 * channels, channels, 1, 1)


def _layer(groups=2, alpha=1.0, channels=8, **options):
    torch.manual_seed(0)
    layer = GroupWhiteningColoring(
        channels, groups=groups, style_dim=8, mlp_dim=16, alpha_init=alpha, **options
    )
    return layer.double()


def _set_matrix(layer, s):
    """Make the layer predict the matrices s [c, c] and the mean 0 whatever the style."""
    with torch.no_grad():
        for mlp, bias in ((layer.matrix_mlp, s.flatten()), (layer.mean_mlp, torch.zeros(()))):
            mlp[-1].weight.zero_()
            mlp[-1].bias.copy_(bias)


class TestGroupWhiteningColoring(MethodContract):
    def build(self, dtype):
        torch.manual_seed(0)
        return GroupWhiteningColoring(8, groups=2, style_dim=4, mlp_dim=16, dtype=dtype)

    def call(self, module, dtype):
        generator = torch.Generator().manual_seed(0)
        content = torch.randn(3, 8, 4, 4, generator=generator).to(dtype)
        out, covariance, basis = module(content, torch.ones(3, 4, dtype=dtype))
        assert covariance.dtype == basis.dtype != torch.float16
        penalty = whitening_loss(covariance) + coloring_loss(basis)
        return out.square() + penalty.to(dtype)

    def bad_inputs(self):
        make = lambda **options: GroupWhiteningColoring(
            8, **{"groups": 2, "style_dim": 4, "mlp_dim": 16, **options}
        )
        content, style = torch.randn(3, 8, 4, 4), torch.randn(3, 4)
        return [
            (ValueError, "channels must", lambda: make(groups=3, style_dim=3)),
            (ValueError, "style_dim must", lambda: make(groups=8)),
            (ValueError, "groups must", lambda: make(groups=0)),
            (ValueError, "alpha_init must", lambda: make(alpha_init=1.5)),
            (ValueError, "eps must", lambda: make(eps=-1.0)),
            (ValueError, "style must", lambda: make()(content, style[:, :2])),
            (ValueError, "x must", lambda: make()(content[:, :4], style)),
            (ValueError, "x must", lambda: make()(content[:1, :, :1, :1], style[:1])),
            (TypeError, "content must", lambda: make()(content.long(), style)),
        ]


def test_the_output_is_the_formula():
    layer, content = _layer(alpha=0.75), 5 + _maps()
    style = torch.randn(3, 8, dtype=torch.float64)
    out, covariance, basis = layer(content, style)
    centered = content - content.mean((0, 2, 3), keepdim=True)
    dense = torch.zeros(3, 8, 8, dtype=torch.float64)
    for sample in range(3):
        for group in range(2):
            part = slice(4 * group, 4 * group + 4)
            s = layer.matrix_mlp(style[sample, part]).view(4, 4)
            U = s / s.norm(dim=0)
            dense[sample, part, part] = U @ torch.diag(s.norm(dim=0)) @ U.T
            torch.testing.assert_close(basis[2 * sample + group], U, **EXACT)
    colored = (dense @ centered.flatten(2)).view_as(content)
    mean = layer.mean_mlp(style)[..., None, None]
    expected = 0.75 * (colored + mean) + 0.25 * content
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(covariance, group_covariance(content, groups=2))


def test_white_input_and_the_identity_give_centred_content():
    layer, content = _layer(), _white()
    _set_matrix(layer, torch.eye(4))
    out = layer(content, torch.randn(8, 8, dtype=torch.float64)).out
    expected = content - content.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_alpha_zero_returns_the_content():
    layer, content = _layer(alpha=0.0), _maps()
    out = layer(content, torch.randn(3, 8, dtype=torch.float64)).out
    assert torch.equal(out, content)


def test_a_large_mean_costs_the_rounding_of_the_content_and_no_more():
    layer, content = _layer(alpha=0.75), 1000 + _maps()
    content = content.float().double()  # what float32 can hold
    style = torch.randn(3, 8, dtype=torch.float64)
    expected = layer(content, style).out
    found = layer.float()(content.float(), style.float()).out
    # One unit in the last place of 1000 is 6e-5; products of 4 channels with entries below 1.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-4)


def test_alpha_is_put_back_into_its_range_and_learns_from_there():
    layer = _layer()
    content, style = _maps(), torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.alpha.fill_(1.3)
    frozen = layer.eval()(content, style).out
    assert layer.alpha == 1.3
    first = layer.train()(content, style).out
    assert layer.alpha == 1.0
    torch.testing.assert_close(first, frozen)
    second = layer(content, 2 * style).out  # two passes before one backward pass
    (first.sum() + second.square().sum()).backward()
    assert layer.alpha.grad.abs() > 0


def test_coloring_matrix_of_a_diagonal():
    s = torch.diag(torch.tensor([3.0, 2.0]))
    X, U = coloring_matrix(s)
    assert torch.equal(X, s)
    assert torch.equal(U, torch.eye(2))


def test_coloring_matrix_is_symmetric_and_definite_for_an_orthogonal_basis():
    s = torch.randn(5, 4, 4, dtype=torch.float64)
    X, _ = coloring_matrix(s)
    torch.testing.assert_close(X, X.mT, **EXACT)
    U, _ = torch.linalg.qr(s)
    X, basis = coloring_matrix(U * torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
    torch.testing.assert_close(basis, U, **EXACT)
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]).double().expand(5, 4)
    torch.testing.assert_close(torch.linalg.eigvalsh(X), expected, **EXACT)


def test_a_column_of_zeros_stays_finite():
    s = torch.randn(3, 3, dtype=torch.float64)
    s[:, 1] = 0
    s.requires_grad_()
    X, U = coloring_matrix(s)
    (X.sum() + U.square().sum() + coloring_loss(U)).backward()
    assert X.isfinite().all()
    assert s.grad.isfinite().all()


def test_white_content_takes_the_covariance_of_the_coloring_matrix():
    U, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    s = U * torch.tensor([2.0, 1.5, 1.0, 0.5]).double()
    layer = _layer()
    _set_matrix(layer, s)
    out = layer(_white(), torch.randn(8, 8, dtype=torch.float64)).out
    X, _ = coloring_matrix(s)
    found = group_covariance(out, groups=2, eps=0.0)
    torch.testing.assert_close(found, (X @ X.T).expand(2, 4, 4), **EXACT)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_exact_transformation_gives_the_statistics_of_the_style(groups):
    content, style = _maps(), 3 * _maps(5, 8, 3, seed=1) + 2
    style[:, 1] += style[:, 0]
    y = exact_whiten_color(content, style, groups=groups)
    found, wanted = (group_covariance(x, groups=groups) for x in (y, style))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.mean((0, 2, 3)), style.mean((0, 2, 3)), **EXACT)


def test_as_many_groups_as_channels_scale_each_channel():
    layer, content = _layer(groups=8), _maps()
    out = layer(content, torch.randn(3, 8, dtype=torch.float64)).out
    centered = content - content.mean((0, 2, 3), keepdim=True)
    slope = ((out - out.mean((2, 3), keepdim=True)) * centered).sum((2, 3)) / (
        (centered - centered.mean((2, 3), keepdim=True)) * centered
    ).sum((2, 3))
    rest = out - slope[..., None, None] * centered
    torch.testing.assert_close(rest, rest.mean((2, 3), keepdim=True).expand_as(rest), **EXACT)


def test_covariance_is_that_of_all_positions_of_the_batch():
    x = 50 + _maps()
    rows = x.permute(1, 0, 2, 3).reshape(2, 4, -1)
    expected = torch.stack([torch.cov(part) for part in rows]) + 0.5 * torch.eye(4)
    torch.testing.assert_close(group_covariance(x, groups=2, eps=0.5), expected, **EXACT)


def test_whitening_loss_vanishes_on_white_groups_alone():
    white = group_covariance(_white(), groups=2, eps=0.0)
    assert whitening_loss(white) < 1e-12
    assert whitening_loss(group_covariance(2 * _white(), groups=2)) > 0.5


def test_whitening_loss_ignores_order_within_a_group_and_constants():
    x = _maps()
    loss = lambda x: whitening_loss(group_covariance(x, groups=2))
    order = torch.tensor([2, 0, 3, 1, 5, 4, 7, 6])
    torch.testing.assert_close(loss(x[:, order]), loss(x), **EXACT)
    moved = x + torch.arange(8).double().view(1, 8, 1, 1)
    torch.testing.assert_close(loss(moved), loss(x), **EXACT)


def test_forms_of_the_coloring_loss_differ_on_a_rotation():
    U = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    assert coloring_loss(U).item() == pytest.approx(0.0, abs=1e-15)
    assert coloring_loss(U, form="direct").item() == pytest.approx(0.853553, abs=1e-6)
    assert coloring_loss(torch.eye(3), form="direct") == 0


@pytest.mark.parametrize("loss", [whitening_loss, coloring_loss])
def test_reductions_agree(loss):
    matrices = torch.randn(3, 4, 4, dtype=torch.float64)
    entries = loss(matrices, reduction="none")
    assert entries.shape == (3, 4, 4)
    torch.testing.assert_close(entries.mean(), loss(matrices), **EXACT)
    torch.testing.assert_close(entries.sum(), loss(matrices, reduction="sum"), **EXACT)


def test_gradcheck():
    content = _maps(2, 4, 2).requires_grad_()
    torch.manual_seed(0)
    layer = GroupWhiteningColoring(4, groups=2, style_dim=2, mlp_dim=3).double()
    style = torch.randn(2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: tuple(layer(x, s)), (content, style))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_accumulate_in_float32(dtype):
    x = _maps().to(dtype)
    found = group_covariance(x, groups=2)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = group_covariance(x.double(), groups=2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert exact_whiten_color(x, x, groups=2).dtype == dtype


def test_nan_gives_nan():
    x = _maps()
    x[0, 0, 0, 0] = math.nan
    assert whitening_loss(group_covariance(x, groups=2)).isnan()
    assert coloring_loss(torch.full((2, 2), math.nan)).isnan()


def test_bad_input_names_the_argument():
    x = torch.randn(2, 6, 3, 3)
    for exception, name, call in [
        (TypeError, "x must", lambda: group_covariance(x.long(), groups=2)),
        (ValueError, "x must", lambda: group_covariance(x, groups=4)),
        (ValueError, "x must", lambda: group_covariance(x[0, 0], groups=1)),
        (ValueError, "x must", lambda: group_covariance(x[:1, :, :1, :1], groups=2)),
        (ValueError, "groups must", lambda: group_covariance(x, groups=0)),
        (ValueError, "eps must", lambda: group_covariance(x, groups=2, eps=-1.0)),
        (ValueError, "covariance must", lambda: whitening_loss(torch.ones(2, 3))),
        (ValueError, "basis must", lambda: coloring_loss(torch.ones(2, 3))),
        (ValueError, "form must", lambda: coloring_loss(torch.eye(2), form="code")),
        (ValueError, "reduction must", lambda: whitening_loss(torch.eye(2), reduction="max")),
        (ValueError, "s must", lambda: coloring_matrix(torch.ones(3))),
        (TypeError, "style must", lambda: exact_whiten_color(x, x.double(), groups=2)),
        (ValueError, "x must", lambda: exact_whiten_color(x, x[:, :4], groups=2)),
    ]:
        with pytest.raises(exception, match=name):
            call()


def test_the_penalty_makes_an_encoder_emit_white_groups():
    def run(weight):
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(16, 16, generator=generator)
        torch.manual_seed(0)
        encoder, decoder = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
        for _ in range(300):
            x = torch.einsum("dc,bchw->bdhw", mixing, torch.randn(8, 16, 4, 4, generator=generator))
            code = encoder(x)
            penalty = whitening_loss(group_covariance(code, groups=4))
            error = (decoder(code) - x).square().mean() / x.square().mean()
            optimizer.zero_grad()
            (error + weight * penalty).backward()
            optimizer.step()
        return penalty.item(), error.item()

    torch.set_num_threads(1)
    (colored, _), (white, error) = run(0.0), run(1.0)
    assert white < 0.1 * colored
    assert error < 0.02
