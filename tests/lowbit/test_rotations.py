"""Hadamard matrices and rotated blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.lowbit import QUANTIZERS, hadamard, rotate_blocks


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 32])
def test_orthonormal_with_entries_of_one_size(size):
    H = hadamard(size)
    torch.testing.assert_close(H @ H.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(H.abs(), torch.full_like(H, size**-0.5), rtol=1e-14, atol=0)


@given(p=st.integers(1, 5), q=st.integers(1, 5), k=st.integers(1, 20), size=st.sampled_from([1, 4, 8]))
def test_the_product_stays(p, q, k, size):
    A, B, signs = randn(p, k), randn(q, k, seed=1), randn(size, seed=2).sign()
    for s in (None, signs):
        turned = rotate_blocks(A, size, s) @ rotate_blocks(B, size, s).mT
        torch.testing.assert_close(turned, A @ B.mT, rtol=0, atol=1e-12)


def test_an_outlier_is_spread_before_rounding():
    A, B, q = randn(8, 32), randn(8, 32, seed=1), QUANTIZERS["MXFP4"]
    A[:, 3] *= 100
    exact = A @ B.mT
    plain = (q(A) @ q(B).mT - exact)[:, :].norm()
    turned = (q(rotate_blocks(A, 32)) @ q(rotate_blocks(B, 32)).mT - exact).norm()
    assert bool(rotate_blocks(A, 32).abs().max() < A.abs().max() / 3)
    assert plain > 0 and turned > 0


def test_refuses():
    for size in (3, 0):
        with pytest.raises(ValueError, match="size: got"):
            hadamard(size)
