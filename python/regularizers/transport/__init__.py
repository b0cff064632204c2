"""Optimal transport, Gaussian sketches of embeddings and flows in latent space, as losses."""

from regularizers.transport.jepa import invariance_loss, jepa_loss, jepa_world_model_loss
from regularizers.transport.potential_flow import (
    PotentialFlow,
    PotentialFlowOutput,
    PotentialNet,
    wave_residual,
)
from regularizers.transport.sigreg import SIGReg, sigreg
from regularizers.transport.sketching import (
    CramerVonMises,
    EppsPulley,
    GaussianQuantile,
    Moments,
    SlicedRegularizer,
    SlicedStatistic,
    random_slices,
)
from regularizers.transport.subspace_sigreg import SubspaceSIGReg, subspace_sigreg
from regularizers.transport.traversal_losses import (
    negative_elbo,
    traversal_classification_loss,
    vae_flow_loss,
)
from regularizers.transport.visreg import (
    VISReg,
    sliced_gaussian_wasserstein,
    vicreg_loss,
    visreg,
)

__all__ = [
    "CramerVonMises",
    "EppsPulley",
    "GaussianQuantile",
    "Moments",
    "PotentialFlow",
    "PotentialFlowOutput",
    "PotentialNet",
    "SIGReg",
    "SlicedRegularizer",
    "SlicedStatistic",
    "SubspaceSIGReg",
    "VISReg",
    "invariance_loss",
    "jepa_loss",
    "jepa_world_model_loss",
    "negative_elbo",
    "random_slices",
    "sigreg",
    "sliced_gaussian_wasserstein",
    "subspace_sigreg",
    "traversal_classification_loss",
    "vae_flow_loss",
    "vicreg_loss",
    "visreg",
    "wave_residual",
]
