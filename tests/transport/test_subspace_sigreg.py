"""Sub-JEPA: the method contract and the facts of the sheet of paper 21."""

import pytest
import torch

from regularizers.transport import SubspaceSIGReg, random_slices, sigreg, subspace_sigreg
from tests.harness import MethodContract

DOUBLE = {"dtype": torch.float64}


class TestSubspaceSIGReg(MethodContract):
    def build(self, dtype):
        return SubspaceSIGReg(
            6,
            2,
            init_mode="random_trainable_soft",
            num_slices=8,
            generator=torch.Generator().manual_seed(0),
            dtype=dtype,
        )

    def call(self, module, dtype):
        emb = torch.linspace(-1, 1, 60).reshape(5, 2, 6).to(dtype).requires_grad_()
        return module(emb)

    def bad_inputs(self):
        emb, projections = torch.randn(4, 3, 6), torch.randn(2, 3, 6)
        build = SubspaceSIGReg
        return [
            (ValueError, "subspace_dim must", lambda: build(6, 4)),
            (ValueError, "subspace_dim must", lambda: build(6, 2, 7)),
            (ValueError, "subspace_dim must", lambda: build(2, 2, 0)),
            (ValueError, "embed_dim must", lambda: build(0)),
            (ValueError, "num_subspaces must", lambda: build(6, 0)),
            (ValueError, "init_mode must", lambda: build(6, 2, init_mode="frozen")),
            (ValueError, "num_slices must", lambda: build(6, 2, num_slices=0)),
            (ValueError, "num_knots must", lambda: build(6, 2, num_knots=1)),
            (ValueError, "t_max must", lambda: build(6, 2, t_max=0.0)),
            (ValueError, "projections must", lambda: build(6, 3, projections=projections)),
            (ValueError, "emb must", lambda: build(6, 2)(emb[..., :5].transpose(0, 1)[:0])),
            (ValueError, "projections must", lambda: build(6, 2)(emb[..., :5])),
            (ValueError, "emb must", lambda: build(6, 2)(emb[0])),
            (ValueError, "emb must", lambda: build(6, 2)(emb[:1])),
            (ValueError, "emb must", lambda: build(6, 2)(emb[:, :0])),
            (ValueError, "emb must", lambda: build(6, 2).project(emb[0])),
            (TypeError, "emb must", lambda: build(6, 2)(emb.long())),
            (
                ValueError,
                "slices must",
                lambda: subspace_sigreg(emb, projections, slices=torch.eye(3)),
            ),
        ]


def _sheet_data(rows=256, dim=24):
    """Anisotropic embeddings of one time step."""
    z = torch.randn(rows, 1, dim, generator=torch.Generator().manual_seed(0), **DOUBLE)
    return z * torch.linspace(0.4, 2.0, dim, **DOUBLE)


def test_one_whole_subspace_is_sigreg_with_turned_slices():
    emb = torch.randn(20, 1, 6, **DOUBLE)
    module = SubspaceSIGReg(6, 1, dtype=torch.float64)
    slices = random_slices(6, 9, seed=1, **DOUBLE)
    found = subspace_sigreg(emb, module.projections, slices=slices[None])
    expected = sigreg(emb[:, 0], slices=module.projections[0].T @ slices)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_slices", [2, 500], ids=["folded", "two stages"])
def test_loss_is_the_mean_over_subspaces_times_and_slices(num_slices):
    emb = torch.randn(20, 3, 6, requires_grad=True, **DOUBLE)
    projections = torch.randn(2, 4, 6, **DOUBLE)
    slices = random_slices(4, num_slices, groups=2, seed=1, **DOUBLE)
    found = subspace_sigreg(emb, projections, slices=slices)
    expected = torch.stack(
        [sigreg(emb[:, t] @ projections[k].T, slices=slices[k]) for k in range(2) for t in range(3)]
    ).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, emb)[0] for loss in (found, expected)))


def test_mean_over_inits_is_sigreg_on_all_directions():
    torch.set_num_threads(1)  # many small calls
    emb = _sheet_data()
    full = sigreg(emb[:, 0], num_slices=4096, seed=1)
    found = []
    for init in range(60):
        generator = torch.Generator().manual_seed(init)
        module = SubspaceSIGReg(24, 4, num_slices=64, generator=generator, **DOUBLE)
        torch.manual_seed(init)
        found.append(module(emb))
    found = torch.stack(found)
    assert abs(found.mean() - full) < 3 * found.std() / 60**0.5 + 0.02 * full


def test_kept_subspaces_spread_more_than_free_slices():
    # Sheet: standard deviation .68 (4 subspaces x 64 slices) against .32 (256 free slices).
    torch.set_num_threads(1)  # many small calls
    emb = _sheet_data()
    inside, free = [], []
    for init in range(40):
        generator = torch.Generator().manual_seed(init)
        module = SubspaceSIGReg(24, 4, num_slices=64, generator=generator, **DOUBLE)
        torch.manual_seed(init)
        inside.append(module(emb))
        free.append(sigreg(emb[:, 0], num_slices=256, seed=init))
    assert torch.stack(inside).std() > 1.3 * torch.stack(free).std()


def test_subspaces_see_marginals_and_not_the_joint_distribution():
    # Sheet: z = (x, x), B = 512: near 49.7 for SIGReg, below the null mean 1.05 on the axes.
    x = torch.randn(512, 1, 1, generator=torch.Generator().manual_seed(4), **DOUBLE)
    emb = x.expand(512, 1, 2)
    axes = torch.eye(2, **DOUBLE)[:, None]
    assert sigreg(emb[:, 0], num_slices=1024, seed=1) > 40
    assert subspace_sigreg(emb, axes, num_slices=4, seed=1) < 3


def test_time_steps_are_not_mixed_into_the_batch():
    # Steps of other scales each: alone far from N(0, 1), together near to it.
    emb = torch.randn(200, 2, 4, **DOUBLE) * torch.tensor([0.2, 1.4], **DOUBLE)[:, None]
    module = SubspaceSIGReg(4, 1, num_slices=64, **DOUBLE)
    each = [module(emb[:, t : t + 1]) for t in range(2)]
    torch.testing.assert_close(module(emb), torch.stack(each).mean(), rtol=0.2, atol=0)
    torch.manual_seed(0)
    assert module(emb.flatten(0, 1)[:, None]) < module(emb)


def test_projections_of_the_orthogonal_mode_have_orthonormal_rows():
    projections = SubspaceSIGReg(12, 4, 5, **DOUBLE).projections
    torch.testing.assert_close(
        projections @ projections.mT, torch.eye(5, **DOUBLE).expand(4, 5, 5), rtol=0, atol=1e-6
    )  # drawn in float32


def test_subspaces_are_drawn_by_themselves():
    projections = SubspaceSIGReg(8, 2).projections
    assert (projections[0] @ projections[1].T).abs().max() > 0.01


def test_projections_of_the_random_modes_are_not_scaled():
    projections = SubspaceSIGReg(64, 4, init_mode="random_frozen").projections
    assert projections.var().item() == pytest.approx(1.0, abs=0.1)


def test_frozen_projections_are_a_buffer_of_the_state():
    module = SubspaceSIGReg(8, 2)
    assert list(module.state_dict()) == ["projections"]
    assert list(module.parameters()) == []
    assert module.orthogonality_loss() == 0


def test_trainable_projections_get_gradients_from_both_losses():
    module = SubspaceSIGReg(8, 2, init_mode="random_trainable_soft", num_slices=16)
    for loss in (module(torch.randn(10, 3, 8)), module.orthogonality_loss()):
        (gradient,) = torch.autograd.grad(loss, module.projections)
        assert gradient.abs().sum() > 0


def test_orthogonality_loss_is_the_mean_norm_of_the_excess():
    module = SubspaceSIGReg(5, 2, 3, init_mode="random_trainable_soft", **DOUBLE)
    a = module.projections
    norms = [(a[k] @ a[k].T - torch.eye(3, **DOUBLE)).norm() for k in range(2)]
    torch.testing.assert_close(module.orthogonality_loss(), torch.stack(norms).mean())


def test_orthogonality_loss_and_its_gradient_are_zero_at_orthonormal_rows():
    axes = torch.eye(4).view(2, 2, 4)
    module = SubspaceSIGReg(4, 2, init_mode="random_trainable_soft", projections=axes)
    loss = module.orthogonality_loss()
    loss.backward()
    assert loss == 0
    assert torch.equal(module.projections.grad, torch.zeros(2, 2, 4))


def test_slices_are_new_at_every_call_and_subspaces_are_not():
    module, emb = SubspaceSIGReg(8, 2, num_slices=4), torch.randn(10, 2, 8)
    before = module.projections.clone()
    assert module(emb) != module(emb)
    assert torch.equal(module.projections, before)


def test_project_gives_the_embeddings_of_every_subspace():
    module, emb = SubspaceSIGReg(8, 2), torch.randn(10, 3, 8)
    expected = torch.stack([(emb @ a.T).transpose(0, 1) for a in module.projections])
    torch.testing.assert_close(module.project(emb), expected)


def test_nan_propagates():
    emb = torch.randn(10, 3, 8)
    emb[0, 0, 0] = torch.nan
    assert SubspaceSIGReg(8, 2)(emb).isnan()
