r"""What LoRA, DoRA and RandLoRA layers run: base and update in one function, with a backward of its own.

Each function equals a definition up to rounding; the tests hold the two together.

| here              | equals                                         | keeps for backward, beside x and W         |
|-------------------|------------------------------------------------|--------------------------------------------|
| `lora_linear`     | x Wᵀ + b + `lora.lora_update`                  | A and B in x's dtype, s·xAᵀ (tokens, r);   |
|                   |                                                | large r under autocast: x, W + s·BA        |
| `dora_linear`     | x V'ᵀ + b, V' = `dora_pissa.dora_weight`   | A and B in x's dtype, m gains              |
| `randlora_linear` | x Wᵀ + b + x ΔWᵀ, ΔW = `randlora.delta_weight` | the diagonals, and ΔW (fused: W + ΔW)      |

Autograd's own graph would keep a second copy of x where dtypes differ, and a (tokens, m) or (m, n) matrix a product.
Here the update is added into the base product by the same kernel that computes it, in forward and in backward.

Products are computed in the dtype of autocast where it is on, else in that of x, which is the weight's; matrix
products add up in float32. A double backward may raise a RuntimeError, and so may the transforms of `torch.func`: for
those, call the definition. Compiled, DoRA keeps one (m, n) matrix more: the compiler sees that backward needs it too.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowrank_ref.core.weights import has_hooks, has_own_forward

#: How many entries of a weight `row_norms` looks at together: 32 MiB in float32.
BLOCK = 2**23
#: Below so many entries of x, starting an operator costs more than its work.
FEW = 2**20


def autocasts(x: Tensor) -> bool:
    """Tell whether autocast is on where x is: never on the meta device, which has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def computing_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies x: that of autocast where it is on, else that of x."""
    if autocasts(x) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_plain(base: nn.Module, x: Tensor) -> bool:
    """Tell whether base(x) is x Wᵀ + b and nothing else, in a dtype in which the products here are safe.

    That is: no `forward` of its own, on class or layer, no hooks, an ordinary weight where x is, dtypes that fit, and
    not float16, in which s·xAᵀ overflows although the result would not.
    """
    W, dtype = base._parameters.get("weight"), computing_dtype(x)
    if W is None or has_own_forward(base) or has_hooks(base) or type(W) not in (nn.Parameter, Tensor):
        return False
    if W.device != x.device or not x.is_floating_point() or dtype == torch.float16:
        return False
    return x.dtype == W.dtype or (dtype == torch.bfloat16 and autocasts(x))


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype
    ) -> Tensor:
        rows, ctx.scale, ctx.dtypes = _rows(x, dtype), scale, (A.dtype, B.dtype)
        A, B = A.to(dtype), B.to(dtype)
        t = (rows @ A.T).mul_(scale)
        out = F.linear(rows, W.to(dtype), bias).addmm_(t, B.T)
        ctx.save_for_backward(x, W, A, B, t)
        return out.view(*x.shape[:-1], out.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, t = ctx.saved_tensors
        rows, dY = _rows(x, A.dtype), _rows(dY, A.dtype)
        u = (dY @ B).mul_(ctx.scale)
        dA = (u.T @ rows).to(ctx.dtypes[0]) if ctx.needs_input_grad[3] else None
        dB = (dY.T @ t).to(ctx.dtypes[1]) if ctx.needs_input_grad[4] else None
        dW = (dY.T @ rows).to(W.dtype) if ctx.needs_input_grad[1] else None  # an adapter freezes W and b
        db = dY.sum(0).to(W.dtype) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dY @ W.to(A.dtype)).addmm_(u, A).view(x.shape).to(x.dtype)
        return dx, dW, db, dA, dB, None, None


def through_weight(tokens: int, rank: int, m: int, n: int) -> bool:
    """Tell whether a step with W + s·BA takes no more FLOPs than one with W and the factors, but for an eighth.

    That is 6mn a token against 4mn + 6r(m+n): from a third of mn/(m+n) on, m/6 where m = n. W + s·BA and the gradients
    of its factors cost as much as r tokens more: an eighth from 8r tokens on.
    """
    return 3 * rank * (m + n) > m * n and tokens >= 8 * rank


def lora_linear(
    x: Float[Tensor, "*batch n"],
    W: Float[Tensor, "m n"],
    bias: Float[Tensor, " m"] | None,
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    scale: float,
) -> Float[Tensor, "*batch m"]:
    """Return x Wᵀ + b + s·(xAᵀ)Bᵀ. Beside x and the parameters, backward keeps the (tokens, r) product s·xAᵀ.

    Where autocast rounds W anyway and the rank is so large that it pays (`through_weight`), it is one product with
    W + s·BA, summed before it is rounded: no less exact, and backward keeps what that of a dense layer keeps. Few
    numbers go through PyTorch's own operators, which start sooner.

    Example:
        >>> one = torch.ones
        >>> lora_linear(torch.tensor([1.0, 2.0]), one(1, 2), one(1), one(1, 2), one(1, 1), 0.5).tolist()
        [5.5]
    """
    dtype = computing_dtype(x)
    if W.dtype == dtype and x.numel() < FEW:
        x = x.to(dtype)
        return F.linear(x, W, bias) + F.linear(scale * F.linear(x, A.to(dtype)), B.to(dtype))
    rounds = dtype.itemsize < W.dtype.itemsize and A.dtype == B.dtype == W.dtype
    if rounds and through_weight(x.numel() // x.shape[-1], A.shape[0], *W.shape):
        return F.linear(x, W + (scale * B) @ A, bias)  # inductor loses the alpha of add(W, B @ A, alpha=scale)
    return cast(Tensor, _LoRALinear.apply(x, W, bias, A, B, scale, dtype))


@torch.no_grad()
def row_norms(
    W: Float[Tensor, "m n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], scale: float
) -> Float[Tensor, " m"]:
    """Return the norms of the rows of W + s·BA, a block of rows at a time and without a gradient.

    They are computed in float32 or wider and returned in A's dtype.
    """
    step, wide = max(1, BLOCK // W.shape[1]), torch.promote_types(A.dtype, torch.float32)
    A_, sB = A.to(wide), scale * B.to(wide)
    parts = [(sB[i : i + step] @ A_).add_(W[i : i + step]).norm(dim=1) for i in range(0, len(W), step)]
    return torch.cat(parts).to(A.dtype)


def _scaled(W: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gain ⊙ W, multiplied in the wider dtype and rounded once, without a matrix of the wider dtype."""
    if torch.compiler.is_compiling():  # which fuses the two, and takes no `out` of what trains
        return (W * gain[..., None]).to(dtype)
    return torch.mul(W, gain[..., None], out=W.new_empty(W.shape, dtype=dtype))


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, gain: Tensor, scale: float
    ) -> Tensor:
        rows = _rows(x, A.dtype)
        out = F.linear(rows, _scaled(W, gain, A.dtype), bias)
        ctx.save_for_backward(x, W, A, B, gain)
        ctx.scale = scale
        return out.addmm_(rows @ A.T, _scaled(B, scale * gain, A.dtype).T).view(*x.shape[:-1], len(B))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, gain = ctx.saved_tensors
        rows, dY = _rows(x, A.dtype), _rows(dY, A.dtype)
        sB = _scaled(B, ctx.scale * gain, A.dtype)
        G = dY.T @ rows  # gradient of the whole weight gain ⊙ (W + s·BA): every other one follows from it
        H = G @ A.T
        dA, dB = sB.T @ G, _scaled(H, ctx.scale * gain, A.dtype)
        dW = _scaled(G, gain, W.dtype) if ctx.needs_input_grad[1] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dY @ _scaled(W, gain, A.dtype)).addmm_(dY @ sB, A).view(x.shape).to(x.dtype)
        db = dY.sum(0).to(W.dtype) if ctx.needs_input_grad[2] else None
        dgain = G.mul_(W).sum(1, dtype=gain.dtype) + ctx.scale * (H * B).sum(1, dtype=gain.dtype)
        return dx, dW, db, dA, dB, dgain, None


def dora_linear(
    x: Float[Tensor, "*batch n"],
    W: Float[Tensor, "m n"],
    bias: Float[Tensor, " m"] | None,
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    magnitude: Float[Tensor, " m"],
    scale: float,
) -> Float[Tensor, "*batch m"]:
    """Return x V'ᵀ + b, V' = m/‖V‖ ⊙ V and V = W + s·BA, the norm a constant in backward.

    The update keeps its own product with x: in half precision W + s·BA would round small updates away.
    """
    dtype = computing_dtype(x)
    gain = magnitude / row_norms(W, A, B, scale)
    return cast(Tensor, _DoRALinear.apply(x, W, bias, A.to(dtype), B.to(dtype), gain, scale))


def through_delta(tokens: int, D: int, d: int, rows: int) -> bool:
    """Tell whether a step that makes ΔW (`products.randlora_linear`) takes fewer FLOPs than one through the factors.

    With full rank, rows = d, that is above 2Dd/(3d - D) tokens, and never where D >= 3d.
    """
    return 6 * tokens * D * d + 4 * rows * D * d < 4 * tokens * rows * (D + d) + 2 * tokens * rows * d


class _RandLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        C: Tensor,
        lam: Tensor,
        gamma: Tensor,
        fused: bool,
    ) -> Tensor:
        dtype, wide = A.dtype, len(W) < W.shape[1]
        rows = _rows(x, dtype)
        M = _scaled(A.expand(len(lam), *A.shape), lam, dtype).mul_(gamma[:, None]).flatten(0, 1)
        left, right = (M.T, C) if wide else (C.T, M)
        if not fused:
            V = left @ right
            out = F.linear(rows, W.to(dtype), bias).addmm_(rows, V.T)
        else:
            V = torch.addmm(W, left, right) if W.dtype == dtype else (W + left @ right).to(dtype)
            out = F.linear(rows, V, bias)
        ctx.save_for_backward(x, W, A, C, lam, gamma, V)
        ctx.fused = fused
        return out.view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, C, lam, gamma, V = ctx.saved_tensors
        rows, dY = _rows(x, A.dtype), _rows(dY, A.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dY @ V if ctx.fused else (dY @ W.to(A.dtype)).addmm_(dY, V)
            dx = dx.view(x.shape).to(x.dtype)
        G = dY.T @ rows
        dM = (C @ (G.T if len(W) < W.shape[1] else G)).view(*lam.shape, -1).mul_(A)  # times A: what both diagonals need
        dlam = torch.einsum("jki,ji->jk", dM, gamma.to(A.dtype)).to(lam.dtype)
        dgamma = torch.einsum("jki,jk->ji", dM, lam.to(A.dtype)).to(gamma.dtype)
        dW = G.to(W.dtype) if ctx.needs_input_grad[1] else None
        db = dY.sum(0).to(W.dtype) if ctx.needs_input_grad[2] else None
        return dx, dW, db, None, None, dlam, dgamma, None


def randlora_linear(
    x: Float[Tensor, "*batch n"],
    W: Float[Tensor, "m n"],
    bias: Float[Tensor, " m"] | None,
    A: Float[Tensor, "r d"],
    C: Float[Tensor, "rows D"],
    lam: Float[Tensor, "blocks r"],
    gamma: Float[Tensor, "blocks d"],
    scale: float,
    *,
    fused: bool = False,
) -> Float[Tensor, "*batch m"]:
    """Return x Wᵀ + b + x ΔWᵀ through ΔW, which is made once a step; it pays where `through_delta` says so.

    Args:
        x, W, bias: of the base layer.
        A, C: frozen bases, C = `randlora_bases.stacked` (B), in the dtype that `computing_dtype` gives.
        lam, gamma: the trained diagonals.
        scale: s.
        fused: one product with W + ΔW, rounded to the dtype of the product. In half precision that loses small updates.
    """
    return cast(Tensor, _RandLoRALinear.apply(x, W, bias, A, C, scale * lam, gamma, fused))
