"""Compare a reader's solution with the reference on random inputs.

    check(my_delta_weight, lora.delta_weight, given={"alpha": [1.0, 16.0]})

The inputs come from the reference's own annotations: `Float[Tensor, "m n"]` becomes a float64 matrix of random size,
and the same letter means the same size in every argument. What a reference needs beyond a shape stands beside it:
`Annotated[Int64[Tensor, " k"], "below m*n", "distinct", "sorted"]`. The words are in `check`.

`check` is for reading. `lab.grade` gives points.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowrank_ref.core.checks import check_number
from lowrank_ref.lab._differences import describe, difference, effects
from lowrank_ref.lab._draws import accepted, check_given
from lowrank_ref.lab._submission import TooLong, arguments, copied, limited, raised

__all__ = ["CheckResult", "check"]


@dataclass(frozen=True)
class CheckResult:
    """True if all cases agree; its text says so, or tells what differs in the first case that does not."""

    agrees: bool
    message: str

    def __bool__(self) -> bool:
        return self.agrees

    def __repr__(self) -> str:
        return self.message


def check(
    student: Callable,
    reference: Callable,
    *,
    cases: int = 20,
    seed: int = 0,
    given: Mapping[str, Sequence[Any] | Callable] | None = None,
    seconds: float = 10.0,
) -> CheckResult:
    """Call both functions with the same random inputs and compare what they return, and what they did to the inputs.

    Tensors are float64 (or whole numbers from 0 to at most 9, or truth values, as annotated) with sizes from 1, 2, 3,
    5, 8; an argument `generator`, a torch.Generator, gets a fresh one of the same seed for both. Words beside an
    annotation narrow a draw: "orthonormal" (columns), "orthonormal rows", "positive", "below EXPRESSION" (whole numbers
    from 0, of letters of the shapes), "distinct", "sorted". Inputs that the reference rejects with an error are drawn
    anew.
    Results must agree to 1e-8, and so must the inputs afterwards: a function may change one only as the reference does.

    Args:
        student: takes the arguments of `reference`, by position where the reference allows it.
        reference: annotated with jaxtyping.
        cases: how many inputs to try, at least 1.
        seed: which inputs.
        given: argument -> values to choose from; needed for arguments that have neither a tensor annotation nor a
            default, for example {"rank": [1, 2]}. A function makes one of the sizes of its letters:
            {"M": lambda m, n: [torch.zeros(m, n)]}.
        seconds: longest time for one call of `student`, above 0. Kept in the main thread of Linux and macOS only, and
            not inside one long operation of PyTorch.

    Raises:
        ValueError: no case to try, no time, an argument cannot be drawn, a name in `given` is no argument or has no
            values, or the reference rejects nearly all inputs.
    """
    if cases < 1:
        raise ValueError(f"cases: got {cases}, wanted at least 1")
    check_number("seconds", seconds, low=0, open_low=True)
    given = dict(given or {})
    parameters = inspect.signature(reference).parameters
    check_given(given, parameters)
    rng = np.random.default_rng(seed)
    for case in range(1, cases + 1):
        inputs, wanted = accepted(parameters, given, rng, lambda inputs: _call(reference, parameters, inputs))
        if problem := _problem(student, parameters, inputs, wanted, seconds):
            shapes = ", ".join(f"{name} {describe(value)}" for name, value in inputs.items())
            return CheckResult(False, f"case {case} of {cases} differs ({shapes}): {problem}")
    return CheckResult(True, f"all {cases} cases agree")


# --- inside -----------------------------------------------------------------------------------------------------------


def _call(
    function: Callable, parameters: Mapping[str, inspect.Parameter], inputs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Call with copies of the inputs; return the result, and the copies as they are afterwards."""
    copies = {name: copied(value) for name, value in inputs.items()}
    positional, named = arguments(parameters, copies)
    return function(*positional, **named), copies


def _problem(
    student: Callable, parameters: Mapping, inputs: dict[str, Any], wanted: tuple[Any, dict[str, Any]], seconds: float
) -> str:
    """Say in words what is wrong, or return ""."""
    try:
        with limited(seconds):
            got, after = _call(student, parameters, inputs)
    except TooLong:
        return f"it had not ended after {seconds:g} seconds"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a first attempt may raise, sys.exit() too
        return raised(student, error)
    if problem := difference(got, wanted[0], "the result"):
        return problem
    start = {name: value for name, value in inputs.items() if not isinstance(value, torch.Generator)}
    return effects(after, wanted[1], start)
