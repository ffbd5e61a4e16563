"""Other ways to sum over concepts, against loops."""

import math

import pytest
import torch
from battery import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lowrank_ref.robustness.cgbc import concept_similarities
from lowrank_ref.robustness.concept_rules import (
    SCORE_RULES,
    fixed_trim,
    hard_trim,
    huber_score,
    mean_embedding_scores,
    softmax_score,
    upper_half,
    weighted_embedding_scores,
)


def by_loop(name, values):
    v = sorted(float(x) for x in values)
    M = len(v)
    m = v[(M - 1) // 2]
    mad = sorted(abs(x - m) for x in v)[(M - 1) // 2] + 1e-6
    if name == "mean":
        return sum(v) / M
    if name == "max":
        return v[-1]
    if name == "median":
        return m
    if name == "softmax":
        w = [math.exp((x - v[-1]) / 1.1) for x in v]
        return sum(a * x for a, x in zip(w, v)) / sum(w)
    if name == "hard trim":
        v = v[int(0.1 * M) :]
        return sum(v) / len(v)
    if name == "symmetric trim":
        v = v[int(0.2 * M) : M - int(0.2 * M)]
        return sum(v) / len(v)
    if name == "Cauchy":
        w = [1 / (1 + ((x - m) / mad) ** 2) for x in v]
        return sum(a * x for a, x in zip(w, v)) / sum(w)
    share = max(sum(abs(x - m) > 2.5 * mad for x in v) / M, 1 / M)
    t = mad * max(1, math.sqrt(2 * math.log(2 / 0.05) / (M * share)))
    return m + t * sum(max(-1, min(1, (x - m) / t)) for x in v) / M


@pytest.mark.parametrize("name", SCORE_RULES)
@given(st.integers(1, 55), st.integers(0, 10_000))
def test_rules_equal_loops_and_lie_between_the_ends(name, M, seed):
    S = 20 + 3 * torch.randn(3, M, generator=seeded(seed), dtype=torch.float64)
    found = SCORE_RULES[name](S)
    wanted = torch.tensor([by_loop(name, row) for row in S], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert bool((found >= S.amin(1) - 1e-9).all()) and bool((found <= S.amax(1) + 1e-9).all())


def test_the_mean_of_embeddings_is_the_mean_of_scores_over_a_length():
    V, T = (torch.randn(*s, generator=seeded(i), dtype=torch.float64) for i, s in enumerate([(4, 6), (3, 5, 6)]))
    length = F.normalize(T, dim=-1).mean(1).norm(dim=-1)
    wanted = concept_similarities(V, T).mean(-1) / length
    torch.testing.assert_close(mean_embedding_scores(V, T), wanted)


def test_weights_on_embeddings_are_a_loop_and_with_equal_ones_the_mean():
    V, T = (torch.randn(*s, generator=seeded(i), dtype=torch.float64) for i, s in enumerate([(4, 6), (3, 5, 6)]))
    w = torch.rand(4, 3, 5, generator=seeded(2), dtype=torch.float64)
    found = weighted_embedding_scores(V, T, w, scale=7.0)
    for b in range(4):
        for k in range(3):
            centre = sum(w[b, k, j] * T[k, j] / T[k, j].norm() for j in range(5))
            wanted = 7 * (V[b] @ centre) / (V[b].norm() * centre.norm())
            torch.testing.assert_close(found[b, k], wanted)
    torch.testing.assert_close(
        weighted_embedding_scores(V, T, w[0]), weighted_embedding_scores(V, T, w[:1].expand_as(w))
    )
    torch.testing.assert_close(weighted_embedding_scores(V, T, torch.ones_like(w[0])), mean_embedding_scores(V, T))


def test_upper_half_counts_the_median_half():
    assert upper_half(torch.tensor([1.0, 2.0, 5.0])).item() == pytest.approx((0.5 * 2 + 5) / 1.5)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda S: hard_trim(S, share=0.5), "share"),
        (lambda S: hard_trim(S, side="upper"), "side"),
        (lambda S: softmax_score(S, temperature=0.0), "temperature"),
        (lambda S: huber_score(S, confidence=0.0), "confidence"),
        (lambda S: fixed_trim(S, -1.0), "kappa"),
        (lambda S: fixed_trim(S, 1.0, side="upper"), "side"),
        (lambda S: mean_embedding_scores(S, S[None], scale=0.0), "scale"),
        (lambda S: weighted_embedding_scores(S, S[None], torch.ones(1, 2), scale=0.0), "scale"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call(torch.rand(2, 5))
