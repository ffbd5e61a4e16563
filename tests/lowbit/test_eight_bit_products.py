"""Real float8 and int8 products on the CPU, beside the emulated quantisers and plain float32 products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.lowbit import QUANTIZERS, float8_product, int8_product
from lowrank_ref.lowbit.eight_bit_products import scaled_definition, scaled_product, takes_scaled, to_float8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
sizes = st.integers(1, 9)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype, name", [(E4M3, "E4M3"), (E5M2, "E5M2")])
@pytest.mark.parametrize("rows", [False, True])
def test_stored_numbers_are_the_emulated_ones(dtype, name, rows):
    x = randn(6, 40) * 100
    q, s = to_float8(x, dtype, rows=rows)
    assert q.dtype == dtype and s.shape == ((6, 1) if rows else ())
    assert torch.equal(q.float() * s, QUANTIZERS[f"{name} {'row' if rows else 'tensor'}"](x))


def test_zeros_and_the_largest_number():
    q, s = to_float8(torch.zeros(2, 3))
    assert not q.float().any() and s > 0
    assert to_float8(torch.tensor([[-7.0, 3.0]]), E5M2)[0].float()[0, 0] == -57344


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("pair", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)])
def test_products_by_a_loop(rows, pair):
    x, W = randn(3, 8), randn(5, 8, seed=1)
    (q, s), (p, r) = to_float8(x, pair[0], rows=rows), to_float8(W, pair[1], rows=rows)
    found = float8_product(x, W, x_dtype=pair[0], W_dtype=pair[1], rows=rows)
    for i in range(3):
        for j in range(5):
            a = q[i].double() * (s[i] if rows else s).double()
            b = p[j].double() * (r[j] if rows else r).double()
            assert found[i, j].item() == pytest.approx(float((a * b).sum()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rows", [False, True])
def test_torchs_scaled_product_is_the_definition(rows):
    """On the CPU PyTorch has one too; on a GPU `tests/gpu/test_low_precision.py` does the same."""
    (q, s), (p, r) = to_float8(randn(32, 64), rows=rows), to_float8(randn(48, 64, seed=1), rows=rows)
    scales = (s, r.mT.contiguous()) if rows else (s, r)
    theirs = torch._scaled_mm(q, p.mT, *scales, out_dtype=torch.float32)
    torch.testing.assert_close(scaled_definition(q, s, p, r), theirs, rtol=1e-4, atol=1e-4)
    found = scaled_product(q, s, p, r, out_dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), theirs, rtol=1e-2, atol=1e-3)


def test_a_fit_gpu_calls_torchs_product(monkeypatch):
    import lowrank_ref.lowbit.eight_bit_products as module

    calls = []
    real = torch._scaled_mm
    monkeypatch.setattr(module, "takes_scaled", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: calls.append(1) or real(*a, **k))
    for rows in (False, True):
        half = torch.bfloat16 if rows else torch.float32
        fit = scaled_product(
            *to_float8(randn(32, 64), rows=rows), *to_float8(randn(48, 64, seed=1), rows=rows), out_dtype=half
        )
        wanted = scaled_definition(*to_float8(randn(32, 64), rows=rows), *to_float8(randn(48, 64, seed=1), rows=rows))
        torch.testing.assert_close(fit.float(), wanted, rtol=1e-2 if rows else 1e-4, atol=1e-2 if rows else 1e-4)
    float8_product(randn(32, 64), randn(48, 64, seed=1), rows=True)  # rows give bfloat16 only
    float8_product(randn(3, 64), randn(48, 64, seed=1))  # three rows do not fit
    float8_product(randn(32, 64), randn(48, 64, seed=1), x_dtype=E5M2, W_dtype=E5M2)
    assert len(calls) == 2


@given(t=sizes, m=sizes, n=sizes)
def test_int8_products_are_exact_sums(t, m, n):
    x, W = randn(t, n), randn(m, n, seed=1)
    wanted = QUANTIZERS["int8 row"](x).double() @ QUANTIZERS["int8 row"](W).double().T
    torch.testing.assert_close(int8_product(x, W).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_cpu_has_no_float8_units():
    assert not takes_scaled(torch.device("cpu"))


@pytest.mark.usefixtures("no_shape_checks")
def test_refuses():
    x = randn(4, 4)
    with pytest.raises(ValueError, match="dtype: got torch.float16"):
        to_float8(x, torch.float16)
    with pytest.raises(ValueError, match="x: got shape"):
        to_float8(x[0])
    q, s = to_float8(x)
    for bad in (q[:, :2], x, q[0]):
        with pytest.raises(ValueError, match="x, W: got"):
            scaled_product(q, s, bad, s)
    with pytest.raises(ValueError, match="W: got shape"):
        int8_product(x, x[0])
