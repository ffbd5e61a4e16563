"""Bayesian-LoRA's layers for its tests, and its quantiser number by number."""

from functools import partial

import torch
from battery import gaussian, seeded
from torch import nn

from lowrank_ref.core.layers import replace_linears
from lowrank_ref.ranks import BayesianLoRALinear
from lowrank_ref.ranks.residual_bits import INSIDE

ONE = torch.tensor(1.0, dtype=torch.float64)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def layer_of(m=6, n=5, rank=4, *, dtype=torch.float64, moved=True, **options):
    layer = BayesianLoRALinear(nn.Linear(n, m, dtype=dtype), rank, generator=seeded(), **options)
    if moved:
        with torch.no_grad():
            layer.E.copy_(gaussian(rank, seed=1))
    return layer


def net(rank=3, **options):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return replace_linears(model, "", partial(BayesianLoRALinear, rank=rank, generator=seeded(), **options))


def set_logits(layer, ranks=None, bits=None):
    with torch.no_grad():
        if ranks is not None:
            layer.rank_logits.copy_(float64(*ranks))
        if bits is not None:
            layer.bit_logits.copy_(torch.as_tensor(bits))
    return layer


def by_hand(x, beta, gates):
    """One number, gate after gate."""
    x = min(max(x, -beta * INSIDE), beta * INSIDE)
    steps = [2 * beta / (2.0**2 ** (k + 1) - 1) for k in range(len(gates) + 1)]
    parts, rest = [], x
    for step in steps:
        parts.append(step * round(rest / step))
        rest -= parts[-1]
    inner = 0.0
    for z, part in list(zip(gates, parts[1:]))[::-1]:
        inner = z * (part + inner)
    return parts[0] + inner
