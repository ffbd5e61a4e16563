"""BM25, query likelihood and LSI against loops over words, and their limits."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.robustness.lexical_rankers import BM25, LSI, QueryLikelihood, WordIndex, count_words, text_lengths

WORDS = "abcdefgh"
texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), min_size=2, max_size=6)
queries = st.lists(st.lists(st.sampled_from(WORDS + "x"), min_size=1, max_size=4), min_size=1, max_size=3)
DOCS = [list("aabc"), list("bbd"), list("acdeff"), list("gh"), list("abcdefgh")]


def rare(docs, word):
    df = sum(word in d for d in docs)
    return math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))


def slow_bm25(query, d, docs, k1, b):
    mean, tf = sum(map(len, docs)) / len(docs), Counter(d)
    seen = {w for doc in docs for w in doc}
    K = k1 * (1 - b + b * len(d) / mean)
    return sum(rare(docs, t) * tf[t] * (k1 + 1) / (tf[t] + K) for t in query if t in seen and tf[t])


def slow_likelihood(query, d, docs, mu):
    everything = Counter(w for doc in docs for w in doc)
    total, tf = sum(everything.values()), Counter(d)
    return sum(math.log((tf[t] + mu * everything[t] / total) / (len(d) + mu)) for t in query if everything[t])


@given(texts, queries, st.floats(0, 3), st.floats(0, 1))
def test_bm25_against_a_loop(docs, asked, k1, b):
    scores = BM25(WordIndex(docs), k1, b)(asked, [*docs, list("axx")])
    for i, query in enumerate(asked):
        for j, d in enumerate([*docs, list("axx")]):
            assert float(scores[i, j]) == pytest.approx(slow_bm25(query, d, docs, k1, b), abs=1e-10)


@given(texts, queries, st.floats(0.1, 100))
def test_query_likelihood_against_a_loop(docs, asked, mu):
    scores = QueryLikelihood(WordIndex(docs), mu)(asked, docs)
    for i, query in enumerate(asked):
        for j, d in enumerate(docs):
            assert float(scores[i, j]) == pytest.approx(slow_likelihood(query, d, docs, mu), abs=1e-9)


def test_bm25_in_its_limits():
    index = WordIndex(DOCS)
    longer = [[*d, "x", "x", "x"] for d in DOCS]
    assert torch.equal(BM25(index, b=0)([["a"]], DOCS), BM25(index, b=0)([["a"]], longer))
    assert not torch.equal(BM25(index)([["a"]], DOCS), BM25(index)([["a"]], longer))
    matched = [sum(rare(DOCS, t) for t in "ab" if t in d) for d in DOCS]
    assert torch.allclose(BM25(index, k1=0)([["a", "b"]], DOCS)[0], torch.tensor(matched, dtype=torch.float64))


@pytest.mark.parametrize("kind", [BM25, QueryLikelihood])
def test_sums_over_words_and_unknown_words(kind):
    ranker = kind(WordIndex(DOCS))
    both, one, other, strange = ranker([["a", "d"], ["a"], ["d"], ["a", "zzz"]], DOCS)
    assert torch.allclose(both, one + other) and torch.equal(one, strange)


def test_the_order_of_query_likelihood():
    """The same order comes from Σ ln(1 + tf / (μ P)) + |q| ln(μ / (|d| + μ))."""
    index, mu = WordIndex(DOCS), 3.0
    tf = index.count([list("abca")])
    other = tf @ torch.log1p(index.counts / (mu * index.shares)).T + 4 * (mu / (text_lengths(DOCS) + mu)).log()
    ours = QueryLikelihood(index, mu)([list("abca")], DOCS)
    assert torch.equal(ours.argsort(), other.argsort())
    assert torch.allclose((ours - other).diff(), torch.zeros(1, 4, dtype=torch.float64), atol=1e-12)


def test_lsi_of_full_rank_is_the_cosine_of_tf_idf():
    index = WordIndex(DOCS)
    asked = [list("ab"), list("hh"), list("cx")]
    assert torch.allclose(LSI(index, 5)(DOCS, DOCS), LSI(index, None)(DOCS, DOCS), atol=1e-10)
    plain = LSI(index, None)(asked, DOCS)
    for i, q in enumerate(asked):
        for j, d in enumerate(DOCS):
            u, v = ({w: c * rare(DOCS, w) for w, c in Counter(t).items() if w in WORDS} for t in (q, d))
            dot = sum(u[w] * v.get(w, 0) for w in u)
            sizes = [math.sqrt(sum(x * x for x in y.values())) for y in (u, v)]
            assert float(plain[i, j]) == pytest.approx(dot / sizes[0] / sizes[1], abs=1e-12)


def test_lsi_is_blind_outside_its_directions():
    index = WordIndex(DOCS)
    ranker = LSI(index, 2)
    outside = torch.eye(8, dtype=torch.float64) - ranker.basis @ ranker.basis.T
    X = index.count(DOCS) * index.idf
    moved = X + outside[0]
    assert torch.allclose(moved @ ranker.basis, X @ ranker.basis, atol=1e-12)
    assert torch.equal(ranker([["unknown"]], DOCS), torch.zeros(1, 5, dtype=torch.float64))
    assert torch.allclose(ranker.basis.T @ ranker.basis, torch.eye(2, dtype=torch.float64))


def test_counts_and_the_index():
    index = WordIndex(DOCS)
    assert index.words == {w: i for i, w in enumerate(WORDS)} and float(index.shares.sum()) == pytest.approx(1)
    assert count_words([["a", "b", "a", "?"], []], {"a": 0, "b": 1}).tolist() == [[2, 1], [0, 0]]
    assert text_lengths([["a", "?"], []]).tolist() == [2, 0]


def test_bad_input():
    index = WordIndex(DOCS)
    for call, kind, error in (
        (lambda: WordIndex([]), ValueError, "documents: got none"),
        (lambda: WordIndex([[]]), ValueError, "documents: got no word"),
        (lambda: index.count("ab"), TypeError, "texts: got a string"),
        (lambda: BM25(index)(["ab"], DOCS), TypeError, "texts: got a string"),
        (lambda: BM25(index, -1), ValueError, "k1: got -1"),
        (lambda: BM25(index, b=2), ValueError, "b: got 2"),
        (lambda: QueryLikelihood(index, 0), ValueError, "mu: got 0"),
        (lambda: LSI(index, 6), ValueError, "rank: got 6"),
    ):
        with pytest.raises(kind, match=error):
            call()
