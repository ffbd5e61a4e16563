import copy

import pytest
import torch
from battery import gaussian, shapes
from hypothesis import given
from torch import nn

from lowrank_ref.adapters.singular_core import SingularCoreLinear, core_delta, singular_core_update
from lowrank_ref.adapters.svfit import SVFitLinear


def core(m, n, r, **options):
    base = nn.Linear(n, m).double()
    with torch.no_grad():
        base.weight.copy_(gaussian(m, n, seed=3))
    layer = SingularCoreLinear(base, r, **options)
    with torch.no_grad():
        layer.delta.copy_(gaussian(r, r, seed=1))
    return layer


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def test_core_delta_by_loops():
    U, M, Vh = gaussian(4, 2), gaussian(2, 2, seed=1), gaussian(2, 3, seed=2)
    W = core_delta(U, M, Vh)
    for i in range(4):
        for j in range(3):
            terms = (U[i, k] * M[k, h] * Vh[h, j] for k in range(2) for h in range(2))
            assert W[i, j].item() == pytest.approx(sum(terms).item())


@given(shapes())
def test_singular_core_update_is_core_delta_times_x(shape):
    m, n, r = shape
    U, M, Vh, x = gaussian(m, r), gaussian(r, r, seed=1), gaussian(r, n, seed=2), gaussian(4, n, seed=3)
    assert_close(singular_core_update(x, U, M, Vh), x @ core_delta(U, M, Vh).T)


@given(shapes())
def test_a_diagonal_core_is_svfit(shape):
    m, n, r = shape
    layer, x = core(m, n, r), gaussian(4, n)
    diagonal = SVFitLinear(copy.deepcopy(layer.base), r)
    with torch.no_grad():
        layer.delta.copy_(layer.delta.diagonal().clone().diag())
        diagonal.delta.copy_(layer.delta.diagonal())
    assert_close(layer(x), diagonal(x))
    layer(x).pow(2).sum().backward()
    diagonal(x).pow(2).sum().backward()
    torch.testing.assert_close(layer.delta.grad.diagonal(), diagonal.delta.grad)


@given(shapes())
def test_multiplicative_is_lora_xs(shape):
    m, n, r = shape
    layer = core(m, n, r, form="multiplicative")
    R = layer.delta
    assert_close(layer.delta_weight(), layer.U @ R @ layer.S.diag() @ layer.Vh)
    A, B, s = layer.lora_factors()
    assert_close(s * B @ A, layer.delta_weight())
    assert R.numel() == r * r == sum(p.numel() for p in layer.parameters() if p.requires_grad)


def test_a_full_core_reaches_every_change():
    layer, D = core(5, 5, 5), gaussian(5, 5, seed=7)
    with torch.no_grad():
        layer.delta.copy_(layer.U.T @ D @ layer.Vh.T)
    assert_close(layer.delta_weight(), D)
