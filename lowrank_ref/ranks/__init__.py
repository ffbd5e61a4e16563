"""How much rank, and where.

Papers:

    sora             gates between LoRA's two matrices fall to exact zeros
    increlora        every layer starts at rank 1, and the most important ones grow

Companions:

    growing_linear   IncreLoRA's layer, whose rank grows by blocks
    growth_schedule  IncreLoRA's optimizer groups, each with a clock of its own
    sora_schedule    the schedule that raises SoRA's penalty level by level
    svd_pruning      the baseline: train one rank, then drop the smallest singular values
"""

from lowrank_ref.ranks.growing_linear import IncreLoRALinear, grown_ranks
from lowrank_ref.ranks.growth_schedule import growth_groups, growth_schedule
from lowrank_ref.ranks.increlora import RankGrowth, orthogonality_penalty
from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, soft_threshold
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels
from lowrank_ref.ranks.svd_pruning import prune_by_svd

__all__ = [
    "IncreLoRALinear",
    "ProximalGates",
    "RankGrowth",
    "SoRALinear",
    "SparsifyingSchedule",
    "gate_groups",
    "grown_ranks",
    "growth_groups",
    "growth_schedule",
    "kept_ranks",
    "orthogonality_penalty",
    "prune",
    "prune_by_svd",
    "soft_threshold",
    "threshold_levels",
]
