"""Convolutions that the tests of compression share."""

import torch
from battery import gaussian
from hypothesis import strategies as st
from torch import nn


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def shapes():
    """(N, C, kh, kw), tall and wide."""
    return st.tuples(st.integers(1, 7), st.integers(1, 5), st.sampled_from([1, 2, 3]), st.sampled_from([1, 3]))


def conv(*sizes, **options):
    """A convolution in float64 with fixed weights."""
    base = nn.Conv2d(*sizes, **options).double()
    for i, p in enumerate(base.parameters()):
        p.data.copy_(gaussian(*p.shape, seed=7 + i) / 3)
    return base
