"""Patterns from files: the answers of `re`, and an end in every case."""

import random
import re

import pytest

from lowrank_ref.core.patterns import matches


def written(draw, depth):
    """Draw a small pattern."""
    kind = draw.random()
    if not depth or kind < 0.35:
        return draw.choice([*"ab.1^$", r"\.", "[ab]", "[^a]", "[0-9a]", r"\d", r"\w", r"\W", r"\s", r"\b", r"\B"])
    inner = written(draw, depth - 1)
    if kind < 0.55:
        return inner + written(draw, depth - 1)
    if kind < 0.7:
        return f"({inner}|{written(draw, depth - 1)})"
    if kind < 0.9:
        return f"(?:{inner})" + draw.choice(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}", "{2,}"])
    return draw.choice(["(?=", "(?!"]) + inner + ")"


def test_answers_are_those_of_re():
    draw, found = random.Random(0), 0
    for _ in range(800):
        pattern = written(draw, draw.randint(1, 4))
        # not empty: what \B says of that depends on the version of Python
        text = "".join(draw.choice("ab.1") for _ in range(draw.randint(1, 4)))
        wanted = re.fullmatch(pattern, text) is not None
        assert matches(pattern, text) == wanted, (pattern, text)
        after = [0, *(i + 1 for i, c in enumerate(text) if c == ".")]
        assert matches(pattern, text, starts=after) == (re.match(rf"(.*\.)?({pattern})$", text) is not None)
        found += wanted
    assert found > 20


@pytest.mark.parametrize(
    "pattern", [r"(?<=\.)q", r"(?<!a)b", r".*(?<=a)b", r"(?P<name>a|b)c", r"[\w.]{3}", r"[^\d]+", r"\Aab\Z", ""]
)
def test_rarer_parts(pattern):
    for text in ("", "q", "ab", "bb", "ac", "a.1", "a.q", "x\n"):
        assert matches(pattern, text) == (re.fullmatch(pattern, text) is not None), text


HANG = ["(a+)+b", "(a|a)*b", "(a*)*b", "(.*)*b", "(a|aa)+b", "((a{1,50}){1,50})+b", "(a?){40}a{40}b"]
HANG += ["(a|a)" * 30 + "b", ".*" * 20 + "b", "(?=(a+)+$)b", "(){1000000000}(a+)+b", r"(\w*\.?)*b"]
HANG += ["(" * 30 + "a*" + ")*" * 30 + "b"]


@pytest.mark.parametrize("pattern", HANG)
def test_patterns_on_which_re_would_run_for_years_end(pattern):
    """The answer is no, or a refusal; that there is one is the test."""
    try:
        assert not matches(pattern, "a" * 70)
    except ValueError as error:
        assert "too many steps" in str(error)


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("(", "unterminated"),
        ("*", "nothing to repeat"),
        ("a{99999999999}", "too large"),
        ("(" * 5000, "recursion"),
        ("(?:" * 300 + "a*" + ")*" * 300, "nested too deep"),
        (r"(a)\1", "GROUPREF"),
        ("(?i)a", "flags"),
        ("(?i:a)*", "flags"),
        ("a*+", "POSSESSIVE_REPEAT"),
        ("(?>a)", "ATOMIC_GROUP"),
        ("(a)?(?(1)b|c)", "GROUPREF_EXISTS"),
    ],
)
def test_what_is_no_plain_pattern_is_refused(pattern, message):
    with pytest.raises(ValueError, match=f"pattern: got .*{message}"):
        matches(pattern, "aaaa")
