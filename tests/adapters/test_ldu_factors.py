import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given

from lowrank_ref.adapters.ldu_factors import (
    LDU_FACTORS,
    LDU_STARTS,
    check_elimination,
    check_mark,
    choose_factors,
    factor_mark,
    ldu_gram,
    nearest_diagonal,
    start_diagonal,
)
from lowrank_ref.adapters.loldu import delta_weight, ldu
from lowrank_ref.adapters.singular_pairs import fingerprint


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def chosen(m, n, r, factors="ldu", seed=0):
    return choose_factors(*ldu(gaussian(m, n)), r, factors, seeded(seed))


def sorted_below(T):
    return T[tuple(torch.tril_indices(*T.shape, offset=-1))].sort().values


# Factors.


@given(shapes())
def test_shapes_and_layout_of_all_factors(shape):
    m, n, r = shape
    for factors in LDU_FACTORS:
        if (factors, r) == ("shuffled", 1):
            continue
        left, D, right = chosen(m, n, r, factors)
        assert (left.shape, D.shape, right.shape) == ((m, r), (r,), (r, n))
        assert all(t.is_contiguous() and t.untyped_storage().size() == 8 * t.numel() for t in (left, D, right))


@given(shapes())
def test_what_each_control_keeps_and_changes(shape):
    m, n, r = shape
    order, L, D, U = ldu(gaussian(m, n))
    left, pivots, right = chosen(m, n, r)
    assert_close(left, L[order][:, :r])
    assert torch.equal(pivots, D[:r]) and torch.equal(right, U[:r])
    assert torch.equal(chosen(m, n, r, "unpermuted")[0], L[:, :r])
    ones = torch.ones(r).double()
    unit = chosen(m, n, r, "normalised")
    assert_close(unit[0].norm(dim=0), ones)
    assert_close(unit[2].norm(dim=1), ones)
    torch.testing.assert_close(unit[0] * unit[1] @ unit[2], left * pivots @ right, rtol=1e-9, atol=1e-9)
    Q = chosen(m, n, r, "orthogonal")
    assert_close(Q[0].T @ Q[0], torch.eye(r).double())
    assert_close(Q[2] @ Q[2].T, torch.eye(r).double())
    one = chosen(m, n, r, "identity")
    eye = torch.eye(m, n).double()
    assert torch.equal((one[0] @ one[2])[order.argsort()], eye * (torch.arange(n) < r))


@given(shapes())
def test_random_triangles_have_the_same_numbers_at_other_places(shape):
    m, n, _ = shape
    order, L, D, U = ldu(gaussian(m, n))
    left, pivots, right = chosen(m, n, min(m, n), "triangular")
    lower, upper = left[order.argsort()], right
    assert torch.equal(lower, lower.tril()) and torch.equal(upper, upper.triu())
    assert torch.equal(sorted_below(lower), sorted_below(L)) and torch.equal(sorted_below(upper.T), sorted_below(U.T))
    assert torch.equal(lower.diagonal(), L.diagonal()) and torch.equal(upper.diagonal(), U.diagonal())
    assert torch.equal(pivots, D)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [2, 3, 7])
def test_nobody_keeps_a_partner(rank, seed):
    left, D, right = chosen(7, 9, rank)
    shuffled = chosen(7, 9, rank, "shuffled", seed)
    assert torch.equal(shuffled[0], left) and torch.equal(shuffled[1], D)
    same = (shuffled[2][:, None] == right[None]).all(dim=2)
    assert torch.equal(same.sum(0), torch.ones(rank).long()) and not same.diagonal().any()


def test_what_is_drawn_comes_from_the_generator():
    for factors in ("shuffled", "triangular", "orthogonal"):
        first, same, other = (chosen(8, 8, 8, factors, s) for s in (1, 1, 4))
        assert all(torch.equal(a, b) for a, b in zip(first, same))
        assert not all(torch.equal(a, b) for a, b in zip(first, other)), factors
    assert all(torch.equal(a, b) for a, b in zip(chosen(8, 8, 8, seed=1), chosen(8, 8, 8, seed=2)))


# Starts.


def test_starts():
    D = torch.tensor([1.0, -4.0, 0.5, -1.5]).double()  # mean -1, deviation 2.2
    assert torch.equal(start_diagonal(D, "lu"), D) and start_diagonal(D, "lu").data_ptr() != D.data_ptr()
    assert start_diagonal(D, "constant").tolist() == [-1.0] * 4
    assert start_diagonal(D, "ones").tolist() == [1.0] * 4 and start_diagonal(D, "zeros").tolist() == [0.0] * 4
    many = {s: torch.cat([start_diagonal(D, s, seeded(i)) for i in range(2000)]) for s in LDU_STARTS}
    for start, low, high, mean, sd in (
        ("uniform", -0.5, 0.5, 0, 1 / 12**0.5),
        ("s_uniform", -1, 1, 0, 2 / 12**0.5),
        ("normal", -20, 20, -1, D.std().item()),
        ("s_normal", -6, 6, 0, 1),
    ):
        assert low <= many[start].min() and many[start].max() <= high
        assert many[start].mean().item() == pytest.approx(mean, abs=0.1)
        assert many[start].std().item() == pytest.approx(sd, rel=0.05)


def test_one_pivot_has_a_mean_and_no_deviation():
    for start in LDU_STARTS:
        assert bool(start_diagonal(torch.tensor([2.0]), start, seeded()).isfinite().all())
    assert start_diagonal(torch.tensor([2.0]), "normal", seeded()).item() == 2
    with pytest.raises(ValueError, match="start: got 'Ones', wanted one of"):
        start_diagonal(torch.ones(2), "Ones")


# What an update can be.


@given(shapes())
def test_the_gram_matrix_by_loops(shape):
    m, n, r = shape
    left, _, right = chosen(m, n, r)
    M = ldu_gram(left, right)
    for i in range(r):
        for j in range(r):
            wanted = (torch.outer(left[:, i], right[i]) * torch.outer(left[:, j], right[j])).sum()
            torch.testing.assert_close(M[i, j], wanted, rtol=1e-9, atol=1e-9)


def test_the_gram_matrix_of_orthonormal_factors_is_the_identity():
    left, _, right = chosen(7, 9, 5, "orthogonal")
    assert_close(ldu_gram(left, right), torch.eye(5).double())
    left, _, right = chosen(48, 48, 48)
    assert torch.linalg.cond(ldu_gram(left, right)) > 3 and torch.linalg.cond(left) > 10


def test_the_nearest_diagonal_is_a_least_squares_fit():
    for m, n, r in ((6, 6, 6), (5, 8, 3), (8, 5, 5)):
        left, _, right = chosen(m, n, r)
        wanted = gaussian(m, n, seed=5)
        delta = nearest_diagonal(left, wanted, right)
        terms = torch.einsum("mi,in->imn", left, right).flatten(1)
        torch.testing.assert_close(delta, torch.linalg.lstsq(terms.T, wanted.flatten()[:, None]).solution[:, 0])
        unit = chosen(m, n, r, "normalised")  # the same span: the same update
        again = delta_weight(unit[0], nearest_diagonal(unit[0], wanted, unit[2]), unit[2])
        assert_close(again, delta_weight(left, delta, right), 1e-8)
        missed = (wanted - again).square().sum()
        for seed in range(3):
            other = delta_weight(left, delta + 0.1 * gaussian(r, seed=seed), right)
            assert (wanted - other).square().sum() > missed


def test_a_random_change_leaves_one_part_in_the_larger_side():
    left, _, right = chosen(48, 80, 48)
    shares = []
    for seed in range(30):
        D = gaussian(48, 80, seed=100 + seed)
        near = delta_weight(left, nearest_diagonal(left, D, right), right)
        shares.append((near.square().sum() / D.square().sum()).item())
    assert sum(shares) / 30 == pytest.approx(1 / 80, rel=0.15)  # 48 of 48·80 dimensions


# Marks and checks.


@given(shapes())
def test_a_mark_by_loops_tells_factors_apart(shape):
    m, n, r = shape
    left, _, right = chosen(m, n, r)
    mark = factor_mark(left, right)
    p = fingerprint(left / left.norm(dim=0), right / right.norm(dim=1)[:, None])
    for f in range(1, 5):
        waves = [2**0.5 * torch.cos(torch.tensor(f * (i + 1.0)).double()) for i in range(r)]
        assert_close(mark[f - 1], sum(w * q for w, q in zip(waves, p)) / r**0.5)
    torch.testing.assert_close(factor_mark(3 * left, right / 7), mark)
    check_mark({"0.mark": mark + 1e-3}, "0.", mark)
    check_mark({}, "0.", mark)
    check_mark({"0.mark": mark[:2]}, "0.", mark)
    with pytest.raises(ValueError, match=r"0\.mark: got that of other factors"):
        check_mark({"0.mark": mark + 0.1}, "0.", mark)


def test_elimination_is_checked_by_the_first_columns():
    W = gaussian(6, 8)
    own = dict(zip(("left", "D", "right"), chosen(6, 8, 4)))
    state = {f"x.{name}": t for name, t in own.items()}
    check_elimination(state, "x.", W, own)
    check_elimination(state, "x.", W + 0.01 * gaussian(6, 8, seed=1), own)
    with pytest.raises(ValueError, match=r"x\.left, x\.right: got those of another weight"):
        check_elimination(state, "x.", gaussian(6, 8, seed=1), own)
    for silent in (state | {"x.base.weight": W}, {}, state | {"x.D": own["D"][:2]}):
        check_elimination(silent, "x.", gaussian(6, 8, seed=1), own)


def test_bad_input():
    factors = ldu(gaussian(4, 6))
    for rank, kind in ((0, "ldu"), (5, "ldu"), (2, "svd"), (1, "shuffled")):
        with pytest.raises(ValueError, match="rank: got|factors: got"):
            choose_factors(*factors, rank, kind)
