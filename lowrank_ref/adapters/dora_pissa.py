"""DoRA and PiSSA: two relatives of LoRA that the chapters use as baselines. They have no chapter of their own.

| paper                                          | here                                             |
|------------------------------------------------|--------------------------------------------------|
| DoRA (2402.09353): W' = m ⊙ V/‖V‖, V = W + sBA | `dora_weight`, `dora_linear`, `DoRALinear`       |
| PiSSA (2404.02948): start at the top-r SVD     | `pissa_factors`, `PiSSALinear`                   |

Deviations. DoRA's norm is taken over the input dimension, one magnitude per output, as its code does. PiSSA replaces W
by W - s·B₀A₀; here the base stays W and the update is s·(BA - B₀A₀): the same function and the same gradients, but a
checkpoint that stays valid with the original model.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.lora import LoRALinear, delta_weight, lora_update
from lowrank_ref.core.layers import AdaptedLinear, weight_of
from lowrank_ref.core.linalg import svd
from lowrank_ref.core.products import dora_linear, row_norms


def dora_weight(
    V: Float[Tensor, "m n"], magnitude: Float[Tensor, " m"], *, detach_norm: bool = True
) -> Float[Tensor, "m n"]:
    """Return W' = m ⊙ V/‖V‖, rows rescaled to the trained magnitudes (DoRA equations 5 and 11).

    Args:
        V: direction W + s·BA, shape (m, n), no zero row.
        magnitude: wanted norm of each row, shape (m,).
        detach_norm: treat ‖V‖ as a constant in backward, as DoRA does to save memory.
    """
    norm = V.norm(dim=1)
    return (magnitude / (norm.detach() if detach_norm else norm))[:, None] * V


def pissa_factors(
    W: Float[Tensor, "m n"], rank: int, scale: float
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return A = √(S/s)·Vᵀ and B = U·√(S/s) from the top r singular triples: s·BA is W's best rank-r part.

    Where a singular value is zero up to rounding, A's row is the singular vector and B's column zero, as LoRA starts:
    with zeros in both, neither would ever get a gradient.
    """
    U, S, Vh = svd(W, rank)
    there = S.gt(max(W.shape) * torch.finfo(S.dtype).eps * S[0])
    root = torch.where(there, S / scale, 0).sqrt()
    return torch.where(there, root, 1)[:, None] * Vh, U * root


class DoRALinear(LoRALinear):
    """LoRA on the direction of each row of W, and a trained magnitude for its length (arXiv 2402.09353).

    Same arguments as `LoRALinear`; m more trained numbers. A step costs what a trained layer costs: its backward needs
    the gradient of the whole weight. A weight with a zero row, which has no direction, raises a ValueError, and so does
    a first forward on another weight than the layer was built on.

    Args:
        detach_norm: treat ‖V‖ as a constant in backward, as the paper's section 4.3 and PEFT do. False makes W + s·BA
            anew in every step and takes the gradient through its norm too: slower, same function.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import DoRALinear
        >>> layer = DoRALinear(nn.Linear(4, 3), rank=2)
        >>> {name: tuple(p.shape) for name, p in layer.adapter_parameters().items()}
        {'A': (2, 4), 'B': (3, 2), 'magnitude': (3,)}
    """

    adapter_names = ("A", "B", "magnitude")
    starts_from_weight = True

    def __init__(self, base: nn.Module, rank: int = 8, *, detach_norm: bool = True, **options: Any) -> None:
        super().__init__(base, rank, **options)
        self.detach_norm = detach_norm
        norms = row_norms(weight_of(base), self.A, self.B, self.scale)  # B = 0: those of W
        if bad := (~((norms > 0) & norms.isfinite())).nonzero().flatten().tolist():
            raise ValueError(f"base.weight: got zero, NaN or infinite rows {bad}, wanted none")
        self.magnitude = nn.Parameter(norms)

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return m ⊙ V/‖V‖ - W with V = W + s·BA."""
        W = weight_of(self.base).to(self.A.dtype)
        return dora_weight(W + super().delta_weight(), self.magnitude, detach_norm=self.detach_norm) - W

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return what has to be added to xWᵀ to give m/‖V‖ ⊙ (xWᵀ + s·B(A·dropout(x)))."""
        W = weight_of(self.base)
        if self.detach_norm:
            norms = row_norms(W, self.A, self.B, self.scale)
        else:
            norms = (W.to(self.A.dtype) + super().delta_weight()).norm(dim=1)
        gain = self.magnitude / norms
        return (gain - 1) * F.linear(x, W.to(self.A.dtype)) + gain * super().update(x)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return base(x) + x ΔWᵀ, shape (..., m): by `dora_linear` where base and update read the same x."""
        if not self.detach_norm or not self.as_one(x):
            return AdaptedLinear.forward(self, x)
        bias = cast(Any, self.base.bias)
        return dora_linear(x, weight_of(self.base), bias, self.A, self.B, self.magnitude, self.scale)


class PiSSALinear(LoRALinear):
    """LoRA that starts A and B at the principal singular triples of W, and subtracts that start (arXiv 2404.02948).

    Same arguments as `LoRALinear`; no randomness. Exported, it is an ordinary LoRA of rank 2r.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import PiSSALinear
        >>> layer = PiSSALinear(nn.Linear(4, 3), rank=2)
        >>> A, B, scale = layer.lora_factors()
        >>> A.shape, B.shape
        (torch.Size([4, 4]), torch.Size([3, 4]))
    """

    starts_from_weight = True

    def __init__(self, base: nn.Module, rank: int = 8, **options: Any) -> None:
        super().__init__(base, rank, **options)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def initial_factors(self, W: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the principal factors of W, with the strides that FSDP2 wants."""
        A, B = pissa_factors(W, self.rank, self.scale)
        return A.contiguous(), B.contiguous()

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·(BA - B₀A₀)."""
        return delta_weight(*self.lora_factors())

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·(BA - B₀A₀)·dropout(x)."""
        return lora_update(self.dropout(x), *self.lora_factors())

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return ([A; -A₀], [B, B₀], s): the exact LoRA of rank 2r on the original W."""
        A0, B0 = cast(Tensor, self.A0), cast(Tensor, self.B0)
        return torch.cat([self.A, -A0]), torch.cat([self.B, B0], dim=1), self.scale
