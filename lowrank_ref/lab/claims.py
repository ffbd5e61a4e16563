"""The table that ends every experiment: what the paper claims, what was measured here, and the verdict.

A verdict is prose, but it rests on numbers that are computed live. Text and condition read the same numbers, so they
cannot part, and a verdict that is stronger than the numbers carry is an error: no page can show one.

    claims.add("8 directions hold the gradient", where="Fig. 1", measured="{energy:.2f} of the energy",
               numbers={"energy": e}, condition="energy > 0.7", verdict="holds",
               control={"energy": e_of_noise})                      # must fail the condition
    claims.beats("LoRA", "head only", result, "loss", claim="LoRA beats training the head", where="Table 2",
                 cause=["trains"], verdict="holds")                 # the strongest verdict is computed
"""

import ast
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_ref.lab.compare import Comparison
from lowrank_ref.lab.draw.table import Table

__all__ = ["VERDICTS", "Claims", "Row", "checked"]

#: Verdicts, the strongest first. An open one says in its row what is missing.
VERDICTS = ("holds", "holds in part", "not confirmed", "open")

#: What may be written where this is the strongest verdict that the runs of two arms carry.
ALLOWED = {
    "holds": ("holds", "holds in part", "open"),
    "not confirmed": ("not confirmed", "open"),
    "open": ("open",),
}

#: Functions that a condition may call.
FUNCTIONS = {f.__name__: f for f in (abs, all, any, len, max, min, sorted, sum)}

#: Invisible, on both sides of a number that another processor may round otherwise: the tests of the chapters compare
#: what stands outside. The condition is computed again wherever the chapter runs.
MARK = "\u2060"


def checked(name: str, value: Any, low: float, high: float, *, digits: int = 2) -> None:
    """Print a number with the range in which the check holds, as "energy: 0.78 (checked: 0.70 to 0.85)".

    Args:
        name: what the number is, with its unit.
        value: the number, or a tensor of one.
        low, high: ends of the range, both allowed.
        digits: significant digits of the ends where they are small or large, else digits after the point.

    Raises:
        ValueError: low is above high, or one of them is not a number.
        AssertionError: the value lies outside, or is NaN.

    Example:
        >>> checked("energy in 8 directions", 0.781, 0.7, 0.85)
        energy in 8 directions: 0.78 (checked: 0.70 to 0.85)
    """
    if not low <= high:
        raise ValueError(f"low, high: got {low}, {high}, wanted low <= high")
    value = float(value.detach() if hasattr(value, "detach") else value)
    shown, *ends = (_plain(number, digits) for number in (value, low, high))
    text = f"{name}: {shown} (checked: {' to '.join(ends)})"
    if not low <= value <= high:
        raise AssertionError(f"outside its range: {text}")
    print(text)  # noqa: T201


@dataclass(frozen=True)
class Row:
    """One row of the table: words, and the numbers behind them."""

    claim: str
    where: str
    measured: str
    check: str
    seeds: str
    verdict: str


class Claims:
    """The claims of one paper.

    Args:
        paper: the paper's key in the registry, for example "galore".

    Raises:
        ValueError: an empty key.

    Example:
        >>> claims = Claims("lora")
        >>> claims.add("r = 4 is enough", where="Table 6", measured="{lora:.2f} of {full:.2f}", verdict="holds",
        ...            numbers={"lora": 0.95, "full": 0.97}, condition="lora > 0.95 * full")
        >>> claims.rows[0].check
        'lora > 0.95 · full'
    """

    def __init__(self, paper: str):
        if not paper:
            raise ValueError("paper: got an empty key, wanted the paper's key in the registry")
        self.paper = paper
        self.rows: list[Row] = []

    def add(
        self,
        claim: str,
        *,
        where: str,
        measured: str,
        verdict: str,
        numbers: Mapping[str, Any] | None = None,
        condition: str = "",
        control: Mapping[str, Any] | None = None,
        seeds: int | None = None,
        missing: str = "",
        holds: object = None,
    ) -> None:
        """Add a claim about numbers, with its verdict. A claim that one arm beats another goes to `beats`.

        Args:
            claim: what the paper says, in one sentence.
            where: its place there: table, figure, equation or page.
            measured: what came out here, a template of the numbers, such as "{lora:.2f} of {full:.2f}". A sequence
                shows all its entries.
            verdict: one of `VERDICTS`.
            numbers: name -> number, or sequence of numbers.
            condition: on which the verdict rests, an expression over the numbers, such as "lora > 0.95 * full". For
                "not confirmed" it is the condition that shows the failure. The template shows every number it reads.
            control: the same numbers, measured where the condition must fail.
            seeds: how many seeds the numbers rest on.
            missing: what an open verdict waits for: the control, the length, the size.
            holds: in place of numbers and condition, a truth value. It cannot be told from the text whether the two
                agree; only chapters that are still to be rewritten use it.

        Raises:
            ValueError: another verdict, an empty text, a template that hides a number of the condition or has one that
                is not there, an open verdict without `missing`.
            TypeError: the condition is no single truth value.
            AssertionError: the condition is False, so that the numbers do not support the written verdict; or the
                control satisfies it too, so that it shows nothing.
        """
        _check_words(claim=claim, where=where, measured=measured)
        _check_verdict(verdict, missing)
        check = ""
        if numbers is not None or condition:
            numbers = dict(numbers or {})
            _check_template(measured, condition, numbers)
            holds, check = _truth(condition, numbers), _pretty(condition)
            if control is not None:
                _check_control(control, numbers, condition, claim)
            measured = _Fill().format(measured, **numbers)
        elif control is not None:
            raise ValueError("control: got one without numbers and condition, wanted all three")
        if str(holds) not in ("True", "False", "tensor(True)", "tensor(False)"):
            raise TypeError(f"condition: got {holds!r}, wanted True or False")
        if not holds:
            shown = measured.replace(MARK, "")
            raise AssertionError(f"the verdict {verdict!r} no longer follows from the numbers: {claim} ({shown})")
        if missing:
            measured += f"; open: {missing}"
        self.rows.append(Row(claim, where, measured, check, "" if seeds is None else str(seeds), verdict))

    def beats(
        self,
        a: str,
        b: str,
        result: Comparison,
        metric: str,
        *,
        claim: str,
        where: str,
        verdict: str,
        cause: Sequence[str],
        by: float = 0.0,
        higher: bool = False,
        digits: int = 3,
        control: tuple[str, str] | None = None,
        missing: str = "",
    ) -> None:
        """Add a claim that arm a is better than arm b; the strongest verdict that it may carry is computed.

        The runs support it where the 95 % interval of the paired difference lies wholly beyond `by` and nothing of
        `Comparison.doubts` stands against it; they contradict it where the interval lies wholly short of `by`. Else
        the verdict is open.

        Args:
            a, b: arms of the comparison.
            result: the runs.
            metric: the reported number, of test data.
            claim: what the paper says, in one sentence.
            where: its place there.
            verdict: one of `VERDICTS`, not stronger than the computed one.
            cause: the declared facts in which the arms are meant to differ; where they differ in others, the cause is
                not isolated and the verdict is open.
            by: how much better a has to be, in units of the metric; a negative number asks that it is at most so much
                worse.
            higher: whether more of the metric is better.
            digits: after the point.
            control: two arms between which the same difference must not show.
            missing: what an open verdict waits for; default the doubts.

        Raises:
            ValueError: another verdict, an empty text, an unknown arm, metric or cause.
            AssertionError: the written verdict is stronger than the computed one; or the control shows it too.
        """
        _check_words(claim=claim, where=where)
        paired, sign = result.paired(a, b, metric), 1 if higher else -1
        low, high = sorted((sign * paired.low, sign * paired.high))
        doubts = result.doubts(a, b, metric, cause=cause)
        if not doubts and low <= by <= high:
            doubts = [f"the interval contains {_signed(sign * by + 0.0, digits)}"]
        strongest = "open" if doubts else "holds" if low > by else "not confirmed"
        if verdict not in VERDICTS or verdict not in ALLOWED[strongest]:
            why = "; ".join(doubts) or repr(paired)
            raise AssertionError(f"verdict: got {verdict!r} for {claim!r}, wanted at most {strongest!r}: {why}")
        if control is not None:
            same = result.paired(*control, metric)
            if min(sign * same.low, sign * same.high) > by:
                raise AssertionError(
                    f"control: {control[0]} beats {control[1]} too, so {claim!r} shows nothing: {same}"
                )
        if verdict == "open":
            missing = missing or "; ".join(doubts)
            _check_verdict(verdict, missing)
        shown = [f"{name} {_marked(f'{result.mean(name, metric):.{digits}f}')}" for name in (a, b)]
        text = f"{', '.join(shown)}; difference {_marked(_signed(paired.mean, digits))}"
        ends = [_marked(_signed(end, digits)) for end in (paired.low, paired.high)]
        if missing:
            text += f"; open: {missing}"
        self.rows.append(Row(claim, where, text, " to ".join(ends), str(len(paired.seeds)), verdict))

    def _table(self) -> Table:
        return Table(
            ["claim", "where", "measured here", "95 % interval, or check", "seeds", "verdict"],
            [[r.claim, r.where, r.measured, r.check, r.seeds, r.verdict] for r in self.rows],
            numbers=False,
            css="lr-table claims",
            attributes={"data-paper": self.paper},
            row_attributes=[{"data-verdict": row.verdict} for row in self.rows],
        )

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def __repr__(self) -> str:
        """One line a claim, whose spaces do not depend on the width of a number."""
        return "\n".join(f"{r.verdict}: {r.claim} ({r.where}). {r.measured} [{r.check}] {r.seeds}" for r in self.rows)


# --- inside -----------------------------------------------------------------------------------------------------------


def _check_words(**texts: str) -> None:
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"{name}: got an empty text, wanted words")


def _check_verdict(verdict: str, missing: str) -> None:
    if verdict not in VERDICTS:
        raise ValueError(f"verdict: got {verdict!r}, wanted one of {', '.join(VERDICTS)}")
    if (verdict == "open") != bool(missing.strip()):
        raise ValueError(f"missing: got {missing!r} with verdict {verdict!r}, wanted what an open verdict waits for")


def _names(condition: str) -> set[str]:
    """The numbers that a condition reads; a name that a comprehension binds is none."""
    try:
        tree = ast.parse(condition, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"condition: got {condition!r}, wanted an expression such as 'lora < full'") from error
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    return {node.id for node in nodes} - bound - set(FUNCTIONS)


def _check_template(measured: str, condition: str, numbers: Mapping[str, Any]) -> None:
    shown = {name for _, name, _, _ in string.Formatter().parse(measured) if name is not None}
    read = _names(condition)
    if not read:
        raise ValueError(f"condition: got {condition!r}, which reads no number, wanted one that does")
    if unknown := (shown | read) - set(numbers):
        raise ValueError(f"numbers: got {sorted(numbers)}, wanted also {sorted(unknown)}")
    if hidden := read - shown:
        raise ValueError(f"measured: got {measured!r}, wanted it to show {sorted(hidden)}, which the condition reads")
    if idle := set(numbers) - shown:
        raise ValueError(f"numbers: got {sorted(idle)}, which are not shown, wanted only those in the template")


def _truth(condition: str, numbers: Mapping[str, Any]) -> object:
    values = {name: _number(name, value) for name, value in numbers.items()}
    return eval(condition, {"__builtins__": {}, **FUNCTIONS, **values})  # the chapter's own text, checked names


def _number(name: str, value: Any) -> Any:
    """A float, or a list of floats. NaN is refused: every comparison with it is False, "not" makes it True."""
    if isinstance(value, str | Mapping):
        raise TypeError(f"numbers: got {value!r} for {name!r}, wanted a number or a sequence of numbers")
    try:
        found = float(value)
    except (TypeError, ValueError):
        return [_number(name, entry) for entry in value]
    if math.isnan(found):
        raise ValueError(f"numbers: got NaN for {name!r}, wanted a number")
    return found


def _check_control(control: Mapping[str, Any], numbers: Mapping[str, Any], condition: str, claim: str) -> None:
    if strangers := set(control) ^ set(numbers):
        raise ValueError(f"control: got {sorted(control)}, wanted the names in numbers; they differ in {strangers}")
    if _truth(condition, control):
        raise AssertionError(f"control: it satisfies {condition!r} too, so {claim!r} shows nothing: {dict(control)}")


class _Fill(string.Formatter):
    """Fills a template with marked numbers; a sequence becomes its entries."""

    def format_field(self, value: Any, format_spec: str) -> str:
        entries: Iterable[Any] = value if _is_sequence(value) else [value]
        return ", ".join(_marked(format(_scalar(entry), format_spec)) for entry in entries)


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__len__") and (not hasattr(value, "ndim") or value.ndim > 0)


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _marked(number: str) -> str:
    return f"{MARK}{number}{MARK}"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _pretty(condition: str) -> str:
    return condition.replace(" * ", " · ").replace("<=", "≤").replace(">=", "≥").replace("_", " ")


def _plain(value: float, digits: int) -> str:
    size = abs(value)
    if value and not 10 ** (1 - digits) <= size < 1e6:
        return f"{value:.{max(digits - 1, 0)}e}"
    return f"{value:,.{digits}f}"
