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
from regularizers.transport.monge_gap import MongeGap, monge_gap
from regularizers.transport.potential_flow import (
    PotentialFlow,
    PotentialFlowOutput,
    PotentialNet,
    wave_residual,
)
from regularizers.transport.sinkhorn import SinkhornSolution, sinkhorn, sinkhorn_cost
from regularizers.transport.sinkhorn_divergence import SinkhornDivergence, sinkhorn_divergence
from regularizers.transport.structured_map import StructuredMap, conservative_penalty
from regularizers.transport.traversal_losses import (
    negative_elbo,
    traversal_classification_loss,
    vae_flow_loss,
)

__all__ = [
    "Arccos",
    "Cosine",
    "CostFn",
    "Euclidean",
    "Lp",
    "MongeGap",
    "PotentialFlow",
    "PotentialFlowOutput",
    "PotentialNet",
    "SinkhornDivergence",
    "SinkhornSolution",
    "SqEuclidean",
    "StructuredMap",
    "TICost",
    "as_cost",
    "conservative_penalty",
    "from_blur",
    "from_ott",
    "monge_gap",
    "negative_elbo",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_divergence",
    "traversal_classification_loss",
    "vae_flow_loss",
    "wave_residual",
]
