"""Counting: parameters, bytes of weights, gradients and optimizer state, floating-point operations."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: How many lines a printed report shows.
MOST = 64


def numel(tensors: Iterable[Tensor]) -> int:
    """Count the numbers in all tensors, each tensor once."""
    return sum(t.numel() for t in {id(t): t for t in tensors}.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of all tensors, each tensor once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _state_tensors(value: Any) -> Iterable[Tensor]:
    """Yield the tensors inside nested state. Zero-dimensional ones are step counters and are left out."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _state_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _state_tensors(item)


def state_numel(optimizer: torch.optim.Optimizer) -> int:
    """Count the numbers an optimizer keeps between steps (moments, projectors), without step counters."""
    return numel(_state_tensors(optimizer.state))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes an optimizer keeps between steps, without step counters."""
    return nbytes(_state_tensors(optimizer.state))


def linear_flops(tokens: int, m: int, n: int) -> int:
    """Floating-point operations of x Wᵀ for `tokens` rows: 2 · tokens · m · n (a multiply and an add each)."""
    return 2 * tokens * m * n


@dataclass(frozen=True)
class ParameterReport:
    """What trains in a model. `print` it (a long list is cut), or read the numbers.

    Attributes:
        trainable: count of trained numbers.
        total: count of all numbers.
        rows: (path, shape, count) of each trained parameter.
    """

    trainable: int
    total: int
    rows: tuple[tuple[str, tuple[int, ...], int], ...]

    def __str__(self) -> str:
        width = max([len(name) for name, _, _ in self.rows] + [len("parameter")])
        lines = [f"{'parameter':{width}}  {'shape':>14}  {'numbers':>10}"]
        shown = self.rows if len(self.rows) <= MOST else self.rows[: MOST - 1]
        lines += [f"{name:{width}}  {'×'.join(map(str, shape)):>14}  {n:>10,}" for name, shape, n in shown]
        if rest := self.rows[len(shown) :]:
            lines.append(f"{f'and {len(rest)} more':{width}}  {'':>14}  {sum(n for _, _, n in rest):>10,}")
        share = 100 * self.trainable / self.total if self.total else 0.0
        return "\n".join([*lines, f"trains {self.trainable:,} of {self.total:,} numbers ({share:.2f} %)"])


def parameter_report(model: nn.Module) -> ParameterReport:
    """Say which parameters train and how many numbers they hold. Shared parameters count once.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref import parameter_report
        >>> print(parameter_report(nn.Linear(3, 2)))
        parameter           shape     numbers
        weight                2×3           6
        bias                    2           2
        trains 8 of 8 numbers (100.00 %)
    """
    named = list(model.named_parameters())
    rows = tuple((name, tuple(p.shape), p.numel()) for name, p in named if p.requires_grad)
    return ParameterReport(sum(n for _, _, n in rows), numel(p for _, p in named), rows)
