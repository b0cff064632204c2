"""Methods on mutual information, entropy and dependence: estimators, bounds and penalties."""

from regularizers.information.mcr import (
    MCR,
    MCROutput,
    jensen_shannon,
    latent_permutations,
    nt_xent,
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
    "MCROutput",
    "XFactorsLoss",
    "XFactorsOutput",
    "factorvae_score",
    "jensen_shannon",
    "latent_permutations",
    "nt_xent",
    "supervised_info_nce",
    "swap_factor",
]
