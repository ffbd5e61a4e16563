"""Convolutions as matrices and as pairs: against loops, PyTorch's own convolution and FLOP counter."""

import copy
import math

import pytest
import torch
from battery import gaussian
from conv_cases import assert_close, conv, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowrank_ref.compression import (
    from_matrix,
    matrix_sides,
    pair_weights,
    released_layers,
    split_layer,
    split_macs,
    split_model,
    to_matrix,
    truncation,
)
from lowrank_ref.compression.conv_matrices import SCHEMES, prunable
from lowrank_ref.core.io import load_tensors, save_tensors

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@given(shapes())
def test_matrices_by_loops(shape):
    W = gaussian(*shape)
    N, C, kh, kw = shape
    channel, spatial, decoupled = (to_matrix(W, scheme) for scheme in SCHEMES)
    for n in range(N):
        for c in range(C):
            for i in range(kh):
                for j in range(kw):
                    w = W[n, c, i, j]
                    assert channel[n, (c * kh + i) * kw + j] == w
                    assert spatial[c * kh + i, n * kw + j] == w
                    assert decoupled[n, c, i * kw + j] == w
    for scheme in SCHEMES:
        M = to_matrix(W, scheme)
        assert torch.equal(from_matrix(M, shape, scheme), W)
        assert matrix_sides(shape, scheme) == tuple(M.shape[-2:])


options = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 2, 3, (1, 3), (3, 2)]),
        "stride": st.sampled_from([1, 2, (1, 2)]),
        "padding": st.sampled_from([0, 1, (2, 1)]),
        "dilation": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


@given(st.integers(1, 3), st.integers(1, 6), options, st.sampled_from(SCHEMES), st.data())
def test_3_the_pair_is_the_convolution_with_the_cut_matrix(channels, filters, options, scheme, data):
    layer, x = conv(channels, filters, **options), gaussian(2, channels, 7, 8)
    sides = matrix_sides(tuple(layer.weight.shape), scheme)
    rank = data.draw(st.integers(1, min(sides)))
    M = to_matrix(layer.weight.detach(), scheme)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    cut = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
    W = from_matrix(cut, tuple(layer.weight.shape), scheme)
    wanted = F.conv2d(x, W, layer.bias, layer.stride, layer.padding, layer.dilation)
    pair = split_layer(layer, rank, scheme)
    assert_close(pair(x), wanted)
    assert pair[0].bias is None and [type(m) for m in pair] == [nn.Conv2d, nn.Conv2d]
    weights = sum(m.weight.numel() for m in pair)
    assert weights == split_macs(tuple(layer.weight.shape), rank, scheme)
    if rank == min(sides):
        assert_close(pair(x), layer(x))
    if scheme == "channel":
        with FlopCounterMode(display=False) as counter:
            pair(x)
        places = 2 * math.prod(wanted.shape[2:])  # two pictures
        assert counter.get_total_flops() == 2 * places * split_macs(tuple(layer.weight.shape), rank)


@every_scheme
def test_strided_pairs_cost_what_the_formula_says(scheme):
    layer, x = conv(4, 6, 3, stride=2, padding=1), gaussian(1, 4, 16, 16)
    with FlopCounterMode(display=False) as counter:
        split_layer(layer, 3, scheme)(x)
    assert counter.get_total_flops() == 2 * 64 * split_macs((6, 4, 3, 3), 3, scheme, stride=(2, 2))


@every_scheme
def test_factors_multiply_to_the_best_matrix_and_share_the_values(scheme):
    W = gaussian(6, 4, 3, 3)
    A, B = pair_weights(W, 2, scheme)
    if scheme == "channel":
        assert_close(B.flatten(1) @ A.flatten(1), to_matrix(truncation_at(W, 2, scheme), scheme))
        assert_close(A.flatten(1).norm(dim=1), B.flatten(1).norm(dim=0))
    elif scheme == "spatial":
        assert_close(A.flatten(1).norm(dim=1), torch.ones(2, dtype=torch.float64))
        assert_close(B.transpose(0, 1).flatten(1).norm(dim=1), torch.linalg.svdvals(to_matrix(W, scheme))[:2])
    else:
        assert A.shape == (12, 4, 1, 1) and B.shape == (6, 2, 3, 3)


def truncation_at(W, rank, scheme):
    """T(W) with the energy that just keeps this rank."""
    S2 = torch.linalg.svdvals(to_matrix(W, scheme)) ** 2
    found = truncation(W, float(S2[:rank].sum() / S2.sum()) - 1e-12, scheme)
    assert found.rank == rank
    return found.weight


def test_linear_layers_and_conv1d_split_too():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    base, x = nn.Linear(7, 5).double(), gaussian(4, 7)
    twin = Conv1D(5, 7).double()
    twin.weight, twin.bias = nn.Parameter(base.weight.T.detach().clone()), nn.Parameter(base.bias.detach().clone())
    for scheme in SCHEMES:
        pair, other = split_layer(base, 2, scheme), split_layer(twin, 2, scheme)
        assert_close(pair(x), other(x))
        U, S, Vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
        assert_close(pair(x), F.linear(x, U[:, :2] * S[:2] @ Vh[:2], base.bias))
        assert sum(m.weight.numel() for m in pair) == split_macs((5, 7), 2, scheme) == 24
    assert type(other[1]) is Conv1D and type(other[0]) is nn.Linear


def test_split_model_leaves_the_model_alone_and_dense_what_would_cost_more():
    model = nn.Sequential(conv(2, 8, 3), nn.ReLU(), conv(8, 8, 3, stride=2)).eval()
    before, x = copy.deepcopy(model.state_dict()), gaussian(2, 2, 9, 9)
    small = split_model(model, {"0": 8, "2": 3})
    assert isinstance(small[0], nn.Conv2d) and isinstance(small[2], nn.Sequential) and not small.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    both = split_model(model, {"0": 8, "2": 3}, always=True)
    assert isinstance(both[0], nn.Sequential)
    assert_close(both(x), small(x))
    assert isinstance(split_model(model[2], {"": 3}), nn.Sequential)


def test_an_exercise_of_the_chapter_when_a_split_saves():
    for N, C, k in ((24, 24, 3), (16, 3, 3), (64, 32, 5)):
        limit = N * C * k * k / (C * k * k + N)
        for rank in range(1, min(N, C * k * k) + 1):
            assert (split_macs((N, C, k, k), rank) < N * C * k * k) == (rank < limit)


@every_scheme
def test_a_file_and_half_precision(scheme, tmp_path):
    model = nn.Sequential(conv(4, 6, 3)).float()
    small, x = split_model(model, {"0": 2}, scheme), gaussian(1, 4, 5, 5).float()
    save_tensors(small.state_dict(), tmp_path / "x", kind="split")
    other = split_model(nn.Sequential(nn.Conv2d(4, 6, 3)), {"0": 2}, scheme)
    other.load_state_dict(load_tensors(tmp_path / "x", kind="split"))
    assert torch.equal(other(x), small(x))
    half = split_model(copy.deepcopy(model).bfloat16(), {"0": 2}, scheme)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half(x.bfloat16()).float() - small(x)).abs().max() < 0.1


def test_the_pair_trains_and_shares_nothing():
    layer = conv(4, 6, 3)
    pair = split_layer(layer, 2)
    pair(gaussian(1, 4, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pair.parameters()) and layer.bias.grad is None
    pair[1].bias.data.add_(1)
    assert not torch.equal(pair[1].bias, layer.bias)


def test_released_layers_of_a_residual_network():
    block = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(*block), nn.Conv2d(4, 4, (1, 3)))
    assert released_layers(model) == ["1.0", "2"]
    assert list(prunable(model)) == ["1.0", "2"] and list(prunable(model, ["1.1", "1.2"])) == ["1.1", "1.2"]


def test_bad_arguments(no_shape_checks):
    layer = conv(4, 6, 3)
    for call, message in (
        (lambda: split_layer(layer, 0), "rank: got 0"),
        (lambda: split_layer(layer, 7), "rank: got 7"),
        (lambda: split_layer(layer, 2, "VH"), "scheme: got 'VH'"),
        (lambda: split_layer(nn.Conv2d(4, 4, 3, groups=2), 1), "groups = 2"),
        (lambda: split_layer(nn.Conv2d(4, 4, 3, padding_mode="reflect"), 1), "reflect"),
        (lambda: split_macs((6, 4, 3, 3), 7), "rank: got 7"),
        (lambda: split_model(nn.Sequential(layer), {}), "ranks: got none"),
        (lambda: split_model(nn.Sequential(layer), {"1": 2}), r"ranks: got \['1'\]"),
        (lambda: to_matrix(torch.ones(2, 2, 2)), "W: got shape"),
        (lambda: to_matrix(torch.ones(0, 2)), "W: got shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for other in (nn.ReLU(), nn.Conv1d(2, 2, 1)):
        with pytest.raises(TypeError, match="base"):
            split_layer(other, 1)
    with pytest.raises(TypeError, match="W: got dtype"):
        to_matrix(torch.ones(2, 2, dtype=torch.int64))
    layer.weight.data[0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        split_layer(layer, 2)
