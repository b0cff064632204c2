"""Optimal transport, Gaussian sketches of embeddings and flows in latent space, as losses."""

from regularizers.transport.conventions import from_blur, from_ott
from regularizers.transport.cost import (
    Arccos,
    Cosine,
    CostFn,
    Euclidean,
    Lp,
    SqEuclidean,
    TICost,
    as_cost,
)
from regularizers.transport.jepa import invariance_loss, jepa_loss, jepa_world_model_loss
from regularizers.transport.monge_gap import MongeGap, monge_gap
from regularizers.transport.potential_flow import (
    PotentialFlow,
    PotentialFlowOutput,
    PotentialNet,
    wave_residual,
)
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
from regularizers.transport.sigreg import SIGReg, sigreg
from regularizers.transport.sinkhorn import SinkhornSolution, sinkhorn, sinkhorn_cost
from regularizers.transport.sinkhorn_divergence import SinkhornDivergence, sinkhorn_divergence
from regularizers.transport.sketching import (
    CramerVonMises,
    EppsPulley,
    GaussianQuantile,
    Moments,
    SlicedRegularizer,
    SlicedStatistic,
    random_slices,
)
from regularizers.transport.sparse_router import SparseOTRouter
from regularizers.transport.structured_map import StructuredMap, conservative_penalty
from regularizers.transport.subspace_sigreg import SubspaceSIGReg, subspace_sigreg
from regularizers.transport.traversal_losses import (
    negative_elbo,
    traversal_classification_loss,
    vae_flow_loss,
)
from regularizers.transport.visreg import VISReg, sliced_gaussian_wasserstein, vicreg_loss, visreg

__all__ = [
    "Arccos",
    "Cosine",
    "CostFn",
    "CramerVonMises",
    "Entropic",
    "EppsPulley",
    "Euclidean",
    "GaussianQuantile",
    "Lp",
    "Moments",
    "MongeGap",
    "OTRegularizer",
    "PotentialFlow",
    "PotentialFlowOutput",
    "PotentialNet",
    "RegularizedOTLoss",
    "RegularizedOTOutput",
    "SIGReg",
    "SinkhornDivergence",
    "SinkhornSolution",
    "SlicedRegularizer",
    "SlicedStatistic",
    "SparseOTRouter",
    "SparsityConstrained",
    "SqEuclidean",
    "SquaredL2",
    "StructuredMap",
    "SubspaceSIGReg",
    "TICost",
    "VISReg",
    "as_cost",
    "conservative_penalty",
    "from_blur",
    "from_ott",
    "invariance_loss",
    "jepa_loss",
    "jepa_world_model_loss",
    "monge_gap",
    "negative_elbo",
    "project_simplex",
    "project_sparse_nonneg",
    "project_sparse_simplex",
    "random_slices",
    "regularized_ot",
    "sigreg",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_divergence",
    "sliced_gaussian_wasserstein",
    "sparse_plan",
    "subspace_sigreg",
    "traversal_classification_loss",
    "vae_flow_loss",
    "vicreg_loss",
    "visreg",
    "wave_residual",
]
