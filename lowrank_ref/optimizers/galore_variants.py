"""GaLore's variants: 8-bit moments, Adafactor, and per-layer updates inside backward.

| paper or official code                                    | here                |
|-----------------------------------------------------------|---------------------|
| 8-bit GaLore: M and V stored block-wise in 8 bits         | `GaLoreAdamW8bit`   |
| Adafactor (Shazeer and Stern 2018) on R                   | `adafactor_direction`, `GaLoreAdafactor` |
| per-layer updates: a gradient is used and freed at once   | `per_layer_updates` |

Deviations. The official 8-bit class hands R to bitsandbytes through a swapped weight; here the moments are decoded,
updated and encoded in plain PyTorch, with the same code and blocks of 256, but V is never rounded to zero. Its ε is
added after bias correction, as in the paper's algorithm 2, and is 1e-8 by default, its weight decay 0.01; here, as in
`GaLoreAdamW` and the official class of that name, ε comes before, and the defaults are 1e-6 and 0. The two differ where
gradients are not large beside ε: early on, by up to 1/√(1 - β₂) = 32 times. The official per-layer mode makes one
optimizer per parameter and steps on every micro-batch; here one optimizer holds all states, and a second backward pass
before `step()` is an error. The official Adafactor decays the weight before the step; here, as in `GaLoreAdamW`, after.
"""

import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_ref.core.checks import check_number
from lowrank_ref.core.quantize import dequantize_blockwise, quantize_blockwise
from lowrank_ref.optimizers.galore import GaLore, GaLoreAdamW, adam_directions
from lowrank_ref.optimizers.projected import ProjectedOptimizer, check_gradients, check_shape, steps_in_backward
from lowrank_ref.optimizers.sharded import is_sharded

#: Moments with fewer entries stay in float32, as in bitsandbytes.
SMALLEST_8BIT = 4096


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` whose moments rest as 8-bit codes: 2 bytes and 8/256 bytes an entry instead of 8. Same options.

    Moments with fewer than 4,096 entries stay in float32, as in bitsandbytes.

    Example:
        >>> import torch
        >>> from lowrank_ref.optimizers import GaLoreAdamW8bit
        >>> W = torch.nn.Parameter(torch.randn(128, 128))
        >>> optimizer = GaLoreAdamW8bit([{"params": [W], "rank": 32}], lr=0.01)
        >>> W.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[W]["M_codes"].dtype, optimizer.state[W]["M_codes"].numel()
        (torch.uint8, 4096)
    """

    def directions(self, R: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> Iterable[Tensor]:
        """Return Adam's directions, one at a time: decoding the moments of all at once would take their memory."""
        return GaLore.directions(self, R, states, group)

    def quick_steps(self, ps: list[Tensor], *more: Any) -> list[int]:
        """Return all: the kernels know no 8-bit moments."""
        return GaLore.quick_steps(self, ps)

    def direction(self, R: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return Adam's direction."""
        if R.numel() < SMALLEST_8BIT:
            return next(iter(super().directions([R.float()], [state], group))).to(R.dtype)
        M, V = _decode(state, "M", R), _decode(state, "V", R)
        options = {"betas": group["betas"], "eps": group["eps"]}
        N = adam_directions([R.float()], [M], [V], [state["step"]], **options)[0]
        state["M_codes"], state["M_peak"] = quantize_blockwise(M, signed=True)
        state["V_codes"], state["V_peak"] = quantize_blockwise(V, signed=False)
        state["V_codes"].clamp_(min=1)  # rounded to zero beside a large neighbour, V would make M/√V explode
        return N.to(R.dtype)


def _decode(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    if f"{name}_codes" not in state:
        return torch.zeros_like(like, dtype=torch.float32)
    return dequantize_blockwise(state[f"{name}_codes"], state[f"{name}_peak"], signed=name == "M")


def adafactor_direction(
    R: Tensor, row: Tensor, col: Tensor, step: int, *, decay: float = 0.8, eps: float = 1e-30, clip: float = 1.0
) -> Tensor:
    """Update the factored second moment in place and return Adafactor's direction, its RMS clipped.

    The direction is R / √(row ⊗ col / mean(row)): the second moment as a matrix of rank 1 with these rows and columns.

    Args:
        R: (projected) gradient (a, b); row: moment of its rows (a,); col: moment of its columns (b,).
        step: t >= 1; the moments decay with 1 - t^(-decay).
        decay: > 0. eps: added to R², > 0. clip: largest RMS of the direction, > 0.
    """
    keep = 1 - step**-decay
    square = R.square() + eps
    row.mul_(keep).add_(square.mean(dim=1), alpha=1 - keep)
    col.mul_(keep).add_(square.mean(dim=0), alpha=1 - keep)
    D = R * (row / row.mean()).rsqrt()[:, None] * col.rsqrt()
    return D / (D.square().mean().sqrt() / clip).clamp_min(1.0)


class GaLoreAdafactor(GaLore):
    """GaLore with Adafactor's factored second moment: m + r (or r + n) numbers a matrix beside the projector.

    Options as `GaLore`, and decay > 0, clip > 0. Parameters that are no matrix keep a full second moment. Moments are
    float32 at least.

    Example:
        >>> import torch
        >>> from lowrank_ref.optimizers import GaLoreAdafactor
        >>> W = torch.nn.Parameter(torch.randn(6, 4))
        >>> optimizer = GaLoreAdafactor([{"params": [W], "rank": 2}], lr=0.01)
        >>> W.square().sum().backward()
        >>> optimizer.step()
        >>> tuple(optimizer.state[W]["row"].shape), tuple(optimizer.state[W]["col"].shape)
        ((6,), (2,))
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, *, decay: float = 0.8, clip: float = 1.0, **options: Any
    ) -> None:
        super().__init__(params, lr, own={"decay": decay, "clip": clip}, **options)

    def check_options(self, group: dict[str, Any]) -> None:
        """Check decay and clip as well. TypeError, ValueError: one of them is not > 0, or as for every group."""
        super().check_options(group)
        check_number("decay", group["decay"], low=0, open_low=True)
        check_number("clip", group["clip"], low=0, open_low=True)

    def direction(self, R: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return Adafactor's direction. A vector is a matrix of one row: its row moment then cancels."""
        matrix = (R if R.ndim == 2 else R.reshape(1, -1)).to(torch.promote_types(R.dtype, torch.float32))
        if "row" not in state:
            state["row"], state["col"] = torch.zeros_like(matrix[:, 0]), torch.zeros_like(matrix[0])
        moments = state["row"], state["col"]
        D = adafactor_direction(matrix, *moments, state["step"], decay=group["decay"], clip=group["clip"])
        return D.view_as(R).to(R.dtype)


def processes() -> int:
    """Return how many processes train together."""
    here = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if here else 1


def per_layer_updates(optimizer: ProjectedOptimizer) -> list[Any]:
    """Let every parameter step inside `backward()` as soon as its gradient is complete, and free the gradient.

    At most one layer's gradient is then alive. Call `optimizer.step()` once after each backward pass, as usual: it
    opens the next step. What needs all gradients together is impossible here: clipping by their norm (a clip finds no
    gradients and does nothing, silently in `torch.nn.utils`), several processes, and a `GradScaler`; use bfloat16.

    Args:
        optimizer: any GaLore optimizer itself, not a wrapper of it.

    Returns:
        The hooks; `remove()` each to go back to ordinary steps.

    Raises:
        TypeError: another optimizer.
        ValueError: it has per-layer updates already, or its parameters are sharded. In backward: a gradient with NaN or
            infinity, or a parameter that changed its shape; that parameter and its state are unchanged.
        RuntimeError: in backward, when a second pass comes before `optimizer.step()`: that is gradient accumulation,
            and would make one step of every micro-batch. Or when the optimizer no longer exists, or in several
            processes, which average gradients only after these hooks. In `GradScaler.step`, which comes too late.
    """
    if not isinstance(optimizer, ProjectedOptimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a GaLore optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(map(steps_in_backward, parameters)):
        raise ValueError("optimizer: got per-layer updates already, wanted their hooks removed first")
    if any(map(is_sharded, parameters)):
        raise ValueError(
            "optimizer: got sharded parameters, wanted whole ones: per-layer updates know one process only"
        )
    index = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    shapes = {id(p): tuple(p.shape) for p in parameters}
    done: set[int] = set()
    # A parameter owns its hooks: a strong reference back through the optimizer would keep both alive for ever.
    alive = weakref.ref(optimizer)

    @torch.no_grad()
    def hook(p: Tensor) -> None:
        optimizer = alive()
        if optimizer is None:
            raise RuntimeError("backward: got per-layer updates of an optimizer that is gone, wanted it kept alive")
        if id(p) in done:
            raise RuntimeError("backward: got a second pass before optimizer.step(), wanted one; no accumulation here")
        if (world := processes()) > 1:
            raise RuntimeError(f"backward: got {world} processes, whose per-layer updates would drift apart, wanted 1")
        assert p.grad is not None
        check_shape(p, shapes[id(p)])
        check_gradients([p.grad])
        optimizer.update([p], optimizer.param_groups[index[id(p)]])
        done.add(id(p))
        p.grad = None

    cast(Any, hook).steps = True
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(hook) for p in parameters]
    return [*hooks, optimizer.register_step_post_hook(lambda *_: done.clear())]
