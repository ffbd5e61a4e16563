"""Compare a reader's solution with the reference on random inputs.

    check(my_delta_weight, lora.delta_weight, given={"alpha": [1.0, 16.0]})

The inputs come from the reference's own annotations: `Float[Tensor, "m n"]` becomes a float64 matrix of random size,
and the same letter means the same size in every argument.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CheckResult", "check"]

_SIZES = (1, 2, 3, 5, 8)


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
    given: Mapping[str, Sequence[Any]] | None = None,
) -> CheckResult:
    """Call both functions with the same random inputs and compare what they return.

    Tensors are float64 (or random whole numbers 0 to 9, or truth values, as annotated) with sizes from 1, 2, 3, 5, 8;
    an argument `generator` gets a fresh generator of the same seed for both. Inputs that the reference rejects with a
    ValueError are drawn anew. Results must agree to 1e-8, and neither function may change its inputs.

    Args:
        student: takes the arguments of `reference`, by position where the reference allows it.
        reference: annotated with jaxtyping.
        cases: how many inputs to try, at least 1.
        seed: which inputs.
        given: argument -> values to choose from; needed for arguments that have neither a tensor annotation nor a
            default, for example {"rank": [1, 2]}.

    Raises:
        ValueError: no case to try, an argument cannot be drawn, a name in `given` is no argument or has no values, or
            the reference rejects nearly all inputs.
    """
    if cases < 1:
        raise ValueError(f"cases: got {cases}, wanted at least 1")
    given = dict(given or {})
    parameters = inspect.signature(reference).parameters
    if strangers := set(given) - set(parameters):
        raise ValueError(f"given: got {sorted(strangers)}, wanted arguments of the reference: {list(parameters)}")
    if empty := [name for name, values in given.items() if not len(values)]:
        raise ValueError(f"given: got no values for {empty}, wanted at least one each")
    rng = np.random.default_rng(seed)
    done = rejected = 0
    while done < cases:
        inputs = _draw(parameters, given, rng)
        try:
            wanted, _ = _call(reference, parameters, inputs)
        except ValueError as error:
            rejected += 1
            if rejected > 10 * cases:
                raise ValueError(f"given: the reference rejects nearly all inputs, the last with: {error}") from error
            continue
        done += 1
        if problem := _problem(student, parameters, inputs, wanted):
            shapes = ", ".join(f"{name} {_describe(value)}" for name, value in inputs.items())
            return CheckResult(False, f"case {done} of {cases} differs ({shapes}): {problem}")
    return CheckResult(True, f"all {cases} cases agree")


# --- inside -----------------------------------------------------------------------------------------------------------


def _draw(parameters: Mapping[str, inspect.Parameter], given: Mapping, rng: np.random.Generator) -> dict[str, Any]:
    sizes: dict[str, Any] = {}  # letter -> size, the same in every argument
    inputs: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in given:
            inputs[name] = given[name][int(rng.integers(len(given[name])))]
        elif hasattr(parameter.annotation, "dim_str"):
            shape = _shape(parameter.annotation.dim_str, sizes, rng)
            inputs[name] = _tensor(parameter.annotation.dtypes, shape, rng)
        elif name == "generator":
            inputs[name] = torch.Generator().manual_seed(int(rng.integers(2**31)))
        elif parameter.default is parameter.empty:
            raise ValueError(f"given: got no values for {name!r}, wanted some, as {{{name!r}: [...]}}")
    return inputs


def _shape(text: str, sizes: dict[str, Any], rng: np.random.Generator) -> list[int]:
    """Turn jaxtyping's "*batch m 3 m*n" into numbers, remembering every letter."""

    def size() -> int:
        return int(rng.choice(_SIZES))

    shape: list[int] = []
    for axis in text.split():
        axis = axis.split("=")[-1]
        if axis.isdigit():
            shape.append(int(axis))
        elif axis == "..." or axis.startswith("*"):
            if axis not in sizes or axis == "...":
                sizes[axis] = [size() for _ in range(int(rng.integers(3)))]
            shape += sizes[axis]
        elif axis.lstrip("#").isidentifier() and not axis.startswith("_"):
            shape.append(sizes.setdefault(axis.lstrip("#"), size()))
        elif axis.startswith("_"):
            shape.append(size())
        else:  # an expression of letters that came before
            shape.append(max(int(eval(axis, {"__builtins__": {}, "min": min, "max": max}, sizes)), 0))
    return shape


def _tensor(dtypes: Any, shape: list[int], rng: np.random.Generator) -> Tensor:
    names = [str(dtype).rstrip("_") for dtype in dtypes] if isinstance(dtypes, list | tuple) else ["float64"]
    dtype = next((d for d in ("float64", "complex128", "int64") if d in names), names[-1])
    values: np.ndarray | float
    if dtype == "bool":
        values = rng.integers(0, 2, shape)
    elif dtype.startswith(("int", "uint")):
        values = rng.integers(0, 10, shape)
    else:
        values = rng.standard_normal(shape)
    return torch.from_numpy(np.asarray(values)).to(getattr(torch, dtype))


def _call(function: Callable, parameters: Mapping[str, inspect.Parameter], inputs: dict[str, Any]) -> tuple[Any, str]:
    """Call with copies of the inputs; return the result and the name of an input that changed, or ""."""
    copies = {name: _copy(value) for name, value in inputs.items()}
    positional: list[Any] = []
    by_position = True
    named = {}
    for name, parameter in parameters.items():
        by_position &= name in copies and parameter.kind is not parameter.KEYWORD_ONLY
        if by_position:  # so that a student may choose other names
            positional.append(copies[name])
        elif name in copies:
            named[name] = copies[name]
    result = function(*positional, **named)
    changed = [n for n, value in inputs.items() if isinstance(value, Tensor) and not torch.equal(value, copies[n])]
    return result, changed[0] if changed else ""


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator().set_state(value.get_state())
    return copy.deepcopy(value)


def _problem(student: Callable, parameters: Mapping, inputs: dict[str, Any], wanted: Any) -> str:
    """Say in words what is wrong, or return ""."""
    try:
        got, changed = _call(student, parameters, inputs)
    except Exception as error:  # whatever a first attempt may raise
        return f"it raised {type(error).__name__}: {error}"
    if changed:
        return f"it changed its input {changed} in place"
    return _difference(got, wanted, "the result")


def _difference(got: Any, wanted: Any, where: str) -> str:
    if isinstance(wanted, Tensor):
        if not isinstance(got, Tensor):
            return f"{where} is a {type(got).__name__}, wanted a tensor"
        if got.shape != wanted.shape:
            return f"{where} has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
        if got.dtype != wanted.dtype:
            return f"{where} has dtype {got.dtype}, wanted {wanted.dtype}"
        if torch.isclose(got, wanted, rtol=1e-8, atol=1e-8, equal_nan=True).all():
            return ""
        size = (got.to(torch.complex128) - wanted.to(torch.complex128)).abs().nan_to_num(nan=float("inf"))
        worst = tuple(int(i) for i in np.unravel_index(int(size.argmax()), size.shape))
        entry = f" at {list(worst)}" if worst else ""
        return f"{where} is off by {size.max():.3g}{entry}: {got[worst].item():.6g}, wanted {wanted[worst].item():.6g}"
    if isinstance(wanted, Mapping):
        if not isinstance(got, Mapping) or list(got) != list(wanted):
            return f"{where} is {_describe(got)}, wanted a mapping with keys {list(wanted)}"
        return next(filter(None, (_difference(got[k], wanted[k], f"{where}[{k!r}]") for k in wanted)), "")
    if isinstance(wanted, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(wanted):
            return f"{where} is {_describe(got)}, wanted {len(wanted)} values"
        return next(filter(None, (_difference(g, w, f"{where}[{i}]") for i, (g, w) in enumerate(zip(got, wanted)))), "")
    if isinstance(wanted, int | float | complex) and not isinstance(wanted, bool):
        same = isinstance(got, int | float | complex) and (
            got == wanted or abs(got - wanted) <= 1e-8 * (1 + abs(wanted)) or (got != got and wanted != wanted)
        )
    else:
        same = type(got) is type(wanted) and got == wanted
    return "" if same else f"{where} is {_describe(got)}, wanted {_describe(wanted)}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, torch.Generator):
        return "with a seed"
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    return repr(value) if isinstance(value, int | float | complex | str | None) else f"a {type(value).__name__}"
