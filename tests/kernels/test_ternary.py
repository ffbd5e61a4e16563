"""Products with packed weights in Triton's interpreter, against the definitions. `tests/gpu` runs them on a GPU."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.lowbit import pack
from lowrank_ref.lowbit import ternary as definition

pytest.importorskip("triton", reason="Triton is not installed")
from lowrank_ref.kernels import ternary as kernels

pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="a GPU is there: tests/gpu tests the compiled kernels")

#: Small blocks, so that small matrices have inner blocks and ragged edges.
DECODE = {"ROWS": 8, "BM": 16, "BK": 32, "SPLIT": 2}
PREFILL = {"ROWS": 16, "BM": 16, "BK": 32}
EITHER = st.sampled_from([None, DECODE, PREFILL])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def problem(rows, m, n, seed=0):
    g = seeded(seed)
    T = torch.randint(-1, 2, (m, n), generator=g, dtype=torch.int8)
    return T, torch.randn(rows, n, generator=g), torch.rand((), generator=g) + 0.1


def fitting(config, rows):
    """Decoding serves at most as many rows as a block has."""
    return PREFILL if config is DECODE and rows > DECODE["ROWS"] else config


@given(rows=st.integers(1, 20), n=st.integers(1, 300), seed=st.integers(0, 99))
def test_quantising_is_the_definition_to_the_bit(rows, n, seed):
    x = torch.randn(rows, n, generator=seeded(seed)) * 10.0 ** torch.randint(-6, 3, (rows, 1), generator=seeded(seed))
    codes, scale, x_sum = kernels.quantise(x)
    s = definition.absmax_scale(x)
    assert torch.equal(scale, s.squeeze(1))
    assert torch.equal(codes.float(), definition.int8_codes(x, s))
    assert torch.equal(x_sum, codes.sum(1, dtype=torch.int32))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_nan_and_infinity_spoil_their_own_token_as_in_the_definition():
    T, x, beta = problem(6, 7, 40)
    x[1, 3], x[2, 39], x[3, 0], x[4, 5] = math.nan, math.inf, -math.inf, -math.nan
    codes, scale, x_sum = kernels.quantise(x)
    y = kernels.ternary_matmul(codes, pack(T), beta, scale=scale, x_sum=x_sum)
    wanted = definition.packed_linear(x, pack(T), beta)
    assert wanted[1:5].isnan().all() and wanted[[0, 5]].isfinite().all()
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


def test_halves_round_to_even_and_zero_rows_stay_zero():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -3.5], [0.0] * 6])
    assert kernels.quantise(x)[0].tolist() == [[127, 0, 2, 2, 0, -4], [0] * 6]


@given(rows=st.integers(1, 20), m=st.integers(1, 50), n=st.integers(1, 300), config=EITHER, seed=st.integers(0, 99))
def test_int8_product_is_the_definition_to_the_bit(rows, m, n, config, seed):
    T, x, beta = problem(rows, m, n, seed)
    codes, scale, x_sum = kernels.quantise(x)
    y = kernels.ternary_matmul(codes, pack(T), beta, scale=scale, x_sum=x_sum, config=fitting(config, rows))
    assert torch.equal(y, definition.packed_linear(x, pack(T), beta))


@given(rows=st.integers(1, 20), m=st.integers(1, 50), n=st.integers(1, 300), config=EITHER, seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_product_is_the_exact_one_rounded_once(dtype, rows, m, n, config, seed):
    T, x, beta = problem(rows, m, n, seed)
    x = x.to(dtype)
    y = kernels.ternary_matmul(x, pack(T), beta, config=fitting(config, rows))
    exact = x.double() @ T.T.double() * beta.double()
    size = x.double().abs() @ T.T.double().abs() * beta.double()  # float32 sums err by this, times n roundings
    assert y.dtype == dtype
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)  # the interpreter cuts bfloat16 off
    assert bool(((y - exact).abs() <= rounding * exact.abs() + n * 1.2e-7 * size + 1e-9).all())


@pytest.mark.parametrize("config", [DECODE, PREFILL])
def test_a_scale_for_every_row_of_weights(config):
    T, x, _ = problem(5, 20, 70)
    beta = torch.rand(20, generator=seeded(1)) + 0.1
    codes, scale, x_sum = kernels.quantise(x)
    y = kernels.ternary_matmul(codes, pack(T), beta, scale=scale, x_sum=x_sum, config=config)
    assert torch.equal(y, (codes.double() @ T.T.double()).float() * (beta / scale[:, None]))


@given(rows=st.integers(1, 20), m=st.integers(1, 40), n=st.integers(1, 100), r=st.integers(0, 80), config=EITHER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_correction_is_added_in_the_same_pass(dtype, rows, m, n, r, config):
    T, x, beta = problem(rows, m, n)
    B, t = torch.randn(m, r, generator=seeded(2)).to(dtype), torch.randn(rows, r, generator=seeded(3))
    codes, scale, x_sum = kernels.quantise(x)
    options = {"scale": scale, "x_sum": x_sum, "config": fitting(config, rows)}
    y = kernels.ternary_matmul(codes, pack(T), beta, B=B, t=t, **options)
    torch.testing.assert_close(y, definition.packed_linear(x, pack(T), beta) + t @ B.float().T, rtol=1e-5, atol=1e-5)


def test_strided_activations_and_a_result_of_another_dtype():
    T, x, beta = problem(6, 12, 90)
    apart = torch.stack([x, x], dim=1)[:, 0]  # rows lie apart
    turned = x.T.contiguous().T  # columns lie apart
    wanted = kernels.ternary_matmul(x.half(), pack(T), beta, dtype=torch.float32)
    assert wanted.dtype == torch.float32
    for other in (apart, turned):
        assert torch.equal(kernels.ternary_matmul(other.half(), pack(T), beta, dtype=torch.float32), wanted)
        assert torch.equal(kernels.quantise(other)[0], kernels.quantise(x)[0])


@given(m=st.integers(1, 40), n=st.integers(1, 1100))
def test_unpacking(m, n):
    T, _, beta = problem(1, m, n)
    assert torch.equal(kernels.unpacked(pack(T), n, beta, torch.float32), beta * T)


def test_very_many_rows_are_multiplied_by_an_unpacked_weight(monkeypatch):
    monkeypatch.setattr(kernels, "UNPACK_FROM", 3)
    T, x, beta = problem(3, 8, 20)
    y = kernels.ternary_matmul(x.half(), pack(T), beta)
    assert torch.equal(y, x.half() @ (beta * T).half().T)


def test_bad_input_is_named():
    T, x, beta = problem(2, 4, 9)
    codes, scale, x_sum = kernels.quantise(x)
    sums, ones = {"scale": scale, "x_sum": x_sum}, torch.ones
    for error, message, arguments, options in [
        (TypeError, "x: got dtype torch.float32", (x, pack(T), beta), {}),
        (ValueError, r"packed: got torch.uint8 of shape \(4, 3\)", (x.half()[:, :8], pack(T), beta), {}),
        (ValueError, "packed: got torch.int8", (x.half(), pack(T).to(torch.int8), beta), {}),
        (ValueError, "rows 0", (x.half()[:0], pack(T), beta), {}),
        (ValueError, "beta: got 3 numbers", (x.half(), pack(T), torch.ones(3)), {}),
        (ValueError, "beta: got 1 numbers of torch.float64", (x.half(), pack(T), beta.double()), {}),
        (ValueError, "scale, x_sum: wanted both", (codes, pack(T), beta), {"scale": scale}),
        (ValueError, "scale, x_sum: wanted both", (x.half(), pack(T), beta), sums),
        (ValueError, "B, t: got one", (codes, pack(T), beta), {**sums, "B": ones(4, 1)}),
        (ValueError, r"\(4, 2\) and \(2, 1\)", (codes, pack(T), beta), {**sums, "B": ones(4, 2), "t": ones(2, 1)}),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            kernels.ternary_matmul(*arguments, **options)
    tensors = {"packed": pack(T), "beta": beta, **sums, "B": ones(4, 2), "t": ones(2, 2)}
    for name, tensor in tensors.items():
        with pytest.raises(ValueError, match=f"{name}: got a tensor on meta, wanted cpu, where x is"):
            kernels.ternary_matmul(codes, **{**tensors, name: tensor.to("meta")})
    with pytest.raises(ValueError, match=r"x: got shape \(9,\)"):
        kernels.quantise(x[0])


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 128, 129, 4096])
def test_tuned_blocks_can_hold_the_rows(rows, int8):
    for m in (64, 8192, 16384):
        config = kernels.tuned(rows, m, int8)
        assert "SPLIT" not in config or config["ROWS"] >= rows
        assert config["BK"] >= 32  # the inner side of an int8 matrix instruction
