"""Attacks on a document: no budget changes nothing, more budget never hurts, and undoing restores."""

import pytest
import torch

from lowrank_ref.robustness.document_edits import stuffed, substituted, substitution_attack
from lowrank_ref.robustness.lexical_rankers import BM25, LSI, WordIndex
from lowrank_ref.robustness.ranking_robustness import rank_of

DOCS = [list("aabc"), list("bbd"), list("acdeff"), list("gh"), list("bcdefgh")]


@pytest.mark.parametrize("kind", [BM25, lambda index: LSI(index, 3)])
def test_each_edit_raises_the_score(kind):
    ranker = kind(WordIndex(DOCS))

    def score(texts):
        return ranker([["a", "b"]], texts)[0]

    path = substitution_attack(score, DOCS[4], list("abcdefgh"), 4)
    scores = score(path)
    assert len(path) == 5 and path[0] == DOCS[4] and bool((scores.diff() >= 0).all()) and scores[-1] > scores[0]
    for before, after in zip(path, path[1:]):
        assert len(after) == len(before) and sum(a != b for a, b in zip(before, after)) <= 1
    places = [int(rank_of(ranker([["a", "b"]], [*DOCS[:4], d]), torch.tensor([4]))[0]) for d in path]
    assert places == sorted(places, reverse=True)
    assert torch.equal(ranker([["a", "b"]], [*DOCS[:4], path[0]]), ranker([["a", "b"]], DOCS))


def test_the_first_step_is_the_best_single_edit_at_its_place():
    ranker = BM25(WordIndex(DOCS))

    def score(texts):
        return ranker([["a", "b"]], texts)[0]

    first = substitution_attack(score, DOCS[3], list("abcdefgh"), 1)[1]
    every = [substituted(DOCS[3], i, w) for i in range(2) for w in "abcdefgh"]
    assert float(score([first])) == pytest.approx(float(score(every).max()))


def test_words_that_do_not_help_are_not_written():
    ranker = BM25(WordIndex(DOCS))
    path = substitution_attack(lambda texts: ranker([["a"]], texts)[0], DOCS[3], ["e", "f"], 2)
    assert path == [DOCS[3]] * 3


def test_stuffing():
    assert stuffed(["x"], ["a", "b"], 3) == ["a", "b", "a", "x"] and stuffed(["x"], ["a"], 0) == ["x"]


def test_bad_input():
    for call, error in (
        (lambda: substitution_attack(len, ["a"], ["b"], 2), "budget: got 2"),
        (lambda: substitution_attack(len, ["a"], [], 1), "words: got none"),
        (lambda: stuffed(["a"], [], 1), "words: got none"),
        (lambda: stuffed(["a"], ["b"], -1), "count: got -1"),
    ):
        with pytest.raises(ValueError, match=error):
            call()
