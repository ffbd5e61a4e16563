"""λ against loops and finite differences, and the boosting of trees."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.tree import DecisionTreeRegressor

from lowrank_ref.robustness.lambda_mart import (
    FEATURES,
    LambdaMART,
    boost_lambdas,
    boosted_scores,
    count_features,
    lambdas,
    swap_gains,
)
from lowrank_ref.robustness.lexical_rankers import BM25, QueryLikelihood, WordIndex
from lowrank_ref.robustness.ranking_robustness import ndcg


def drawn(seed, queries=3, documents=7):
    g = torch.Generator().manual_seed(seed)
    grades = torch.randint(0, 3, (queries, documents), generator=g)
    grades[:, 0] = 2
    return grades, torch.randn(queries, documents, generator=g, dtype=torch.float64)


@given(st.integers(0, 1000))
def test_a_swap_changes_ndcg_by_its_gain(seed):
    grades, scores = drawn(seed)
    gains = swap_gains(grades, scores)
    for i, j in ((0, 1), (2, 6), (3, 3)):
        swapped = scores.clone()
        swapped[:, [i, j]] = scores[:, [j, i]]
        change = ndcg(grades, swapped, None) - ndcg(grades, scores, None)
        assert torch.allclose(gains[:, i, j], change.abs(), atol=1e-12)


@given(st.integers(0, 1000))
def test_lambdas_against_a_loop(seed):
    grades, scores = drawn(seed)
    push, bend = lambdas(grades, scores)
    gains = swap_gains(grades, scores)
    for q in range(len(grades)):
        for i in range(7):
            slow, curve = 0.0, 0.0
            for j in range(7):
                rho = 1 / (1 + math.exp(float(scores[q, i] - scores[q, j])))
                if grades[q, i] > grades[q, j]:
                    slow += float(gains[q, i, j]) * rho
                if grades[q, j] > grades[q, i]:
                    slow -= float(gains[q, i, j]) * (1 - rho)
                if grades[q, i] != grades[q, j]:
                    curve += float(gains[q, i, j]) * rho * (1 - rho)
            assert float(push[q, i]) == pytest.approx(slow, abs=1e-12)
            assert float(bend[q, i]) == pytest.approx(curve, abs=1e-12)


@given(st.integers(0, 1000))
def test_lambdas_are_a_gradient_and_sum_to_zero(seed):
    grades, scores = drawn(seed)
    push, bend = lambdas(grades, scores)
    assert push.sum(1).abs().max() < 1e-12 and bool((bend >= 0).all())
    gains, above = swap_gains(grades, scores), grades[:, :, None] > grades[:, None, :]

    def loss(s):
        return (gains * above * torch.nn.functional.softplus(s[:, None, :] - s[:, :, None])).sum()

    s = scores.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(s), s)
    assert torch.allclose(push, -slope, atol=1e-12)
    equal = lambdas(torch.ones_like(grades), scores)
    assert equal[0].abs().max() == 0 and equal[1].abs().max() == 0
    assert lambdas(torch.zeros_like(grades), scores)[0].abs().max() == 0


def test_swapped_grades_turn_signs():
    scores = torch.zeros(1, 2, dtype=torch.float64)
    first, second = (lambdas(torch.tensor([g]), scores)[0] for g in ([2, 0], [0, 2]))
    assert torch.allclose(first[0, 0], -second[0, 0]) and first[0, 0] > 0


def grow(X, y, leaves=8):
    return DecisionTreeRegressor(max_leaf_nodes=leaves, random_state=0).fit(X, y)


def test_boosting_learns_to_order():
    grades, _ = drawn(1, queries=20, documents=15)
    g = torch.Generator().manual_seed(2)
    X = torch.stack([grades + 0.5 * torch.randn(grades.shape, generator=g), torch.rand(grades.shape, generator=g)], 2)
    trees = boost_lambdas(X, grades, fit=grow, rounds=20, lr=0.2)
    found = [ndcg(grades, boosted_scores(trees[:k], X, 0.2)).mean() for k in (0, 5, 20)]
    assert found[0] < found[1] < found[2] and found[2] > 0.95
    assert torch.equal(boosted_scores([], X), torch.zeros(20, 15, dtype=torch.float64))


def test_one_tree_of_single_rows_takes_a_newton_step():
    """A leaf a row gives λ/w; a small step lowers the loss with |Δ| held fixed."""
    grades, _ = drawn(3, queries=1)
    X = torch.arange(7.0).view(1, 7, 1)
    trees = boost_lambdas(X, grades, fit=partial(grow, leaves=None), rounds=1)
    push, bend = lambdas(grades, torch.zeros(1, 7, dtype=torch.float64))
    assert torch.allclose(boosted_scores(trees, X, 1.0), push / bend.clamp_min(1e-12), atol=1e-9)
    assert float((push * boosted_scores(trees, X, 1e-3)).sum()) > 0


DOCS = [list("aabc"), list("bbd"), list("acd")]


def test_features_of_words():
    index = WordIndex(DOCS)
    asked = [list("abx"), list("dd")]
    X = count_features(index, asked, DOCS, mu=2.0)
    assert X.shape == (2, 3, len(FEATURES))
    assert torch.allclose(X[..., 0], BM25(index)(asked, DOCS))
    assert torch.allclose(X[..., 1], QueryLikelihood(index, 2.0)(asked, DOCS))
    assert X[..., 2].tolist() == [[2, 1, 1], [0, 2, 2]] and X[..., 3].tolist() == [[3, 2, 1], [0, 2, 2]]
    assert X[..., 5].tolist() == [[4, 3, 3], [4, 3, 3]]
    means = count_features(index, asked, DOCS, mu=2.0, per_word=True)
    assert torch.allclose(means[..., :5] * 2, X[..., :5]) and torch.equal(means[..., 5], X[..., 5])


def test_the_ranker_calls_trees_on_features():
    index = WordIndex(DOCS)
    features = partial(count_features, index)
    X, grades = features([["a"], ["d"]], DOCS), torch.tensor([[1, 0, 1], [0, 1, 1]])
    trees = boost_lambdas(X, grades, fit=grow, rounds=3)
    assert torch.equal(LambdaMART(features, trees)([["a"], ["d"]], DOCS), boosted_scores(trees, X))


@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input():
    grades, scores = drawn(0)
    with pytest.raises(ValueError, match="grades: got shape"):
        lambdas(grades[:, :3], scores)
    X = torch.zeros(3, 7, 2)
    for options, error in (({"rounds": -1}, "rounds: got -1"), ({"lr": 0}, "lr: got 0")):
        with pytest.raises(ValueError, match=error):
            boost_lambdas(X, grades, fit=grow, **options)
