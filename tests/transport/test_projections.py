"""Projections on the simplex: known answers of the sheet of paper 122, and agreement with POT."""

import contextlib
import io

import pytest
import torch

from regularizers.transport import project_simplex, project_sparse_nonneg, project_sparse_simplex


def _rows(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_known_answers():
    close = lambda have, want: torch.testing.assert_close(have, _rows(*want), atol=1e-4, rtol=0)
    v, u = _rows(0.5, 1.0, 0.2), _rows(0.5, 0.4, 0.3)
    close(project_simplex(v), [0.25, 0.75, 0])
    close(project_sparse_simplex(v, 1), [0, 1, 0])
    close(project_sparse_simplex(v, 2), [0.25, 0.75, 0])
    close(project_simplex(u), [0.4333, 0.3333, 0.2333])
    close(project_sparse_simplex(u, 2), [0.55, 0.45, 0])
    close(project_sparse_nonneg(_rows(1.0, -1.0, 2.0), 1), [0, 0, 2])


def test_masking_comes_before_projecting():
    # Projecting first and truncating the result would give other numbers.
    v = _rows(0.5, 0.4, 0.3)
    truncated = project_simplex(v) * _rows(1.0, 1.0, 0.0)
    assert (project_sparse_simplex(v, 2) - truncated / truncated.sum()).abs().max() > 1e-3


def test_k_of_the_length_or_more_is_the_simplex():
    v = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for k in (8, 9, 100):
        assert torch.equal(project_sparse_simplex(v, k), project_simplex(v))


def test_every_dimension_and_a_sum_for_each_vector():
    v = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = torch.rand(3, 5, dtype=torch.float64) + 0.1
    torch.testing.assert_close(project_sparse_simplex(v, 2, z, dim=1).sum(1), z)


@pytest.mark.parametrize("k", [None, 1, 3])
def test_agrees_with_pot(k):
    ot = pytest.importorskip("ot")
    v = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with contextlib.redirect_stdout(io.StringIO()):  # POT prints debugging shapes
        if k is None:
            expected = ot.smooth.projection_simplex(v.numpy(), 2.0, axis=1)
            result = project_simplex(v, 2.0)
        else:
            expected = ot.utils.projection_sparse_simplex(v.numpy(), k, 2.0, axis=1)
            result = project_sparse_simplex(v, k, 2.0)
    torch.testing.assert_close(result, torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_cotangent_is_centred_on_the_support():
    v = _rows(0.5, 1.0, 0.2).requires_grad_()
    z = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(project_simplex(v, z), (v, z), _rows(1.0, 3.0, 7.0))
    assert gradients[0].tolist() == [-1, 1, 0]
    assert gradients[1].item() == 2


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match="k must"):
        project_sparse_simplex(_rows(1.0), 0)
    with pytest.raises(TypeError, match="k must"):
        project_sparse_nonneg(_rows(1.0), 1.5)
    with pytest.raises(ValueError, match="z must"):
        project_simplex(_rows(1.0), -1.0)
    with pytest.raises(TypeError, match="v must"):
        project_simplex([1.0])
