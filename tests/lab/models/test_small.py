import math

import pytest
import torch
from torch import nn

from lowrank_ref.lab import models


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mlp_is_its_formula():
    m = models.MLP((4, 5, 3), activation=nn.Tanh, generator=seeded()).double()
    x = torch.randn(2, 4, dtype=torch.float64, generator=seeded())
    a, b = m.layers
    want = torch.tanh(x @ a.weight.T + a.bias) @ b.weight.T + b.bias
    assert torch.allclose(m(x), want, atol=1e-14)
    assert a.weight.abs().max() <= 1 / 2 and b.weight.abs().max() <= 1 / math.sqrt(5)
    assert sum(p.numel() for p in models.MLP((64, 128, 128, 10)).parameters()) == 26_122
    with pytest.raises(ValueError, match="sizes"):
        models.MLP((4,))


def test_convnet_shapes():
    m = models.ConvNet((4, 8), 3, inputs=2)
    assert m(torch.rand(5, 2, 9, 9)).shape == (5, 3)
    assert [tuple(c.weight.shape) for c in m.convs] == [(4, 2, 3, 3), (8, 4, 3, 3)]
    with pytest.raises(ValueError, match="channels"):
        models.ConvNet(())
