"""Loss scaling: what keeps raw float16 gradients from vanishing (Micikevicius et al. 2018, arXiv 1710.03740)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_integer, check_number


class LossScale:
    """Multiplies the loss so that float16 gradients do not vanish; skips a step whose gradients overflow.

    The factor is halved after an overflow, and doubled after `every` good steps, as `torch.amp.GradScaler` does.

    Args:
        scale: the first factor, > 0.
        every: good steps until it doubles.

    Raises:
        TypeError, ValueError: scale is not above 0, or every no integer >= 1.

    Example:
        >>> import torch
        >>> from lowrank_ref.lowbit import LossScale
        >>> LossScale(1024.0).scaled(torch.tensor(2.0)).item()
        2048.0
    """

    def __init__(self, scale: float = 2.0**16, *, every: int = 2000) -> None:
        check_number("scale", scale, low=0, open_low=True)
        check_integer("every", every, low=1)
        self.scale, self.every, self.good = float(scale), every, 0

    def scaled(self, loss: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return loss · scale, on which `backward` is called."""
        return loss * self.scale

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide all gradients by the factor and step, or skip the step; return whether it was taken."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:
            grad.div_(self.scale)
        if not all(bool(grad.isfinite().all()) for grad in grads):
            self.scale, self.good = self.scale / 2, 0
            return False
        optimizer.step()
        self.good += 1
        if self.good == self.every:
            self.scale, self.good = self.scale * 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the factor and the count of good steps."""
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state."""
        self.scale, self.good = float(state["scale"]), int(state["good"])
