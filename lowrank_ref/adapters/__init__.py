"""How to write the update: adapters of a frozen layer.

Papers:

    lora            W stays, a low-rank correction s·B·A is trained beside it
    randlora        a full-rank update out of frozen random bases and trained diagonals
    nola            LoRA's factors as mixtures of random matrices: a seed and some coefficients

Companions:

    dora_pissa      two relatives of LoRA that chapters use as baselines
    embedding_conv  LoRA on embeddings and convolutions
    nola_bases      NOLA's random matrices, drawn block by block
    nola_bits       NOLA's coefficients in a few bits
    nola_file       NOLA's smallest file
    peft_format     exchange with huggingface/peft's folders
    randlora_bases  RandLoRA's frozen random matrices
"""

from lowrank_ref.adapters.dora_pissa import DoRALinear, PiSSALinear
from lowrank_ref.adapters.embedding_conv import LoRAConv2d, LoRAEmbedding
from lowrank_ref.adapters.lora import LoRALinear, lora_plus_groups, lora_scaling, rslora_scaling
from lowrank_ref.adapters.nola import NOLALinear
from lowrank_ref.adapters.nola_file import load_packed, save_packed
from lowrank_ref.adapters.peft_format import load_peft, save_peft
from lowrank_ref.adapters.randlora import RandLoRALinear

__all__ = [
    "DoRALinear",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "NOLALinear",
    "PiSSALinear",
    "RandLoRALinear",
    "load_packed",
    "load_peft",
    "lora_plus_groups",
    "lora_scaling",
    "rslora_scaling",
    "save_packed",
    "save_peft",
]
