"""What the updates look like.

Papers:

    artificial_entanglement  a matrix read as the state of a chain, and its entropies

Companions:

    mps_adapter              matrix product states, and the adapter that is one
"""

from lowrank_ref.analysis.artificial_entanglement import (
    Profile,
    attention_matrix,
    entropy,
    entropy_profile,
    factor_sites,
    marchenko_pastur_density,
    pad_to_binary,
    page_entropy,
    rank_ceiling,
    schmidt_probabilities,
    valley_depth,
)
from lowrank_ref.analysis.mps_adapter import MPSLinear, contract_train, mps_factor, split_factor, tensor_train

__all__ = [
    "MPSLinear",
    "Profile",
    "attention_matrix",
    "contract_train",
    "entropy",
    "entropy_profile",
    "factor_sites",
    "marchenko_pastur_density",
    "mps_factor",
    "pad_to_binary",
    "page_entropy",
    "rank_ceiling",
    "schmidt_probabilities",
    "split_factor",
    "tensor_train",
    "valley_depth",
]
