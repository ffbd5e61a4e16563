"""Matrices and a network with known spectra, for the tests of WeLore and of its companions."""

import torch
from torch import nn

from lowrank_ref.compression import WeLoreLinear


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def spectrum(q, seed=0):
    return gaussian(q, seed=seed).abs().sort(descending=True).values


def steep(*shape, seed=0):
    """A matrix whose singular values fall by a factor of 2."""
    U, _, Vh = torch.linalg.svd(gaussian(*shape, seed=seed), full_matrices=False)
    return U * 0.5 ** torch.arange(len(Vh)) @ Vh


def network(seed=0):
    """Two steep matrices and a flat one, of different shapes, in float64."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    with torch.no_grad():
        for i, layer in enumerate(model[::2]):
            make = gaussian if i == 1 else steep
            layer.weight.copy_(make(*layer.weight.shape, seed=seed + i))
            layer.bias.copy_(gaussian(len(layer.bias), seed=seed + 10 + i))
    return model


def welore_layer(base, generator=None):
    """A layer of rank 4, in the form of the battery's cases: it draws nothing."""
    return WeLoreLinear.from_linear(base, rank=4)
