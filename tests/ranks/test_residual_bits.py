"""The quantiser by residuals against a loop and direct rounding, its golden values, and its gradients."""

import itertools

import pytest
import torch
from battery import gaussian
from bit_cases import ONE, assert_close, by_hand, float64
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.ranks.residual_bits import codes_of, residual_quantize, step_sizes


def test_step_sizes_are_those_of_each_grid():
    got = step_sizes(torch.tensor(1.7, dtype=torch.float64), 4)
    assert_close(got, float64(*(2 * 1.7 / (2.0**b - 1) for b in (2, 4, 8, 16, 32))), 1e-16)
    for b, (coarse, fine) in zip((2, 4, 8, 16), itertools.pairwise(got)):
        assert coarse / fine == pytest.approx(2**b + 1, rel=1e-14)
    assert torch.equal(step_sizes(0 * ONE, 2), step_sizes(ONE, 2))  # a tensor of zeros divides by something


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.floats(0.1, 3), st.lists(st.floats(0, 1), max_size=4))
def test_residual_quantize_by_a_loop(values, beta, gates):
    got = residual_quantize(float64(*values), float64(beta)[0], torch.tensor(gates, dtype=torch.float64))
    assert_close(got, float64(*(by_hand(v, beta, gates) for v in values)), 1e-12)


@pytest.mark.parametrize("opened", [0, 1, 2, 3])
def test_open_gates_round_directly(opened):
    x = gaussian(1000)
    limit, bits = x.abs().max(), 2 ** (opened + 1)
    gates = float64(*([1.0] * opened + [0.0] * (3 - opened)))
    step = step_sizes(limit, 3)[opened]
    got, codes = residual_quantize(x, limit, gates), codes_of(x, limit, step)
    assert_close(got, codes * step, 1e-15 * float(limit) * 4)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert ((x - got).abs() <= step / 2 + 1e-7 * limit + 1e-15).all()
    assert_close(residual_quantize(-x, limit, gates), -got, 0)


def test_two_bits_are_three_levels():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    got = residual_quantize(x, ONE, torch.zeros(3, dtype=torch.float64))
    assert_close(got.unique(), float64(-2 / 3, 0, 2 / 3), 1e-15)


def test_golden_values_of_the_quantiser():
    x, wanted = (
        float64(0.9, -0.37),
        ((0.666667, -0.666667), (0.933333, -0.4), (0.901961, -0.368627), (0.900008, -0.370001)),
    )
    for opened, values in enumerate(wanted):
        assert_close(codes_of(x, ONE, step := step_sizes(ONE, 3)[opened]) * step, float64(*values), 5e-7)


def test_gradients_pass_rounding_and_reach_gates():
    x, z = gaussian(7).requires_grad_(), float64(0.3, 0.8, 0.5).requires_grad_()
    limit = x.detach().abs().max()
    g = gaussian(7, seed=2)
    residual_quantize(x, limit, z).backward(g)
    assert torch.equal(x.grad, g)
    for k in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[k] = 1e-6
        up, down = (residual_quantize(x.detach(), limit, z.detach() + sign * shift) for sign in (1, -1))
        assert_close(z.grad[k], ((up - down) / 2e-6 * g).sum(), 1e-8)


def test_a_tensor_of_zeros_stays_one():
    x = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(residual_quantize(x, x.abs().max(), torch.ones(3, dtype=torch.float64)), x)
