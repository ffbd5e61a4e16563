"""Determinantal point processes against enumeration of all subsets."""

import itertools
import math

import numpy as np
import pytest
import torch
from battery import seeded
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from lowrank_ref.robustness.dpp import (
    elementary_symmetric,
    greedy_dpp,
    k_dpp_log_probability,
    log_volume,
    sample_k_dpp,
)


def features(n, d, seed=0):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def determinants(E, k):
    """subset -> det L_S, for all subsets of k."""
    L = (E @ E.T).numpy()
    return {S: float(np.linalg.det(L[np.ix_(S, S)])) for S in itertools.combinations(range(len(E)), k)}


@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 10_000))
def test_greedy_takes_the_largest_determinant_step_by_step(n, d, seed):
    E = features(n, d, seed)
    k = min(n, d)
    picks, gains = greedy_dpp(E, k)
    L = (E @ E.T).numpy()
    taken = []
    for pick, gain in zip(picks.tolist(), gains.tolist()):
        rest = [c for c in range(n) if c not in taken]
        dets = {c: np.linalg.det(L[np.ix_([*taken, c], [*taken, c])]) for c in rest}
        before = np.linalg.det(L[np.ix_(taken, taken)]) if taken else 1.0
        assert dets[pick] == pytest.approx(max(dets.values()), rel=1e-6, abs=1e-12)
        assert gain == pytest.approx(dets[pick] / before, rel=1e-6, abs=1e-9)
        taken.append(pick)
    assert float(gains.log().sum()) == pytest.approx(float(log_volume(E, picks)), rel=1e-6, abs=1e-6)
    assert bool((gains.diff() <= 1e-12).all())


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_near_the_best_subset_of_all(seed):
    E, k = features(9, 5, seed), 4
    best = max(determinants(E, k).values())
    found = math.exp(float(log_volume(E, greedy_dpp(E, k)[0])))
    assert best / math.factorial(k) ** 2 <= found <= best * (1 + 1e-9)


def test_greedy_is_not_always_the_best_subset():
    E = torch.tensor([[1.1, 1.1], [1.4, -0.2], [-0.2, 1.4]], dtype=torch.float64)
    best = max(determinants(E, 2), key=determinants(E, 2).get)
    assert sorted(greedy_dpp(E, 2)[0].tolist()) != list(best) == [1, 2]


def test_greedy_beyond_the_rank_has_no_gain_and_keeps_the_order():
    E = torch.cat([features(4, 3), features(4, 3)])  # every item twice
    picks, gains = greedy_dpp(E, 8)
    assert sorted(picks.tolist()) == list(range(8)) and bool((gains[:3] > 1e-6).all()) and not gains[3:].any()
    assert picks[:3].max() < 4  # of two that tie, the first
    assert picks[3:].tolist() == sorted(picks[3:].tolist())


def test_greedy_is_the_pivoted_cholesky_factorisation_and_its_rest_the_trace_error():
    E = features(30, 6)
    picks, gains = greedy_dpp(E, 4)
    L = E @ E.T
    C = torch.linalg.solve_triangular(torch.linalg.cholesky(L[picks][:, picks]), L[picks], upper=False).T
    rest = float((L - C @ C.T).diagonal().sum())
    assert float(L.trace()) > rest > float(torch.linalg.eigvalsh(L)[:-4].sum()) - 1e-9  # the best rank 4
    nystrom = L[:, picks] @ torch.linalg.solve(L[picks][:, picks], L[picks])
    torch.testing.assert_close(C @ C.T, nystrom)


@given(st.integers(1, 7), st.integers(0, 10_000))
def test_elementary_symmetric_equals_products_of_all_subsets(n, seed):
    values = features(n, 1, seed).flatten().abs()
    e = elementary_symmetric(values, n)
    for k in range(n + 1):
        wanted = sum(math.prod(c) for c in itertools.combinations(values.tolist(), k))
        assert float(e[k, n]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n, d, k", [(6, 4, 2), (6, 6, 3), (7, 3, 3), (5, 2, 1)])
def test_probabilities_equal_enumeration_and_sum_to_one(n, d, k):
    E = features(n, d)
    dets = determinants(E, k)
    total = sum(dets.values())
    for S, det in dets.items():
        p = float(k_dpp_log_probability(E, torch.tensor(S)).exp())
        assert p == pytest.approx(det / total, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("n, d, k", [(5, 4, 2), (6, 3, 3), (5, 5, 4)])
def test_the_sampler_draws_each_subset_as_often_as_enumeration_says(n, d, k):
    E, draws, g = features(n, d, 3), 3000, seeded(0)
    dets = determinants(E, k)
    total = sum(dets.values())
    counts = dict.fromkeys(dets, 0)
    for _ in range(draws):
        counts[tuple(sorted(sample_k_dpp(E, k, generator=g).tolist()))] += 1
    wanted = {S: draws * det / total for S, det in dets.items()}
    rare = sum(w for w in wanted.values() if w < 5)
    cells = [(counts[S], w) for S, w in wanted.items() if w >= 5]
    cells.append((sum(counts[S] for S, w in wanted.items() if w < 5), rare))
    statistic = sum((c - w) ** 2 / w for c, w in cells if w > 0)
    assert statistic < chi2.ppf(0.999, max(len(cells) - 1, 1))


def test_the_sampler_prefers_diverse_subsets_and_repeats_under_a_generator():
    E = torch.cat([features(20, 8, 1), features(1, 8, 1).expand(20, 8) + 0.01 * features(20, 8, 2)])
    drawn = [sample_k_dpp(E, 6, generator=seeded(s)) for s in range(30)]
    assert torch.equal(drawn[4], sample_k_dpp(E, 6, generator=seeded(4)))
    assert all(len(set(d.tolist())) == 6 for d in drawn)
    random = [torch.randperm(40, generator=seeded(s))[:6] for s in range(30)]
    volumes = [np.mean([float(log_volume(E, d)) for d in many]) for many in (drawn, random)]
    assert volumes[0] > volumes[1] + 3
    assert float(log_volume(E, greedy_dpp(E, 6)[0])) > max(float(log_volume(E, d)) for d in random)


def test_as_many_as_the_rank_but_no_more():
    E = features(10, 3)
    assert len(set(sample_k_dpp(E, 3, generator=seeded()).tolist())) == 3
    with pytest.raises(ValueError, match="^count: got 4, wanted at most the rank"):
        sample_k_dpp(E, 4)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda E: greedy_dpp(E, 0), "count"),
        (lambda E: greedy_dpp(E, 99), "count"),
        (lambda E: greedy_dpp(E * math.nan, 2), "features"),
        (lambda E: sample_k_dpp(E, 0), "count"),
        (lambda E: sample_k_dpp(E * math.inf, 2), "features"),
        (lambda E: sample_k_dpp(E.long(), 2), "features"),
    ],
)
def test_bad_input_is_named(call, name, no_shape_checks):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call(features(5, 3))
