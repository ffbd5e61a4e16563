"""How to write the update: adapters of a frozen layer."""

from lowrank_ref.adapters.lora import LoRALinear, lora_plus_groups, lora_scaling, rslora_scaling
from lowrank_ref.adapters.lora_layers import LoRAConv2d, LoRAEmbedding
from lowrank_ref.adapters.lora_relatives import DoRALinear, PiSSALinear
from lowrank_ref.adapters.peft_format import load_peft, save_peft
from lowrank_ref.adapters.randlora import RandLoRALinear

__all__ = [
    "DoRALinear",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "PiSSALinear",
    "RandLoRALinear",
    "load_peft",
    "lora_plus_groups",
    "lora_scaling",
    "rslora_scaling",
    "save_peft",
]
