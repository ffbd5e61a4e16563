"""Argument checks. Every message names the argument, what came, and what was wanted."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def check_matrix(name: str, value: Tensor) -> None:
    """Require a finite floating-point matrix without empty sides.

    Raises:
        TypeError: not a tensor, or not floating point of 16 bits or more.
        ValueError: not 2-D, an empty side, NaN or infinity inside, or on the meta device.
    """
    check_wide(name, value)
    check_loaded(name, value)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted a matrix (m, n) with m, n >= 1")
    check_finite(name, value)


def check_floating(name: str, value: Tensor) -> None:
    """Require a floating-point tensor.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.Tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted a floating-point dtype")


def finite(value: Tensor) -> Tensor:
    """Return which entries are finite, as `torch.isfinite` does, also for the float8 dtypes that it does not know."""
    return torch.isfinite(value.float() if value.is_floating_point() and value.element_size() == 1 else value)


def check_finite(name: str, value: Tensor) -> None:
    """Require that no entry is NaN or infinite.

    Raises:
        ValueError: with the number of bad entries.
    """
    bad = int((~finite(value)).sum())
    if bad:
        raise ValueError(f"{name}: got {bad} NaN or infinite entries of {value.numel()}, wanted finite numbers")


def check_wide(name: str, value: Tensor) -> None:
    """Require a floating-point tensor of 16 bits or more; PyTorch only stores float8.

    Raises:
        TypeError: anything else.
    """
    check_floating(name, value)
    if value.element_size() < 2:
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted a floating-point dtype of 16 bits or more")


def check_loaded(name: str, value: Tensor) -> None:
    """Require a tensor that holds numbers.

    Raises:
        ValueError: it is on the meta device.
    """
    if value.is_meta:
        raise ValueError(f"{name}: got a tensor without numbers (meta device), wanted them loaded")


def check_activations(x: Tensor, n: int) -> None:
    """Require floating-point activations (..., n): a layer returns its result in their dtype.

    Raises:
        TypeError: whole numbers, booleans, complex numbers or float8.
        ValueError: another width.
    """
    check_wide("x", x)
    if x.shape[-1:] != (n,):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (..., {n})")


def check_rank(rank: int, shape: Sequence[int], name: str = "rank") -> None:
    """Require an integer rank with 1 <= rank <= min(shape).

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    check_integer(name, rank)
    if not 1 <= rank <= min(shape):
        raise ValueError(f"{name}: got {rank}, wanted 1 <= {name} <= {min(shape)} for a {tuple(shape)} matrix")


def check_integer(name: str, value: int, *, low: float = -math.inf) -> None:
    """Require an integer >= low.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, wanted an integer")
    if value < low:
        raise ValueError(f"{name}: got {value}, wanted an integer >= {low}")


def check_number(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """Require a finite real number in [low, high], or (low, high] with `open_low`.

    Raises:
        TypeError: not a real number.
        ValueError: not finite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, wanted a number")
    if not math.isfinite(value) or not (low < value if open_low else low <= value) or value > high:
        raise ValueError(f"{name}: got {value!r}, wanted a finite number in {'(' if open_low else '['}{low}, {high}]")


def check_names(
    name: str, got: Iterable[str], known: Iterable[str], *, elsewhere: Mapping[str, str] | None = None
) -> None:
    """Require that all names are known.

    Args:
        name: the argument.
        got: names that came.
        known: names that have a meaning.
        elsewhere: what other packages call things -> the known name.

    Raises:
        ValueError: an unknown name; the message has its nearest relatives and all known names.
    """
    known = sorted(known)
    for stranger in sorted(set(got) - set(known)):
        inside = [word for word in known if len(word) > 2 and word in stranger]
        near = [(elsewhere or {}).get(stranger), *difflib.get_close_matches(stranger, known), *inside]
        best = next((word for word in near if word), None)
        hint = "" if best is None else f" (near: {best!r})"
        raise ValueError(f"{name}: got unknown {stranger!r}{hint}, wanted some of {known}")
