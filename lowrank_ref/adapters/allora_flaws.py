r"""What ALLoRA's paper says is wrong with LoRA (2410.09692v1, section 3), as functions that can be measured.

| in the paper                                            | here                    |
|---------------------------------------------------------|-------------------------|
| dropout between A and B (equation 1)                    | `RankDropoutLoRALinear` |
| E[loss] - loss = p/(1-p)·Σₖ norm²(x aₖ) norm²(bₖ) (3.1) | `rank_dropout_penalty`  |
| the same for dropout on the inputs, as in LoRA's code   | `input_dropout_penalty` |
| Π (norm(Wₗ) + s·norm(BₗAₗ)) (proposition 1, 3.3)        | `ripple_bound`          |
| B = 0 (3.2); its control starts with no zero            | `CompensatedLoRALinear` |

The paper's λ is the share that is kept, 1 - p. Both penalties are exact for a squared error, summed over outputs.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.adapters.dora_pissa import PiSSALinear
from lowrank_ref.adapters.lora import LoRALinear, init_factors
from lowrank_ref.core.checks import check_number


def _odds(dropout: float) -> float:
    """Return p/(1-p), the variance of a mask entry that is 0 or 1/(1-p)."""
    check_number("dropout", dropout, low=0, high=1 - 1e-9)
    return dropout / (1 - dropout)


def rank_dropout_penalty(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], dropout: float, scale: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Return what dropout between A and B adds to the expected squared error of each row: p/(1-p)·s²·Σₖ(aₖx)²‖bₖ‖².

    Raises:
        TypeError, ValueError: dropout is not in [0, 1).

    Example:
        >>> rank_dropout_penalty(torch.tensor([[2.0]]), torch.ones(1, 1), torch.tensor([[3.0]]), 0.5).tolist()
        [36.0]
    """
    return _odds(dropout) * scale**2 * (F.linear(x, A).square() @ B.square().sum(dim=0))


def input_dropout_penalty(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], dropout: float, scale: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Return the same for dropout on the inputs of A, where LoRA's code and PEFT put it: p/(1-p)·s²·Σⱼxⱼ²‖(BA)ⱼ‖².

    Raises:
        TypeError, ValueError: dropout is not in [0, 1).

    Example:
        >>> input_dropout_penalty(torch.tensor([[2.0]]), torch.ones(1, 1), torch.tensor([[3.0]]), 0.5).tolist()
        [36.0]
    """
    return _odds(dropout) * scale**2 * (x.square() @ (B @ A).square().sum(dim=0))


def ripple_bound(
    weights: Sequence[Float[Tensor, "_ _"]], updates: Sequence[Float[Tensor, "_ _"]], scale: float
) -> float:
    """Return Π(‖Wₗ‖ + s‖ΔWₗ‖) in spectral norms: no output of the chain exceeds it times ‖x‖ (proposition 1).

    Example:
        >>> ripple_bound([torch.eye(2)] * 3, [torch.eye(2)] * 3, 1.0)
        8.0
    """
    norm = torch.linalg.matrix_norm
    return math.prod(float(norm(W, 2) + scale * norm(D, 2)) for W, D in zip(weights, updates, strict=True))


class RankDropoutLoRALinear(LoRALinear):
    """LoRA with dropout between A and B, as the paper analyses it, and not on the inputs.

    Same arguments as `LoRALinear`.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters.allora_flaws import RankDropoutLoRALinear
        >>> RankDropoutLoRALinear(nn.Linear(4, 3), rank=2, dropout=0.1).is_product
        False
    """

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·B(dropout(Ax))."""
        return self.scale * F.linear(self.dropout(F.linear(x, self.A)), self.B)


class CompensatedLoRALinear(PiSSALinear):
    """LoRA that starts with two random factors and subtracts their product: the base at the start, and no zero.

    Same arguments as `LoRALinear`. B is U(-1/√m, 1/√m), as A is U(-1/√n, 1/√n).

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters.allora_flaws import CompensatedLoRALinear
        >>> layer = CompensatedLoRALinear(nn.Linear(4, 3), rank=2)
        >>> bool(layer.delta_weight().abs().max() < 1e-6), bool((layer.B != 0).all())
        (True, True)
    """

    starts_from_weight = False

    def initial_factors(self, W: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return A and B, both drawn."""
        A, B = (init_factors(side, self.rank, generator)[0] for side in (W, W.T))
        return A, B.T.contiguous()
