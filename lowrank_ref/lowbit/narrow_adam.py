"""AdamW whose weights and moments are stored in narrow formats, each by a quantiser of its own; emulated.

Per step: both moments are updated in full precision, the weight takes its step with these fresh moments, and then all
three are rounded for storage, as in torchao's low-bit optimizers. With no quantiser it is `torch.optim.AdamW`.

    m ← β₁m + (1 - β₁)g,  v ← β₂v + (1 - β₂)g²
    u = -η·(m/(1 - β₁ᵗ)) / (√(v/(1 - β₂ᵗ)) + ε) - ηλp
    p ← Q_w(p + u),  m ← Q_m(m),  v ← Q_v(v)

With `compensated`, Kahan's sum: p' = Q_w(p + (u + c)), and c = Q_w(u + c - (p' - p)) is what the rounding left over.
Packed 8-bit moments, which do save memory, are in `core.quantize`; GaLore's 8-bit class uses them.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_ref.core.checks import check_number
from lowrank_ref.lowbit.quantizers import Quantizer


class NarrowAdamW(Optimizer):
    """AdamW with quantised storage.

    Args:
        params: tensors or groups, as of every optimizer.
        lr: η >= 0.
        betas: β₁, β₂ in [0, 1).
        eps: ε >= 0, added to the root.
        weight_decay: λ >= 0, decoupled.
        weight, first, second: quantisers of weights, first and second moments; None stores them in full precision.
        compensated: Kahan's sum for the weights; needs `weight`.
        generator: for stochastic rounding; its state is not part of `state_dict`.

    Raises:
        TypeError, ValueError: a number out of range, or compensated without `weight`.

    Example:
        >>> import torch
        >>> from lowrank_ref.lowbit import QUANTIZERS, NarrowAdamW
        >>> p = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = NarrowAdamW([p], lr=2**-10, weight=QUANTIZERS["bf16"])
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.tolist()  # 1 - 2⁻¹⁰ is nearer to 1 than to the bf16 number below
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight: Quantizer | None = None,
        first: Quantizer | None = None,
        second: Quantizer | None = None,
        compensated: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        check_number("lr", lr, low=0)
        check_number("eps", eps, low=0)
        check_number("weight_decay", weight_decay, low=0)
        for beta in betas:
            check_number("betas", beta, low=0, high=1)
            if beta == 1:
                raise ValueError(f"betas: got {betas}, wanted numbers in [0, 1)")
        if compensated and weight is None:
            raise ValueError("compensated: got True without a quantiser `weight`, wanted both")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.weight, self.first, self.second = weight, first, second
        self.compensated, self.generator = compensated, generator

    def _stored(self, x: Tensor, quantizer: Quantizer | None) -> Tensor:
        return x if quantizer is None else quantizer(x, generator=self.generator)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. Parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = 0
            state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            if self.compensated:
                state["rest"] = torch.zeros_like(p)
        state["step"] += 1
        m = state["m"].lerp(grad, 1 - beta1)
        v = state["v"] * beta2 + grad.square() * (1 - beta2)
        root = v.sqrt() / math.sqrt(1 - beta2 ** state["step"]) + group["eps"]
        update = m / root * (-group["lr"] / (1 - beta1 ** state["step"])) - group["lr"] * group["weight_decay"] * p
        if self.compensated:
            update = update + state["rest"]
        new = self._stored(p + update, self.weight)
        if self.compensated:
            state["rest"] = self._stored(update - (new - p), self.weight)
        p.copy_(new)
        state["m"], state["v"] = self._stored(m, self.first), self._stored(v, self.second)
