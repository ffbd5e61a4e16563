"""Edits of a query that leave what is meant: typos, noise in all letters, lost, added and moved words, other words.

A query is a list of words; every function returns a new one. All random choices come from the generator, so an edit is
drawn once and shared by all rankers. To delete a word is no attack, but the yardstick for one: a ranker of whole words
loses by a typo, if the misspelt word is unknown, exactly what it loses by the deletion.
"""

import string
from collections.abc import Mapping, Sequence

import torch

from lowrank_ref.core.checks import check_integer, check_number

Words = Sequence[str]


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _place(query: Words, place: int) -> None:
    check_integer("place", place, low=0)
    if place >= len(query):
        raise ValueError(f"place: got {place}, wanted the place of one of {len(query)} words")


#: Kinds of a typo.
TYPOS = ("swap", "drop", "double", "replace")


def misspelt(word: str, generator: torch.Generator, kind: str | None = None) -> str:
    """Return a word with one typo, never the word itself.

    Args:
        word: of two letters at least that are not all the same.
        generator: draws the place, and the letter of a "replace".
        kind: "swap" two neighbours that differ, "drop", "double" or "replace" a letter; None draws one of them.

    Raises:
        ValueError: another kind, or such a word.
    """
    if len(set(word)) < 2:
        raise ValueError(f"word: got {word!r}, wanted two letters that differ")
    kind = TYPOS[_draw(len(TYPOS), generator)] if kind is None else kind
    if kind not in TYPOS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {TYPOS}")
    if kind == "swap":
        places = [i for i in range(len(word) - 1) if word[i] != word[i + 1]]
        i = places[_draw(len(places), generator)]
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    i = _draw(len(word), generator)
    others = [letter for letter in string.ascii_lowercase if letter != word[i]]
    middle = {"drop": "", "double": 2 * word[i], "replace": others[_draw(len(others), generator)]}[kind]
    return word[:i] + middle + word[i + 1 :]


def with_typo(query: Words, place: int, generator: torch.Generator, kind: str | None = None) -> list[str]:
    """Return the query with one typo in the word at this place. ValueError: no such place, or as `misspelt`."""
    _place(query, place)
    return [misspelt(word, generator, kind) if i == place else word for i, word in enumerate(query)]


def noisy_letters(query: Words, share: float, generator: torch.Generator) -> list[str]:
    """Return the query with every letter replaced by a drawn one with this probability. ValueError: not in [0, 1]."""
    check_number("share", share, low=0, high=1)
    letters = string.ascii_lowercase
    found = []
    for word in query:
        hit = (torch.rand(len(word), generator=generator) < share).tolist()
        drawn = torch.randint(len(letters), (len(word),), generator=generator).tolist()
        found.append("".join(letters[d] if h else letter for letter, h, d in zip(word, hit, drawn)))
    return found


def without_word(query: Words, place: int) -> list[str]:
    """Return the query without the word at this place. ValueError: no such place."""
    _place(query, place)
    return [*query[:place], *query[place + 1 :]]


def with_word(query: Words, word: str, generator: torch.Generator) -> list[str]:
    """Return the query with one more word, at a drawn place."""
    place = _draw(len(query) + 1, generator)
    return [*query[:place], word, *query[place:]]


def reordered(query: Words, generator: torch.Generator) -> list[str]:
    """Return the words of the query in a drawn order."""
    return [query[i] for i in torch.randperm(len(query), generator=generator).tolist()]


def reworded(query: Words, other: Mapping[str, Sequence[str]], generator: torch.Generator) -> list[str]:
    """Return the query with every word that has entries in `other` replaced by a drawn one of them."""
    return [other[word][_draw(len(other[word]), generator)] if other.get(word) else word for word in query]
