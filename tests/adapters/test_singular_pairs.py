import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given

from lowrank_ref.adapters.singular_pairs import PAIRS, choose_pairs, fingerprint
from lowrank_ref.core.linalg import svd


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@given(shapes())
def test_all_choices_are_orthonormal(shape):
    m, n, r = shape
    for pairs in PAIRS:
        if (pairs, r) == ("shuffled", 1):
            continue
        U, S, Vh = choose_pairs(gaussian(m, n), r, pairs, seeded())
        assert (U.shape, S.shape, Vh.shape) == ((m, r), (r,), (r, n))
        assert_close(U.T @ U, torch.eye(r, dtype=torch.float64))
        assert_close(Vh @ Vh.T, torch.eye(r, dtype=torch.float64))
        assert all(t.is_contiguous() for t in (U, S, Vh))


@given(shapes())
def test_top_bottom_and_any_are_triples_of_the_weight(shape):
    m, n, r = shape
    W = gaussian(m, n)
    values = svd(W)[1]
    for pairs in ("top", "bottom", "any"):
        U, S, Vh = choose_pairs(W, r, pairs, seeded(r))
        assert_close(W @ Vh.T, U * S)
        assert all((values - s).abs().min() < 1e-12 for s in S)
        if pairs != "any":
            assert_close(S, values[:r] if pairs == "top" else values[-r:])
    assert_close(choose_pairs(W, min(m, n), "any", seeded())[1], values)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [2, 3, 7])
def test_nobody_keeps_a_partner(rank, seed):
    W = gaussian(7, 9)
    U, S, Vh = svd(W, rank)
    left, values, right = choose_pairs(W, rank, "shuffled", seeded(seed))
    assert_close(left, U)
    assert_close(values, S)
    found = (right @ Vh.T).abs().round()
    assert_close(found.sum(0), torch.ones(rank).double())  # the same rows, in another order
    assert found.diagonal().sum() == 0


def test_what_is_drawn_comes_from_the_generator():
    W = gaussian(6, 5)
    for pairs in ("any", "shuffled", "random"):
        first, same, other = (choose_pairs(W, 3, pairs, seeded(s)) for s in (1, 1, 4))
        assert all(torch.equal(a, b) for a, b in zip(first, same))
        assert not all(torch.equal(a, b) for a, b in zip(first, other)), pairs
    U, _, Vh = choose_pairs(W, 3, "random", seeded())
    assert (svd(W, 3)[0].T @ U).abs().max() < 0.999 and not torch.equal(U[:5], Vh.T)


@given(shapes())
def test_a_fingerprint_by_loops_forgets_signs_and_tells_vectors_apart(shape):
    m, n, r = shape
    U, _, Vh = svd(gaussian(m, n), r)
    mark = fingerprint(U, Vh)
    for k in range(r):
        left = sum(2**0.5 * torch.cos(torch.tensor(i + 1.0).double()) * U[i, k] for i in range(m))
        right = sum(2**0.5 * torch.cos(torch.tensor(j + 1.0).double()) * Vh[k, j] for j in range(n))
        assert_close(mark[k], left * right)
    assert_close(fingerprint(-U, -Vh), mark)
    other = choose_pairs(gaussian(m, n), r, "random", seeded(5))
    assert r == 1 or (fingerprint(other[0], other[2]) - mark).abs().max() > 1e-3
