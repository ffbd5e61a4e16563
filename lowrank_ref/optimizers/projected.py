"""Base of the optimizers that step in a projected space: option checks, the step loop, strict loading."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lowrank_ref.core.checks import check_integer, check_number, check_rank
from lowrank_ref.optimizers.fast import norms
from lowrank_ref.optimizers.sharded import whole_matrices

#: How many parameters step together, so that a step launches few kernels and its projections need little memory.
TOGETHER = 32


class ProjectedOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups may carry a "rank". A subclass defines `update(ps, group)`, a step of some parameters.

    Every group has the options lr, rank (or None), gap, scale, side, spread and weight_decay, and the name of the
    optimizer and the shapes of its parameters, by which a state is recognised on loading.
    """

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        super().__init__(params, {**options, "method": type(self).__name__})

    def update(self, ps: list[Tensor], group: dict[str, Any]) -> None:
        """Take one step of each of these parameters of a group, from its gradient."""
        raise NotImplementedError

    def due(self, p: Tensor, step: int, group: dict[str, Any]) -> bool:
        """Tell whether a parameter changes its basis in this step, which counts from 1.

        All do in the first step; then every `gap` steps, in a group with "spread" one after the other (but not under
        FSDP2, where p is lent).
        """
        place = next((i for i, other in enumerate(group["params"]) if other is p), 0) if group["spread"] else 0
        later = place * group["gap"] // len(group["params"])
        return step == 1 or (step - 1 - later) % group["gap"] == 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["shapes"] = [tuple(p.shape) for p in group["params"]]
        try:
            self.check_options(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def check_options(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for an option out of range. A subclass adds its own."""
        check_number("lr", group["lr"], low=0)
        check_number("scale", group["scale"], low=0, open_low=True)
        check_number("weight_decay", group["weight_decay"], low=0)
        check_integer("gap", group["gap"], low=1)
        for shape in group["shapes"] if group["rank"] is not None else ():
            if len(shape) != 2:
                raise ValueError(f"params: got shape {shape} in a projected group, wanted matrices")
            check_rank(group["rank"], shape)
            sides(shape, group["side"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [([p for p in group["params"] if p.grad is not None], group) for group in self.param_groups]
        check_gradients([p.grad for ps, _ in todo for p in ps])
        for ps, group in todo:
            for i in range(0, len(ps), TOGETHER):
                with whole_matrices(ps[i : i + TOGETHER], self.state) as matrices:
                    self.update(matrices, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the same class and shapes. Tensors keep their dtype; PyTorch would cast them to the weight's.

        Raises:
            ValueError: a state of another optimizer, or of parameters with other shapes. Nothing is changed.
        """
        groups = state_dict.get("param_groups", [])
        methods = {group.get("method") for group in groups}
        if methods != {type(self).__name__}:
            raise ValueError(f"state_dict: got a state of {methods}, wanted {type(self).__name__}")
        order = [p for group in self.param_groups for p in group["params"]]
        shapes = [tuple(shape) for group in groups for shape in group["shapes"]]
        for i, (got, wanted) in enumerate(zip_longest(shapes, [tuple(p.shape) for p in order])):
            if got != wanted:
                raise ValueError(f"state_dict: got shape {got} for parameter {i}, wanted {wanted}")
        super().load_state_dict(state_dict)
        targets = dict(zip([index for group in groups for index in group["params"]], order))
        for index, saved in state_dict["state"].items():
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[targets[index]][key] = value.to(targets[index].device, copy=True)


def sides(shape: tuple[int, int], side: str) -> tuple[bool, bool]:
    """Say on which sides of a gradient (m, n) to project.

    Args:
        shape: (m, n).
        side: "smaller" (the default: state (max(m, n), r)), "larger", "left", "right" or "both". Square counts as tall.

    Returns:
        (left, right).
    """
    tall = shape[0] >= shape[1]
    table = {
        "smaller": (not tall, tall),
        "larger": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "both": (True, True),
    }
    if side not in table:
        raise ValueError(f"side: got {side!r}, wanted one of {sorted(table)}")
    return table[side]


def check_gradients(gradients: list[Tensor]) -> None:
    """Require gradients of finite norm, with one look at all of them. Squares that overflow would spoil the moments.

    Raises:
        ValueError: with the number of gradients that hold NaN, infinity, or numbers too large to square.
    """
    if gradients:
        bad = int((~norms(gradients).isfinite()).sum())
        if bad:
            raise ValueError(f"grad: got NaN or infinity in {bad} of {len(gradients)} gradients, wanted finite norms")
