"""Making a trained network low-rank.

Papers:

    maestro           train W = B·A so that its components get an order

Companions:

    maestro_layers    the convolution, and surgery on whole models
    maestro_training  samplers and the shrinker that act while it trains
"""

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

__all__ = [
    "JointRankSampler",
    "MaestroConv2d",
    "MaestroLinear",
    "RankSampler",
    "RankShrinker",
    "decompose",
    "deployed",
    "group_lasso",
    "importance",
    "maestro_layers",
    "penalty",
    "ranks_by_loss",
    "ranks_within",
    "resorted",
    "strengths",
]
