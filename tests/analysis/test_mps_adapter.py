"""Tensor trains, their cores as an adapter, and parity with tensorly. What every adapter must do is in the battery."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.analysis import (
    MPSLinear,
    contract_train,
    entropy,
    entropy_profile,
    factor_sites,
    mps_factor,
    rank_ceiling,
    split_factor,
    tensor_train,
)
from lowrank_ref.analysis.mps_adapter import init_cores, mps_update, near_square
from lowrank_ref.core.layers import replace_linears

sizes = st.integers(2, 16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def sites_of(W):
    return factor_sites(W.shape[0]) + factor_sites(W.shape[1])


def mps(m, n, rank, bond, *, dtype=torch.float64, moved=True, **options):
    layer = MPSLinear(nn.Linear(n, m, dtype=dtype), rank, bond=bond, generator=seeded(), **options)
    if moved:
        with torch.no_grad():
            layer.B.copy_(gaussian(m, rank, seed=5))
    return layer


@st.composite
def adapters(draw):
    m, n = draw(sizes), draw(sizes)
    r = draw(st.integers(1, min(m, n)))
    n1, n2 = near_square(n)
    return m, n, r, draw(st.integers(1, min(r * n1, n2)))


# Tensor trains.


@given(sizes, sizes, st.integers(1, 16))
def test_a_train_is_exact_and_its_bonds_are_the_ranks_of_the_cuts(m, n, r):
    r = min(r, m, n)
    W = gaussian(m, r) @ gaussian(r, n, seed=1)
    sites = sites_of(W)
    cores, _ = tensor_train(W, sites)
    assert_close(contract_train(cores), W.reshape(sites), 1e-10)
    assert tuple(core.shape[1] for core in cores) == sites
    bonds = [core.shape[2] for core in cores[:-1]]
    assert bonds == rank_ceiling(m, n, r).exp().round().int().tolist()
    for core in cores[:-1]:
        Q = core.flatten(0, 1)
        assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64), 1e-10)


@given(sizes, sizes)
def test_successive_svds_give_the_profile(m, n):
    W = gaussian(m, n)
    values = tensor_train(W, sites_of(W))[1]
    S = torch.tensor([entropy(s.square()) for s in values], dtype=torch.float64)
    assert_close(S, entropy_profile(W).entropy, 1e-10)


def test_a_train_of_zeros_and_of_half_precision():
    cores, values = tensor_train(torch.zeros(4, 4), (2, 2, 2, 2))
    assert not contract_train(cores).any() and [len(v) for v in values] == [1, 1, 1]
    W = gaussian(4, 6).bfloat16()
    assert_close(contract_train(tensor_train(W, (4, 6))[0]), W.float(), 1e-5)


@given(sizes, sizes)
def test_tensorly_contracts_and_decomposes_the_same(m, n):
    tl = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train as their_train

    W = gaussian(m, n)
    sites = sites_of(W)
    ours, _ = tensor_train(W, sites)
    np.testing.assert_allclose(tl.tt_to_tensor([c.numpy() for c in ours]), W.reshape(sites), rtol=0, atol=1e-10)
    theirs = their_train(W.reshape(sites).numpy(), rank=[1, *(c.shape[2] for c in ours)])
    assert [c.shape for c in theirs] == [c.shape for c in ours]
    again = contract_train([torch.tensor(np.asarray(c)) for c in theirs])
    assert_close(again, W.reshape(sites), 1e-10)


@given(adapters())
def test_tensorly_contracts_the_factor_the_same(shape):
    tl = pytest.importorskip("tensorly")
    m, n, r, bond = shape
    layer = mps(m, n, r, bond)
    G1, G2 = layer.G1.detach(), layer.G2.detach()
    cores = [torch.eye(r, dtype=torch.float64)[None], G1, G2[:, :, None]]
    theirs = tl.tt_to_tensor([c.numpy() for c in cores]).reshape(r, n)
    np.testing.assert_allclose(mps_factor(G1, G2).numpy(), theirs, rtol=0, atol=1e-12)


# The adapter.


@given(adapters())
def test_factor_and_update_against_loops(shape):
    m, n, r, bond = shape
    layer = mps(m, n, r, bond, alpha=3.0)
    G1, G2, B = (p.detach() for p in (layer.G1, layer.G2, layer.B))
    n2 = G2.shape[1]
    A = torch.zeros(r, n, dtype=torch.float64)
    for k in range(r):
        for j in range(n):
            A[k, j] = sum(G1[k, j // n2, a] * G2[a, j % n2] for a in range(bond))
    assert_close(mps_factor(G1, G2), A)
    x = gaussian(3, n, seed=2)
    assert_close(mps_update(x, G1, G2, B, 0.5), 0.5 * x @ A.T @ B.T, 1e-10)
    assert_close(layer.delta_weight(), 3.0 / r * B @ A, 1e-11)
    assert_close(layer(x), layer.base(x) + x @ layer.delta_weight().T, 1e-10)


@given(adapters())
def test_gradients_are_those_of_the_dense_form(shape):
    m, n, r, bond = shape
    layer, x = mps(m, n, r, bond), gaussian(3, n, seed=2)
    layer.update(x).pow(2).sum().backward()
    got = {name: p.grad.clone() for name, p in layer.adapter_parameters().items()}
    layer.zero_grad()
    (x @ layer.delta_weight().T).pow(2).sum().backward()
    for name, p in layer.adapter_parameters().items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-9)


@given(adapters())
def test_counts_and_start(shape):
    m, n, r, bond = shape
    layer, (n1, n2) = mps(m, n, r, bond, moved=False), near_square(n)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == m * r + r * n1 * bond + bond * n2
    assert not layer.delta_weight().any()
    assert torch.equal(layer(gaussian(2, n)), layer.base(gaussian(2, n)))


def test_counts_of_the_paper():
    n1, n2 = near_square(4096)
    assert (n1, n2) == (64, 64)
    assert 4096 * 256 + 256 * n1 * 32 + 32 * n2 == 1_574_912
    assert 256 * (4096 + 4096) == 2_097_152


@given(adapters())
def test_the_bond_limits_two_cuts(shape):
    m, n, r, bond = shape
    layer = mps(m, n, r, bond)
    G1, G2 = layer.G1.detach(), layer.G2.detach()
    assert torch.linalg.matrix_rank(mps_factor(G1, G2).reshape(-1, G2.shape[1])).item() <= bond
    dW = layer.delta_weight().detach()
    profile = entropy_profile(dW)
    for left, got in zip(profile.left, profile.entropy.tolist()):
        if left == m:
            assert got <= math.log(r) + 1e-10
        if left == m * near_square(n)[0]:  # rows and j1 on one side, j2 on the other
            assert got <= math.log(bond) + 1e-10


@given(sizes, sizes, st.integers(1, 16))
def test_at_full_bond_it_is_lora(m, n, r):
    lora = LoRALinear(nn.Linear(n, m, dtype=torch.float64), min(r, m, n), alpha=4, generator=seeded())
    with torch.no_grad():
        lora.B.copy_(gaussian(m, lora.rank))
    n1, n2 = near_square(n)
    layer = MPSLinear(lora.base, lora.rank, bond=min(lora.rank * n1, n2), alpha=4)
    with torch.no_grad():
        for p, value in zip((layer.G1, layer.G2, layer.B), (*split_factor(lora.A.detach(), layer.bond), lora.B)):
            p.copy_(value)
    assert_close(layer(gaussian(5, n)), lora(gaussian(5, n)), 1e-10)


@given(adapters())
def test_a_split_misses_the_energy_of_the_values_it_drops(shape):
    _, n, r, bond = shape
    A = gaussian(r, n)
    G1, G2 = split_factor(A, bond)
    dropped = torch.linalg.svdvals(A.reshape(-1, G2.shape[1]))[bond:].square().sum().item()
    assert (mps_factor(G1, G2) - A).square().sum().item() == pytest.approx(dropped, abs=1e-10)


def test_start_has_the_variance_of_lora():
    W = torch.empty(4, 400, dtype=torch.float64)
    draws = torch.stack([mps_factor(*init_cores(W, 4, 8, seeded(s))[:2]) for s in range(200)])
    assert draws.var().item() == pytest.approx(1 / 1200, rel=0.05)
    G1, G2, B = init_cores(W, 4, 8, seeded())
    assert G1.std().item() == pytest.approx(G2.std().item(), rel=0.2) and not B.any()
    assert {t.dtype for t in init_cores(W.bfloat16(), 2, 2)} == {torch.float32}


@given(st.integers(1, 400))
def test_near_square(n):
    n1, n2 = near_square(n)
    assert n1 * n2 == n and n1 <= n2
    assert not any(n % d == 0 for d in range(n1 + 1, math.isqrt(n) + 1))


def test_a_prime_input_size_works():
    layer = mps(6, 13, 3, 2)
    assert layer.G1.shape == (3, 1, 2) and layer.G2.shape == (2, 13)
    assert_close(layer(gaussian(4, 13)), layer.merged()(gaussian(4, 13)), 1e-11)


def test_peft_folder_holds_a_plain_lora(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(12, 10), nn.ReLU())
        with torch.no_grad():
            model[0].weight.copy_(gaussian(10, 12))
            model[0].bias.zero_()
        return model

    model = replace_linears(build(), "0", lambda base: MPSLinear(base, 3, bond=2, generator=seeded()))
    with torch.no_grad():
        model[0].B.normal_(generator=seeded(1))
    save_peft(model, tmp_path / "folder")
    again = load_peft(build(), tmp_path / "folder")
    assert type(again[0]) is LoRALinear
    x = gaussian(4, 12).float()
    assert_close(again(x), model(x), 1e-5)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": 11}, ValueError, "rank: got 11"),
        ({"bond": 0}, ValueError, "bond: got 0"),
        ({"bond": 5}, ValueError, r"bond: got 5, wanted 1 <= bond <= 4 for a \(6, 4\) matrix"),
        ({"bond": 2.0}, TypeError, None),
        ({"alpha": 0}, ValueError, "alpha: got 0"),
    ],
)
def test_bad_options_raise_and_leave_the_base_trainable(options, error, message):
    base = nn.Linear(12, 10)
    with pytest.raises(error, match=message):
        MPSLinear(base, **{"rank": 2, "bond": 2, **options})
    assert all(p.requires_grad for p in base.parameters())


def test_other_bad_input_raises():
    with pytest.raises(ValueError, match=r"sites: got \(2, 3\) with product 6, wanted product 8"):
        tensor_train(torch.ones(2, 4), (2, 3))
    with pytest.raises(ValueError, match="W: got 1 NaN"):
        tensor_train(torch.tensor([[torch.nan]]), (1,))
    with pytest.raises(ValueError, match="bond: got 4"):
        split_factor(torch.ones(1, 12), 4)
