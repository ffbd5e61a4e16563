"""How to write the update: adapters of a frozen layer.

Papers:

    lora              W stays, a low-rank correction s·B·A is trained beside it
    svfit             the singular values of W trained, its singular vectors frozen
    randlora          a full-rank update out of frozen random bases and trained diagonals
    nola              LoRA's factors as mixtures of random matrices: a seed and some coefficients
    loldu             the pivots of a weight trained, its triangular factors frozen
    lora_sb           a trained r x r core between frozen frames, taken from the first gradient
    lora_squeeze      train at a generous rank, cut by an SVD of the thin factors, at the end or on the way
    allora            LoRA without dropout and scale, whose gradients shrink row by row as the update grows
    ba_lora           three penalties on the outputs: near the pretrained model's, spread, concentrated
    sara              the smallest weights trained where they stand, all others frozen

Companions:

    allora_family     relatives of ALLoRA: other factors, and its controls
    allora_flaws      what its paper says is wrong with LoRA, as functions that can be measured
    dora_pissa        two relatives of LoRA that chapters use as baselines
    embedding_conv    LoRA on embeddings and convolutions
    gradient_start    LoRA-SB's gradient pass, and the start of a whole model
    lambda_schedules  how BA-LoRA's code moves the weights of its penalties
    ldu_factors       which triangular factors LoLDU trains, and its controls
    nola_bases        NOLA's random matrices, drawn block by block
    nola_bits         NOLA's coefficients in a few bits
    nola_file         NOLA's smallest file
    peft_format       exchange with huggingface/peft's folders
    placed_values     a frozen weight with trained numbers at some places, without a dense gradient
    randlora_bases    RandLoRA's frozen random matrices
    sara_file         SaRA's files: masks found again, as bits or as places
    sara_progress     SaRA's selection anew, half-way
    singular_core     SVFit with an r × r matrix in place of its r values: a control
    singular_pairs    which singular vectors SVFit trains, and its controls
    svd_frames        LoRA-XS: frames from the pretrained weight, and random ones
    squeeze_targets   which layers LoRA-Squeeze cuts, to which ranks, also in PEFT's words
    squeeze_training  LoRA-Squeeze while a model trains, and its control that only restarts Adam
    weight_selection  which weights of a matrix to train: SaRA's rule, its controls, one threshold for many
    teacher           the pretrained model's logits, and those of a response, for BA-LoRA
"""

from lowrank_ref.adapters.allora import ALLoRALinear
from lowrank_ref.adapters.ba_lora import (
    OutputPenalty,
    covariance_penalty,
    entropy_penalty,
    normalised_mse,
    singular_penalty,
    temperature_kl,
)
from lowrank_ref.adapters.dora_pissa import DoRALinear, PiSSALinear
from lowrank_ref.adapters.embedding_conv import LoRAConv2d, LoRAEmbedding
from lowrank_ref.adapters.gradient_start import start_lora_sb
from lowrank_ref.adapters.lambda_schedules import confident_penalty, cosine_fall, two_phase
from lowrank_ref.adapters.loldu import LoLDULinear
from lowrank_ref.adapters.lora import LoRALinear, lora_plus_groups, lora_scaling, rslora_scaling
from lowrank_ref.adapters.lora_sb import LoRASBLinear
from lowrank_ref.adapters.lora_squeeze import ranks_for_energy, squeeze
from lowrank_ref.adapters.nola import NOLALinear
from lowrank_ref.adapters.nola_file import load_nola, save_nola
from lowrank_ref.adapters.peft_format import load_peft, save_peft
from lowrank_ref.adapters.randlora import RandLoRALinear
from lowrank_ref.adapters.sara import SaRALinear, rank_penalty
from lowrank_ref.adapters.sara_file import load_sara, save_sara
from lowrank_ref.adapters.sara_progress import ProgressiveSelection
from lowrank_ref.adapters.singular_core import SingularCoreLinear
from lowrank_ref.adapters.squeeze_targets import peft_ranks
from lowrank_ref.adapters.squeeze_training import LoRASqueezer, MomentRestart, halving_plan, rewarmed
from lowrank_ref.adapters.svd_frames import LoRAXSLinear
from lowrank_ref.adapters.svfit import SVFitLinear
from lowrank_ref.adapters.teacher import response_logits, teacher_logits
from lowrank_ref.adapters.weight_selection import threshold_for_density

__all__ = [
    "ALLoRALinear",
    "DoRALinear",
    "LoLDULinear",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASBLinear",
    "LoRASqueezer",
    "LoRAXSLinear",
    "MomentRestart",
    "NOLALinear",
    "OutputPenalty",
    "PiSSALinear",
    "ProgressiveSelection",
    "RandLoRALinear",
    "SVFitLinear",
    "SaRALinear",
    "SingularCoreLinear",
    "confident_penalty",
    "cosine_fall",
    "covariance_penalty",
    "entropy_penalty",
    "halving_plan",
    "load_nola",
    "load_peft",
    "load_sara",
    "lora_plus_groups",
    "lora_scaling",
    "normalised_mse",
    "peft_ranks",
    "rank_penalty",
    "ranks_for_energy",
    "response_logits",
    "rewarmed",
    "rslora_scaling",
    "save_nola",
    "save_peft",
    "save_sara",
    "singular_penalty",
    "squeeze",
    "start_lora_sb",
    "teacher_logits",
    "temperature_kl",
    "threshold_for_density",
    "two_phase",
]
