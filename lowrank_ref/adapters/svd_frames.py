"""LoRA-XS: the same core as LoRA-SB's between frames of the pretrained weight; and random frames, as their control.

Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604v3.

| frames                    | here              |
|---------------------------|-------------------|
| B = U_r, A = Σ_r V_rᵀ     | `xs_frames`       |
| B = U_r, A = V_rᵀ         | `singular_frames` |
| random, orthonormal       | `random_frames`   |

Deviations. The SVD is exact for layers up to 1,024; the official code takes scikit-learn's randomised one of the
transpose, which agrees up to signs and 1e-3. A core means nothing beside frames of other signs, or of another mixture
of equal singular values: so a file of ours holds A and B as well. The scale is an argument; the code has α/r.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.lora_sb import LoRASBLinear, truncated_svd
from lowrank_ref.core.checks import check_rank
from lowrank_ref.core.layers import weight_of

Frames = tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]


def xs_frames(W: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None = None) -> Frames:
    """Return LoRA-XS's A = Σ_r V_rᵀ and B = U_r, from the SVD of the pretrained weight."""
    U, S, Vh = truncated_svd(W, rank, generator)
    return S[:, None] * Vh, U


def singular_frames(W: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None = None) -> Frames:
    """Return A = V_rᵀ and B = U_r of W: those of LoRA-XS made orthonormal."""
    U, _, Vh = truncated_svd(W, rank, generator)
    return Vh, U


def random_frames(W: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None = None) -> Frames:
    """Return orthonormal A and B of random directions: the control of what a good choice is worth.

    Raises:
        TypeError, ValueError: rank is not an integer in [1, min(m, n)].
    """
    check_rank(rank, W.shape)
    device = generator.device if generator is not None else W.device
    dtype = torch.promote_types(W.dtype, torch.float32)
    V, U = (
        torch.linalg.qr(torch.randn(k, rank, generator=generator, dtype=dtype, device=device)).Q.to(W.device)
        for k in (W.shape[1], W.shape[0])
    )
    return V.T, U


class LoRAXSLinear(LoRASBLinear):
    """LoRA-XS: frames from the pretrained weight, and a core that starts next to zero, R ~ N(0, 1e-10).

    Args:
        base, scale, dropout: see `LoRASBLinear`.
        rank: r, 1 <= r <= min(m, n).
        frames: (W, rank, generator) -> (A, B): `xs_frames`, `singular_frames`, `random_frames`.
        generator: source of R, and of random frames.

    Raises:
        TypeError, ValueError: rank is not an integer in [1, min(m, n)], a frame is all zero, or as `LoRASBLinear`.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import LoRAXSLinear
        >>> layer = LoRAXSLinear(nn.Linear(64, 64), rank=4)
        >>> sum(p.numel() for p in layer.adapter_parameters().values())
        16
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        frames: Callable[..., Frames] = xs_frames,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        W = weight_of(base).detach()
        check_rank(rank, W.shape)
        A, B = frames(W, rank, generator)
        if not bool(A.any() and B.any()):
            raise ValueError("base.weight: got zeros only, whose frames no core can move, wanted other frames=...")
        device = generator.device if generator is not None else W.device
        R = 1e-5 * torch.randn(rank, rank, generator=generator, dtype=B.dtype, device=device)
        super().__init__(base, A, R, B, **options)
