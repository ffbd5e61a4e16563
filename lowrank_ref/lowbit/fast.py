"""The packed products of `ternary.py` and `hgf.py` on a GPU, by the Triton kernels; one operator for torch.compile.

Each function has the value of a plain definition: `packed_linear` to the bit, `corrected_linear` and `packed_matmul` to
rounding. For inference: no gradient passes. On cards that run no kernel (`kernels.takes_card`) layers compute by the
definitions.
"""

import torch
from torch import Tensor

from lowrank_ref.kernels import runs_on


def takes(x: Tensor) -> bool:
    """Tell whether the kernels take these activations: at most 32 bits, not empty, no gradient asked, on a fit GPU.

    It need not be the current one: a launch goes to where x is. Weights on another device are refused there.
    """
    ready = x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0
    return ready and not (x.requires_grad and torch.is_grad_enabled()) and runs_on(x.device)


def _corrected(x: Tensor, packed: Tensor, beta: Tensor, B: Tensor, t: Tensor) -> Tensor:
    from lowrank_ref.kernels.ternary import quantise, ternary_matmul

    codes, scale, x_sum = quantise(x.reshape(-1, x.shape[-1]))
    t = t.reshape(len(codes), -1)
    y = ternary_matmul(codes, packed, beta.float(), scale=scale, x_sum=x_sum, B=B, t=t, dtype=x.dtype)
    return y.view(*x.shape[:-1], len(packed))


def _matmul(x: Tensor, packed: Tensor, beta: Tensor) -> Tensor:
    from lowrank_ref.kernels.ternary import ternary_matmul

    return ternary_matmul(x.reshape(-1, x.shape[-1]), packed, beta.float()).view(*x.shape[:-1], len(packed))


# torch.compile sees one opaque operator; eager code calls the function itself, which is quicker.
_corrected_op = torch.library.custom_op("lowrank_ref::packed_linear", _corrected, mutates_args=())
_corrected_op.register_fake(lambda x, packed, beta, B, t: x.new_empty(*x.shape[:-1], len(packed)))
_matmul_op = torch.library.custom_op("lowrank_ref::packed_matmul", _matmul, mutates_args=())
_matmul_op.register_fake(lambda x, packed, beta: x.new_empty(*x.shape[:-1], len(packed)))


def corrected_linear(x: Tensor, packed: Tensor, beta: Tensor, B: Tensor, t: Tensor) -> Tensor:
    """Return `ternary.packed_linear` plus t Bᵀ, added in the same pass over the result.

    Args:
        x: normalised activations (..., n), see `takes`.
        packed, beta: the weight, (m, ⌈n/4⌉) bytes and β.
        B: (m, r), r >= 0, and t: (..., r), which carries the gate; 16 or 32 bits.
    """
    return (_corrected_op if torch.compiler.is_compiling() else _corrected)(x, packed, beta, B, t)


def packed_linear(x: Tensor, packed: Tensor, beta: Tensor) -> Tensor:
    """Return `ternary.packed_linear`: int8 activations, int32 sums, the same bits."""
    return corrected_linear(x, packed, beta, x.new_empty(len(packed), 0), x.new_empty(*x.shape[:-1], 0))


def packed_matmul(x: Tensor, packed: Tensor, beta: Tensor) -> Tensor:
    """Return `ternary.packed_matmul` of bfloat16 or float16 activations (..., n), summed in float32.

    Raises:
        TypeError: activations of another dtype.
    """
    return (_matmul_op if torch.compiler.is_compiling() else _matmul)(x, packed, beta)
