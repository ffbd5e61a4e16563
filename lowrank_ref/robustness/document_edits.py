"""Edits of a document that shall lift it in the list of one query: words put in front, or words put in place of others.

The attacker sees scores only. The index keeps what it counted before the attack. Whether the edited document has become
relevant is for the caller to know: then it was no attack.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_ref.core.checks import check_integer
from lowrank_ref.robustness.lexical_rankers import Texts

Document = Sequence[str]


def stuffed(document: Document, words: Sequence[str], count: int) -> list[str]:
    """Return the document with `count` words in front, from `words` in turn.

    Raises:
        ValueError: a negative count, or no words.
    """
    check_integer("count", count, low=0)
    if not words:
        raise ValueError("words: got none, wanted at least one")
    return [*(words[i % len(words)] for i in range(count)), *document]


def substituted(document: Document, place: int, word: str) -> list[str]:
    """Return the document with this word at this place."""
    return [word if i == place else old for i, old in enumerate(document)]


def substitution_attack(
    score: Callable[[Texts], Tensor], document: Document, words: Sequence[str], budget: int
) -> list[list[str]]:
    """Replace one word after the other, each time where it costs least by what helps most.

    A step finds the place whose word, taken out, leaves the highest score (each place is used once), then the word of
    `words` that gives the highest score there. Ties go to the first. If no word raises the score, nothing changes any
    more. That is greedy: a lower bound on what an attacker can do.

    Args:
        score: texts -> scores (n) for the one query.
        document: at least `budget` words.
        words: what may be written.
        budget: steps, >= 0.

    Returns:
        budget + 1 documents, from none to all edits; each has one edit more than the last, or is the last.

    Raises:
        ValueError: a budget above the number of words, or no words.
    """
    check_integer("budget", budget, low=0)
    if budget > len(document):
        raise ValueError(f"budget: got {budget}, wanted at most the {len(document)} words of the document")
    if not words:
        raise ValueError("words: got none, wanted at least one")
    found, free = [list(document)], list(range(len(document)))
    for _ in range(budget):
        now = found[-1]
        shorter = [[word for i, word in enumerate(now) if i != place] or [""] for place in free]
        place = free[int(score(shorter).argmax())]
        edits = [substituted(now, place, word) for word in words]
        scores = score([now, *edits])
        best = int(torch.as_tensor(scores).argmax())
        found.append(now if best == 0 else edits[best - 1])
        if best:
            free.remove(place)
    return found
