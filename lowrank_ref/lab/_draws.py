"""Random inputs from a reference's annotations: what `check` and `grade` try a reader's work on."""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SIZES = (1, 2, 3, 5, 8)
_BOUNDS = (1, 2, 3, 5, 10)  # of whole numbers: small ones for indices and labels


def kinds_of(parameters: Mapping[str, inspect.Parameter]) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """Return the bare annotation of every argument, and the words beside it."""
    words = {name: getattr(p.annotation, "__metadata__", ()) for name, p in parameters.items()}
    kinds = {n: p.annotation.__origin__ if words[n] else p.annotation for n, p in parameters.items()}
    return kinds, words


def is_random_generator(parameter: inspect.Parameter) -> bool:
    """Whether an argument `generator` is a source of random numbers: one with another annotation is a network."""
    kind = parameter.annotation
    random = kind is parameter.empty or torch.Generator in (kind, *typing.get_args(kind))
    return parameter.name == "generator" and random


def draw(
    parameters: Mapping[str, inspect.Parameter],
    given: Mapping[str, Any],
    rng: np.random.Generator,
    sizes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one value an argument; those with a default and nothing else to go by are left out.

    Args:
        parameters: of the reference.
        given: argument -> values to choose from, or a function of letters of the shapes that makes one.
        rng: source of everything random.
        sizes: letter -> size, where a size is wanted; "*batch" has a list of them.
    """
    sizes = dict(sizes or {})  # the same letter is the same size in every argument
    kinds, words = kinds_of(parameters)
    shapes = {
        name: shape_of(kind.dim_str, sizes, rng)
        for name, kind in kinds.items()
        if name not in given and hasattr(kind, "dim_str")
    }
    inputs: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in given:
            inputs[name] = _made(given[name], sizes, rng)
        elif name in shapes:
            value = narrowed(tensor_of(kinds[name].dtypes, shapes[name], rng), words[name], sizes, rng)
            inputs[name] = value.numpy() if kinds[name].array_type is np.ndarray else value
        elif is_random_generator(parameter):
            inputs[name] = torch.Generator().manual_seed(int(rng.integers(2**31)))
        elif parameter.default is parameter.empty:
            raise ValueError(f"given: got no values for {name!r}, wanted some, as {{{name!r}: [...]}}")
    return inputs


def _made(values: Any, sizes: dict[str, Any], rng: np.random.Generator) -> Any:
    if not callable(values):
        return values[int(rng.integers(len(values)))]
    letters = {letter: shape_of(letter, sizes, rng)[0] for letter in inspect.signature(values).parameters}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        return values(**letters)


def check_given(given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Require values for arguments that the reference has.

    Raises:
        ValueError: a name is no argument or has no values.
    """
    if strangers := set(given) - set(parameters):
        raise ValueError(f"given: got {sorted(strangers)}, wanted arguments of the reference: {list(parameters)}")
    if empty := [name for name, values in given.items() if not callable(values) and not len(values)]:
        raise ValueError(f"given: got no values for {empty}, wanted at least one each")


def accepted(
    parameters: Mapping[str, inspect.Parameter],
    given: Mapping[str, Any],
    rng: np.random.Generator,
    reference: Callable[[dict[str, Any]], Any],
    *,
    patience: int = 200,
    sizes: Callable[[], Mapping[str, Any]] | None = None,
    ready: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs,
) -> tuple[dict[str, Any], Any]:
    """Draw until the reference takes the inputs; return them and what it made of them.

    Raises:
        ValueError: an argument cannot be drawn, or so many draws in a row were rejected.
    """
    for left in reversed(range(patience)):
        try:
            inputs = ready(draw(parameters, given, rng, sizes() if sizes else None))
            return inputs, reference(inputs)
        except (ValueError, IndexError, RuntimeError) as error:  # the last two: an index that is none
            if str(error).startswith("given: "):
                raise
            if not left:
                raise ValueError(f"given: the reference rejects nearly all inputs, the last with: {error}") from error
    raise AssertionError


def narrowed(value: Tensor, words: Sequence[Any], sizes: dict[str, Any], rng: np.random.Generator) -> Tensor:
    """Make a drawn tensor what the words beside its annotation ask for; ValueError where its shape forbids that."""
    for word in words:
        if word == "orthonormal" or word == "orthonormal rows":
            value = value.mT if word.endswith("rows") else value
            if value.shape[-2] < value.shape[-1]:
                raise ValueError(f"more than {value.shape[-2]} orthonormal vectors of that length")
            value = torch.linalg.qr(value)[0]
            value = (value.mT if word.endswith("rows") else value).contiguous()
        elif word == "positive":
            value = value.abs() + 0.1
        elif isinstance(word, str) and word.startswith("below "):
            bound = evaluated(word.removeprefix("below "), sizes)
            if "distinct" in words and value.numel() > bound:
                raise ValueError(f"more than {bound} distinct whole numbers below {bound}")
            drawn = rng.choice(bound, value.shape, replace="distinct" not in words)
            value = torch.from_numpy(np.asarray(drawn)).to(value.dtype)
        elif word == "sorted":
            value = value.sort().values
        elif word != "distinct":
            raise ValueError(f"given: got the word {word!r} beside an annotation, wanted one that `check` knows")
    return value


def evaluated(expression: str, sizes: dict[str, Any]) -> int:
    """Return a whole number from an expression of letters, at least 0."""
    return max(int(eval(expression, {"__builtins__": {}, "min": min, "max": max}, sizes)), 0)


def shape_of(text: str, sizes: dict[str, Any], rng: np.random.Generator) -> list[int]:
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
            shape.append(evaluated(axis, sizes))
    return shape


def tensor_of(dtypes: Any, shape: list[int], rng: np.random.Generator) -> Tensor:
    """Draw a tensor in the widest of the dtypes that an annotation allows."""
    names = [str(dtype).rstrip("_") for dtype in dtypes] if isinstance(dtypes, list | tuple) else ["float64"]
    dtype = next((d for d in ("float64", "complex128", "int64") if d in names), names[-1])
    values: np.ndarray | float
    if dtype == "bool":
        values = rng.integers(0, 2, shape)
    elif dtype.startswith(("int", "uint")):
        values = rng.integers(0, int(rng.choice(_BOUNDS)), shape)
    else:
        values = rng.standard_normal(shape)
    return torch.from_numpy(np.asarray(values)).to(getattr(torch, dtype))
