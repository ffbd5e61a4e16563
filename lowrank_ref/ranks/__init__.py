"""How much rank, and where.

Papers:

    sora           gates between LoRA's two matrices fall to exact zeros

Companions:

    sora_schedule  the schedule that raises SoRA's penalty level by level
    svd_pruning    the baseline: train one rank, then drop the smallest singular values
"""

from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, soft_threshold
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels
from lowrank_ref.ranks.svd_pruning import prune_by_svd

__all__ = [
    "ProximalGates",
    "SoRALinear",
    "SparsifyingSchedule",
    "gate_groups",
    "kept_ranks",
    "prune",
    "prune_by_svd",
    "soft_threshold",
    "threshold_levels",
]
