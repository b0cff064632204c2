"""Rigid motions, shapes and manifolds: transforms and the penalties on them."""

from regularizers.geometry.actions import (
    from_relative_poses,
    pose_to_vector,
    to_relative_poses,
    vector_to_pose,
)
from regularizers.geometry.se3 import rotation_6d_to_matrix, so3_exp, so3_log

__all__ = [
    "from_relative_poses",
    "pose_to_vector",
    "rotation_6d_to_matrix",
    "so3_exp",
    "so3_log",
    "to_relative_poses",
    "vector_to_pose",
]
