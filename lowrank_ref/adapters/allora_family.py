r"""Relatives of ALLoRA: the family of its section 4.3, and factors that tell which part of the rule does what.

| in the paper (2410.09692v1)                       | here                                  |
|---------------------------------------------------|---------------------------------------|
| ALLoRA-OD: g̃ᵢ = gᵢ/√(abs((BAx)ᵢ) + 1/c₀²) (4.3)  | `output_factors`, `factors="outputs"` |
| ASF-LoRA: f̃ᵢ = fᵢ/√(abs(fᵢ) + 1/c₀²) (4.3)       | `asf_update`, `ASFLoRALinear`         |
| "inversely proportional" (abstract), word by word | `factors="inverse"`: 1/(norm + 1/c₀)  |

Controls of this book, on `ALLoRAVariant`: "layer" gives all rows of a layer the mean of their factors, "constant" gives
them c₀ for ever, and `rescale_input` lets the factors act on what flows to the layer below, too.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.allora import (
    ALLoRALinear,
    adaptive_factor,
    allora_update,
    check_boost,
    row_factors,
    update_row_norms,
)
from lowrank_ref.adapters.lora import LoRALinear, delta_weight, lora_update

#: Factors of `ALLoRAVariant`; "rows" is ALLoRA.
ALLORA_FACTORS = ("rows", "layer", "constant", "outputs", "inverse")


@torch.no_grad()
def output_factors(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], boost: float
) -> Float[Tensor, "*batch m"]:
    """Return 1/√(abs (BAx)ᵢ + 1/c₀²), a factor for each sample and output: those of ALLoRA-OD.

    Example:
        >>> output_factors(torch.tensor([[1.0], [0.0]]), torch.eye(1), torch.tensor([[-0.75]]), 2.0).tolist()
        [[1.0], [2.0]]
    """
    return adaptive_factor(lora_update(x, A, B, 1.0).abs(), boost)


def asf_update(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], boost: float
) -> Float[Tensor, "*batch m"]:
    """Return fᵢ/√(abs fᵢ + 1/c₀²) with f = BAx, and its own gradient: no linear map of x, so it cannot be merged.

    Example:
        >>> asf_update(torch.tensor([[1.0]]), torch.eye(1), torch.tensor([[-0.75]]), 2.0).tolist()
        [[-0.75]]
    """
    f = lora_update(x, A, B, 1.0)
    return f * adaptive_factor(f.abs(), boost)


class ALLoRAVariant(ALLoRALinear):
    """ALLoRA with other factors.

    Args:
        base, rank, options: as `ALLoRALinear` takes them.
        factors: one of `ALLORA_FACTORS`.
        rescale_input: whether the gradient that goes to the layer below is rescaled as well; the paper leaves it.

    Raises:
        TypeError, ValueError: unknown factors, or what `ALLoRALinear` refuses.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters.allora_family import ALLoRAVariant
        >>> layer = ALLoRAVariant(nn.Linear(4, 3), 2, boost=2.0, factors="outputs")
        >>> layer.gradient_factors(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, base: nn.Module, rank: int = 8, *, factors: str = "rows", rescale_input: bool = False, **options: Any
    ) -> None:
        if factors not in ALLORA_FACTORS:
            raise ValueError(f"factors: got {factors!r}, wanted one of {ALLORA_FACTORS}")
        super().__init__(base, rank, **options)
        self.factors, self.rescale_input = factors, rescale_input

    @property
    def is_product(self) -> bool:
        """Whether a model may multiply with `weight` itself: not where factors or gradients ask for x."""
        return self.factors != "outputs" and not self.rescale_input

    def as_one(self, x: Tensor) -> bool:
        """Tell whether base and update may be one function: not where the input's gradient is rescaled."""
        return not self.rescale_input and super().as_one(x)

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return BA, with rescaled gradients where `is_product`."""
        return super().delta_weight() if self.is_product else delta_weight(self.A, self.B, 1.0)

    def gradient_factors(self, x: Float[Tensor, "*batch n"] | None = None) -> Float[Tensor, "*rows m"]:
        """Return c, (m,), or with "outputs" one for each row of x.

        Raises:
            TypeError: "outputs", and no x.
        """
        if self.factors == "outputs":
            if x is None:
                raise TypeError("x: got None, wanted the activations that these factors depend on")
            return output_factors(x, self.A, self.B, self.boost)
        if self.factors == "inverse":
            return 1 / (update_row_norms(self.A, self.B) + 1 / self.boost)
        c = row_factors(self.A, self.B, self.boost)
        if self.factors == "rows":
            return c
        return torch.full_like(c, self.boost) if self.factors == "constant" else c.mean().expand_as(c)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return B(Ax), with rescaled gradients."""
        if not self.rescale_input or not torch.is_grad_enabled():
            return super().update(x)
        c = self.gradient_factors(x).detach()
        through = lora_update(x, self.A.detach(), self.B.detach(), 1.0)  # only x gets a gradient here
        return allora_update(x.detach(), self.A, self.B, c) + c * through - (c * through).detach()


class ASFLoRALinear(LoRALinear):
    """LoRA whose output is divided by the root of its own size, entry by entry: ASF-LoRA.

    Args:
        base, rank, generator: as `LoRALinear` takes them.
        boost: c₀, in [1e-6, 1e6]: the scale of an output of 0.

    `delta_weight`, merging and export raise a TypeError: the update is no matrix.

    Raises:
        TypeError, ValueError: what `LoRALinear` refuses, or boost out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters.allora_family import ASFLoRALinear
        >>> layer = ASFLoRALinear(nn.Linear(4, 3), rank=2)
        >>> layer(torch.ones(1, 4)).shape
        torch.Size([1, 3])
    """

    def __init__(
        self, base: nn.Module, rank: int = 8, *, boost: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        check_boost(boost)
        super().__init__(base, rank, alpha=rank, generator=generator)
        self.boost = float(boost)

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Refuse.

        Raises:
            TypeError: always.
        """
        raise TypeError("delta_weight: got ASF-LoRA, whose update is no linear map, wanted a LoRA")

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Refuse.

        Raises:
            TypeError: always.
        """
        raise TypeError("lora_factors: got ASF-LoRA, whose update is no linear map, wanted a LoRA")

    def as_one(self, x: Tensor) -> bool:
        """Return False: base and update are two things."""
        return False

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return the rescaled output."""
        return asf_update(x, self.A, self.B, self.boost)
