"""Few bits, ternary weights.

Papers:

    low_precision       formats, scales and rounding for each tensor of a training step
    hgf                 a ternary layer with a small gated low-rank path beside it

Companions:

    bitnet              BitNet layers of transformers as packed layers
    differential        attention as the difference of two softmax maps
    eight_bit_products  real float8 and int8 products
    fast                the packed products on a GPU
    loss_scale          loss scaling for float16
    narrow_adam         AdamW with quantised weights and moments
    number_formats      formats as sets of values, nearest and stochastic rounding
    quantization_aware  rounded forward, straight-through gradient; a learned step
    quantizers          format, rule for scales and block in one function of a tensor
    rotations           Hadamard rotations of both operands of a product
    ternary             ternary weights and int8 activations, trained and packed
"""

from lowrank_ref.lowbit.bitnet import from_bitnet, is_bitnet
from lowrank_ref.lowbit.differential import DifferentialAttention
from lowrank_ref.lowbit.eight_bit_products import float8_product, int8_product
from lowrank_ref.lowbit.hgf import GateSchedule, HGFLinear, gate_penalty, gates, memory_overhead
from lowrank_ref.lowbit.loss_scale import LossScale
from lowrank_ref.lowbit.low_precision import RECIPES, QuantLinear, Recipe, quantized_linear
from lowrank_ref.lowbit.narrow_adam import NarrowAdamW
from lowrank_ref.lowbit.number_formats import FORMATS, fixed_point, integer_format, nearest, stochastic
from lowrank_ref.lowbit.quantization_aware import fake_quantize, learned_step
from lowrank_ref.lowbit.quantizers import QUANTIZERS, DelayedScale, Quantizer
from lowrank_ref.lowbit.rotations import hadamard, rotate_blocks
from lowrank_ref.lowbit.ternary import BitLinear, PackedLinear, load_packed, pack, pack_model, unpack

__all__ = [
    "BitLinear",
    "DelayedScale",
    "DifferentialAttention",
    "FORMATS",
    "GateSchedule",
    "HGFLinear",
    "LossScale",
    "NarrowAdamW",
    "PackedLinear",
    "QUANTIZERS",
    "QuantLinear",
    "Quantizer",
    "RECIPES",
    "Recipe",
    "fake_quantize",
    "fixed_point",
    "float8_product",
    "from_bitnet",
    "gate_penalty",
    "gates",
    "hadamard",
    "int8_product",
    "integer_format",
    "is_bitnet",
    "learned_step",
    "load_packed",
    "memory_overhead",
    "nearest",
    "pack",
    "pack_model",
    "quantized_linear",
    "rotate_blocks",
    "stochastic",
    "unpack",
]
