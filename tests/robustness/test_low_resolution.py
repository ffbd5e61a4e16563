"""The operator against a loop, Pillow and PyTorch; its rank, linearity and limits."""

import math

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lowrank_ref.robustness.low_resolution import (
    cubic,
    draw_sides,
    low_resolution,
    low_resolution_matrix,
    resize_matrix,
)


def key(d):
    d = abs(d)
    if d < 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


@given(st.floats(-3, 3))
def test_the_kernel_is_keys(d):
    assert cubic(torch.tensor(d, dtype=torch.float64)).item() == pytest.approx(key(d), abs=1e-12)


@given(st.integers(1, 20), st.integers(1, 20))
def test_resizing_equals_a_loop_and_keeps_constants(size, side):
    M = resize_matrix(size, side)
    assert M.shape == (side, size)
    for i in range(side):
        wide = max(size / side, 1)
        row = [key((j + 0.5 - (i + 0.5) * size / side) / wide) for j in range(size)]
        assert M[i].tolist() == pytest.approx([w / sum(row) for w in row], abs=1e-12)
    torch.testing.assert_close(M.sum(1), torch.ones(side, dtype=torch.float64))


@given(st.integers(1, 24), st.integers(1, 30))
def test_its_rank_is_the_side(size, side):
    rank = torch.linalg.matrix_rank(low_resolution_matrix(size, side), atol=1e-9).item()
    assert rank == min(size, side)


@pytest.mark.parametrize("size, side", [((28, 28), 7), ((32, 20), 5), ((30, 30), 23)])
def test_it_is_what_pillow_and_pytorch_do_without_rounding(size, side):
    pillow = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    x = torch.rand(*size, generator=seeded())
    image = pillow.fromarray(x.numpy(), mode="F").resize((side, side), pillow.BICUBIC)
    theirs = torch.from_numpy(numpy.array(image.resize(size[::-1], pillow.BICUBIC)))
    torch.testing.assert_close(low_resolution(x, side), theirs, rtol=0, atol=1e-6)
    how = {"mode": "bicubic", "antialias": True}
    small = F.interpolate(x[None, None], (side, side), **how)
    torch.testing.assert_close(low_resolution(x, side), F.interpolate(small, size, **how)[0, 0], rtol=0, atol=1e-5)


def test_bytes_of_pillow_differ_by_their_rounding_only():
    pillow = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    smooth = (128 + 60 * torch.sin(torch.arange(28.0) / 5)[:, None] * torch.cos(torch.arange(28.0) / 6)).round()
    image = pillow.fromarray(smooth.numpy().astype("uint8")).resize((7, 7)).resize((28, 28))  # the default filter
    assert float((low_resolution(smooth, 7) - torch.from_numpy(numpy.array(image))).abs().max()) < 3


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 14))
def test_it_is_linear_and_leaves_alone_what_is_small_enough(height, width, side):
    x, y = gaussian(2, 3, height, width), gaussian(2, 3, height, width, seed=1)
    whole = low_resolution(2 * x - 3 * y, side)
    torch.testing.assert_close(whole, 2 * low_resolution(x, side) - 3 * low_resolution(y, side), rtol=0, atol=1e-12)
    assert torch.equal(low_resolution(x, max(height, width)), x)
    one = torch.stack([low_resolution(x[0], side), low_resolution(x[1], side + 1)])
    torch.testing.assert_close(low_resolution(x, [side, side + 1]), one, rtol=0, atol=1e-12)


def test_twice_is_not_once():
    x = gaussian(16, 16)
    assert float((low_resolution(low_resolution(x, 5), 5) - low_resolution(x, 5)).abs().max()) > 0.01


def test_sides_are_drawn_evenly_from_the_half_open_range():
    sides = draw_sides((5, 8), 600, seeded())
    assert sorted(set(sides)) == [5, 6, 7] and max(sides.count(s) for s in (5, 6, 7)) < 250
    assert draw_sides((5, 8), 9, seeded(1)) == draw_sides((5, 8), 9, seeded(1)) and draw_sides((5, 8), 0) == []


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: low_resolution(torch.ones(3, 3, dtype=torch.int64), 2), TypeError, "x: got dtype"),
        (lambda: low_resolution(torch.ones(3), 2), ValueError, "x: got shape"),
        (lambda: low_resolution(torch.ones(3, 3), 0), ValueError, "side: got 0"),
        (lambda: low_resolution(torch.ones(2, 3, 3), [2]), ValueError, "side: got 1 sides"),
        (lambda: low_resolution(torch.ones(3, 3), [2, 2, 2]), ValueError, "side: got 3 sides"),
        (lambda: resize_matrix(0, 2), ValueError, "size: got 0"),
        (lambda: low_resolution_matrix(0, 2), ValueError, "size: got 0"),
        (lambda: draw_sides((3, 3), 2), ValueError, r"bucket\[1\]"),
        (lambda: draw_sides((0, 3), 2), ValueError, r"bucket\[0\]"),
        (lambda: resize_matrix(3, math.pi), TypeError, "side"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
