"""How to write the update: adapters of a frozen layer."""

from lowrank_ref.adapters.lora import LoRALinear, lora_plus_groups, lora_scaling, rslora_scaling
from lowrank_ref.adapters.lora_layers import LoRAConv2d, LoRAEmbedding
from lowrank_ref.adapters.lora_relatives import DoRALinear, PiSSALinear

__all__ = [
    "DoRALinear",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "PiSSALinear",
    "lora_plus_groups",
    "lora_scaling",
    "rslora_scaling",
]
