"""Quantisation-aware training: the forward pass sees rounded numbers, the gradient passes straight through."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.lowbit.quantizers import Quantizer
from lowrank_ref.lowbit.ternary import straight_through


def fake_quantize(
    x: Float[Tensor, "*shape"], quantizer: Quantizer, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Return x̂, whose gradient goes to x as if nothing had been rounded (straight-through)."""
    return straight_through(x, quantizer(x, generator=generator))


def learned_step(w: Float[Tensor, "*shape"], step: Float[Tensor, ""], bits: int) -> Float[Tensor, "*shape"]:
    """Return round(clip(w/s, -Q_N, Q_P))·s with Q_N = 2^(b-1), Q_P = Q_N - 1, where the step s is trained (LSQ).

    The gradient passes to w inside the range only. That of s is round(w/s) - w/s inside, -Q_N or Q_P outside, times
    1/√(N·Q_P) for N weights. A start for s is 2·mean(abs w)/√Q_P. (Esser et al. 2020, arXiv 1902.08153.)

    Raises:
        TypeError, ValueError: bits is no integer >= 2, or step is not above 0.
    """
    check_integer("bits", bits, low=2)
    check_number("step", float(step.detach()), low=0, open_low=True)
    below, above = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    share = 1 / math.sqrt(w.numel() * above)
    s = straight_through(step * share, step)  # the value of s, with a smaller gradient
    clipped = (w / s).clamp(-below, above)
    return straight_through(clipped, clipped.round()) * s
