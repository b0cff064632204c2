"""Optimal transport, Gaussian sketches of embeddings and flows in latent space, as losses."""

from regularizers.transport.projections import (
    project_simplex,
    project_sparse_nonneg,
    project_sparse_simplex,
)
from regularizers.transport.regularized_ot import (
    Entropic,
    OTRegularizer,
    RegularizedOTLoss,
    RegularizedOTOutput,
    SparsityConstrained,
    SquaredL2,
    regularized_ot,
    sparse_plan,
)
from regularizers.transport.sparse_router import SparseOTRouter

__all__ = [
    "Entropic",
    "OTRegularizer",
    "RegularizedOTLoss",
    "RegularizedOTOutput",
    "SparseOTRouter",
    "SparsityConstrained",
    "SquaredL2",
    "project_simplex",
    "project_sparse_nonneg",
    "project_sparse_simplex",
    "regularized_ot",
    "sparse_plan",
]
