"""Rigid motions, shapes and manifolds: transforms and the penalties on them."""

from regularizers.geometry.actions import (
    from_relative_poses,
    pose_to_vector,
    to_relative_poses,
    vector_to_pose,
)
from regularizers.geometry.se3 import rotation_6d_to_matrix, so3_exp, so3_log
from regularizers.representation.topology import (
    euler_characteristic_loss,
    soft_euler_characteristic,
    topology_surrogate_loss,
    total_variation,
)
from regularizers.representation.topology_metrics import (
    betti_numbers,
    boundary_f1,
    persistence_diagram_distance,
)

__all__ = [
    "betti_numbers",
    "boundary_f1",
    "euler_characteristic_loss",
    "from_relative_poses",
    "persistence_diagram_distance",
    "pose_to_vector",
    "rotation_6d_to_matrix",
    "so3_exp",
    "so3_log",
    "soft_euler_characteristic",
    "to_relative_poses",
    "topology_surrogate_loss",
    "total_variation",
    "vector_to_pose",
]
