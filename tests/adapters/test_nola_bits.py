"""Rounding and packing of NOLA's coefficients."""

import pytest
import torch
from battery import gaussian
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.adapters.nola_bits import pack_codes, quantize, rounded, unpack_codes

BITS = st.integers(2, 8)


@given(BITS, st.integers(1, 40), st.integers(0, 5))
def test_each_coefficient_goes_to_the_nearest_level(bits, count, seed):
    c = gaussian(count, seed=seed)
    codes, step = quantize(c, bits)
    top = 2 ** (bits - 1) - 1
    assert codes.abs().max() == top and torch.isclose(step, c.abs().max() / top)
    levels = [float(step) * i for i in range(-top, top + 1)]
    for value, code in zip(c.tolist(), codes.tolist()):
        nearest = min(levels, key=lambda level: abs(level - value))
        assert abs(nearest - float(step) * code) < 1e-12
    torch.testing.assert_close(rounded(c, bits), codes * step, rtol=0, atol=0)


def test_zeros_stay_zeros_and_ties_go_to_the_even_level():
    codes, step = quantize(torch.zeros(3), 4)
    assert not codes.any() and step == 0 and not rounded(torch.zeros(3), 4).any()
    assert quantize(torch.tensor([7.0, 0.5, 1.5, -2.5]), 4)[0].tolist() == [7, 0, 2, -2]


def test_the_gradient_passes_straight_through():
    c = gaussian(9).requires_grad_()
    weight = gaussian(9, seed=1)
    (rounded(c, 3) * weight).sum().backward()
    assert torch.equal(c.grad, weight)


@given(BITS, st.integers(0, 30), st.integers(0, 5))
def test_packing_and_back(bits, count, seed):
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    data = pack_codes(codes, bits)
    assert data.dtype == torch.uint8 and len(data) == -(-count * bits // 8)
    assert torch.equal(unpack_codes(data, bits, count), codes)
    number = sum((code + top) << (bits * i) for i, code in enumerate(codes.tolist()))  # one long number, lowest first
    assert bytes(data.tolist()) == number.to_bytes(len(data), "little")


@pytest.mark.parametrize("bits, error", [(1, ValueError), (9, ValueError), (4.0, TypeError), (True, TypeError)])
def test_bits_out_of_range_raise(bits, error):
    for call in (quantize, rounded):
        with pytest.raises(error, match="bits"):
            call(torch.ones(2), bits)


@pytest.mark.parametrize(
    "c, error", [(torch.tensor([1.0, torch.nan]), ValueError), (torch.tensor([torch.inf]), ValueError)]
)
def test_what_is_not_finite_is_not_coded(c, error):
    with pytest.raises(error, match="c: got 1 NaN or infinite"):
        quantize(c, 4)
    assert rounded(c, 4).isnan().any()  # a merge then says so


def test_bytes_that_are_no_codes_raise():
    with pytest.raises(ValueError, match="data: got 3 bytes, wanted 2 for 3 codes of 4 bits"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, 3)
    with pytest.raises(ValueError, match="data: got the code 8, wanted at most 7"):
        unpack_codes(torch.tensor([0xF0], dtype=torch.uint8), 4, 2)
