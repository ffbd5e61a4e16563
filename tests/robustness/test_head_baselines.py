"""The surest head and the average, against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.robustness import Heads, average_heads, surest_head


def heads(n, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Heads(*(3 * torch.randn(n, classes, generator=g, dtype=torch.float64) for _ in range(3)))


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 100), st.sampled_from([2, 3]))
def test_they_equal_loops(n, classes, seed, count):
    z = heads(n, classes, seed)
    index, mean = surest_head(z, count=count), average_heads(z).exp()
    for row in range(n):
        p = [part[row].softmax(0).tolist() for part in z]
        H = [-sum(v * math.log(v) for v in q) for q in p[:count]]
        assert index[row] == H.index(min(H))
        for j in range(classes):
            assert mean[row, j].item() == pytest.approx(sum(q[j] for q in p) / 3, abs=1e-12)


def test_equal_heads_give_the_first_and_the_same():
    z = heads(5, 4).clean
    same = Heads(z, z.clone(), z.clone())
    assert surest_head(same, count=3).tolist() == [0] * 5
    torch.testing.assert_close(average_heads(same).softmax(1), z.softmax(1))


@pytest.mark.parametrize("count, error", [(1, ValueError), (4, ValueError), (2.0, TypeError)])
def test_bad_input(count, error):
    with pytest.raises(error, match="count"):
        surest_head(heads(2, 3), count=count)
