"""How much rank, and where.

Papers:

    sora              gates between LoRA's two matrices fall to exact zeros
    increlora         every layer starts at rank 1, and the most important ones grow
    diffora           one gate a module says where LoRA goes
    codyra            tasks in sequence: such gates choose each task's rank, and its update is merged
    bayesian_lora     stochastic gates choose the rank of each update and the bits of each factor

Companions:

    sora_schedule     the schedule that raises SoRA's penalty level by level
    module_search     DiffoRA's search: gates on one part of the data, factors on the other
    module_selection  which modules fit a budget, and the model that keeps them
    module_gram       the Gram matrices of DiffoRA's theory
    svd_pruning       the baseline: train one rank, then drop the smallest singular values
    task_sequence     CoDyRA's cycle of tasks, and the Last, Average, Transfer and Forgetting of a sequence
    growing_linear    IncreLoRA's layer, whose rank grows by blocks
    growth_schedule   IncreLoRA's optimizer groups, each with a clock of its own
    bit_export        factors of few bits as whole numbers: packing, and files
    bit_gates         the draw of Bayesian-LoRA's gates, and what they cost: penalties, bit operations, stored bits
    residual_bits     the quantiser of Bayesian Bits: 2, 4, 8, 16 and 32 bits by residuals
"""

from lowrank_ref.ranks.bayesian_lora import (
    BayesianLoRALinear,
    bernoulli_kl,
    chain_kl,
    chain_penalty,
    deterministic_gates,
    hard_concrete,
    nested_gates,
    open_probability,
)
from lowrank_ref.ranks.bit_export import load_bits, pack_integers, save_bits, unpack_integers
from lowrank_ref.ranks.bit_gates import (
    GateSampler,
    bit_cost,
    bit_operations,
    chain_divergence,
    gated_layers,
    logit_groups,
    operations,
    prune_to_lora,
    stored_bits,
)
from lowrank_ref.ranks.codyra import CoDyRALinear, RankSelection
from lowrank_ref.ranks.diffora import DiffoRALinear, couple_logits, module_logits, top_modules
from lowrank_ref.ranks.growing_linear import IncreLoRALinear, grown_ranks
from lowrank_ref.ranks.growth_schedule import growth_groups, growth_schedule
from lowrank_ref.ranks.increlora import RankGrowth, orthogonality_penalty
from lowrank_ref.ranks.module_search import ModuleSearch
from lowrank_ref.ranks.module_selection import adaptation_matrix, keep_modules, modules_within, update_norms
from lowrank_ref.ranks.residual_bits import codes_of, residual_quantize, step_sizes
from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, soft_threshold
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels
from lowrank_ref.ranks.svd_pruning import prune_by_svd
from lowrank_ref.ranks.task_sequence import MergedUpdate, TaskScores, finish_task, start_task, task_scores

__all__ = [
    "BayesianLoRALinear",
    "CoDyRALinear",
    "DiffoRALinear",
    "GateSampler",
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
    "bernoulli_kl",
    "bit_cost",
    "bit_operations",
    "chain_divergence",
    "chain_kl",
    "chain_penalty",
    "codes_of",
    "couple_logits",
    "deterministic_gates",
    "finish_task",
    "gate_groups",
    "gated_layers",
    "grown_ranks",
    "growth_groups",
    "growth_schedule",
    "hard_concrete",
    "keep_modules",
    "kept_ranks",
    "load_bits",
    "logit_groups",
    "module_logits",
    "modules_within",
    "nested_gates",
    "open_probability",
    "operations",
    "orthogonality_penalty",
    "pack_integers",
    "prune",
    "prune_by_svd",
    "prune_to_lora",
    "residual_quantize",
    "save_bits",
    "soft_threshold",
    "start_task",
    "step_sizes",
    "stored_bits",
    "task_scores",
    "threshold_levels",
    "top_modules",
    "unpack_integers",
    "update_norms",
]
