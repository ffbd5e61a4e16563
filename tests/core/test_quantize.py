"""The 8-bit code and its rounding: against bitsandbytes, brute force, and its own error bound."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.core.quantize import BLOCK, dequantize_blockwise, dynamic_code, quantize_blockwise

SIZES = [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]


def sample(size: int, *, signed: bool, seed: int = 0) -> torch.Tensor:
    """Draw numbers over many decades, as moments have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes").functional
    theirs = functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(dynamic_code(signed), theirs, rtol=1e-6, atol=0)  # they add up in float32


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_has_256_rising_values_with_zero_and_one(signed):
    code = dynamic_code(signed)
    assert code.shape == (256,) and code.dtype == torch.float32
    assert bool((code.diff() > 0).all())
    assert 0.0 in code and code[-1] == 1.0
    assert (code[0] < -0.99) == signed


def test_the_signed_code_has_no_minus_one():
    assert round(dynamic_code(True).min().item(), 3) == -0.993 and dynamic_code(False).min() == 0


def test_seven_decades_each_with_twice_the_points():
    code = dynamic_code(True).double()
    counts = [int(((code > 10.0 ** (d - 7)) & (code < 10.0 ** (d - 6))).sum()) for d in range(7)]
    assert counts == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_every_entry_gets_the_nearest_code(size, signed):
    x = sample(size, signed=signed)
    codes, peak = quantize_blockwise(x, signed=signed)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    assert peak.dtype == torch.float32 and peak.shape == (math.ceil(size / BLOCK),)
    values = dynamic_code(signed).double()
    for start in range(0, size, BLOCK):
        block = x[start : start + BLOCK]
        assert peak[start // BLOCK] == block.abs().max()
        scaled = (block / block.abs().max()).double()
        distance = (scaled[:, None] - values).abs()
        chosen = distance.gather(1, codes[start : start + BLOCK].long()[:, None]).squeeze(1)
        assert bool((chosen <= distance.min(dim=1).values + 1e-9).all())  # 1e-9: midpoints are rounded to float32


@pytest.mark.parametrize("signed", [True, False])
@given(size=st.integers(1, 600), seed=st.integers(0, 10_000))
def test_codes_survive_decoding_and_encoding_again(signed, size, seed):
    x = sample(size, signed=signed, seed=seed)
    for block in x.split(
        BLOCK
    ):  # the signed code has no -1: where the largest entry is negative, the peak would change
        if block[block.abs().argmax()] < 0:
            block.neg_()
    codes, peak = quantize_blockwise(x, signed=signed)
    again, _ = quantize_blockwise(dequantize_blockwise(codes, peak, signed=signed), signed=signed)
    assert torch.equal(again, codes)


def test_decoding_is_the_code_times_the_peak_of_the_block():
    codes = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    peak = torch.tensor([2.0, 0.5, 3.0])  # 600 entries are three blocks
    values = dequantize_blockwise(codes, peak, signed=True).flatten()
    for i, c in enumerate(codes.flatten().tolist()):
        assert values[i] == dynamic_code(True)[c] * peak[i // BLOCK]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_error_is_at_most_half_the_widest_step_of_the_code(size, signed):
    x = sample(size, signed=signed, seed=1)
    codes, peak = quantize_blockwise(x, signed=signed)
    error = (dequantize_blockwise(codes, peak, signed=signed) - x).abs()
    half = float(dynamic_code(signed).diff().max()) / 2
    end = 1 + float(dynamic_code(signed)[0]) if signed else 0.0  # -1 itself is not in the signed code
    bound = peak.repeat_interleave(BLOCK)[:size] * (max(half, end) + 1e-6)
    assert bool((error <= bound).all())
    assert half < (0.0071 if signed else 0.0036)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_blocks_stay_zero_beside_others(signed):
    x = torch.zeros(3 * BLOCK)
    x[BLOCK + 3] = 0.7
    codes, peak = quantize_blockwise(x, signed=signed)
    assert torch.equal(dequantize_blockwise(codes, peak, signed=signed), x)
    assert int((dynamic_code(signed)[codes.int()] != 0).sum()) == 1
    torch.testing.assert_close(peak, torch.tensor([0.0, 0.7, 0.0]), rtol=0, atol=0)


def test_shape_and_half_precision_are_handled():
    x = sample(2 * 3 * 50, signed=True).view(2, 3, 50).bfloat16()
    codes, peak = quantize_blockwise(x, signed=True)
    assert codes.shape == x.shape
    back = dequantize_blockwise(codes, peak, signed=True)
    assert back.shape == x.shape and back.dtype == torch.float32
    assert torch.equal(codes, quantize_blockwise(x.float(), signed=True)[0])


@pytest.mark.parametrize(
    "x, signed, error, message",
    [
        (torch.tensor([1.0, float("nan")]), True, ValueError, "x: got 1 NaN"),
        (torch.tensor([1.0, float("inf")]), True, ValueError, "x: got 1 NaN or inf"),
        (torch.tensor([1.0, -0.1]), False, ValueError, "x: got negative entries"),
        (torch.tensor([1, 2]), True, TypeError, "x"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), True, ValueError, "x: got 1 NaN or inf"),
        (torch.tensor([-4e38, 1.0], dtype=torch.float64), True, ValueError, "x: got 1 NaN or inf"),
        (torch.empty(3, device="meta"), True, ValueError, "x: got a tensor without numbers"),
    ],
)
def test_bad_input(x, signed, error, message):
    with pytest.raises(error, match=message):
        quantize_blockwise(x, signed=signed)


def test_float64_within_float32_and_float8_are_quantised_as_float32():
    x = torch.tensor([3e38, -1e38, 1e-300, 0.0], dtype=torch.float64)
    codes, peak = quantize_blockwise(x, signed=True)
    assert peak.isfinite() and torch.equal(codes, quantize_blockwise(x.float(), signed=True)[0])
    x = torch.tensor([1.0, -0.5, 0.25]).to(torch.float8_e4m3fn)
    assert torch.equal(quantize_blockwise(x, signed=True)[0], quantize_blockwise(x.float(), signed=True)[0])


@pytest.mark.usefixtures("no_shape_checks")
def test_codes_that_were_not_made_so_are_refused():
    codes, peak = quantize_blockwise(torch.ones(300), signed=True)
    for wrong in ((codes, peak[:1]), (codes, torch.ones(3)), (codes.int(), peak), (codes[:256], peak)):
        with pytest.raises(ValueError, match="codes, peak: got codes of"):
            dequantize_blockwise(*wrong, signed=True)
