"""Verses to find, and MiniLM's vectors."""

import pytest
import torch

from lowrank_ref.lab.beds import SentenceVectors, last_words, verse_search, words_of


def test_verses_and_grades():
    bed = verse_search(("Law",), 30)
    assert len(bed.documents) == len(bed.wordings) == 30 and min(map(len, bed.documents)) >= 10
    assert bed.documents != bed.wordings and bed.documents == verse_search(("Law",), 30).documents
    assert torch.equal(bed.grades([3, 1]).argmax(1), torch.tensor([3, 1])) and bed.grades([3]).sum() == 1
    assert len(last_words(bed.wordings[0])) == 6 and words_of("He's HERE, now!") == ["he's", "here", "now"]
    with pytest.raises(ValueError, match="count: got 100000"):
        verse_search(("Law",), 100_000)


def test_sentence_vectors_are_kept():
    vectors = SentenceVectors()
    texts = [["in", "the", "beginning"], ["the", "end"], ["in", "the", "beginning"]]
    X = vectors(texts)
    assert X.shape == (3, vectors.size) and torch.equal(X[0], X[2]) and len(vectors.known) == 2
    assert torch.allclose(vectors.scores(texts, texts).diagonal(), torch.ones(3), atol=1e-5)
