"""LoRA-XS's frames, and the controls: what they are, how they start, and what random ones capture."""

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from torch import nn

from lowrank_ref.adapters.svd_frames import LoRAXSLinear, random_frames, singular_frames, xs_frames


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@given(shapes())
def test_xs_frames_multiply_to_the_best_part_of_the_weight(shape):
    m, n, r = shape
    W = gaussian(m, n)
    A, B = xs_frames(W, r)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert_close(B @ A, U[:, :r] * S[:r] @ Vh[:r], 1e-10)
    assert_close(A @ A.T, S[:r].square().diag(), 1e-10)
    unit, same = singular_frames(W, r)
    assert torch.equal(same, B)
    assert_close(S[:r, None] * unit, A, 1e-10)


@given(shapes())
def test_orthonormal_frames_are(shape):
    m, n, r = shape
    for frames in (singular_frames, random_frames):
        A, B = frames(gaussian(m, n), r, seeded())
        eye = torch.eye(r, dtype=torch.float64)
        assert_close(A @ A.T, eye)
        assert_close(B.T @ B, eye)


def test_random_frames_come_from_the_generator():
    W = torch.ones(5, 4, dtype=torch.bfloat16)
    first, same, other = (random_frames(W, 2, seeded(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, same)) and not torch.equal(first[0], other[0])
    assert {t.dtype for t in first} == {torch.float32}


def test_8_random_frames_capture_r_squared_over_mn_of_any_target():
    """With a standard deviation near 0.013 of one draw, 400 draws put the mean within 0.003."""
    m, n, r = 12, 16, 4
    target, shares = gaussian(m, n, seed=5), []
    for seed in range(400):
        A, B = random_frames(target, r, seeded(seed))
        shares.append(((B.T @ target @ A.T).square().sum() / target.square().sum()).item())
    assert sum(shares) / len(shares) == pytest.approx(r * r / (m * n), abs=0.004)
    A, B = singular_frames(target, r)
    assert (B.T @ target @ A.T).square().sum() / target.square().sum() > 3 * r * r / (m * n)


def test_the_core_starts_near_zero_and_counts_its_square():
    base, x = nn.Linear(30, 20, dtype=torch.float64), gaussian(4, 30)
    layer = LoRAXSLinear(base, 16, generator=seeded())
    assert layer.R.std().item() == pytest.approx(1e-5, rel=0.15)  # 256 draws: 4.4 % a standard deviation
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 256
    assert 0 < (layer(x) - base(x)).abs().max() < 1e-3


def test_bad_input(no_shape_checks):
    base = nn.Linear(4, 3)
    for rank, error in ((0, ValueError), (4, ValueError), (2.0, TypeError)):
        for frames in (xs_frames, singular_frames, random_frames):
            with pytest.raises(error, match="rank: got"):
                LoRAXSLinear(base, rank, frames=frames)
    with pytest.raises(TypeError, match="base: got ReLU"):
        LoRAXSLinear(nn.ReLU(), 1)
    with pytest.raises(ValueError, match="scale: got -1"):
        LoRAXSLinear(base, 2, scale=-1.0)
    with torch.no_grad():
        base.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="W: got 1 NaN"):
        LoRAXSLinear(base, 2)
    assert all(p.requires_grad for p in base.parameters())
