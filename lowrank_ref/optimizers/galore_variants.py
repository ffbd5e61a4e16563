"""GaLore's variants: 8-bit moments, Adafactor, and per-layer updates inside backward.

| paper or official code                                    | here                |
|-----------------------------------------------------------|---------------------|
| 8-bit GaLore: M and V stored block-wise in 8 bits         | `GaLoreAdamW8bit`   |
| Adafactor (Shazeer and Stern 2018) on R                   | `adafactor_direction`, `GaLoreAdafactor` |
| per-layer updates: a gradient is used and freed at once   | `per_layer_updates` |

Deviations. The official 8-bit class hands R to bitsandbytes through a swapped weight; here the moments are decoded,
updated and encoded in plain PyTorch, with the same code and blocks of 256, but V is never rounded to zero. The official
per-layer mode makes one optimizer per parameter and steps on every micro-batch; here one optimizer holds all states,
and a second backward pass before `step()` is an error. The official Adafactor decays the weight before the step; here,
as in `GaLoreAdamW`, after.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_ref.core.checks import check_number
from lowrank_ref.core.quantize import dequantize_blockwise, quantize_blockwise
from lowrank_ref.optimizers.galore import GaLore, GaLoreAdamW, adam_directions
from lowrank_ref.optimizers.projected import check_gradients

#: Moments with fewer entries stay in float32, as in bitsandbytes.
SMALLEST_8BIT = 4096


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` whose moments rest as 8-bit codes: 2 bytes and 8/256 bytes an entry instead of 8. Same options."""

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
    """Update the factored second moment in place and return Adafactor's direction R / √(row ⊗ col), its RMS clipped.

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
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, *, decay: float = 0.8, clip: float = 1.0, **options: Any
    ) -> None:
        super().__init__(params, lr, own={"decay": decay, "clip": clip}, **options)

    def check_options(self, group: dict[str, Any]) -> None:
        """Check decay and clip as well."""
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


def per_layer_updates(optimizer: GaLore) -> list[Any]:
    """Let every parameter step inside `backward()` as soon as its gradient is complete, and free the gradient.

    At most one layer's gradient is then alive. Call `optimizer.step()` once after each backward pass, as usual: it
    opens the next step. Clipping by the norm of all gradients is impossible here, since they never exist together; so
    is DDP, which averages gradients only after these hooks.

    Args:
        optimizer: any GaLore optimizer.

    Returns:
        The hooks; `remove()` each to go back to ordinary steps.

    Raises:
        RuntimeError: in backward, when a second pass comes before `optimizer.step()`: that is gradient accumulation,
            and would make one step of every micro-batch. Or when the optimizer no longer exists.
        ValueError: in backward, for a gradient with NaN or infinity. That parameter and its state are unchanged.
    """
    index = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
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
        assert p.grad is not None
        check_gradients([p.grad])
        optimizer.update([p], optimizer.param_groups[index[id(p)]])
        done.add(id(p))
        p.grad = None

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(hook) for p in parameters]
    return [*hooks, optimizer.register_step_post_hook(lambda *_: done.clear())]
