r"""Differential attention: the difference of two softmax maps, so that what both maps attend to cancels.

Ye et al., "Differential Transformer", arXiv 2410.05258; the attention of HGF.

| in the paper                                            | here                                           |
|---------------------------------------------------------|------------------------------------------------|
| (softmax(Q₁K₁ᵀ/√d) - λ softmax(Q₂K₂ᵀ/√d))·V (eq. 1)     | `differential_attention`, two fused calls      |
| λ = exp(λq₁·λk₁) - exp(λq₂·λk₂) + λ_init (eq. 2)        | `lambda_value`                                 |
| λ_init = 0.8 - 0.6·exp(-0.3·(l - 1))                    | `lambda_init`, depth = l - 1                   |
| RMSNorm per head, times 1 - λ_init (eq. 3)              | `DifferentialAttention.forward`                |

A layer of h heads has 2h maps of width d_h = dim/(2h) and h values of width 2d_h: the four matrices keep the size of
plain attention with 2h heads. It trains 4 d_h numbers for λ and 2 d_h for the norm besides.

Deviations. The four vectors of λ are shared by the heads of a layer, and one gain of the norm too, as in the official
code. Costs: 2h maps as plain attention with 2h heads, but each multiplies values of twice the width.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer
from lowrank_ref.kernels import EPS


def lambda_init(depth: int) -> float:
    """Return 0.8 - 0.6·exp(-0.3·depth) for the layer with this many layers before it: 0.2, 0.356, 0.471, ..."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def lambda_value(vectors: Float[Tensor, "4 head"], initial: float) -> Float[Tensor, ""]:
    """Return λ = exp(λq₁·λk₁) - exp(λq₂·λk₂) + λ_init from the rows (λq₁, λk₁, λq₂, λk₂) (equation 2)."""
    q1, k1, q2, k2 = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).unbind()
    return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + initial


def differential_attention(
    q: Float[Tensor, "batch heads 2 length head"],
    k: Float[Tensor, "batch heads 2 length head"],
    v: Float[Tensor, "batch heads length value"],
    lam: Float[Tensor, ""],
    *,
    causal: bool,
) -> Float[Tensor, "batch heads length value"]:
    """Return (A₁ - λA₂)V, where A_i = softmax(Q_i K_iᵀ/√d) (equation 1).

    The maps are never formed: two fused attention calls share V, and their outputs are subtracted.
    """
    first, second = (
        F.scaled_dot_product_attention(q[:, :, i], k[:, :, i], v, is_causal=causal)  # (batch, heads, length, value)
        for i in range(2)
    )
    return first - lam.to(first.dtype) * second


def rotate(
    x: Float[Tensor, "*batch length head"], cos: Float[Tensor, "length half"], sin: Float[Tensor, "length half"]
) -> Float[Tensor, "*batch length head"]:
    """Turn each pair (x_j, x_(j + head/2)) by the angle of its place (rotary positions)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class DifferentialAttention(nn.Module):
    """Differential attention with the matrices of a plain attention layer, which it takes over.

    Args:
        base: has linear layers `q`, `k`, `v`, `o` of shape (dim, dim), an even number `heads`, and `causal`; as
            `lab.models.Attention`.
        depth: layers before this one, from 0.
        generator: draws the vectors of λ from N(0, 0.1²).

    Raises:
        TypeError, ValueError: heads is odd, or depth negative or no integer.

    Example:
        >>> import torch
        >>> from lowrank_ref.lab.models.transformer import Attention
        >>> from lowrank_ref.lowbit import DifferentialAttention
        >>> layer = DifferentialAttention(Attention(16, 4, causal=True), depth=0)
        >>> layer.heads, layer(torch.randn(2, 5, 16)).shape
        (2, torch.Size([2, 5, 16]))
    """

    def __init__(self, base: Any, *, depth: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_integer("depth", depth, low=0)
        maps, dim = int(base.heads), base.q.in_features
        if maps % 2 or dim % maps:
            raise ValueError(f"base.heads: got {maps} for width {dim}, wanted an even divisor of the width")
        self.q, self.k, self.v, self.o = base.q, base.k, base.v, base.o
        self.heads, self.causal, self.initial = maps // 2, bool(base.causal), lambda_init(depth)
        W = base.q.weight
        device = generator.device if generator is not None else W.device
        vectors = 0.1 * torch.randn(4, dim // maps, generator=generator, device=device)
        self.vectors = nn.Parameter(vectors.to(W))
        self.gain = nn.Parameter(torch.ones_like(W[0, : 2 * dim // maps]))
        self.train(base.training)

    def forward(
        self, x: Float[Tensor, "batch length dim"], rotation: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Mix the places of x; `rotation` holds cosines and sines (length, d_h/2) of the places."""
        batch, length, dim = x.shape
        q, k = (
            f(x).view(batch, length, self.heads, 2, dim // self.heads // 2).permute(0, 2, 3, 1, 4)
            for f in (self.q, self.k)
        )
        v = self.v(x).view(batch, length, self.heads, dim // self.heads).transpose(1, 2)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = differential_attention(q, k, v, lambda_value(self.vectors, self.initial), causal=self.causal)
        y = F.rms_norm(y, y.shape[-1:], self.gain.to(y.dtype), EPS) * (1 - self.initial)  # each head for itself
        return self.o(y.transpose(1, 2).reshape(batch, length, dim))
