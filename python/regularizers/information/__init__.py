"""Methods on mutual information, entropy and dependence: estimators, bounds and penalties."""

from regularizers.information.estimators import (
    InformationPlane,
    InformationRow,
    LayerInformation,
    binned_information,
    ebab_edges,
    ebab_information,
    kde_information,
)
from regularizers.information.frechet_covariance import (
    FCCovKernel,
    FCCovLoss,
    fccov,
    fccov_kernel,
    fccov_loss,
    metric_distances,
)
from regularizers.information.inversion import (
    gradient_inversion_attack,
    linear_inversion_attack,
)
from regularizers.information.manifold_entropy import (
    CriticTerms,
    GeneratorTerms,
    ManifoldEntropy,
    RingBuffer,
    disomap_loss,
    dlle_loss,
    knn_entropy,
    nn_entropy_loss,
)
from regularizers.information.mcr import (
    MCR,
    MCROutput,
    jensen_shannon,
    latent_permutations,
    nt_xent,
)
from regularizers.information.mid import (
    NoisyRegressor,
    VIBHead,
    VIBOutput,
    gaussian_output_information,
    mid_loss,
)
from regularizers.information.mid_tree import (
    MIDTreeClassifier,
)
from regularizers.information.xfactors import (
    XFactorsLoss,
    XFactorsOutput,
    factorvae_score,
    supervised_info_nce,
    swap_factor,
)

__all__ = [
    "MCR",
    "CriticTerms",
    "FCCovKernel",
    "FCCovLoss",
    "GeneratorTerms",
    "InformationPlane",
    "InformationRow",
    "LayerInformation",
    "MCROutput",
    "MIDTreeClassifier",
    "ManifoldEntropy",
    "NoisyRegressor",
    "RingBuffer",
    "VIBHead",
    "VIBOutput",
    "XFactorsLoss",
    "XFactorsOutput",
    "binned_information",
    "disomap_loss",
    "dlle_loss",
    "ebab_edges",
    "ebab_information",
    "factorvae_score",
    "fccov",
    "fccov_kernel",
    "fccov_loss",
    "gaussian_output_information",
    "gradient_inversion_attack",
    "jensen_shannon",
    "kde_information",
    "knn_entropy",
    "latent_permutations",
    "linear_inversion_attack",
    "metric_distances",
    "mid_loss",
    "nn_entropy_loss",
    "nt_xent",
    "supervised_info_nce",
    "swap_factor",
]
