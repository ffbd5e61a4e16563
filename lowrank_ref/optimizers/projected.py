"""Base of the optimizers that step in a projected space: option checks, the step loop, strict loading."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lowrank_ref.core.checks import check_integer, check_names, check_number, check_rank
from lowrank_ref.optimizers.fast import norms
from lowrank_ref.optimizers.sharded import whole, whole_matrices

#: How many parameters step together, so that a step launches few kernels and its projections need little memory.
TOGETHER = 32
#: What a group may hold beside the options, which are keys of PyTorch, of its schedulers, and what is noted here.
GROUP_KEYS = {"params", "param_names", "name", "initial_lr", "method", "shapes"}
#: Keys of the official code -> ours.
OFFICIAL = {"update_proj_gap": "gap", "proj_type": "side"}


class ProjectedOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups may carry a "rank". A subclass defines `update(ps, group)`, a step of some parameters.

    Every group has the options lr, rank (or None), gap, scale, side, spread and weight_decay, perhaps betas and eps,
    and the name of the optimizer and the shapes of its parameters, by which a state is recognised on loading.
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

    def changes(self, ps: list[Tensor], group: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the numbers of the matrices that change their basis in this step, and of those that count no step.

        A gradient of zeros tells no basis. A matrix that has seen nothing else has a state (so that checkpoints find
        one to load into) and decays, but its steps count from the first other gradient, which decides its basis. Where
        a later change meets zeros, it comes with the next other gradient.
        """
        change, waiting = [], []
        for i, p in enumerate(ps):
            state = self.state[p]
            if not state.get("late") and not self.due(p, state.get("step", 0) + 1, group):
                continue
            tells = p.grad is not None and bool(p.grad.any())
            if tells or not state:
                change.append(i)
            if tells and state.get("step"):
                state.pop("late", None)
            elif tells:
                state.clear()  # what was there while it waited
            elif state.get("step"):
                state["late"] = True
            else:
                waiting.append(i)
        return change, waiting

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options; a key that nobody reads is a ValueError."""
        if isinstance(param_group, dict):  # PyTorch has its own error for anything else
            check_names("params", param_group, GROUP_KEYS | self.defaults.keys(), elsewhere=OFFICIAL)
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
        check_number("eps", group.get("eps", 0.0), low=0)
        betas = group.get("betas", (0.0, 0.0))
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas: got {betas!r}, wanted two numbers (β₁, β₂)")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, low=0, high=1 - 1e-12)
        sides((1, 1), group["side"])
        for shape in group["shapes"] if group["rank"] is not None else ():
            if len(shape) != 2:
                raise ValueError(f"params: got shape {shape} in a projected group, wanted matrices")
            check_rank(group["rank"], shape)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of every parameter that has a gradient.

        Raises:
            ValueError: a gradient with NaN or infinity, or a parameter that changed its shape.
            RuntimeError: a GradScaler with per-layer updates.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "grad_scale" in vars(self):  # set by a GradScaler
            del vars(self)["grad_scale"], vars(self)["found_inf"]
            raise RuntimeError("step: got a GradScaler, whose factor per-layer updates took for gradient, wanted none")
        for group in self.param_groups:
            for p, shape in zip(group["params"], group["shapes"]):
                check_shape(p, shape)
        todo = [([p for p in group["params"] if p.grad is not None], group) for group in self.param_groups]
        check_gradients([p.grad for ps, _ in todo for p in ps])
        for ps, group in todo:
            for i in range(0, len(ps), TOGETHER):
                with whole_matrices(ps[i : i + TOGETHER], self.state) as matrices:
                    self.update(matrices, group)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Let a `GradScaler` call `step` without unscaling where there is nothing to unscale: `step` refuses it."""
        return any(steps_in_backward(p) for group in self.param_groups for p in group["params"])

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
        side: "smaller" (the default: state (max(m, n), r)), "larger", "left", "right" or "both". Square counts as tall,
            as in the official code; the paper's algorithm, written for m <= n, would project a square on the left.

    Returns:
        (left, right).

    Raises:
        ValueError: another side.
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


def steps_in_backward(p: Tensor) -> bool:
    """Tell whether a parameter has a hook of `galore_variants.per_layer_updates`."""
    hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return any(hasattr(hook, "steps") for hook in hooks.values())


def check_shape(p: Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError if a parameter has another shape than at construction: FSDP1, for one, flattens them."""
    if tuple(p.shape) != tuple(shape):
        raise ValueError(
            f"params: got shape {tuple(p.shape)}, wanted {tuple(shape)} as at construction: build the optimizer last,"
            " and shard with fully_shard"
        )


def check_gradients(gradients: list[Tensor]) -> None:
    """Require dense gradients of finite norm, with one look at all of them.

    Raises:
        ValueError: a sparse gradient; or NaN, infinity, or squares that overflow and would spoil the moments, with the
            number of such gradients.
    """
    if any(G.layout != torch.strided for G in gradients):
        raise ValueError("grad: got a sparse gradient, wanted dense ones: build the nn.Embedding with sparse=False")
    if not gradients:
        return
    bad = whole(~norms(gradients).isfinite()).tolist()
    if any(bad):
        worst = [G for G, is_bad in zip(gradients, bad) if is_bad]
        what = "squares that overflow" if all(bool(whole(G).isfinite().all()) for G in worst) else "NaN or infinity"
        raise ValueError(f"grad: got {what} in {len(worst)} of {len(gradients)} gradients, wanted finite norms")
