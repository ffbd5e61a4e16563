"""Documents and queries in a made-up language in which it is known what is relevant.

240 concepts have three words each; 30 words say nothing. A document has a topic of 20 concepts, of which five are its
main ones: of its 40 words 45 % are words of main concepts, 20 % of the topic, 35 % say nothing. A query names some
main concepts of a document, by words of their own. All words are drawn letters, so typos can be made.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["Language", "SearchCorpus", "SearchQueries", "synonym_language"]

CONCEPTS, SYNONYMS, EMPTY, TOPICS, PER_TOPIC, MAIN, LENGTH = 240, 3, 30, 24, 20, 5, 40


@dataclass(frozen=True)
class SearchCorpus:
    """Documents (lists of words), and which concepts are main ones of each, (documents, 240)."""

    documents: list[list[str]]
    main: Bool[Tensor, "n concepts"]


@dataclass(frozen=True)
class SearchQueries:
    """Queries: their words, their concepts, the document each was made of, and grades, (queries, documents).

    Grade 2: all concepts of the query are main ones of the document; 1: at least 60 % of them; 0: fewer.
    """

    words: list[list[str]]
    concepts: list[list[int]]
    source: list[int]
    grades: Int[Tensor, "q n"]


@dataclass(frozen=True)
class Language:
    """The words of each concept, words that say nothing, and the concepts of each topic; draws corpora and queries."""

    synonyms: list[list[str]]
    empty: list[str]
    topics: np.ndarray

    def concept_of(self) -> dict[str, int]:
        """Word -> its concept; words that say nothing are left out."""
        return {word: c for c, words in enumerate(self.synonyms) for word in words}

    def others(self, which: tuple[int, ...]) -> Mapping[str, list[str]]:
        """Word -> the other words of its concept, among those that are in use."""
        return {w[i]: [w[j] for j in which if j != i] for w in self.synonyms for i in range(SYNONYMS)}

    def corpus(self, seed: int, count: int, topics: range, which: tuple[int, ...]) -> SearchCorpus:
        """Draw documents of these topics, with these of the three words of each concept."""
        rng = np.random.default_rng([seed, 1])
        main = torch.zeros(count, CONCEPTS, dtype=torch.bool)
        documents = []
        for row in range(count):
            topic = self.topics[rng.choice(list(topics))]
            chosen = rng.choice(topic, MAIN, replace=False)
            main[row, chosen] = True
            kind = rng.choice(3, LENGTH, p=(0.45, 0.2, 0.35))
            concept = np.where(kind == 0, rng.choice(chosen, LENGTH), rng.choice(topic, LENGTH))
            word, filler = rng.choice(which, LENGTH), rng.choice(EMPTY, LENGTH)
            documents.append(
                [self.empty[f] if k == 2 else self.synonyms[c][w] for k, c, w, f in zip(kind, concept, word, filler)]
            )
        return SearchCorpus(documents, main)

    def queries(
        self, seed: int, corpus: SearchCorpus, count: int, which: tuple[int, ...], *, size: int = 3, fillers: int = 0
    ) -> SearchQueries:
        """Draw queries of `size` main concepts of a drawn document, and some words that say nothing, in any order."""
        rng = np.random.default_rng([seed, 2, size, fillers])
        words, concepts, source = [], [], []
        named = torch.zeros(count, CONCEPTS)
        for row in range(count):
            source.append(int(rng.integers(len(corpus.documents))))
            chosen = rng.choice(corpus.main[source[-1]].nonzero()[:, 0].numpy(), size, replace=False)
            named[row, chosen] = 1
            text = [self.synonyms[c][rng.choice(which)] for c in chosen]
            text += [self.empty[i] for i in rng.choice(EMPTY, fillers, replace=False)]
            words.append([text[i] for i in rng.permutation(len(text))])
            concepts.append(chosen.tolist())
        share = named @ corpus.main.float().T / size
        return SearchQueries(words, concepts, source, (share > 0.999).long() + (share > 0.599).long())


def synonym_language(seed: int) -> Language:
    """Draw a language: words of two to four syllables, and topics such that every concept stands in two of them.

    The first twelve topics hold all concepts, and so do the last twelve.
    """
    rng = np.random.default_rng([seed, 0])
    drawn: dict[str, None] = {}
    while len(drawn) < CONCEPTS * SYNONYMS + EMPTY:
        size = int(rng.integers(2, 5))
        letters = zip(rng.choice(list("bcdfghklmnprstvz"), size), rng.choice(list("aeiou"), size))
        drawn["".join(consonant + vowel for consonant, vowel in letters)] = None
    words = list(drawn)
    concepts = [words[SYNONYMS * c : SYNONYMS * (c + 1)] for c in range(CONCEPTS)]
    halves = [rng.permutation(CONCEPTS).reshape(-1, PER_TOPIC) for _ in range(TOPICS * PER_TOPIC // CONCEPTS)]
    return Language(concepts, words[CONCEPTS * SYNONYMS :], np.concatenate(halves))
