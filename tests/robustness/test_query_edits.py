"""Edits of queries change what they say they change, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.robustness import query_edits as edits


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


words = st.text("abcde", min_size=2, max_size=8).filter(lambda w: len(set(w)) > 1)


@given(words, st.sampled_from([None, *edits.TYPOS]), st.integers(0, 99))
def test_a_typo_is_one_edit(word, kind, seed):
    new = edits.misspelt(word, seeded(seed), kind)
    assert new != word and abs(len(new) - len(word)) <= 1
    if kind == "swap":
        assert sorted(new) == sorted(word) and sum(a != b for a, b in zip(word, new)) == 2
    if kind == "replace":
        assert sum(a != b for a, b in zip(word, new)) == 1
    if kind in ("drop", "double"):
        longer, shorter = sorted((word, new), key=len, reverse=True)
        assert any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
    assert new == edits.misspelt(word, seeded(seed), kind)


def test_edits_of_one_word():
    query = ["red", "deer", "seen"]
    new = edits.with_typo(query, 1, seeded())
    assert [a == b for a, b in zip(query, new)] == [True, False, True] and query[1] == "deer"
    assert edits.without_word(query, 0) == ["deer", "seen"]
    added = edits.with_word(query, "new", seeded())
    assert sorted(added) == sorted([*query, "new"]) and [w for w in added if w != "new"] == query
    assert sorted(edits.reordered(query, seeded())) == sorted(query)
    other = {"deer": ["stag", "hart"], "red": []}
    found = {edits.reworded(query, other, seeded(s))[1] for s in range(20)}
    assert found == {"stag", "hart"} and edits.reworded(query, {}, seeded()) == query


def test_noise_in_letters():
    query = ["abcdefgh"] * 200
    assert edits.noisy_letters(query, 0, seeded()) == query
    changed = sum(a != b for w in edits.noisy_letters(query, 0.3, seeded()) for a, b in zip("abcdefgh", w))
    assert 0.25 < changed / 1600 < 0.33  # one drawn letter in 26 is the old one


def test_bad_input():
    for call, error in (
        (lambda: edits.misspelt("aa", seeded()), "word: got 'aa'"),
        (lambda: edits.misspelt("ab", seeded(), "twist"), "kind: got 'twist'"),
        (lambda: edits.with_typo(["ab"], 1, seeded()), "place: got 1"),
        (lambda: edits.without_word(["ab"], -1), "place: got -1"),
        (lambda: edits.noisy_letters(["ab"], 2, seeded()), "share: got 2"),
    ):
        with pytest.raises(ValueError, match=error):
            call()
