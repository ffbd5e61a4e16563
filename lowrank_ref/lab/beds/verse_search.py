"""Find a verse of the World English Bible by words of the King James Version: known-item search on real text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowrank_ref.lab.data import sentence_pairs, verse_group
from lowrank_ref.lab.models import embed_sentences, minilm

__all__ = ["SentenceVectors", "VerseSearch", "last_words", "verse_search", "words_of"]


def words_of(text: str) -> list[str]:
    """Return the words of a text in small letters, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


@dataclass(frozen=True)
class VerseSearch:
    """Verses to find (WEB) and the same verses in other words (KJV), both as lists of words."""

    documents: list[list[str]]
    wordings: list[list[str]]

    def grades(self, rows: Sequence[int]) -> Int[Tensor, "q n"]:
        """Return the grades of queries made of these verses: 1 for the verse itself, else 0."""
        return torch.eye(len(self.documents), dtype=torch.long)[list(rows)]


def verse_search(groups: Sequence[str], count: int | None = None, seed: int = 0) -> VerseSearch:
    """Draw verses of these groups of books, of ten words or more in both versions; count = None takes all.

    Raises:
        ValueError: fewer verses than asked for.
    """
    pairs = [(words_of(p.second), words_of(p.first)) for p in sentence_pairs() if verse_group(p.id) in groups]
    pairs = [pair for pair in pairs if min(map(len, pair)) >= 10]
    if count is not None and count > len(pairs):
        raise ValueError(f"count: got {count}, wanted at most {len(pairs)}")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return VerseSearch([pairs[i][0] for i in order], [pairs[i][1] for i in order])


def last_words(wording: Sequence[str], count: int = 6) -> list[str]:
    """Return the last words of a verse."""
    return list(wording[-count:])


class SentenceVectors:
    """Features of texts: the unit vectors of frozen MiniLM, (n, 384), each text computed once."""

    size = 384

    def __init__(self) -> None:
        self.model, self.tokenizer = minilm()
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[Sequence[str]]) -> Float[Tensor, "n 384"]:
        """Return the vectors."""
        joined = [" ".join(text) for text in texts]
        new = sorted({text for text in joined if text not in self.known}, key=len)
        if new:
            self.known.update(zip(new, embed_sentences(self.model, self.tokenizer, new)))
        return torch.stack([self.known[text] for text in joined])

    def scores(self, queries: Sequence[Sequence[str]], documents: Sequence[Sequence[str]]) -> Float[Tensor, "q n"]:
        """Rank by MiniLM as it is: the cosine of the two vectors."""
        return self(queries) @ self(documents).T
