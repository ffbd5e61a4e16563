"""The trained low-bit layers, what they are run on, and their two-process run. `lowbit/test_hgf.py` holds the tests."""

from functools import partial
from types import SimpleNamespace

import torch
from battery import N, batch, linear, loss, seeded
from torch import nn

from lowrank_ref.lowbit import BitLinear, DifferentialAttention, GateSchedule, HGFLinear, gate_penalty, gates
from lowrank_ref.lowbit.hgf import hgf_layers


def attention(*, generator=None, dtype=torch.float64):
    """Differential attention of width 12 with two heads, whose four matrices are the battery's rows."""
    rows = torch.randn(4, N, N, generator=seeded(7), dtype=torch.float64) / 3
    layers = [nn.Linear(N, N, bias=False, dtype=dtype) for _ in rows]
    for layer, W in zip(layers, rows):
        layer.weight.data.copy_(W)
    base = SimpleNamespace(**dict(zip("qkvo", layers)), heads=4, causal=True, training=True)
    return DifferentialAttention(base, depth=1, generator=generator)


def bit_linear(*, generator=None, dtype=torch.float64, sub_norm=True):
    return BitLinear(linear(dtype), sub_norm=sub_norm)


def hgf_linear(*, generator=None, dtype=torch.float64, gate=0.3, sub_norm=True):
    return HGFLinear(linear(dtype), 3, gate=gate, sub_norm=sub_norm, generator=generator)


#: Name -> layer(generator=..., dtype=...) from batches of width 12.
LAYERS = {
    "BitLinear": bit_linear,
    "BitLinear without norm": partial(bit_linear, sub_norm=False),
    "HGFLinear": hgf_linear,
    "HGFLinear without norm": partial(hgf_linear, sub_norm=False),
    "DifferentialAttention": attention,
}


def layer(name, *, seed=0, moved=True, dtype=torch.float64):
    """A layer; `moved` shifts every trained number, as training would."""
    made = LAYERS[name](generator=seeded(seed), dtype=dtype)
    if moved:
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn(p.shape, generator=seeded(8)).to(p), alpha=0.2)
    return made


def inputs(name, step=0, dtype=torch.float64):
    """Rows for linear layers, (2, 4, 12) for attention."""
    return batch(step, dtype).reshape(2, 4, N) if name == "DifferentialAttention" else batch(step, dtype)


def train(model, steps, name, rows=slice(None)):
    """Take the given steps with Adam; gates go through all their phases. This process sees `rows` of each batch."""
    inner = getattr(model, "module", model)
    schedule = [GateSchedule(inner, warmup=1, freeze=3)] if name.startswith("HGFLinear") else []
    optimizer = torch.optim.Adam(inner.parameters(), lr=0.01)
    for step in steps:
        optimizer.zero_grad()
        value = loss(model, inputs(name, step)[rows])
        (value + (gate_penalty(gates(inner)) if schedule else 0)).backward()
        optimizer.step()
        for action in schedule:
            action.step()
    return [found.theta.item() for found in hgf_layers(inner)] if schedule else []


def distributed(rank, world, folder):
    """One process of a DDP run over all layers: its share of the rows. Rank 0 saves what came out."""
    results = {}
    for name in LAYERS:
        model = layer(name)
        train(nn.parallel.DistributedDataParallel(model), range(4), name, rows=slice(rank, None, world))
        results[name] = model.state_dict()
    if rank == 0:
        torch.save(results, f"{folder}/results")
