"""Optimal transport, Gaussian sketches of embeddings and flows in latent space, as losses."""

from regularizers.transport.jepa import invariance_loss, jepa_loss, jepa_world_model_loss
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
    "SIGReg",
    "SlicedRegularizer",
    "SlicedStatistic",
    "SubspaceSIGReg",
    "VISReg",
    "invariance_loss",
    "jepa_loss",
    "jepa_world_model_loss",
    "random_slices",
    "sigreg",
    "sliced_gaussian_wasserstein",
    "subspace_sigreg",
    "vicreg_loss",
    "visreg",
]
