"""A frozen weight with trained numbers at some places: placing them, the product, and a gradient of them alone.

`masked_product` equals `F.linear(x, placed(W, values, support))`, whose graph would keep an (m, n) matrix a layer until
backward and whose gradient is dense. Here one such matrix at a time is alive, for as long as a product needs it.
"""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

#: Numbers of a dense gradient that `values_gradient` holds at a time: 32 MiB in float32.
DENSE_AT_ONCE = 2**23


def placed(W: Float[Tensor, "m n"], values: Float[Tensor, " k"], support: Int[Tensor, " k"]) -> Float[Tensor, "m n"]:
    """Return W with the values at their places, P[M] ← p, rounded to W's dtype."""
    return W.reshape(-1).index_put((support,), values.to(W.dtype)).view(W.shape)


def values_gradient(
    dY: Float[Tensor, "*batch m"], x: Float[Tensor, "*batch n"], support: Int[Tensor, " k"], block: int = DENSE_AT_ONCE
) -> Float[Tensor, " k"]:
    """Return (dYᵀx)[M], of which no more than `block` dense entries (at least one row) are alive at a time."""
    dY, x = dY.reshape(-1, dY.shape[-1]), x.reshape(-1, x.shape[-1])
    m, n = dY.shape[1], x.shape[1]
    rows = max(1, block // n)
    if rows >= m:
        return (dY.T @ x).reshape(-1)[support]
    starts = torch.arange(0, m, rows, device=x.device)
    ends = [*torch.searchsorted(support, starts.to(support.dtype) * n).tolist()[1:], len(support)]
    parts, first = [], 0
    for i, last in zip(range(0, m, rows), ends):
        parts.append((dY[:, i : i + rows].T @ x).reshape(-1)[support[first:last] - i * n])
        first = last
    return torch.cat(parts)


def placed_product(x: Tensor, W: Tensor, values: Tensor, support: Tensor, active: Tensor) -> Tensor:
    """Return x Pᵀ, shape (..., m), in x's dtype; active values get a gradient. Backward keeps the arguments, no P."""
    return F.linear(x, placed(W, values, support).to(x.dtype))


def input_gradient(dY: Tensor, W: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """Return dY·P."""
    return dY @ placed(W, values, support).to(dY.dtype)


# Opaque operators: with an autograd.Function, torch.compile would see that backward builds the same P, and keep it.
_product = torch.library.custom_op("lowrank_ref::placed_product", placed_product, mutates_args=())
_inputs = torch.library.custom_op("lowrank_ref::placed_input_gradient", input_gradient, mutates_args=())
_product.register_fake(lambda x, W, *_: x.new_empty(*x.shape[:-1], len(W)))
_inputs.register_fake(lambda dY, W, values, support: dY.new_empty(*dY.shape[:-1], W.shape[1]))


@torch.library.custom_op("lowrank_ref::placed_values_gradient", mutates_args=())
def _values(dY: Tensor, x: Tensor, values: Tensor, support: Tensor) -> Tensor:
    return values_gradient(dY, x, support).to(values.dtype)


_values.register_fake(lambda dY, x, values, support: torch.empty_like(values))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    x, W, values, support, active = ctx.saved_tensors
    dx = _inputs(dY, W, values, support) if ctx.needs_input_grad[0] else None
    dp = _values(dY, x, values, support) * active if ctx.needs_input_grad[2] else None
    dW = None
    if ctx.needs_input_grad[1]:  # an adapter freezes W; who thaws it gets what the other entries get
        dW = (dY.flatten(0, -2).T @ x.flatten(0, -2)).to(W.dtype)
        dW = placed(dW, torch.zeros_like(values), support)
    return dx, dW, dp, None, None


_product.register_autograd(_backward, setup_context=_save)


def masked_product(
    x: Float[Tensor, "*batch n"],
    W: Float[Tensor, "m n"],
    values: Float[Tensor, " k"],
    support: Int[Tensor, " k"],
    active: Bool[Tensor, " k"],
) -> Float[Tensor, "*batch m"]:
    """Return x Pᵀ with P = W and the values at their places, in x's dtype. Only active values get a gradient.

    A double backward raises a RuntimeError: for it, call the definition.
    """
    return cast(Tensor, _product(x, W, values, support, active))
