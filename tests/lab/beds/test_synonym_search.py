"""The made-up language: what is relevant is what was drawn."""

import torch

from lowrank_ref.lab.beds import synonym_language
from lowrank_ref.lab.beds.synonym_search import LENGTH


def test_words_topics_and_grades():
    language = synonym_language(0)
    words = [w for group in language.synonyms for w in group] + language.empty
    assert len(set(words)) == len(words) == 750
    assert all(sorted(language.topics[h : h + 12].ravel()) == list(range(240)) for h in (0, 12))
    corpus = language.corpus(0, 50, range(3), (0, 2))
    allowed = {c for t in range(3) for c in language.topics[t].tolist()}
    concept = language.concept_of()
    for text, main in zip(corpus.documents, corpus.main):
        assert len(text) == LENGTH and main.sum() == 5
        assert {concept[w] for w in text if w in concept} <= allowed
        assert not {w[1] for w in language.synonyms} & set(text)
    queries = language.queries(1, corpus, 20, (1,), size=3, fillers=2)
    for i, (text, concepts) in enumerate(zip(queries.words, queries.concepts)):
        assert len(text) == 5 and {concept[w] for w in text if w in concept} == set(concepts)
        for j in range(50):
            hit = sum(bool(corpus.main[j, c]) for c in concepts)
            assert queries.grades[i, j] == {3: 2, 2: 1}.get(hit, 0)
        assert queries.grades[i, queries.source[i]] == 2


def test_it_repeats_and_names_other_words():
    language = synonym_language(3)
    assert language.synonyms == synonym_language(3).synonyms != synonym_language(4).synonyms
    one, two = (language.corpus(5, 10, range(16), (0, 1)) for _ in range(2))
    assert one.documents == two.documents and torch.equal(one.main, two.main)
    first, second, third = language.synonyms[7]
    assert language.others((0, 1))[first] == [second] and language.others((0, 1))[third] == [first, second]
