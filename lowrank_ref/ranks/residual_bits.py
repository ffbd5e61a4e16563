"""The quantiser of Bayesian Bits: rounding to 2 bits, and then the rest to 4, 8, 16 and 32, each behind a gate.

Van Baalen et al., "Bayesian Bits: Unifying Quantization and Pruning", arXiv 2005.07093. One range ±β a tensor; steps
are s_b = 2β/(2^b - 1), codes ±(2^(b-1) - 1): there is no extra negative level, and two bits are three levels.
"""

import torch
from jaxtyping import Float
from torch import Tensor

#: The share of β to which values are clipped, so that the largest does not round up and off the grid.
INSIDE = 1 - 1e-7


def step_sizes(limit: Float[Tensor, ""], gates: int) -> Float[Tensor, " levels"]:
    """Return s₂, s₄, s₈, ..., one more than gates. s_b = 2β/(2^b - 1), so every grid holds the coarser ones.

    Args:
        limit: β >= 0; 0 counts as 1.
        gates: 0 to 4, for 2 to 32 bits.
    """
    shrink = torch.tensor([3.0, *(2.0**2**k + 1 for k in range(1, gates + 1))], dtype=limit.dtype)
    return 2 * torch.where(limit > 0, limit, 1.0) / shrink.to(limit.device).cumprod(0)


def codes_of(x: Float[Tensor, "*shape"], limit: Float[Tensor, ""], step: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Return round(x/s), whole numbers as floats, of x clipped to ±β(1 - 1e-7): ±(2^(b-1) - 1) at most."""
    return (x.clamp(-limit * INSIDE, limit * INSIDE) / step).round()


def residual_quantize(
    x: Float[Tensor, "*shape"], limit: Float[Tensor, ""], gates: Float[Tensor, " gates"]
) -> Float[Tensor, "*shape"]:
    """Return x₂ + z₄(ε₄ + z₈(ε₈ + ...)), where ε_b rounds to the grid of b bits what all coarser ones left.

    The gradient by x is 1 wherever x was rounded or clipped; that by a gate is the sum of what the gate lets through.

    Example:
        >>> x, one = torch.tensor([0.9, -0.37]), torch.tensor(1.0)
        >>> residual_quantize(x, one, torch.tensor([1.0, 0.0])).mul(15).round().tolist()  # 4 bits: fifteenths
        [14.0, -6.0]
    """
    rest = x.detach().clamp(-limit * INSIDE, limit * INSIDE)
    parts = []
    for step in step_sizes(limit, len(gates)):
        parts.append((rest / step).round() * step)
        rest = rest - parts[-1]
    total = torch.zeros_like(rest)
    for gate, part in zip(reversed(gates.unbind()), reversed(parts[1:])):
        total = gate * (part + total)
    return parts[0] + total + (x - x.detach())
