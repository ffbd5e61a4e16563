"""Making a trained network low-rank.

Papers:

    trp                truncate each weight by its SVD every few steps while it trains
    maestro            train W = B·A so that its components get an order
    welore             one threshold on normalised spectra; factors where it cuts deep, and only these are tuned
    pela               factors of one size ratio, then a repair with the original network as teacher

Companions:

    conv_matrices      a convolution as a matrix in three ways, and as two layers of lower rank
    feature_taps       what blocks of a model return while it runs
    input_covariances  what every layer reads, for cuts that look at activations
    maestro_layers     the convolution, and surgery on whole models
    maestro_training   samplers and the shrinker that act while it trains
    spectral_cut       WeLore on whole models: plan the ranks, cut, freeze the rest
"""

from lowrank_ref.compression.conv_matrices import (
    from_matrix,
    matrix_sides,
    pair_weights,
    released_layers,
    split_layer,
    split_macs,
    split_model,
    to_matrix,
)
from lowrank_ref.compression.feature_taps import tapped
from lowrank_ref.compression.input_covariances import input_covariances
from lowrank_ref.compression.maestro import MaestroLinear, group_lasso, importance, ranks_within, strengths
from lowrank_ref.compression.maestro_layers import (
    MaestroConv2d,
    decompose,
    deployed,
    maestro_layers,
    penalty,
    ranks_by_loss,
    resorted,
)
from lowrank_ref.compression.maestro_training import JointRankSampler, RankSampler, RankShrinker
from lowrank_ref.compression.pela import (
    Repair,
    feature_loss,
    max_deviation,
    perturbation_loss,
    plan_by_ratio,
    rank_at_ratio,
)
from lowrank_ref.compression.spectral_cut import (
    RankPlan,
    cut_model,
    plan_ranks,
    plan_within,
    train_low_rank_only,
    weight_spectra,
)
from lowrank_ref.compression.trp import (
    TrainedRankPruning,
    Truncation,
    by_gram,
    matrix_nuclear_norm,
    rank_at_energy,
    rank_at_threshold,
    rank_limit,
    truncation,
)
from lowrank_ref.compression.welore import (
    WeLoreLinear,
    find_threshold,
    gradient_cosine,
    normalised_spectrum,
    pruned_counts,
    rank_reduction,
    spectral_factors,
    subspace_overlap,
    uniform_pruning,
)

__all__ = [
    "JointRankSampler",
    "MaestroConv2d",
    "MaestroLinear",
    "RankPlan",
    "RankSampler",
    "RankShrinker",
    "Repair",
    "TrainedRankPruning",
    "Truncation",
    "WeLoreLinear",
    "by_gram",
    "cut_model",
    "decompose",
    "deployed",
    "feature_loss",
    "find_threshold",
    "from_matrix",
    "gradient_cosine",
    "group_lasso",
    "importance",
    "input_covariances",
    "maestro_layers",
    "matrix_nuclear_norm",
    "matrix_sides",
    "max_deviation",
    "normalised_spectrum",
    "pair_weights",
    "penalty",
    "perturbation_loss",
    "plan_by_ratio",
    "plan_ranks",
    "plan_within",
    "pruned_counts",
    "rank_at_energy",
    "rank_at_ratio",
    "rank_at_threshold",
    "rank_limit",
    "rank_reduction",
    "ranks_by_loss",
    "ranks_within",
    "released_layers",
    "resorted",
    "spectral_factors",
    "split_layer",
    "split_macs",
    "split_model",
    "strengths",
    "subspace_overlap",
    "tapped",
    "to_matrix",
    "train_low_rank_only",
    "truncation",
    "uniform_pruning",
    "weight_spectra",
]
