r"""Bayesian-LoRA: stochastic gates, pushed shut by a prior, choose the rank of each update and the bits of each factor.

Meo et al., "Bayesian-LoRA", arXiv 2406.13046v1. The quantiser is that of Bayesian Bits: van Baalen et al., arXiv
2005.07093. Of the first paper only the abstract could be read: forms follow the code of its first authors.

| in the papers                                           | here                                                |
|---------------------------------------------------------|-----------------------------------------------------|
| ΔW = s·Q(B) diag(c ∘ Q(E)) Q(A)                         | `BayesianLoRALinear`, `gated_delta` of SoRA         |
| x_q = x₂ + z₄(ε₄ + z₈(ε₈ + z₁₆ ε₁₆))                    | `residual_quantize`, `step_sizes`, `codes_of`       |
| z = clip(σ((log u - log(1-u) + φ)/τ)(ζ-γ) + γ, 0, 1)    | `hard_concrete`; q(z > 0) is `open_probability`     |
| z = 1 iff q is large enough, after training             | `deterministic_gates`                               |
| c₁ = 1, c_i = round(z₂ ... z_i)                         | `nested_gates`                                      |
| KL(q‖p) of a chain of gates, and what the code keeps    | `chain_kl`, `chain_penalty`; of a model: `bit_cost` |

Letters: A (r, n), B (m, r), E (r); φ are logits, τ = 2/3, ζ = 1.1, γ = -0.1; β is the largest size in a tensor, λ the
penalty; μ = λ/N multiplies the penalty in the loss.

Deviations. E starts at 0, so that ΔW does; in the code all three are drawn (`start="released"`). The rank is charged by
cumulative products, as nested gates ask; the code takes each q alone. β is the present largest size, without gradient;
in the code it is the largest value at the first forward, and stays. Gates are drawn by an action, once a step
(`GateSampler` in `bit_gates.py`), not once a forward. The frozen weight and activations keep their precision; the code
quantises them too. Gates with φ <= -2 are still drawn (there: never again). No z₂ prunes a tensor.

Cost per layer: r(m+n+1) trained numbers, and r - 1 + 3·log₂(bits/2) logits. A step takes more time and memory than one
of LoRA, for the residuals of all factors; only a packed file is small (`bit_export.py`).
"""

import math
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.ranks.residual_bits import codes_of, residual_quantize, step_sizes
from lowrank_ref.ranks.sora import gated_delta, gated_update, pruned_factors

#: τ, ζ and γ of the hard-concrete gate, and the probability of a shut gate above which it is shut after training.
TAU, ZETA, GAMMA, SHUT = 2 / 3, 1.1, -0.1, 0.34


def hard_concrete(logits: Float[Tensor, "*gates"], noise: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Return z in [0, 1] for φ and log u - log(1 - u). Both ends are reached exactly, and have no gradient."""
    h = torch.sigmoid((noise + logits) / TAU)
    return (h * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(logits: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Return q(z > 0) = σ(φ - τ·log(-γ/ζ))."""
    return torch.sigmoid(logits - TAU * math.log(-GAMMA / ZETA))


def deterministic_gates(logits: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Return 1 where 1 - q < 0.34, that is φ > -0.9353, else 0."""
    return (1 - open_probability(logits) < SHUT).to(logits.dtype)


def nested_gates(z: Float[Tensor, " gates"]) -> Float[Tensor, " r"]:
    """Return c₁ = 1, c_i = round(z₂ ... z_i), with the gradient of the product. ½ rounds to 0.

    Example:
        >>> nested_gates(torch.tensor([0.9, 0.8, 0.6, 1.0])).tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    chain = torch.cat([torch.ones_like(z[:1]) if len(z) else z.new_ones(1), z.cumprod(0)])
    return chain.detach().round() + (chain - chain.detach())


def bernoulli_kl(q: Float[Tensor, "*gates"], penalty: float) -> Float[Tensor, "*gates"]:
    """Return KL(Bern(q)‖Bern(e^-λ)) = -H(q) + λq - (1 - q)·log(1 - e^-λ). λ <= 0 raises a ValueError."""
    check_number("penalty", penalty, low=0, open_low=True)
    negative_entropy = torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)
    return negative_entropy + penalty * q - (1 - q) * math.log(-math.expm1(-penalty))


def chain_kl(q: Float[Tensor, " gates"], penalty: float) -> Float[Tensor, ""]:
    """Return Σ_i (q_1 ... q_(i-1))·KL(q_i): the divergence of a chain in which a gate behind a shut one is shut.

    λ <= 0 raises a ValueError.
    """
    before = torch.cat([torch.ones_like(q[:1]), q[:-1].cumprod(0)])
    return (before * bernoulli_kl(q, penalty)).sum()


def chain_penalty(q: Float[Tensor, " gates"], weights: Float[Tensor, " levels"]) -> Float[Tensor, ""]:
    """Return c_2 + Σ_b c_b·q_4 ... q_b, what the official code keeps of the divergence. 2 bits are always open."""
    return weights[0] + (weights[1:] * q.cumprod(0)).sum()


def _in_place_of(x: Tensor, value: Tensor) -> Tensor:
    """Return the value, with the gradient of x."""
    return value.detach() + (x - x.detach())


class BayesianLoRALinear(LoRALinear):
    """LoRA with a diagonal E, nested gates on its r components, and gates on the bits of A, B and E.

    Gates are deterministic, and every factor holds whole multiples of its step. Once a `GateSampler` was made for the
    model, gates in training mode are those of its last draw: call `eval()` before you merge or export.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, the most it can keep; one component always stays.
        bits: the most bits of a factor, 4, 8, 16 or 32 (float32 cannot tell 32 from none); the least are 2.
        gate: φ, where all logits start. Open for sure at 20; 6 in the paper's configuration.
        start: "base", E = 0, A ~ N(0, 1/n), B ~ N(0, 1/m); or "released", A and B ~ N(0, 0.02²), E ~ N(0, 1), ΔW ≠ 0.
        generator: source of A, B and E.
        **options: alpha, dropout and scaling of `LoRALinear`, which also says what is refused.

    Buffer `limits` holds β of A, B and E where they stay, as in a layer loaded from a file of few bits; 0 is none.

    Raises:
        TypeError, ValueError: an option out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.ranks import BayesianLoRALinear
        >>> layer = BayesianLoRALinear(nn.Linear(6, 4), rank=2).eval()
        >>> layer.learned_rank, layer.learned_bits
        (2, {'A': 16, 'B': 16, 'E': 16})
    """

    adapter_names = ("A", "B", "E", "rank_logits", "bit_logits")
    no_decay = ("E", "rank_logits", "bit_logits")
    limits: Tensor
    rank_noise: Tensor
    bit_noise: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        bits: int = 16,
        gate: float = 6.0,
        start: str = "base",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        check_integer("bits", bits)
        if bits not in (4, 8, 16, 32):
            raise ValueError(f"bits: got {bits}, wanted 4, 8, 16 or 32")
        check_number("gate", gate)
        if start not in ("base", "released"):
            raise ValueError(f"start: got {start!r}, wanted 'base' or 'released'")
        self.__dict__["_released"] = start == "released"  # `initial_factors` reads it, before `nn.Module` is ready
        super().__init__(base, rank, generator=generator, **options)
        self.bits, self.sampled = bits, False
        place = self.A.device if generator is None else generator.device
        E = torch.randn(rank, generator=generator, dtype=self.A.dtype, device=place).to(self.A.device)
        self.E = nn.Parameter(E if start == "released" else torch.zeros_like(E))
        gates = bits.bit_length() - 2
        self.rank_logits = nn.Parameter(self.A.new_full((rank - 1,), float(gate)))
        self.bit_logits = nn.Parameter(self.A.new_full((3, gates), float(gate)))
        self.register_buffer("limits", self.A.new_zeros(3))
        self.register_buffer("rank_noise", torch.zeros_like(self.rank_logits.data), persistent=False)
        self.register_buffer("bit_noise", torch.zeros_like(self.bit_logits.data), persistent=False)

    def initial_factors(self, W: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return A and B, both drawn from normal distributions."""
        dtype, (m, n) = torch.promote_types(W.dtype, torch.float32), W.shape
        place = W.device if generator is None else generator.device
        A = torch.randn(self.rank, n, generator=generator, dtype=dtype, device=place).to(W.device)
        B = torch.randn(m, self.rank, generator=generator, dtype=dtype, device=place).to(W.device)
        return (0.02 * A, 0.02 * B) if self._released else (A / n**0.5, B / m**0.5)

    def quantized(self) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"], Float[Tensor, " r"]]:
        """Return Q(A), Q(B), c ∘ Q(E). Deterministic gates are hard in value; φ gets the gradients of u = ½."""
        drawn, logits = self.sampled and self.training, (self.rank_logits, self.bit_logits)
        noise = (self.rank_noise, self.bit_noise) if drawn else [torch.zeros_like(t) for t in logits]
        c, z = nested_gates(hard_concrete(logits[0], noise[0])), hard_concrete(logits[1], noise[1])
        parts = [residual_quantize(x, limit, gates) for (x, limit), gates in zip(self._ranged(), z)]
        if not drawn:
            c = _in_place_of(c, nested_gates(deterministic_gates(self.rank_logits)))
            parts = [_in_place_of(x, codes * step) for x, (codes, step, _) in zip(parts, self.codes())]
        return parts[0], parts[1], c * parts[2]

    def _ranged(self) -> list[tuple[Tensor, Tensor]]:
        """Return A, B and E, each with its β."""
        pairs = zip((self.A, self.B, self.E), self.limits)
        return [(x, torch.where(limit > 0, limit, x.detach().abs().max())) for x, limit in pairs]

    def ranges(self) -> Float[Tensor, " 3"]:
        """Return β of A, B and E."""
        return torch.stack([limit for _, limit in self._ranged()])

    def codes(self) -> list[tuple[Float[Tensor, "..."], Float[Tensor, ""], Int[Tensor, ""]]]:
        """Return codes, step and count of open bit gates of A, B and E, by deterministic gates: x_q = codes·step."""
        found = []
        for (x, limit), logits in zip(self._ranged(), self.bit_logits.detach()):
            opened = deterministic_gates(logits).cumprod(0).sum().long()
            step = step_sizes(limit, len(logits)).gather(0, opened[None])[0]
            found.append((codes_of(x.detach(), limit, step), step, opened))
        return found

    @property
    def learned_rank(self) -> int:
        """Components that deterministic gates keep, 1 to r."""
        return 1 + int(deterministic_gates(self.rank_logits.detach()).cumprod(0).sum())

    @property
    def learned_bits(self) -> dict[str, int]:
        """Bits of A, B and E by deterministic gates."""
        return {name: 2 ** (1 + int(opened)) for name, (_, _, opened) in zip("ABE", self.codes())}

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·Q(B) diag(c ∘ Q(E)) Q(A)."""
        return gated_delta(*self.quantized(), self.scale)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·Q(B)(c ∘ Q(E) ∘ Q(A)·dropout(x))."""
        return gated_update(self.dropout(x), *self.quantized(), self.scale)

    def step_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (diag(c ∘ Q(E))·Q(A), Q(B), s), all r components of them."""
        A, B, g = self.quantized()
        return g[:, None] * A, B, self.scale

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A', B', s), full-precision products of the quantised factors, without components that are 0."""
        A, B, g = self.quantized()
        return *(pruned_factors(A, B, g) if bool(g.any()) else (A[:1], B[:, :1] * g[:1])), self.scale


PAPER = PaperInfo(
    key="bayesian_lora",
    part="ranks",
    name="Bayesian-LoRA",
    title="Bayesian-LoRA: LoRA based Parameter Efficient Fine-Tuning using Optimal Quantization levels and Rank Values "
    "trough Differentiable Bayesian Gates",
    authors=("Cristian Meo", "Ksenia Sycheva", "Anirudh Goyal", "Justin Dauwels"),
    arxiv="2406.13046",
    summary="Let gates choose, for every matrix, the rank of its update and the bits of its factors.",
    use_when="you must deliver an adapter in few bits, and can afford to train with rounding in the loop",
    instead={"sora": "only the rank is asked for"},
    needs=("sora",),
    official_code="KseniaSycheva/peft",
    code_licence="Apache-2.0",
    equations={"z": "hard_concrete", "q(z > 0)": "open_probability", "c": "nested_gates", "KL": "chain_kl"},
    deviations=("E starts at 0", "the rank is charged by cumulative products", "only A, B and E are quantised"),
    aliases=("B-LoRA", "Bayesian Bits", "mixed precision", "quantisation-aware training", "hard concrete"),
    status="checked",
    verified="2026-11-29",
    layers={"BayesianLoRALinear": partial(BayesianLoRALinear, gate=0.0)},
)
