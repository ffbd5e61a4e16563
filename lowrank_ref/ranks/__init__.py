"""How much rank, and where.

Papers:

    sora           gates between LoRA's two matrices fall to exact zeros
    codyra         tasks in sequence: such gates choose each task's rank, and its update is merged

Companions:

    sora_schedule  the schedule that raises SoRA's penalty level by level
    svd_pruning    the baseline: train one rank, then drop the smallest singular values
    task_sequence  CoDyRA's cycle of tasks, and the Last, Average, Transfer and Forgetting of a sequence
"""

from lowrank_ref.ranks.codyra import CoDyRALinear, RankSelection
from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, soft_threshold
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels
from lowrank_ref.ranks.svd_pruning import prune_by_svd
from lowrank_ref.ranks.task_sequence import MergedUpdate, TaskScores, finish_task, start_task, task_scores

__all__ = [
    "CoDyRALinear",
    "MergedUpdate",
    "ProximalGates",
    "RankSelection",
    "SoRALinear",
    "SparsifyingSchedule",
    "TaskScores",
    "finish_task",
    "gate_groups",
    "kept_ranks",
    "prune",
    "prune_by_svd",
    "soft_threshold",
    "start_task",
    "task_scores",
    "threshold_levels",
]
