"""Optimizer groups and learning rates for layers that grow: what begins to train later has a clock of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank_ref.core.checks import check_integer
from lowrank_ref.ranks.growing_linear import growing_layers
from lowrank_ref.ranks.increlora import RankGrowth


def clock(age: int, *, warmup: int, total: int) -> float:
    """Return the factor on the learning rate of what has trained for `age` of `total` steps: up in a line, then down.

    `total` is counted from the birth of the group, so that all groups reach 0 together. Before birth it is 0.

    Example:
        >>> [clock(t - 500, warmup=100, total=2500 - 500) for t in (400, 550, 600, 1550, 2500)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = max(0.0, age / warmup) if warmup else float(age >= 0)
    return max(0.0, min(1.0, rise, (total - age) / max(1, total - warmup)))


def growth_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: what trains from the start, and one for every growth that a layer can have.

    Group 0 also holds every other parameter that trains, such as a head. The others have a key "growth", the layer's
    path and the number of the growth, by which `growth_schedule` knows when their clock starts.

    Args:
        model: with its IncreLoRA layers, before any of them has grown.

    Raises:
        ValueError: no such layer, or one that has grown.
    """
    layers = list(growing_layers(model))
    if not layers or any(layer.rank > layer.first_rank for _, layer in layers):
        got = "layers that have grown" if layers else f"{type(model).__name__} without an IncreLoRALinear"
        raise ValueError(f"model: got {got}, wanted at least one IncreLoRALinear, as it was built")
    late = [((path, i + 1), layer.newcomers(i + 1)) for path, layer in layers for i in range(layer.growths)]
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    return groups + [{"params": parameters, "growth": key} for key, parameters in late]


def growth_schedule(
    optimizer: torch.optim.Optimizer, growth: RankGrowth, *, steps: int, warmup: int, restart: bool = True
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return PyTorch's schedule with a `clock` for every group of `growth_groups`, started when its layer grew.

    Call its `step()` after that of the optimizer and of `growth`, as for any schedule; hand both to a `Trainer` as
    `optimizers=(optimizer, schedule)`. The first step of a clock has the rate 0, as is usual for warm-ups.

    Args:
        optimizer: over the groups of `growth_groups`.
        growth: knows when layers grew.
        steps: of the whole run, > warmup.
        warmup: steps to the full rate, from the birth of each group, >= 0.
        restart: False starts all clocks at 0, so that late groups begin at the rate of the others.

    Raises:
        TypeError, ValueError: steps or warmup out of range.
    """
    check_integer("warmup", warmup, low=0)
    check_integer("steps", steps, low=warmup + 1)

    def factor(key: tuple[str, int] | None) -> Callable[[int], float]:
        def of_step(step: int) -> float:
            path, count = key or ("", 0)
            births: tuple[int, ...] = growth.births.get(path, ())
            born = 0 if count == 0 or not restart else births[count - 1] if len(births) >= count else step
            return clock(step - born, warmup=warmup, total=steps - born)

        return of_step

    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, [factor(group.get("growth")) for group in optimizer.param_groups]
    )
