"""How much rank, and where.

Papers:

    sora              gates between LoRA's two matrices fall to exact zeros
    diffora           one gate a module says where LoRA goes
    codyra            tasks in sequence: such gates choose each task's rank, and its update is merged
    increlora         every layer starts at rank 1, and the most important ones grow

Companions:

    sora_schedule     the schedule that raises SoRA's penalty level by level
    module_search     DiffoRA's search: gates on one part of the data, factors on the other
    module_selection  which modules fit a budget, and the model that keeps them
    module_gram       the Gram matrices of DiffoRA's theory
    svd_pruning       the baseline: train one rank, then drop the smallest singular values
    task_sequence     CoDyRA's cycle of tasks, and the Last, Average, Transfer and Forgetting of a sequence
    growing_linear    IncreLoRA's layer, whose rank grows by blocks
    growth_schedule   IncreLoRA's optimizer groups, each with a clock of its own
"""

from lowrank_ref.ranks.codyra import CoDyRALinear, RankSelection
from lowrank_ref.ranks.diffora import DiffoRALinear, couple_logits, module_logits, top_modules
from lowrank_ref.ranks.growing_linear import IncreLoRALinear, grown_ranks
from lowrank_ref.ranks.growth_schedule import growth_groups, growth_schedule
from lowrank_ref.ranks.increlora import RankGrowth, orthogonality_penalty
from lowrank_ref.ranks.module_search import ModuleSearch
from lowrank_ref.ranks.module_selection import adaptation_matrix, keep_modules, modules_within, update_norms
from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, soft_threshold
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels
from lowrank_ref.ranks.svd_pruning import prune_by_svd
from lowrank_ref.ranks.task_sequence import MergedUpdate, TaskScores, finish_task, start_task, task_scores

__all__ = [
    "CoDyRALinear",
    "DiffoRALinear",
    "IncreLoRALinear",
    "MergedUpdate",
    "ModuleSearch",
    "ProximalGates",
    "RankGrowth",
    "RankSelection",
    "SoRALinear",
    "SparsifyingSchedule",
    "TaskScores",
    "adaptation_matrix",
    "couple_logits",
    "finish_task",
    "gate_groups",
    "grown_ranks",
    "growth_groups",
    "growth_schedule",
    "keep_modules",
    "kept_ranks",
    "module_logits",
    "modules_within",
    "orthogonality_penalty",
    "prune",
    "prune_by_svd",
    "soft_threshold",
    "start_task",
    "task_scores",
    "threshold_levels",
    "top_modules",
    "update_norms",
]
