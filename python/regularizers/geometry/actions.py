"""Actions of a robot's end effector, relative to where it is, and poses as vectors."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from regularizers._shared.checks import (
    check_one_of,
    check_same_device,
    check_same_dtype,
    known_range,
)
from regularizers.geometry.se3 import check_precise, rotation_6d_to_matrix, so3_exp, so3_log

RotationForm = Literal["6d", "axis_angle"]
_FORMS: tuple[str, ...] = get_args(RotationForm)
_RIGID = 1e-4  # how far R^T R may be from the identity


def to_relative_poses(current: Tensor, future: Tensor) -> Tensor:
    r"""Express future poses in the frame of the current one.

    .. math:: T_{\mathrm{rel}} = T_{\mathrm{current}}^{-1} T_{\mathrm{future}}, \qquad
        R_{\mathrm{rel}} = R_c^\top R_f, \quad t_{\mathrm{rel}} = R_c^\top (t_f - t_c)

    The same motion gives the same numbers wherever the robot's base stands. A gripper's opening is
    no pose: leave it absolute, beside these.

    Args:
        current: poses ``[*, 4, 4]``; float32 or float64.
        future: poses ``[*, H, 4, 4]``: H of them for every current one.

    Returns:
        ``[*, H, 4, 4]``.

    Raises:
        TypeError: a pose is neither float32 nor float64, or dtypes differ.
        ValueError: shapes or devices do not fit, or a pose is not rigid to 1e-4 (checked where that
            costs no synchronisation: on CPU tensors outside of ``torch.compile``).

    Example:
        >>> current, future = torch.eye(4), torch.eye(4).repeat(2, 1, 1)
        >>> current[0, 3], future[0, 0, 3], future[1, 0, 3] = 1.0, 3.0, 4.0
        >>> to_relative_poses(current, future)[:, 0, 3]
        tensor([2., 3.])

    Source:
        "Rethinking Visual-Language-Action Model Scaling: Alignment, Mixture, and Regularization",
        2026, arXiv 2602.09722; reconstructed: the abstract says that actions are relative to the
        end effector, the formula is the standard one.
    """
    _check_pair(current, "future", future)
    transposed = current[..., None, :3, :3].transpose(-1, -2)
    rotation = _product(transposed, future[..., :3, :3])
    # Differences first: a far-away base then costs no digits.
    moved = future[..., :3, 3:] - current[..., None, :3, 3:]
    return _pose(rotation, _product(transposed, moved))


def from_relative_poses(current: Tensor, relative: Tensor) -> Tensor:
    r"""Put poses that are relative to the current one back into the world.

    .. math:: T_{\mathrm{future}} = T_{\mathrm{current}} T_{\mathrm{rel}}

    Args:
        current: poses ``[*, 4, 4]``; float32 or float64.
        relative: poses ``[*, H, 4, 4]``, as :func:`to_relative_poses` gives them.

    Returns:
        ``[*, H, 4, 4]``.

    Raises:
        TypeError: a pose is neither float32 nor float64, or dtypes differ.
        ValueError: as :func:`to_relative_poses`.

    Example:
        >>> current, relative = torch.eye(4), torch.eye(4)[None]
        >>> current[0, 3], relative[0, 0, 3] = 1.0, 2.0
        >>> from_relative_poses(current, relative)[:, 0, 3]
        tensor([3.])

    Source:
        As :func:`to_relative_poses`.
    """
    _check_pair(current, "relative", relative)
    frame = current[..., None, :3, :3]
    moved = _product(frame, relative[..., :3, 3:]) + current[..., None, :3, 3:]
    return _pose(_product(frame, relative[..., :3, :3]), moved)


def pose_to_vector(pose: Tensor, rotation: RotationForm = "6d") -> Tensor:
    r"""Write poses as vectors that a network can regress.

    .. math:: (t, R e_1, R e_2) \in \mathbb{R}^9 \quad\text{or}\quad (t, \log R) \in \mathbb{R}^6

    The six numbers of ``"6d"``, the first two columns of R, are continuous in the rotation. The
    axis-angle vector is shorter, precise and differentiable from 0 up to half a turn, and jumps
    there from w to -w.

    Args:
        pose: ``[*, 4, 4]``; float32 or float64.
        rotation: ``"6d"`` or ``"axis_angle"``.

    Returns:
        ``[*, 9]`` or ``[*, 6]``, translation first.

    Raises:
        TypeError: the poses are neither float32 nor float64.
        ValueError: they are of the wrong shape or not rigid (as :func:`to_relative_poses`), or
            ``rotation`` is unknown.

    Example:
        >>> pose_to_vector(torch.eye(4))
        tensor([0., 0., 0., 1., 0., 0., 0., 1., 0.])
        >>> pose_to_vector(torch.eye(4), rotation="axis_angle")
        tensor([0., 0., 0., 0., 0., 0.])

    Source:
        Y. Zhou et al., CVPR 2019, arXiv 1812.07035, for the two columns; which form the study of
        arXiv 2602.09722 uses is not known.
    """
    check_one_of("rotation", rotation, _FORMS)
    _check_poses("pose", pose)
    matrix = pose[..., :3, :3]
    columns = matrix[..., :2].transpose(-1, -2).flatten(-2)
    turn = columns if rotation == "6d" else so3_log(matrix)
    return torch.cat([pose[..., :3, 3], turn], dim=-1)


def vector_to_pose(vector: Tensor, rotation: RotationForm = "6d") -> Tensor:
    r"""Read poses off vectors: the inverse of :func:`pose_to_vector`, for any numbers.

    ``"6d"`` is orthonormalised (Gram-Schmidt), so what a network puts out becomes a rotation.

    Args:
        vector: ``[*, 9]`` or ``[*, 6]``, translation first; float32 or float64.
        rotation: ``"6d"`` or ``"axis_angle"``.

    Returns:
        ``[*, 4, 4]``, rigid.

    Raises:
        TypeError: the vectors are neither float32 nor float64.
        ValueError: they are of the wrong shape, ``rotation`` is unknown, or two columns are zero or
            parallel (as :func:`rotation_6d_to_matrix`).

    Example:
        >>> vector_to_pose(torch.tensor([1.0, 2, 3, 2, 0, 0, 1, 1, 0])).tolist()
        [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 1.0]]

    Source:
        As :func:`pose_to_vector`.
    """
    check_one_of("rotation", rotation, _FORMS)
    check_precise("vector", vector)
    size = 9 if rotation == "6d" else 6
    if vector.dim() < 1 or vector.shape[-1] != size:
        raise ValueError(f"vector must have shape [..., {size}], got {list(vector.shape)}")
    turn = vector[..., 3:]
    matrix = rotation_6d_to_matrix(turn) if rotation == "6d" else so3_exp(turn)
    return _pose(matrix, vector[..., :3, None])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply 3 x 3 by 3 x n matrices; by hand, since autocast would round a matmul."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def _pose(rotation: Tensor, translation: Tensor) -> Tensor:
    upper = torch.cat([rotation, translation], dim=-1)
    last = torch.eye(4, dtype=upper.dtype, device=upper.device)[3:]  # nothing copied from the host
    return torch.cat([upper, last.expand(*upper.shape[:-2], 1, 4)], dim=-2)


def _check_pair(current: Tensor, name: str, poses: Tensor) -> None:
    _check_poses("current", current)
    _check_poses(name, poses)
    if poses.dim() != current.dim() + 1 or poses.shape[:-3] != current.shape[:-2]:
        raise ValueError(
            f"{name} must have shape [..., H, 4, 4] for current [..., 4, 4] of shape "
            f"{list(current.shape)}, got {list(poses.shape)}"
        )
    check_same_dtype(name, poses, "current", current)
    check_same_device(name, poses, "current", current)


def _check_poses(name: str, pose: Tensor) -> None:
    check_precise(name, pose)
    if pose.dim() < 2 or pose.shape[-2:] != (4, 4):
        raise ValueError(f"{name} must have shape [..., 4, 4], got {list(pose.shape)}")
    if known_range(pose) is None:
        return
    matrix, last = pose.detach()[..., :3, :3], pose.detach()[..., 3, :]
    gram = _product(matrix.transpose(-1, -2), matrix)
    off = (gram - torch.eye(3, dtype=pose.dtype)).abs().amax((-1, -2))
    off_last = (last - torch.tensor([0, 0, 0, 1], dtype=pose.dtype)).abs().amax(-1)
    # "Not at most" rather than "above": a NaN is not rigid.
    bad = ~(torch.maximum(off, off_last) <= _RIGID) | (torch.linalg.det(matrix) < 0)
    if bad.any():
        raise ValueError(
            f"{name} must be rigid motions: rotation, translation and a last row (0, 0, 0, 1) to "
            f"{_RIGID}; {int(bad.sum())} of {bad.numel()} are not"
        )
