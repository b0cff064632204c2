"""Relative poses and pose vectors: the facts of the sheet of paper 1."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from regularizers.geometry import (
    from_relative_poses,
    pose_to_vector,
    so3_exp,
    so3_log,
    to_relative_poses,
    vector_to_pose,
)

FORMS = ("6d", "axis_angle")


def _poses(*shape, angle=None):
    w = torch.randn(*shape, 3, dtype=torch.float64)
    if angle is not None:
        w = angle * w / w.norm(dim=-1, keepdim=True)
    return vector_to_pose(torch.cat([torch.randn_like(w), w], -1), "axis_angle")


def _turned(angle, translation):
    return vector_to_pose(
        torch.tensor([*translation, 0, 0, angle], dtype=torch.float64), "axis_angle"
    )


def test_a_quarter_turn_and_a_step_seen_from_the_end_effector():
    current = _turned(math.pi / 2, (1, 0, 0))
    future = _turned(math.pi, (1, 1, 0))
    relative = to_relative_poses(current, future[None])[0]
    expected = _turned(math.pi / 2, (1, 0, 0))
    torch.testing.assert_close(relative, expected, rtol=0, atol=1e-15)


def test_relative_poses_do_not_depend_on_the_frame():
    current, future, frame = _poses(5), _poses(5, 8), _poses()
    torch.testing.assert_close(
        to_relative_poses(frame @ current, frame @ future),
        to_relative_poses(current, future),
        rtol=0,
        atol=1e-12,
    )


def test_a_far_away_base_costs_no_digits():
    # Near (1e5, 1e5, 1e5) in float32 a step of 2^-6 is representable, and must come out exactly.
    current, future = torch.eye(4), torch.eye(4)[None].clone()
    current[:3, 3] = 2.0**17
    future[0, :3, 3] = 2.0**17 + 2.0**-6
    assert (to_relative_poses(current, future)[0, :3, 3] == 2.0**-6).all()


def test_round_trip_is_exact_to_ten_digits():
    current, future = _poses(5), _poses(5, 8)
    back = from_relative_poses(current, to_relative_poses(current, future))
    torch.testing.assert_close(back, future, rtol=0, atol=1e-10)


def test_relative_poses_are_the_product_with_the_inverse():
    current, future = _poses(5), _poses(5, 8)
    expected = torch.linalg.inv(current)[:, None] @ future
    torch.testing.assert_close(to_relative_poses(current, future), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("angle", [0.0, 1e-7, 1.0, math.pi - 1e-6])
def test_vectors_round_trip(form, angle):
    pose = _poses(6, angle=angle)
    vector = pose_to_vector(pose, form)
    assert vector.shape == (6, 9 if form == "6d" else 6)
    torch.testing.assert_close(vector_to_pose(vector, form), pose, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_any_vector_decodes_to_a_rigid_pose(form):
    pose = vector_to_pose(torch.randn(20, 9 if form == "6d" else 6, dtype=torch.float64), form)
    rotation = pose[:, :3, :3]
    eye = torch.eye(3, dtype=torch.float64).expand(20, 3, 3)
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(20).double())
    assert torch.equal(pose[:, 3], torch.tensor([0.0, 0, 0, 1]).double().expand(20, 4))


def test_six_numbers_are_the_first_two_columns():
    pose = _poses()
    torch.testing.assert_close(pose_to_vector(pose)[3:6], pose[:3, 0])
    torch.testing.assert_close(pose_to_vector(pose)[6:], pose[:3, 1])


def test_axis_angle_is_the_logarithm():
    pose = _poses(4)
    torch.testing.assert_close(pose_to_vector(pose, "axis_angle")[:, 3:], so3_log(pose[:, :3, :3]))


@pytest.mark.parametrize("angle", [1e-9, 1e-3, 1.0, math.pi - 1e-3])
def test_derivatives_are_right_through_every_function(angle):
    # Poses enter as functions of free vectors: gradcheck's steps would leave the rigid motions.
    current = torch.randn(6, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64)
    start = torch.cat([w, angle * w / w.norm()]).requires_grad_()

    def through(vector):
        future = vector_to_pose(vector, "axis_angle")[None]
        pose = vector_to_pose(current, "axis_angle")
        relative = to_relative_poses(pose, future)
        again = from_relative_poses(pose, relative)
        return pose_to_vector(relative), pose_to_vector(again, "axis_angle")

    assert gradcheck(through, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_is_kept_also_under_autocast(dtype):
    current, future = _poses(3).to(dtype), _poses(3, 2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        relative = to_relative_poses(current, future)
        vector = pose_to_vector(relative)
    assert relative.dtype == vector.dtype == dtype
    torch.testing.assert_close(relative, to_relative_poses(current, future), rtol=0, atol=0)


def test_compiles_to_one_graph(fresh_dynamo):
    def step(current, future):
        return pose_to_vector(to_relative_poses(current, future), "axis_angle")

    current, future = _poses(3), _poses(3, 2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(current, future), step(current, future))


def test_differences_of_positions_in_the_world_frame_are_something_else():
    current, future = _poses(), _poses(1)
    relative = to_relative_poses(current, future)[0, :3, 3]
    assert (relative - (future[0, :3, 3] - current[:3, 3])).abs().max() > 1e-3
    torch.testing.assert_close(relative.norm(), (future[0, :3, 3] - current[:3, 3]).norm())


def _spoiled(row, column, value):
    pose = torch.eye(4)
    pose[row, column] = value
    return pose


def test_bad_input_names_the_argument():
    scaled, eye, chunk = _spoiled(0, 0, 1.1), torch.eye(4), torch.eye(4)[None]
    mirrored = torch.diag(torch.tensor([1.0, 1, -1, 1]))
    for exception, name, call in [
        (ValueError, "current must be rigid", lambda: to_relative_poses(scaled, chunk)),
        (ValueError, "current must be rigid", lambda: to_relative_poses(mirrored, chunk)),
        (ValueError, "future must be rigid", lambda: to_relative_poses(
            eye, _spoiled(3, 0, 0.01)[None]
        )),
        (ValueError, "pose must be rigid", lambda: pose_to_vector(_spoiled(1, 1, torch.nan))),
        (ValueError, "relative must have shape", lambda: from_relative_poses(eye, eye)),
        (ValueError, "future must have shape", lambda: to_relative_poses(
            eye.expand(2, 4, 4), eye.expand(3, 5, 4, 4)
        )),
        (ValueError, "current must have shape", lambda: to_relative_poses(torch.eye(3), chunk)),
        (TypeError, "current must be float32", lambda: to_relative_poses(eye.half(), chunk)),
        (TypeError, "future must have the dtype", lambda: to_relative_poses(eye, chunk.double())),
        (ValueError, "rotation must", lambda: pose_to_vector(eye, "euler")),
        (ValueError, "rotation must", lambda: vector_to_pose(torch.ones(9), "quaternion")),
        (ValueError, "vector must", lambda: vector_to_pose(torch.ones(6))),
        (ValueError, "columns must", lambda: vector_to_pose(torch.zeros(9))),
        (TypeError, "vector must", lambda: vector_to_pose(torch.ones(9).bfloat16())),
    ]:  # fmt: skip
        with pytest.raises(exception, match=name):
            call()


def test_a_pose_within_the_tolerance_is_taken():
    assert pose_to_vector(_spoiled(0, 0, 1 + 4e-5)).shape == (9,)
    assert torch.equal(so3_exp(torch.zeros(3)), torch.eye(3))
