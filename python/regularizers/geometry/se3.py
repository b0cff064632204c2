"""Rotations of space as matrices, axis-angle vectors and pairs of columns.

Everything is differentiable everywhere it can be, at no rotation and up to half a turn too, and
multiplies small matrices by hand: under autocast nothing is rounded to half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers._shared.checks import check_tensor, known_range


def so3_exp(rotation_vector: Tensor) -> Tensor:
    r"""Return the rotation matrices of axis-angle vectors.

    .. math:: R = I + \frac{\sin\theta}{\theta} K + \frac{1 - \cos\theta}{\theta^2} K^2, \qquad
        \theta = \|w\|,\ K v = w \times v

    Near zero both factors come from their series, so derivatives of any order are right there.

    Args:
        rotation_vector: ``[*, 3]``, axis times angle in radians; float32 or float64.

    Returns:
        ``[*, 3, 3]``.

    Raises:
        TypeError: the vectors are neither float32 nor float64.
        ValueError: they are of the wrong shape.

    Example:
        >>> quarter_turn = so3_exp(torch.tensor([0.0, 0.0, torch.pi / 2]))
        >>> x, y, _ = torch.eye(3)
        >>> torch.allclose(quarter_turn @ x, y, atol=1e-6)
        True

    Source:
        Rodrigues' formula.
    """
    check_precise("rotation_vector", rotation_vector)
    if rotation_vector.dim() < 1 or rotation_vector.shape[-1] != 3:
        raise ValueError(
            f"rotation_vector must have shape [..., 3], got {list(rotation_vector.shape)}"
        )
    x, y, z = rotation_vector.unbind(-1)
    squared = (rotation_vector * rotation_vector).sum(-1)
    sine, cosine = _rodrigues_factors(squared)
    a, b, c = sine * x, sine * y, sine * z
    # K^2 = w w^T - |w|^2 I
    one = 1 - cosine * squared
    entries = [
        one + cosine * x * x, cosine * x * y - c, cosine * x * z + b,
        cosine * x * y + c, one + cosine * y * y, cosine * y * z - a,
        cosine * x * z - b, cosine * y * z + a, one + cosine * z * z,
    ]  # fmt: skip
    matrix: Tensor = torch.stack(entries, dim=-1).unflatten(-1, (3, 3))
    return matrix


def _rodrigues_factors(squared: Tensor) -> tuple[Tensor, Tensor]:
    """Return sin(t) / t and (1 - cos t) / t^2 of t^2."""
    near = squared < torch.finfo(squared.dtype).eps ** 0.25
    # The far form is kept away from zero, whose infinite derivative would come through `where`.
    angle = torch.where(near, 1, squared).sqrt()
    half = (angle / 2).sin() / angle
    s = squared  # four terms: the fifth is below the rounding error where `near`
    sine = torch.where(
        near, 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72))), angle.sin() / angle
    )
    cosine = torch.where(
        near, (1 - s / 12 * (1 - s / 30 * (1 - s / 56 * (1 - s / 90)))) / 2, 2 * half * half
    )
    return sine, cosine


def so3_log(rotation: Tensor) -> Tensor:
    r"""Return the axis-angle vectors of rotation matrices, angles in [0, pi].

    .. math:: w = \frac{2 \operatorname{atan2}(\|v\|, u)}{\|v\|} v \qquad
        \text{for the unit quaternion } (u, v) \text{ of } R,\ u \ge 0

    The quaternion comes from the largest of its four components, so the result is precise at all
    angles: the trace alone loses half of the digits near 0 and all of the axis near pi. At pi
    exactly both w and -w are right, and one is returned.

    Args:
        rotation: ``[*, 3, 3]``, rotation matrices (not checked); float32 or float64.

    Returns:
        ``[*, 3]``, axis times angle in radians.

    Raises:
        TypeError: the matrices are neither float32 nor float64.
        ValueError: they are of the wrong shape.

    Example:
        >>> so3_log(so3_exp(torch.tensor([0.0, 3.0, 0.0])))
        tensor([0., 3., 0.])

    Source:
        S. W. Shepperd, "Quaternion from rotation matrix", 1978, for the choice of the component.
    """
    quaternion = _quaternion(rotation)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    u, v = quaternion[..., 0], quaternion[..., 1:]
    squared = (v * v).sum(-1)
    near = squared < torch.finfo(v.dtype).eps ** 0.25
    length = torch.where(near, 1, squared).sqrt()
    # atan2(n, u) / n in powers of (n / u)^2; u is almost 1 where n is almost 0.
    inverse = 1 / torch.where(near, u, 1)
    x = squared * inverse * inverse
    series = inverse * (1 - x * (1 / 3 - x * (1 / 5 - x * (1 / 7 - x / 9))))
    factor = torch.where(near, series, torch.atan2(length, torch.where(near, 1, u)) / length)
    rotation_vector: Tensor = 2 * factor[..., None] * v
    return rotation_vector


def _quaternion(rotation: Tensor) -> Tensor:
    """Return quaternions ``[*, 4]`` of either sign, real part first."""
    check_precise("rotation", rotation)
    if rotation.dim() < 2 or rotation.shape[-2:] != (3, 3):
        raise ValueError(f"rotation must have shape [..., 3, 3], got {list(rotation.shape)}")
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    # Four times the outer product of the quaternion with itself.
    outer = [
        1 + a + e + i, h - f, c - g, d - b,
        h - f, 1 + a - e - i, d + b, c + g,
        c - g, d + b, 1 - a + e - i, h + f,
        d - b, c + g, h + f, 1 - a - e + i,
    ]  # fmt: skip
    rows = torch.stack(outer, dim=-1).unflatten(-1, (4, 4))
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = rows.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4))[..., 0, :]
    square = row.gather(-1, largest[..., None])  # at least 1 for a rotation
    quaternion: Tensor = row / (2 * square.sqrt())
    return quaternion


def rotation_6d_to_matrix(columns: Tensor) -> Tensor:
    r"""Return the rotation matrix whose first two columns lie closest to six numbers, in order.

    .. math:: b_1 = \frac{a_1}{\|a_1\|}, \quad
        b_2 = \frac{a_2 - (b_1 \cdot a_2) b_1}{\|a_2 - (b_1 \cdot a_2) b_1\|}, \quad
        b_3 = b_1 \times b_2, \qquad R = [b_1\ b_2\ b_3]

    PyTorch3D's function of this name reads *rows*: its six numbers are those of the transpose.

    Args:
        columns: ``[*, 6]``: :math:`a_1`, then :math:`a_2`; float32 or float64.

    Returns:
        ``[*, 3, 3]``, orthogonal with determinant 1.

    Raises:
        TypeError: the numbers are neither float32 nor float64.
        ValueError: they are of the wrong shape; or a pair of columns is zero or parallel (checked
            where that costs no synchronisation: on CPU tensors outside of ``torch.compile``).

    Example:
        >>> rotation_6d_to_matrix(torch.tensor([2.0, 0, 0, 5, 3, 0])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    Source:
        Y. Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", CVPR
        2019, arXiv 1812.07035.
    """
    check_precise("columns", columns)
    if columns.dim() < 1 or columns.shape[-1] != 6:
        raise ValueError(f"columns must have shape [..., 6], got {list(columns.shape)}")
    first, second = columns[..., :3], columns[..., 3:]
    length = torch.linalg.vector_norm(first, dim=-1, keepdim=True)
    b1 = first / length
    rest = second - (b1 * second).sum(-1, keepdim=True) * b1
    height = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    scale = torch.linalg.vector_norm(second, dim=-1, keepdim=True)
    least = known_range((height.detach() / scale.detach()).nan_to_num(nan=0.0))
    if least is not None and least[0] < 16 * torch.finfo(columns.dtype).eps:
        raise ValueError("columns must hold two vectors that are neither zero nor parallel")
    b2 = rest / height
    return torch.stack([b1, b2, torch.linalg.cross(b1, b2)], dim=-1)


def check_precise(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is float32 or float64: half types are too coarse for rotations."""
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")
