"""MSBReg: the facts of the sheet of paper 134."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regularizers.representation import (
    MSBReg,
    brownian_diffusive_loss,
    byol_momentum,
    ema_update_,
    multiview_centroid_loss,
    singular_value_loss,
)
from tests.harness import DTYPES, GraphRecorder, MethodContract

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, sums in another order


def _views(batch=6, views=3, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, views, dim, generator=generator, dtype=torch.float64)


class TestMSBReg(MethodContract):
    def build(self, dtype):
        return MSBReg(lambda_brownian=0.2, lambda_singular=0.7)

    def call(self, module, dtype):
        online = _views().to(dtype).requires_grad_()
        return module(online, _views(seed=1).to(dtype)).total.to(dtype)

    def bad_inputs(self):
        z = torch.ones(3, 2, 4)
        return [
            (ValueError, "lambda_brownian must", lambda: MSBReg(lambda_brownian=-0.1)),
            (ValueError, "lambda_singular must", lambda: MSBReg(lambda_singular=-1.0)),
            (ValueError, "centroid must", lambda: MSBReg(centroid="online")),
            (ValueError, "form must", lambda: MSBReg(form="l2")),
            (ValueError, "singular_form must", lambda: MSBReg(singular_form="l2")),
            (ValueError, "online must", lambda: MSBReg()(z[0], z)),
            (ValueError, "target must", lambda: MSBReg()(z, z[:2])),
            (TypeError, "online must", lambda: MSBReg()(z.long(), z)),
        ]


def test_views_at_their_centroid_cost_nothing():
    views = _views()[:, :1].expand(-1, 3, -1)
    for centroid in ("target", "both"):
        found = multiview_centroid_loss(views, 5 * views, centroid=centroid)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-14)


def test_worked_values_of_two_orthogonal_views():
    views = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    own = multiview_centroid_loss(views, views, renormalize=False)
    assert own.item() == pytest.approx(0.5)
    assert multiview_centroid_loss(views, views).item() == pytest.approx(2 - math.sqrt(2))


def test_cosine_is_half_of_the_squared_distance():
    online, target = _views(), _views(seed=1)
    for centroid in ("target", "both"):
        squared, cosine = (
            multiview_centroid_loss(online, target, centroid=centroid, form=form)
            for form in ("sq", "cosine")
        )
        torch.testing.assert_close(squared, 2 * cosine, **EXACT)
    center = F.normalize(target, dim=-1).mean(1)
    mean = F.normalize(online, dim=-1).mean(1)
    torch.testing.assert_close(cosine, (1 - F.cosine_similarity(mean, center)).mean(), **EXACT)


def test_two_views_with_equal_targets_are_the_regression_of_byol():
    online, target = _views(views=2), _views(views=1, seed=1).expand(-1, 2, -1)
    byol = (2 - 2 * F.cosine_similarity(online, target.flip(1), dim=-1)).mean()
    loss = MSBReg(lambda_brownian=0.0, lambda_singular=0.0)(online, target)
    torch.testing.assert_close(loss.total, byol, **EXACT)


def test_a_centroid_of_its_own_length_is_the_mean_over_all_pairs_of_views():
    online, target = _views(), _views(seed=1)
    z, t = F.normalize(online, dim=-1), F.normalize(target, dim=-1)
    pairs = (z[:, :, None] - t[:, None]).square().sum(-1).mean()
    scatter = 1 - t.mean(1).square().sum(-1).mean()
    found = multiview_centroid_loss(online, target, renormalize=False)
    torch.testing.assert_close(found + scatter, pairs, **EXACT)


def test_orthonormal_rows_cost_nothing():
    z, _ = torch.linalg.qr(_views(5, 5, 5)[0])
    for form in ("eig_sq", "smooth_l1"):
        loss = singular_value_loss(z, form=form)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-14)


def test_equal_rows_cost_m_less_one():
    for batch, dim in ((4, 9), (9, 4), (4, 4)):
        z = torch.full((batch, dim), 0.3, dtype=torch.float64)
        assert singular_value_loss(z).item() == pytest.approx(3.0)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 3)])
@pytest.mark.parametrize("center", [False, True])
def test_the_gram_form_is_that_of_the_singular_values(shape, center):
    z = _views(1, *shape)[0]
    rows = F.normalize(z)
    rows = rows - rows.mean(0) if center else rows
    m = min(shape)
    p = torch.linalg.svdvals(rows).square() / len(rows)
    expected = (m * p - 1).square().mean()
    torch.testing.assert_close(singular_value_loss(z, center=center), expected, **EXACT)
    expected = F.smooth_l1_loss((m * p).sqrt(), torch.ones(m).double())
    found = singular_value_loss(z, center=center, form="smooth_l1")
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("form", ["eig_sq", "smooth_l1"])
def test_gradient_is_finite_at_equal_singular_values_and_at_collapse(form):
    for z in (torch.eye(4), torch.ones(4, 4), torch.zeros(4, 4)):
        z = z.double().requires_grad_()
        (gradient,) = torch.autograd.grad(singular_value_loss(z, form=form), z)
        assert gradient.isfinite().all()


def test_singular_loss_is_invariant_to_rotation_and_order():
    z = _views(1, 8, 5)[0]
    turn, _ = torch.linalg.qr(_views(1, 5, 5, seed=1)[0])
    expected = singular_value_loss(z)
    torch.testing.assert_close(singular_value_loss(z @ turn), expected, **EXACT)
    torch.testing.assert_close(singular_value_loss(z.flip(0)), expected, **EXACT)


def test_sets_of_embeddings_are_averaged():
    z = _views(3, 8, 5)
    expected = torch.stack([singular_value_loss(one) for one in z]).mean()
    torch.testing.assert_close(singular_value_loss(z), expected, **EXACT)


def test_kicks_have_mean_zero_and_variance_one_over_d():
    z = torch.randn(1, 1, 8, dtype=torch.float64).expand(10_000, 1, 8)
    generator = torch.Generator().manual_seed(0)
    kicks = brownian_diffusive_loss(z, generator=generator, reduction="none")
    assert abs(kicks.mean()) < 4 * (1 / 8 / 10_000) ** 0.5  # four standard errors
    assert kicks.var().item() == pytest.approx(1 / 8, rel=0.05)


def test_views_of_an_image_share_their_kick():
    z = _views()[:, :1].expand(-1, 3, -1)
    draw = lambda **options: brownian_diffusive_loss(
        z, generator=torch.Generator().manual_seed(3), reduction="none", **options
    )
    shared = draw()
    torch.testing.assert_close(shared, shared[:, :1].expand(-1, 3), **EXACT)
    assert not torch.equal(shared[0], shared[1])
    own = draw(shared_views=False)
    assert not torch.equal(own[:, 0], own[:, 1])


def test_a_generator_and_given_directions_decide_the_kicks():
    z = _views()
    draw = lambda seed: brownian_diffusive_loss(z, generator=torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    directions = F.normalize(_views(views=1, seed=2), dim=-1)
    expected = (F.normalize(z, dim=-1) * directions).sum(-1)
    found = brownian_diffusive_loss(z, directions=directions, reduction="none")
    torch.testing.assert_close(found, expected, **EXACT)


def test_gradient_of_the_kick_is_its_tangent_part():
    z = F.normalize(_views(), dim=-1).requires_grad_()
    directions = F.normalize(_views(views=1, seed=2), dim=-1)
    (gradient,) = torch.autograd.grad(brownian_diffusive_loss(z, directions=directions), z)
    along = (z * directions).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, ((directions - along * z) / 18).detach(), **EXACT)


def test_gradient_is_tangent_to_the_sphere_and_spares_the_targets():
    online = _views().requires_grad_()
    target = _views(seed=1).requires_grad_()
    MSBReg(lambda_brownian=0.5)(online, target).total.backward()
    assert target.grad is None
    radial = (online.grad * online).sum(-1)
    assert online.grad.abs().max() > 1e-3
    torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-14)


def test_rows_of_zeros_stay_finite():
    online = _views()
    online[0] = 0
    online.requires_grad_()
    loss = MSBReg()(online, online.detach())
    loss.total.backward()
    assert loss.total.isfinite()
    assert online.grad.isfinite().all()


def test_total_is_the_weighted_sum_of_its_terms():
    online, target = _views(), _views(seed=1)
    directions = _views(views=1, seed=2)
    loss = MSBReg(lambda_brownian=0.3, lambda_singular=0.6)(online, target, directions=directions)
    assert loss.centroid == multiview_centroid_loss(online, target)
    assert loss.brownian == brownian_diffusive_loss(online, directions=directions)
    assert loss.singular == singular_value_loss(online.transpose(0, 1))
    expected = loss.centroid + 0.3 * loss.brownian + 0.6 * loss.singular
    torch.testing.assert_close(loss.total, expected, **EXACT)


def test_a_schedule_of_the_weights_compiles_one_graph(fresh_dynamo):
    module, graphs = MSBReg(), GraphRecorder()
    online, target = _views(), _views(seed=1)
    directions = _views(views=1, seed=2)
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    for step in range(12):
        module.lambda_singular = 0.1 * step
        found = compiled(online, target, directions=directions)
        torch.testing.assert_close(found.total, module(online, target, directions=directions).total)
    assert len(graphs) == 1


def test_reductions_agree():
    online, target = _views(), _views(seed=1)
    directions = _views(views=1, seed=2)
    for loss in (
        lambda reduction: multiview_centroid_loss(online, target, reduction=reduction),
        lambda reduction: multiview_centroid_loss(
            online, target, centroid="both", reduction=reduction
        ),
        lambda reduction: brownian_diffusive_loss(
            online, directions=directions, reduction=reduction
        ),
    ):
        torch.testing.assert_close(loss("none").mean(), loss("mean"), **EXACT)
        torch.testing.assert_close(loss("none").sum(), loss("sum"), **EXACT)
    assert multiview_centroid_loss(online, target, reduction="none").shape == (6, 3)
    both = multiview_centroid_loss(online, target, centroid="both", reduction="none")
    assert both.shape == (6,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_types_give_float32(dtype):
    online, target = _views().to(dtype), _views(seed=1).to(dtype)
    loss = MSBReg(lambda_brownian=0.0)(online, target)
    expected = MSBReg(lambda_brownian=0.0)(online.double(), target.double())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {term.dtype for term in loss} == {wide}
    torch.testing.assert_close(loss.total.double(), expected.total, rtol=1e-5, atol=1e-5)


def test_nan_gives_nan():
    z = _views()
    z[0, 0, 0] = math.nan
    assert all(term.isnan() for term in MSBReg()(z, _views(seed=1)))


def test_momentum_rises_from_its_base_to_one():
    found = [byol_momentum(step, 10, base=0.9) for step in range(12)]
    assert found[0] == pytest.approx(0.9)
    assert found[5] == pytest.approx(0.95)
    assert found[10:] == [1.0, 1.0]
    assert found == sorted(found)


def test_bad_input_names_the_argument():
    z = torch.ones(3, 2, 4)
    for exception, name, call in [
        (ValueError, "z must", lambda: singular_value_loss(z[0, 0])),
        (ValueError, "z must", lambda: singular_value_loss(z[:, :0])),
        (ValueError, "z must", lambda: brownian_diffusive_loss(z[:, :0])),
        (ValueError, "online must", lambda: multiview_centroid_loss(z[:, :0], z[:, :0])),
        (ValueError, "form must", lambda: singular_value_loss(z, form="eig")),
        (ValueError, "reduction must", lambda: brownian_diffusive_loss(z, reduction="all")),
        (
            ValueError,
            "directions must",
            lambda: brownian_diffusive_loss(z, directions=torch.ones(3, 4)),
        ),
        (
            ValueError,
            "renormalize must",
            lambda: multiview_centroid_loss(z, z, centroid="both", renormalize=False),
        ),
        (ValueError, "step must", lambda: byol_momentum(-1, 10)),
        (ValueError, "total_steps must", lambda: byol_momentum(0, 0)),
        (ValueError, "base must", lambda: byol_momentum(0, 10, base=1.5)),
    ]:
        with pytest.raises(exception, match=name):
            call()


def _effective_rank(z):
    """Exponential of the entropy of the normalised eigenvalues, between 1 and D."""
    p = torch.linalg.svdvals(F.normalize(z)).square()
    p = p / p.sum()
    return (-(p * p.clamp_min(1e-30).log()).sum()).exp().item()


def test_the_singular_term_keeps_every_dimension_and_the_other_two_collapse():
    def run(regularizer):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(128, 1, 16, generator=generator)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        target = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        target.load_state_dict(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(200):
            x = images + 0.3 * torch.randn(128, 4, 16, generator=generator)
            loss = regularizer(model(x), target(x), generator=generator).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update_(target, model, 0.0)  # the same network: nothing but the terms holds it up
        with torch.no_grad():
            return _effective_rank(model(images[:, 0]))

    torch.set_num_threads(1)
    assert run(MSBReg()) > 6
    assert run(MSBReg(lambda_brownian=0.0, lambda_singular=0.0)) < 1.5
    assert run(MSBReg(lambda_singular=0.0)) < 1.5  # nor do kicks alone hold it up
