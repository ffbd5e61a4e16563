"""Directions of a generator's code: closed forms against singular values, loops and a search."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.robustness import (
    class_flips,
    code_directions,
    first_layer_directions,
    jacobian_directions,
    random_amplitudes,
)

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)
sides, seeds = st.integers(1, 9), st.integers(0, 1000)


def randoms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sides, sides, seeds)
def test_they_are_the_right_singular_vectors(m, d, seed):
    A = randoms(m, d, seed=seed)
    V, values = first_layer_directions(A)
    close(V.T @ V, torch.eye(d, dtype=torch.float64))
    close(A.T @ A @ V, V * values)
    S = torch.linalg.svdvals(A)
    close(values[: len(S)], S.square())
    close(values[len(S) :], torch.zeros(d - len(S), dtype=torch.float64))
    assert (values.diff() <= 0).all()
    assert all(column[column.abs().argmax()] > 0 for column in V.T)
    Vh = torch.linalg.svd(A).Vh
    gaps = values.diff().abs() > 1e-3
    for k in range(min(m, d)):
        if all(gaps[max(k - 1, 0) : k + 1]):
            assert (V[:, k] @ Vh[k]).abs().item() == pytest.approx(1, abs=1e-7)


@given(sides, sides, seeds)
def test_no_random_direction_moves_the_first_layer_more(m, d, seed):
    A, n = randoms(m, d, seed=seed), randoms(d, 50, seed=seed + 1)
    n = n / n.norm(dim=0)
    assert ((A @ n).norm(dim=0) <= (A @ first_layer_directions(A, 1).V).norm() + 1e-9).all()


def test_what_turning_the_weight_does():
    A, Q, R = randoms(7, 4), torch.linalg.qr(randoms(7, 7, seed=1)).Q, torch.linalg.qr(randoms(4, 4, seed=2)).Q
    one, left, right = (first_layer_directions(W) for W in (A, Q @ A, A @ R))
    close(left.values, one.values)
    close(left.V, one.V)
    close(right.values, one.values)
    close((one.V.T @ R @ right.V).abs(), torch.eye(4, dtype=torch.float64))


def test_beyond_the_rank_nothing_moves():
    A = randoms(7, 2) @ randoms(2, 5, seed=1)
    V, values = first_layer_directions(A)
    assert (A @ V[:, 2:]).abs().max() < 1e-9 and values[2:].max() < 1e-9 < values[1]


def test_normalised_rows():
    A = randoms(6, 4)
    A[2] = 0
    scaled = torch.stack([row / max(row.norm().item(), 1e-300) for row in A])
    close(first_layer_directions(A, normalise=True).values, torch.linalg.svdvals(scaled).square())
    close(first_layer_directions(5 * A, normalise=True).V, first_layer_directions(A, normalise=True).V)


def test_half_precision_comes_back_in_single():
    V, values = first_layer_directions(randoms(6, 4).bfloat16(), 2)
    assert V.dtype == values.dtype == torch.float32 and V.shape == (4, 2)


@given(st.integers(1, 6), st.integers(1, 5), seeds)
def test_mean_geometry_equals_a_loop(n, d, seed):
    torch.manual_seed(seed)
    G = nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Linear(6, 8), nn.Unflatten(1, (2, 4))).double()
    z = randoms(n, d, seed=seed)
    total = torch.zeros(d, d, dtype=torch.float64)
    for row in z:
        J = torch.autograd.functional.jacobian(lambda t: G(t[None]).flatten(), row)
        total += J.T @ J / n
    V, values = jacobian_directions(G, z)
    close(total @ V, V * values)
    close(values.sum(), total.trace())


def test_of_a_linear_generator_both_agree():
    G = nn.Linear(4, 9).double()
    one, two = first_layer_directions(G.weight.detach()), jacobian_directions(G, randoms(3, 4))
    close(one.V, two.V)
    close(one.values, two.values)


def test_principal_directions_of_codes():
    z = randoms(30, 4) * torch.tensor([1.0, 3.0, 0.5, 2.0])
    V, values = code_directions(z, 2)
    close(values, torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)[:2])
    close((z @ V).var(0), values)


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([0.0, 0.5, 3.0]), seeds)
def test_random_amplitudes_lie_in_the_ball(count, q, epsilon, seed):
    alpha = random_amplitudes(count, q, epsilon=epsilon, generator=torch.Generator().manual_seed(seed))
    assert alpha.shape == (count, q) and (alpha.norm(dim=1) <= epsilon * (1 + 1e-5)).all()


@pytest.mark.parametrize("q", [1, 3])
def test_and_fill_it_evenly(q):
    """The share inside radius ε·s is s^q."""
    alpha = random_amplitudes(4000, q, epsilon=2.0, generator=torch.Generator().manual_seed(0))
    for s in (0.3, 0.5, 0.8):
        assert (alpha.norm(dim=1) < 2 * s).double().mean().item() == pytest.approx(s**q, abs=0.03)
    assert alpha.mean(0).abs().max() < 0.1


def test_flips_are_counted():
    def model(x):
        return torch.stack([x[:, 0], 1 - x[:, 0]], 1)

    x, edited = torch.tensor([[0.1], [0.9], [0.2], [0.8]]), torch.tensor([[0.9], [0.7], [0.1], [0.3]])
    assert class_flips(model, x, edited) == 0.5 and class_flips(model, x, x) == 0


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: first_layer_directions(torch.zeros(3)), ValueError, "A"),
        (lambda: first_layer_directions(torch.ones(3, 2).long()), TypeError, "A"),
        (lambda: first_layer_directions(torch.full((3, 2), torch.nan)), ValueError, "A"),
        (lambda: first_layer_directions(torch.ones(3, 2), 3), ValueError, "rank: got 3"),
        (lambda: first_layer_directions(torch.ones(3, 2), 0), ValueError, "rank: got 0"),
        (lambda: jacobian_directions(nn.Linear(2, 3), torch.zeros(0, 2)), ValueError, "z"),
        (lambda: code_directions(torch.ones(1, 2)), ValueError, "z: got 1 codes"),
        (lambda: random_amplitudes(0, 1, epsilon=1.0), ValueError, "count"),
        (lambda: random_amplitudes(1, 0, epsilon=1.0), ValueError, "rank"),
        (lambda: random_amplitudes(1, 1, epsilon=-1.0), ValueError, "epsilon"),
        (lambda: class_flips(nn.Identity(), torch.ones(2, 2), torch.ones(3, 2)), ValueError, "edited"),
        (lambda: class_flips(nn.Identity(), torch.ones(0, 2), torch.ones(0, 2)), ValueError, "edited"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
