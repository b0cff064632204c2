"""Rotations: exponential, logarithm and two columns, at all angles and to every derivative."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from regularizers.geometry import rotation_6d_to_matrix, so3_exp, so3_log

ANGLES = (0.0, 1e-12, 1e-6, 1e-3, 0.011, 0.3, 1.5, 3.0, math.pi - 1e-3, math.pi - 1e-6)


def _vectors(angle, count=6, dtype=torch.float64):
    axes = torch.randn(count, 3, dtype=torch.float64)
    return (angle * axes / axes.norm(dim=1, keepdim=True)).to(dtype)


@pytest.mark.parametrize("angle", ANGLES)
def test_exponential_is_that_of_the_matrix(angle):
    w = _vectors(angle)
    zero = torch.zeros(6, dtype=w.dtype)
    rows = [zero, -w[:, 2], w[:, 1], w[:, 2], zero, -w[:, 0], -w[:, 1], w[:, 0], zero]
    expected = torch.linalg.matrix_exp(torch.stack(rows, 1).view(6, 3, 3))
    torch.testing.assert_close(so3_exp(w), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("angle", ANGLES)
def test_logarithm_undoes_the_exponential(angle):
    w = _vectors(angle)
    torch.testing.assert_close(so3_log(so3_exp(w)), w, rtol=0, atol=1e-14)


@pytest.mark.parametrize("angle", ANGLES[:-1])
def test_logarithm_undoes_the_exponential_in_float32(angle):
    # Relative to the angle near zero too, where the trace alone knows nothing.
    w = _vectors(angle, dtype=torch.float32)
    error = (so3_log(so3_exp(w)) - w).norm(dim=1)
    assert (error <= 1e-6 * angle).all()


@pytest.mark.parametrize("axis", range(3))
def test_half_a_turn_has_one_of_its_two_logarithms(axis):
    half = -torch.eye(3, dtype=torch.float64)
    half[axis, axis] = 1
    w = so3_log(half)
    assert abs(w[axis]) == math.pi
    assert w.count_nonzero() == 1
    torch.testing.assert_close(so3_exp(w), half, rtol=0, atol=1e-15)


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.011, 1.5, 3.0, math.pi - 1e-3])
def test_derivatives_are_right_at_every_angle(angle):
    w = _vectors(angle, count=2).requires_grad_()
    assert gradcheck(so3_exp, w)
    assert gradgradcheck(so3_exp, w)
    rotation = so3_exp(w).detach().requires_grad_()
    assert gradcheck(so3_log, rotation)
    assert gradgradcheck(so3_log, rotation)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, math.pi - 1e-7])
def test_logarithm_of_exponential_has_the_identity_as_derivative(angle):
    w = _vectors(angle, count=1)[0]
    jacobian = torch.autograd.functional.jacobian(lambda w: so3_log(so3_exp(w)), w)
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=w.dtype), rtol=0, atol=1e-9)


def test_two_columns_decode_to_a_rotation():
    rotation = rotation_6d_to_matrix(torch.randn(50, 6, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64).expand(50, 3, 3)
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50).double())


def test_two_columns_of_a_rotation_decode_to_it():
    rotation = so3_exp(_vectors(2.0))
    columns = rotation[..., :2].transpose(1, 2).flatten(1)
    torch.testing.assert_close(rotation_6d_to_matrix(columns), rotation, rtol=0, atol=1e-14)


def test_two_columns_have_right_derivatives():
    columns = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(rotation_6d_to_matrix, columns)


def test_scale_of_the_two_columns_does_not_matter():
    columns = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(
        rotation_6d_to_matrix(1e-8 * columns), rotation_6d_to_matrix(columns), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("function", [so3_exp, so3_log, rotation_6d_to_matrix])
def test_autocast_does_not_round(function):
    shape = {so3_exp: (4, 3), rotation_6d_to_matrix: (4, 6)}.get(function)
    x = so3_exp(torch.randn(4, 3)) if shape is None else torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        result = function(x)
    assert torch.equal(result, function(x))


@pytest.mark.parametrize("function", [so3_exp, so3_log, rotation_6d_to_matrix])
def test_compiles_to_one_graph_and_runs_under_vmap(function, fresh_dynamo):
    shape = {so3_exp: (4, 3), rotation_6d_to_matrix: (4, 6)}.get(function)
    x = so3_exp(torch.randn(4, 3)) if shape is None else torch.randn(shape)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    torch.testing.assert_close(torch.func.vmap(function)(x), function(x))


def test_bad_input_names_the_argument():
    parallel = torch.tensor([1.0, 2, 3, 2, 4, 6])
    for exception, name, call in [
        (ValueError, "rotation_vector must", lambda: so3_exp(torch.ones(4))),
        (TypeError, "rotation_vector must", lambda: so3_exp(torch.ones(3).half())),
        (TypeError, "rotation_vector must", lambda: so3_exp([0.0, 0.0, 1.0])),
        (ValueError, "rotation must", lambda: so3_log(torch.ones(3))),
        (TypeError, "rotation must", lambda: so3_log(torch.ones(3, 3).int())),
        (ValueError, "columns must", lambda: rotation_6d_to_matrix(torch.ones(3, 2))),
        (ValueError, "columns must", lambda: rotation_6d_to_matrix(torch.zeros(6))),
        (ValueError, "columns must", lambda: rotation_6d_to_matrix(parallel)),
    ]:
        with pytest.raises(exception, match=name):
            call()
