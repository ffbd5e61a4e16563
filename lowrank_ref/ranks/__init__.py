"""How much rank, and where.

Papers:

    sora           gates between LoRA's two matrices fall to exact zeros
    bayesian_lora  stochastic gates choose the rank of each update and the bits of each factor

Companions:

    bit_export     factors of few bits as whole numbers: packing, and files
    bit_gates      the draw of Bayesian-LoRA's gates, and what they cost: penalties, bit operations, stored bits
    residual_bits  the quantiser of Bayesian Bits: 2, 4, 8, 16 and 32 bits by residuals
    sora_schedule  the schedule that raises SoRA's penalty level by level
    svd_pruning    the baseline: train one rank, then drop the smallest singular values
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
from lowrank_ref.ranks.residual_bits import codes_of, residual_quantize, step_sizes
from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, soft_threshold
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels
from lowrank_ref.ranks.svd_pruning import prune_by_svd

__all__ = [
    "BayesianLoRALinear",
    "GateSampler",
    "ProximalGates",
    "SoRALinear",
    "SparsifyingSchedule",
    "bernoulli_kl",
    "bit_cost",
    "bit_operations",
    "chain_divergence",
    "chain_kl",
    "chain_penalty",
    "codes_of",
    "deterministic_gates",
    "gate_groups",
    "gated_layers",
    "hard_concrete",
    "kept_ranks",
    "load_bits",
    "logit_groups",
    "nested_gates",
    "open_probability",
    "operations",
    "pack_integers",
    "prune",
    "prune_by_svd",
    "prune_to_lora",
    "residual_quantize",
    "save_bits",
    "soft_threshold",
    "step_sizes",
    "stored_bits",
    "threshold_levels",
    "unpack_integers",
]
