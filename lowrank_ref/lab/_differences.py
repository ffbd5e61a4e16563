"""In what two results differ, in words: what they are, shape, dtype, numbers; with a cause where one is seen."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Found = Iterator[tuple[str, str]]


def difference(got: Any, wanted: Any, where: str) -> str:
    """Say what differs first, or return ""."""
    return next(differences(got, wanted, where), ("", ""))[1]


def differences(got: Any, wanted: Any, where: str, *, tolerance: float = 1e-8) -> Found:
    """Yield ("kind", "shape", "dtype" or "value", what differs, in words), the first of them first.

    Numbers must agree to `tolerance`, relative and absolute; to 1e-4 at least where the dtype is not the one wanted.
    """
    if isinstance(got, np.ndarray) and isinstance(wanted, np.ndarray):
        got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
    if isinstance(wanted, Tensor):
        yield from _of_tensors(got, wanted, where, tolerance)
    elif isinstance(wanted, torch.nn.Module):
        if type(got) is not type(wanted):
            yield "kind", f"{where} is a {type(got).__name__}, wanted a {type(wanted).__name__}"
            return
        yield from differences(got.state_dict(), wanted.state_dict(), f"{where}'s state", tolerance=tolerance)
        yield from differences(settings(got), settings(wanted), f"{where}'s settings", tolerance=tolerance)
    elif isinstance(wanted, Mapping):
        if not isinstance(got, Mapping) or list(got) != list(wanted):
            yield "kind", f"{where} is {describe(got)}, wanted a mapping with keys {list(wanted)}"
            return
        for key in wanted:
            yield from differences(got[key], wanted[key], f"{where}[{key!r}]", tolerance=tolerance)
    elif isinstance(wanted, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(wanted):
            yield "kind", f"{where} is {describe(got)}, wanted {len(wanted)} values"
            return
        for i, (g, w) in enumerate(zip(got, wanted)):
            yield from differences(g, w, f"{where}[{i}]", tolerance=tolerance)
    elif is_dataclass(wanted) and type(got) is type(wanted):
        names = [field.name for field in fields(wanted)]
        has, wants = ({n: getattr(value, n) for n in names} for value in (got, wanted))
        yield from differences(has, wants, where, tolerance=tolerance)
    elif not _same(got, wanted, tolerance):
        numbers = all(isinstance(value, int | float | complex) for value in (got, wanted))
        yield "value" if numbers else "kind", f"{where} is {describe(got)}, wanted {describe(wanted)}"


def effects(after: Mapping[str, Any], wanted: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Say which input was not treated as the reference treats it, or return ""."""
    for name, value in before.items():
        if not difference(after[name], wanted[name], ""):
            continue
        if not difference(wanted[name], value, ""):
            return f"it changed its input {name} in place"
        if not difference(after[name], value, ""):
            return f"it left its input {name} as it was, which the reference changes in place"
        return difference(after[name], wanted[name], f"the input {name}, changed in place,")
    return ""


def _of_tensors(got: Any, wanted: Tensor, where: str, tolerance: float) -> Found:
    if not isinstance(got, Tensor):
        yield "kind", f"{where} is a {type(got).__name__}, wanted a tensor"
        return
    if got.shape != wanted.shape:
        yield "shape", f"{where} has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
        return
    if got.dtype != wanted.dtype:
        yield "dtype", f"{where} has dtype {got.dtype}, wanted {wanted.dtype}"
        got, tolerance = got.to(wanted.dtype), max(tolerance, 1e-4)
    if torch.isclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True).all():
        return
    size = (got.to(torch.complex128) - wanted.to(torch.complex128)).abs().nan_to_num(nan=float("inf"))
    worst = tuple(int(i) for i in np.unravel_index(int(size.argmax()), size.shape))
    entry = f" at {list(worst)}" if worst else ""
    off = f"{where} is off by {size.max():.3g}{entry}: {got[worst].item():.6g}, wanted {wanted[worst].item():.6g}"
    yield "value", off + _reason(got, wanted)


def _same(got: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, int | float | complex) and not isinstance(wanted, bool):
        return isinstance(got, int | float | complex) and (
            got == wanted or abs(got - wanted) <= tolerance * (1 + abs(wanted)) or (got != got and wanted != wanted)
        )
    return type(got) is type(wanted) and got == wanted


def _reason(got: Tensor, wanted: Tensor) -> str:
    """A common cause that explains a whole tensor: one factor, or transposed."""
    if got.is_complex() or not got.is_floating_point() or got.numel() < 2:
        return ""
    if got.ndim == 2 and got.shape[0] == got.shape[1] and torch.allclose(got.T, wanted, rtol=1e-8, atol=1e-8):
        return "; it is the transpose of what is wanted"
    factor = (got * wanted).sum() / (wanted * wanted).sum()
    if torch.allclose(got, factor * wanted, rtol=1e-8, atol=1e-8) and factor.abs() > 1e-8:
        return f"; all of it is {factor.item():.6g} times what is wanted"
    return ""


def settings(module: torch.nn.Module) -> dict[str, Any]:
    """Plain values that a module and its parts hold beside their tensors, by path."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, int | float | str) and not name.startswith("_")
    }


def describe(value: Any) -> str:
    """Say in a word or two what a value is."""
    if isinstance(value, Tensor | np.ndarray):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, torch.Generator):
        return "with a seed"
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    return repr(value) if isinstance(value, int | float | complex | str | None) else f"a {type(value).__name__}"
