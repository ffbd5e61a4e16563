r"""HGF: a ternary layer with a small full-precision low-rank path beside it, added through one trained gate.

Trejo Pizzo, "HGF: Hybrid Gated Flow - Stabilizing 1.58-bit LLMs via Selective Low-Rank Correction", arXiv 2602.05269v1.

| in the paper                                        | here                                         |
|-----------------------------------------------------|----------------------------------------------|
| two streams, y = ternary(x) + g·BAx                 | `gated_correction`, `HGFLinear`              |
| scalar gates with warm-up, regularisation, freeze   | `HGFLinear.gate`, `GateSchedule`, `gate_penalty` |
| 12 to 15 % more memory than the ternary weights     | `correction_bytes`, `memory_overhead`        |
| a small path that starts at 0                       | A and B as LoRA's, `lora.init_factors` [choice] |
| the ternary backbone (BitNet b1.58)                 | `ternary.py`                                 |
| differential attention                              | `differential.py`                            |

**Reconstructed.** No code is public; only abstract, introduction and summaries of the paper could be read. Theirs: a
ternary backbone, a low-rank path added through one trained scalar gate per projection, differential attention, three
phases of the gate, its resting value near 0.1, four losses. Ours, marked [choice] below: what the path reads, how A, B
and gate start, g = tanh θ, the ramp of the warm-up, the penalty λ Σ abs g, which projections are corrected.

Deviations. θ always gets a gradient, exactly zero while the gate is held: so the layer keeps one graph under
`torch.compile`, and every parameter its place under DDP (FSDP2 refuses a scalar). Give θ no weight decay.
Cost per layer: r(m+n)+1 trained numbers besides the latent weight; 2r(m+n) extra FLOPs a token, which no merge removes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.lora import init_factors
from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_finite, check_integer, check_number
from lowrank_ref.core.layers import weight_of
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.lowbit import fast
from lowrank_ref.lowbit.ternary import BitLinear, KeepsWide, PackedLinear, packed_bytes


def gated_correction(
    x: Float[Tensor, "*batch n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], gate: Float[Tensor, ""]
) -> Float[Tensor, "*batch m"]:
    """Return g·B(Ax) for every row. x is normalised but not quantised [choice]."""
    return gate.to(x.dtype) * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def gate_penalty(gates: Float[Tensor, " layers"], strength: float = 1e-5) -> Float[Tensor, ""]:
    """Return λ Σ abs g, λ >= 0, to be added to the loss [choice]. Gates that are held get no gradient from it.

    Adam divides a gradient by its size: λ need only outweigh what the loss asks of a gate to close it. λ = 1e-3 closed
    those of a 25 M model within 200 steps, and of a LLaMA of width 64 (every abs g < 0.001 but one, 0.02); there 1e-4
    closed one or two of six, and at 1e-5 all ended between 0.04 and 0.33, as without a penalty (0.04 to 0.36).

    Raises:
        TypeError, ValueError: strength is not a number >= 0.
    """
    check_number("strength", strength, low=0)
    return strength * gates.abs().sum()


def correction_bytes(m: int, n: int, rank: int, *, bytes_each: int = 2) -> int:
    """Bytes of A and B: r(m+n) numbers of 16 bits."""
    return bytes_each * rank * (m + n)


def memory_overhead(corrected: Sequence[tuple[int, int]], ternary: Sequence[tuple[int, int]], rank: int) -> float:
    """Return bytes of the corrections over bytes of all packed ternary weights.

    For square d × d matrices this is 16r/d if all are corrected, and 4r/d if q, k and v are, out of the 12d² weights of
    a block. The paper's 12 to 15 % then mean r near d/32.

    Args:
        corrected, ternary: shapes (m, n) of the corrected matrices, and of all ternary ones, they among them.
        rank: r.
    """
    return sum(correction_bytes(m, n, rank) for m, n in corrected) / sum(packed_bytes(m, n) for m, n in ternary)


class HGFLinear(KeepsWide):
    """A ternary layer plus a gated low-rank path: y = x̃ W̃ᵀ + g·B(A x̄), where x̄ is the layer's normalised input.

    The gate is g = open·tanh θ + held. The buffers `open` and `held` are set by `GateSchedule`; at first it is open.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`, copied.
        rank: r, 1 <= r <= min(m, n).
        gate: g at the start, in (-1, 1) and not 0: at g = 0 neither B nor θ would ever move.
        sub_norm: RMSNorm inside the layer, as in `BitLinear`.
        generator: source of A.

    Raises:
        TypeError, ValueError: base is no finite floating-point linear layer; rank or gate out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.lowbit import HGFLinear
        >>> round(HGFLinear(nn.Linear(8, 4), rank=2).gate().item(), 4)
        0.1
    """

    wide = ("theta", "open", "held")
    open: Tensor
    held: Tensor
    ternary: BitLinear | PackedLinear
    weight = property(lambda self: self.ternary.dense_weight() + self.gate() * (self.B @ self.A))

    def __init__(
        self,
        base: nn.Module,
        rank: int = 16,
        *,
        gate: float = 0.1,
        sub_norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        check_number("gate", gate, low=-1 + 1e-6, high=1 - 1e-6)
        if gate == 0:
            raise ValueError("gate: got 0, wanted another number: behind a closed gate nothing trains")
        A, B = init_factors(weight_of(base).detach(), rank, generator)
        super().__init__()
        self.rank = rank
        self.ternary = BitLinear(base, sub_norm=sub_norm)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.theta = nn.Parameter(torch.full_like(B[0, 0], math.atanh(gate)))
        self.register_buffer("open", torch.ones_like(B[0, 0]))
        self.register_buffer("held", torch.zeros_like(B[0, 0]))
        self.train(base.training)

    def gate(self) -> Float[Tensor, ""]:
        """Return g; its gradient reaches θ only while the gate is open."""
        return self.open * self.theta.tanh() + self.held

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return ternary(x) + g·B(A x̄), shape (..., m), in x's dtype."""
        inner = self.ternary.normalised(x)
        if isinstance(self.ternary, PackedLinear) and fast.takes(inner) and not torch.is_grad_enabled():
            t = self.gate() * F.linear(inner, self.A.to(inner.dtype))
            y = fast.corrected_linear(inner, self.ternary.codes, self.ternary.beta, self.B, t)
        else:
            y = self.ternary.product(inner) + gated_correction(inner, self.A, self.B, self.gate())
        return (y if self.ternary.bias is None else y + self.ternary.bias).to(x.dtype)

    @torch.no_grad()
    def fold_gate(self, dtype: torch.dtype = torch.float16) -> None:
        """Write g into B and store A and B in 16 bits, for inference, in place. ValueError: a number is too large."""
        B, A = (self.gate() * self.B).to(dtype), self.A.to(dtype)
        check_finite("g·B", B)
        check_finite("A", A)
        self.B.data, self.A.data = B, A
        self.open.zero_(), self.held.fill_(1)
        self.requires_grad_(False)


def hgf_layers(model: nn.Module) -> list[HGFLinear]:
    """Return all gated layers of a model. ValueError: there is none."""
    layers = [module for module in model.modules() if isinstance(module, HGFLinear)]
    if not layers:
        raise ValueError("model: got no HGFLinear, wanted at least one")
    return layers


def gates(model: nn.Module) -> Float[Tensor, " layers"]:
    """Return the gates of all layers of a model, with their gradients."""
    return torch.stack([layer.gate() for layer in hgf_layers(model)])


class GateSchedule(Action):
    """The three phases of all gates of a model: a ramp from 0 to g₀, training, and frozen. Attach it to the optimizer.

    Args:
        model: holds `HGFLinear` layers.
        warmup: T_w, steps in which the gate is held at g₀·t/T_w [choice: 5 % of all steps]; 0 for none.
        freeze: T_f > T_w, the step from which the gate is held where it stands [choice: 60 % of all steps].

    Raises:
        TypeError, ValueError: no such layer; warmup or freeze is no integer, or out of order.

    Example:
        >>> from torch import nn, optim
        >>> from lowrank_ref.lowbit import GateSchedule, HGFLinear
        >>> model = HGFLinear(nn.Linear(8, 4), rank=2)
        >>> schedule = GateSchedule(model, warmup=50, freeze=600).attach(optim.AdamW(model.parameters()))
    """

    def __init__(self, model: nn.Module, *, warmup: int, freeze: int) -> None:
        check_integer("warmup", warmup, low=0)
        check_integer("freeze", freeze, low=warmup + 1)
        self.layers, self.warmup, self.freeze, self.steps = hgf_layers(model), warmup, freeze, 0
        self._apply()

    def act(self) -> None:
        """Count one step and set all gates for the next one."""
        self.steps += 1
        self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        for layer in self.layers:
            if self.steps < self.warmup:
                layer.open.zero_(), layer.held.copy_(layer.theta.tanh() * (self.steps / self.warmup))
            elif self.steps < self.freeze:
                layer.open.fill_(1), layer.held.zero_()
            elif self.steps == self.freeze:
                layer.held.copy_(layer.theta.tanh()), layer.open.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the count of steps. What the gates are held at stands in the model's own state."""
        return {"steps": self.steps, "warmup": self.warmup, "freeze": self.freeze}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state; the model's is loaded first or afterwards. ValueError: of another schedule."""
        if {**state, "steps": 0} != {**self.state_dict(), "steps": 0}:
            raise ValueError(f"state: got {state}, wanted a schedule with {self.state_dict()}")
        self.steps = state["steps"]


PAPER = PaperInfo(
    key="hgf",
    part="lowbit",
    name="HGF",
    title="Hybrid Gated Flow (HGF): Stabilizing 1.58-bit LLMs via Selective Low-Rank Correction",
    authors=("David Alejandro Trejo Pizzo",),
    arxiv="2602.05269v1",
    summary="Keep the weights ternary and win part of the loss back with a thin full-precision path beside them.",
    use_when="you train from scratch for a device that must hold the weights in two bits",
    instead={"low_precision": "four or eight bits are small enough"},
    needs=("lora",),
    equations={
        "gated fusion": "gated_correction",
        "gates": "GateSchedule",
        "regularisation": "gate_penalty",
        "memory": "memory_overhead",
    },
    deviations=("reconstructed: what the path reads, starts, schedule and penalty are chosen here",),
    aliases=("BitNet b1.58", "1.58-bit", "ternary weights", "BitLinear", "differential attention"),
    status="draft",
    verified="2026-11-24",
)
