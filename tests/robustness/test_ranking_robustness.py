"""Metrics of rankings against obvious loops and scikit-learn, and the measures of robustness."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, ndcg_score

from lowrank_ref.robustness import ranking_robustness as rr


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(seed, queries=4, documents=12, ties=False):
    g = seeded(seed)
    grades = torch.randint(0, 3, (queries, documents), generator=g)
    grades[:, 0] = 2
    scores = torch.randn(queries, documents, generator=g, dtype=torch.float64)
    return grades, (2 * scores).round() if ties else scores


def listed(grades, scores):
    """Grades of one query by falling score, ties by number."""
    return [int(grades[i]) for i in sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))]


def loop_dcg(order, cutoff):
    return sum((2**g - 1) / math.log2(i + 2) for i, g in enumerate(order[:cutoff]))


def loop_err(order, cutoff, top=2):
    total, still = 0.0, 1.0
    for i, g in enumerate(order[:cutoff]):
        R = (2**g - 1) / 2**top
        total += still * R / (i + 1)
        still *= 1 - R
    return total


def loop_ap(order):
    hits = [i for i, g in enumerate(order) if g > 0]
    return sum((k + 1) / (i + 1) for k, i in enumerate(hits)) / len(hits)


@given(st.integers(0, 1000), st.integers(1, 15), st.booleans())
def test_metrics_against_loops(seed, cutoff, ties):
    grades, scores = drawn(seed, ties=ties)
    for q in range(len(grades)):
        order = listed(grades[q], scores[q])
        best = loop_dcg(sorted(order, reverse=True), cutoff)
        first = next((i for i, g in enumerate(order[:cutoff]) if g > 0), None)
        assert rr.ndcg(grades, scores, cutoff)[q] == pytest.approx(loop_dcg(order, cutoff) / best, abs=1e-12)
        assert rr.expected_reciprocal_rank(grades, scores, cutoff)[q] == pytest.approx(loop_err(order, cutoff))
        assert rr.average_precision(grades, scores)[q] == pytest.approx(loop_ap(order), abs=1e-12)
        assert rr.reciprocal_rank(grades, scores, cutoff)[q] == pytest.approx(0 if first is None else 1 / (first + 1))


@given(st.integers(0, 1000), st.sampled_from([1, 5, 10, None]))
def test_metrics_against_scikit_learn(seed, cutoff):
    grades, scores = drawn(seed)
    gains, binary = (2**grades - 1).numpy(), (grades > 0).long()
    ours = rr.ndcg(grades, scores, cutoff).mean()
    assert float(ours) == pytest.approx(ndcg_score(gains, scores.numpy(), k=cutoff), abs=1e-12)
    for q in range(len(grades)):
        theirs = average_precision_score(binary[q], scores[q])
        assert float(rr.average_precision(grades, scores)[q]) == pytest.approx(theirs, abs=1e-12)
    one = torch.eye(12, dtype=torch.long)[:4]
    theirs = label_ranking_average_precision_score(one.numpy(), scores.numpy())
    assert float(rr.reciprocal_rank(one, scores, None).mean()) == pytest.approx(theirs, abs=1e-12)


@given(st.integers(0, 1000))
def test_metrics_lie_in_their_range_and_see_only_the_order(seed):
    grades, scores = drawn(seed)
    for metric in (rr.ndcg, rr.expected_reciprocal_rank, rr.reciprocal_rank, rr.average_precision):
        values = metric(grades, scores)
        assert bool(((values >= 0) & (values <= 1 + 1e-12)).all())
        assert torch.equal(values, metric(grades, scores.exp() * 3 - 1))
        shuffled = torch.randperm(12, generator=seeded(seed))
        assert torch.allclose(values, metric(grades[:, shuffled], scores[:, shuffled]), atol=1e-12)
    assert torch.allclose(rr.ndcg(grades, grades.double()), torch.ones(4, dtype=torch.float64))


def test_a_query_without_a_relevant_document_is_skipped():
    grades, scores = drawn(0)
    grades[1] = 0
    for metric in (rr.ndcg, rr.expected_reciprocal_rank, rr.reciprocal_rank, rr.average_precision):
        assert metric(grades, scores).isnan().tolist() == [False, True, False, False]
    values = rr.average_precision(grades, scores)
    kept = values[[0, 2, 3]]
    assert rr.normalised_variance(values) == rr.normalised_variance(kept)
    assert rr.drop_rate(values, kept) == 0 and rr.low_quantile(values, 0) == kept.min()


@given(st.integers(0, 1000), st.booleans())
def test_rank_of_counts_those_in_front(seed, ties):
    _, scores = drawn(seed, ties=ties)
    document = torch.randint(12, (4,), generator=seeded(seed))
    for q, d in enumerate(document.tolist()):
        s = scores[q]
        front = sum(bool(s[i] > s[d]) or (bool(s[i] == s[d]) and i < d) for i in range(12))
        assert rr.rank_of(scores, document)[q] == front + 1


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=20), st.floats(0.1, 5))
def test_normalised_variance(values, c):
    M = torch.tensor(values, dtype=torch.float64)
    mean = sum(values) / len(values)
    slow = sum((v / mean - 1) ** 2 for v in values) / len(values)
    assert float(rr.normalised_variance(M)) == pytest.approx(slow, abs=1e-12)
    assert float(rr.normalised_variance(c * M)) == pytest.approx(slow, abs=1e-9)
    assert float(rr.normalised_variance(M)) == pytest.approx(float((M.std(correction=0) / M.mean()) ** 2), abs=1e-12)
    assert float(M.var(correction=0)) <= 0.25


def test_no_variance_if_all_queries_are_alike_and_a_better_mean_lowers_it():
    assert rr.normalised_variance(torch.full((5,), 0.4, dtype=torch.float64)) < 1e-30
    M = torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert rr.normalised_variance(M + 0.5) < rr.normalised_variance(M) / 10


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.lists(st.floats(0.1, 1), min_size=1, max_size=9))
def test_drop_rate(new, old):
    new, old = (torch.tensor(v, dtype=torch.float64) for v in (new, old))
    DR = float(rr.drop_rate(new, old))
    assert pytest.approx(float(new.mean() / old.mean()) - 1, abs=1e-12) == DR and DR >= -1
    assert rr.drop_rate(old, old) == 0


def test_a_useless_ranker_can_gain():
    assert rr.drop_rate(torch.tensor([0.2]), torch.tensor([0.1])) > 0.9


def test_worst_edit_and_success():
    metric = torch.tensor([[0.5, 0.1], [0.2, 0.9]])
    assert torch.equal(rr.worst_edit(metric), torch.tensor([0.2, 0.1]))
    assert rr.success_rate(torch.tensor([1, 10, 11, 200])) == 0.5
    assert rr.success_rate(torch.tensor([1, 10, 11, 200]), cutoff=1) == 0.25


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda: rr.ranking(torch.zeros(3, 0)), "scores: got shape"),
        (lambda: rr.ranking(torch.tensor([[math.nan, 1.0]])), "scores: got 1 NaN"),
        (lambda: rr.rank_of(torch.zeros(2, 3), torch.tensor([0, 3])), "document: got"),
        (lambda: rr.ndcg(torch.tensor([[0, -1]]), torch.zeros(1, 2)), "grades: got shape"),
        (lambda: rr.ndcg(torch.tensor([[0, 1]]), torch.zeros(1, 2), 0), "cutoff: got 0"),
        (lambda: rr.expected_reciprocal_rank(torch.tensor([[0, 3]]), torch.zeros(1, 2)), "top: got 2"),
        (lambda: rr.normalised_variance(torch.zeros(3)), "metric: got the mean 0"),
        (lambda: rr.normalised_variance(torch.tensor([math.nan])), "metric: got 0 numbers"),
        (lambda: rr.low_quantile(torch.ones(3), 1.5), "share: got 1.5"),
        (lambda: rr.drop_rate(torch.ones(3), torch.zeros(3)), "old: got the mean 0"),
        (lambda: rr.success_rate(torch.zeros(0, dtype=torch.long)), "places: got none"),
        (lambda: rr.success_rate(torch.ones(2, dtype=torch.long), 0), "cutoff: got 0"),
    ],
)
def test_bad_input(call, error, no_shape_checks):
    with pytest.raises(ValueError, match=error):
        call()


def test_grades_are_whole_numbers(no_shape_checks):
    with pytest.raises(TypeError, match="grades: got torch.float32"):
        rr.ndcg(torch.ones(1, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match="scores: got dtype"):
        rr.ranking(torch.ones(1, 2, dtype=torch.long))
