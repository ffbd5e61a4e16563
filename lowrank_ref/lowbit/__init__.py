"""Few bits, ternary weights.

Papers:

    hgf           a ternary layer with a small gated low-rank path beside it

Companions:

    ternary       ternary weights and int8 activations, trained and packed
    bitnet        BitNet layers of transformers as packed layers
    differential  attention as the difference of two softmax maps
    fast          the packed products on a GPU
"""

from lowrank_ref.lowbit.bitnet import from_bitnet, is_bitnet
from lowrank_ref.lowbit.differential import DifferentialAttention
from lowrank_ref.lowbit.hgf import GateSchedule, HGFLinear, gate_penalty, gates, memory_overhead
from lowrank_ref.lowbit.ternary import BitLinear, PackedLinear, load_packed, pack, pack_model, unpack

__all__ = [
    "BitLinear",
    "DifferentialAttention",
    "GateSchedule",
    "HGFLinear",
    "PackedLinear",
    "from_bitnet",
    "gate_penalty",
    "gates",
    "is_bitnet",
    "load_packed",
    "memory_overhead",
    "pack",
    "pack_model",
    "unpack",
]
