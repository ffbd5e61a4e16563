"""Straight-through gradients, and those of a learned step, against finite differences and a loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.lowbit import QUANTIZERS, fake_quantize, learned_step


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["int4 row", "NF4", "ternary", "E4M3 tensor"])
def test_forward_is_rounded_and_the_gradient_passes(name):
    x, G = randn(3, 64).requires_grad_(), randn(3, 64, seed=1)
    y = fake_quantize(x, QUANTIZERS[name])
    assert torch.equal(y, QUANTIZERS[name](x))
    assert torch.equal(torch.autograd.grad((y * G).sum(), x)[0], G)


@given(bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_the_learned_step_by_a_loop(bits, seed):
    w, G = randn(7, seed=seed).requires_grad_(), randn(7, seed=seed + 1)
    step = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    below, above = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    y = learned_step(w, step, bits)
    dw, ds = torch.autograd.grad((y * G).sum(), (w, step))
    wanted_s = 0.0
    for value, q, g, passed in zip(w.tolist(), y.tolist(), G.tolist(), dw.tolist()):
        u = value / 0.3
        clipped = max(-below, min(above, u))
        assert math.isclose(q, round(clipped) * 0.3, abs_tol=1e-12)
        assert math.isclose(passed, g if -below <= u <= above else 0, abs_tol=1e-12)
        wanted_s += g * (round(u) - u if -below < u < above else clipped)
    assert math.isclose(ds.item(), wanted_s / math.sqrt(7 * above), rel_tol=1e-9, abs_tol=1e-12)


def test_refuses():
    w = randn(4)
    with pytest.raises(ValueError, match="bits: got 1"):
        learned_step(w, torch.tensor(0.1), 1)
    with pytest.raises(ValueError, match="step: got 0"):
        learned_step(w, torch.tensor(0.0), 4)
