"""The JEPA losses: facts of the sheets of papers 5 and 21."""

import pytest
import torch

from regularizers.transport import (
    SubspaceSIGReg,
    invariance_loss,
    jepa_loss,
    jepa_world_model_loss,
    visreg,
)


def _zero(z):
    return z.new_zeros(())


def test_invariance_is_the_distance_to_the_mean_of_the_global_views():
    z = torch.randn(5, 7, 3, dtype=torch.float64)
    expected = (z - z[:2].mean(0)).square().mean()
    torch.testing.assert_close(invariance_loss(z, num_global=2), expected)
    torch.testing.assert_close(invariance_loss(z), z.var(0, correction=0).mean())


def test_gradient_of_invariance_flows_through_the_mean():
    z = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(invariance_loss(z, num_global=2), z)
    residual = (z - z[:2].mean(0)).detach() * 2 / z.numel()
    expected = residual.clone()
    expected[:2] -= residual.sum(0) / 2
    torch.testing.assert_close(found, expected)


def test_invariance_of_equal_views_is_zero():
    assert invariance_loss(torch.randn(1, 6, 3).expand(4, 6, 3)) == 0


def test_jepa_mixes_regularizer_and_invariance():
    z = torch.randn(4, 9, 3, dtype=torch.float64)
    regularizer = lambda z: visreg(z, num_slices=5, seed=1)
    loss, terms = jepa_loss(z, regularizer, lamb=0.75, num_global=2)
    assert terms["regularizer"] == regularizer(z)
    assert terms["invariance"] == invariance_loss(z, num_global=2)
    torch.testing.assert_close(loss, 0.75 * terms["regularizer"] + 0.25 * terms["invariance"])


def test_jepa_weight_is_that_of_the_paper():
    z = torch.randn(4, 9, 3)
    torch.testing.assert_close(jepa_loss(z, _zero)[0], 0.1 * invariance_loss(z))


def test_world_model_loss_is_the_sum_of_its_terms():
    pred, target, emb = torch.randn(3, 8, 5, 6, dtype=torch.float64)
    regularizer = SubspaceSIGReg(6, 2, init_mode="random_trainable_soft", num_slices=8).double()
    loss, terms = jepa_world_model_loss(pred, target, emb, regularizer, lamb=0.3, theta=0.2)
    torch.testing.assert_close(terms["prediction"], (pred - target).square().mean())
    torch.testing.assert_close(terms["orthogonality"], regularizer.orthogonality_loss().detach())
    total = terms["prediction"] + 0.3 * terms["regularizer"] + 0.2 * terms["orthogonality"]
    torch.testing.assert_close(loss.detach(), total)


def test_world_model_gradient_reaches_the_target():
    pred, target = (torch.randn(4, 2, 3, requires_grad=True) for _ in range(2))
    jepa_world_model_loss(pred, target, pred, _zero, lamb=0.0)[0].backward()
    torch.testing.assert_close(target.grad, -pred.grad)
    assert target.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_losses_keep_the_dtype(dtype):
    z = torch.randn(2, 4, 3).to(dtype)
    assert invariance_loss(z).dtype == dtype
    assert jepa_loss(z, visreg)[0].dtype == dtype


def test_jepa_compiles_to_one_graph(fresh_dynamo):
    step = lambda z: jepa_loss(z, visreg, num_global=2)[0]
    z = torch.randn(3, 6, 4, requires_grad=True)
    torch.compile(step, fullgraph=True, backend="aot_eager")(z).backward()
    assert z.grad.isfinite().all()


def test_bad_input_names_the_argument():
    z = torch.randn(3, 4, 2)
    world = lambda target=z, **options: jepa_world_model_loss(
        z, target, z, _zero, **{"lamb": 0.1, **options}
    )
    for exception, name, call in [
        (ValueError, "z must", lambda: invariance_loss(z[0])),
        (TypeError, "z must", lambda: invariance_loss(z.long())),
        (ValueError, "num_global must", lambda: invariance_loss(z, num_global=0)),
        (ValueError, "num_global must", lambda: invariance_loss(z, num_global=4)),
        (TypeError, "num_global must", lambda: invariance_loss(z, num_global=1.0)),
        (ValueError, "lamb must", lambda: jepa_loss(z, _zero, lamb=1.5)),
        (ValueError, "target must", lambda: world(target=z[:2])),
        (ValueError, "lamb must", lambda: world(lamb=-1.0)),
        (ValueError, "theta must", lambda: world(theta=-1.0)),
        (TypeError, "orthogonality_loss", lambda: world(theta=1.0)),
    ]:
        with pytest.raises(exception, match=name):
            call()
