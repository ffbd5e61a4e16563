"""An r × r matrix between frozen singular vectors: SVFit with its off-diagonal. The control of SVFit's chapter.

    ΔW = U M Vh,   M (r, r) trained from 0, U (m, r) and Vh (r, n) the top singular vectors of W

SVFit is the case of a diagonal M. LoRA-XS (arXiv 2405.17604) trains R in U R diag(S) Vh, which is `form=
"multiplicative"` here: M = R diag(S). It draws R with a standard deviation of 1e-5, here R = 0 and the start is W.

Cost per layer: r² trained numbers, Adam 2r²; the rest as SVFit's.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.adapters.svfit import SVFitLinear


def core_delta(U: Float[Tensor, "m r"], M: Float[Tensor, "r r"], Vh: Float[Tensor, "r n"]) -> Float[Tensor, "m n"]:
    """Return ΔW = U M Vh."""
    return U @ M @ Vh


def singular_core_update(
    x: Float[Tensor, "*batch n"], U: Float[Tensor, "m r"], M: Float[Tensor, "r r"], Vh: Float[Tensor, "r n"]
) -> Float[Tensor, "*batch m"]:
    """Return U(M(Vh x)) for every row."""
    return F.linear(F.linear(F.linear(x, Vh), M), U)


class SingularCoreLinear(SVFitLinear):
    """A frozen linear layer with a trained matrix between its singular vectors: ΔW = U M Vh.

    Same arguments as `SVFitLinear`, of which `rank` is best given: r² numbers train. "multiplicative" trains R of
    M = R diag(S).

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import SingularCoreLinear
        >>> layer = SingularCoreLinear(nn.Linear(6, 4), rank=2)
        >>> tuple(layer.delta.shape), layer.delta_weight().abs().max().item()
        ((2, 2), 0.0)
    """

    adapter_names = ("delta",)

    def initial(self) -> Tensor:
        """Return M = 0: training starts at W."""
        return torch.zeros_like(self.S).expand(self.rank, self.rank).clone()

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return U M Vh."""
        return core_delta(self.U, self.added(), self.Vh)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return U(M(Vh x))."""
        return singular_core_update(x, self.U, self.added(), self.Vh)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (Vh, U M, 1): an exact LoRA of rank r."""
        return self.Vh, self.U @ self.added(), 1.0
