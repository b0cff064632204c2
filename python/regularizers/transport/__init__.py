"""Optimal transport, Gaussian sketches of embeddings and flows in latent space, as losses."""

from regularizers.transport.potential_flow import (
    PotentialFlow,
    PotentialFlowOutput,
    PotentialNet,
    wave_residual,
)
from regularizers.transport.traversal_losses import (
    negative_elbo,
    traversal_classification_loss,
    vae_flow_loss,
)

__all__ = [
    "PotentialFlow",
    "PotentialFlowOutput",
    "PotentialNet",
    "negative_elbo",
    "traversal_classification_loss",
    "vae_flow_loss",
    "wave_residual",
]
