"""Regular expressions that come from a file, matched in time that no pattern can blow up.

Python's `re` backtracks: (a+)+b on n letters takes 2ⁿ steps. Here every part of a pattern says at which places it can
end when it starts at a place, and each answer is kept, so that n letters cost about n² steps a part. Beyond `STEPS` of
them the pattern is refused.
"""

import importlib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

#: Parts that take one character, and parts that take none; a pattern of these alone is quick in `re`.
_ONE, _NONE = {"ANY", "LITERAL", "NOT_LITERAL", "IN"}, {"AT"}
_CLASSES = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda c: c.isalnum() or c == "_"}
_BLOCKS = {"BRANCH", "SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"}
#: Most steps for one text, a tenth of a second. What people write takes a thousand.
STEPS = 50_000


def matches(pattern: str, text: str, *, starts: Iterable[int] = (0,)) -> bool:
    """Say whether a match of the pattern reaches from one of the starts to the end of the text.

    Args:
        pattern: what `re` takes, without flags, references to groups, conditions, atomic groups and possessive repeats.
        text: one line.
        starts: places in the text; the default asks what `re.fullmatch` does.

    Raises:
        ValueError: no regular expression, one with what is not taken, or one that takes more than `STEPS` steps.
    """
    tree = _parsed(pattern)
    if isinstance(tree, re.Pattern):
        return any(tree.fullmatch(text, start) for start in starts)
    try:
        ends = _Ends(pattern, text)
        return any(len(text) in ends(tree, start) for start in starts)
    except RecursionError as error:
        raise ValueError(f"pattern: got {pattern[:80]!r}, nested too deep") from error


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> Any:
    """Return the parsed pattern, or the compiled one where `re` is quick."""
    try:
        tree = importlib.import_module("re._parser").parse(pattern)
        strange = {str(op) for op in _operations(tree)} - _ONE - _NONE - _BLOCKS
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern: got {pattern[:80]!r} ({error}), wanted a regular expression") from error
    if strange or tree.state.flags != re.UNICODE:
        got = ", ".join(sorted(strange)) or "flags"
        raise ValueError(f"pattern: got {pattern[:80]!r} with {got}, wanted a plain regular expression")
    return re.compile(pattern) if all(str(op) in _ONE | _NONE for op, _ in tree) else tree


def _operations(tree: Any) -> Iterable[Any]:
    """Iterate over the operations of a parsed pattern, the inner ones too. Flags of a group count as an operation."""
    for op, arg in tree:
        yield op
        for inner in _inside(op, arg):
            yield from _operations(inner)
        if str(op) == "SUBPATTERN" and (arg[1] or arg[2]):
            yield "flags"


def _inside(op: Any, arg: Any) -> Iterable[Any]:
    if str(op) == "BRANCH":
        return arg[1]
    return [arg[-1]] if str(op) in _BLOCKS else []


class _Ends:
    """Where a part can end that starts at a place of the text."""

    def __init__(self, pattern: str, text: str) -> None:
        self.pattern, self.text, self.steps = pattern, text, 0
        self.known: dict[tuple[int, int], set[int]] = {}

    def __call__(self, tree: Any, start: int) -> set[int]:
        key = id(tree), start
        if key not in self.known:
            places = {start}
            for op, arg in tree:
                places = self.union(self.step(str(op), arg, place) for place in places)
            self.known[key] = places
        return self.known[key]

    def union(self, ends: Iterable[set[int]]) -> set[int]:
        found: set[int] = set()
        for some in ends:
            self.steps += 1 + len(some)
            if self.steps > STEPS:
                raise ValueError(f"pattern: got {self.pattern[:80]!r}, which takes too many steps, wanted a simpler")
            found |= some
        return found

    def step(self, op: str, arg: Any, i: int) -> set[int]:
        """Return the ends of one operation that starts at i."""
        if op in _ONE:
            return {i + 1} if i < len(self.text) and _takes(op, arg, self.text[i]) else set()
        if op == "AT":
            return {i} if self.at(str(arg), i) else set()
        if op == "BRANCH":
            return self.union(self(tree, i) for tree in arg[1])
        if op == "SUBPATTERN":
            return self(arg[-1], i)
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, tree = arg
            holds = bool(self(tree, i)) if direction > 0 else any(i in self(tree, j) for j in range(i + 1))
            return {i} if holds == (op == "ASSERT") else set()
        low, high, tree = arg
        places = {i}
        for _ in range(low):
            before, places = places, self.union(self(tree, place) for place in places)
            if places == before:  # and so for ever
                break
        found, new = set(places), places
        for _ in range(high - low):
            new = self.union(self(tree, place) for place in new) - found
            if not new:
                break
            found |= new
        return found

    def at(self, where: str, i: int) -> bool:
        if where.startswith("AT_BEGINNING"):
            return i == 0
        if where.startswith("AT_END"):
            return i == len(self.text)
        inside = [0 <= j < len(self.text) and _takes("CATEGORY", "CATEGORY_WORD", self.text[j]) for j in (i - 1, i)]
        return (inside[0] != inside[1]) == (where == "AT_BOUNDARY")


def _takes(op: str, arg: Any, char: str) -> bool:
    """Say whether an operation takes a character."""
    if op == "IN":
        negated = str(arg[0][0]) == "NEGATE"
        return any(_takes(str(o), a, char) for o, a in arg[negated:]) != negated
    if op == "CATEGORY":
        name = str(arg).removeprefix("CATEGORY_")
        return bool(_CLASSES[name.removeprefix("NOT_")](char)) != name.startswith("NOT_")
    if op == "RANGE":
        return arg[0] <= ord(char) <= arg[1]
    return char != "\n" if op == "ANY" else (ord(char) == arg) == (op == "LITERAL")
