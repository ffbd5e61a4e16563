"""Few bits, ternary weights."""

from lowrank_ref.lowbit.differential import DifferentialAttention
from lowrank_ref.lowbit.hgf import GateSchedule, HGFLinear, gate_penalty, gates, memory_overhead
from lowrank_ref.lowbit.ternary import BitLinear, PackedLinear, load_packed, pack, pack_model, unpack

__all__ = [
    "BitLinear",
    "DifferentialAttention",
    "GateSchedule",
    "HGFLinear",
    "PackedLinear",
    "gate_penalty",
    "gates",
    "load_packed",
    "memory_overhead",
    "pack",
    "pack_model",
    "unpack",
]
