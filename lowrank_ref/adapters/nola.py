r"""NOLA: the factors of LoRA as mixtures of seeded random matrices; only the mixing coefficients are trained.

Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis", arXiv 2310.02556v2.

| in the paper                                  | here                                                       |
|-----------------------------------------------|------------------------------------------------------------|
| A = Σᵢ αᵢAᵢ, B = Σⱼ βⱼBⱼ                      | `combine`; without holding the bases: `nola_bases.mixture` |
| ΔW = BA                                       | `delta_weight`                                             |
| ∂αᵢ = ⟨∂A, Aᵢ⟩, bases drawn again in backward | `coefficient_gradients`; the backward of `mixture`         |
| start: A₀ random, α = β = 0 (official code)   | `init_coefficients`, `start_matrix`                        |
| coefficients in few bits                      | `nola_bits`: `quantize`, `rounded`; `nola_file`            |
| seed and coefficients are stored              | `recipe` and the coefficients of `NOLALinear`              |

Letters: the paper writes ΔW = AB, so its A and α are our B and β. A is (r, n), B (m, r); k, l count coefficients.

Deviations. The formulas have no A₀, the official language code has: with α = β = 0 nothing would move without it. Here
A₀ is seeded like the bases and costs a checkpoint nothing; `start="random"` is the formula alone, α ~ N(0, 1). The
official code draws from PyTorch's global generator and leaves it in another state; here numbers are a hash of seed and
place (`nola_bases`). Its layers in `llama` merge to the base without the update; here merging rebuilds A and B.

Cost per layer: k + l trained numbers, whatever m, n and r; Adam twice that; a checkpoint two 64-bit numbers more. Each
forward, and each backward again, draws k·r·n + l·m·r random numbers, a block at a time. Backward keeps A and B, of
r(m + n) numbers, and no basis. Merged, nothing is left.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters import lora
from lowrank_ref.adapters.nola_bases import check_recipe, draw_bases, make_recipe, mixture, uniform
from lowrank_ref.adapters.nola_bits import check_bits, rounded
from lowrank_ref.core.checks import check_integer, check_loaded, check_number, check_rank
from lowrank_ref.core.layers import FactoredLinear, weight_of
from lowrank_ref.core.registry import PaperInfo

STARTS = ("offset", "random")


def combine(coefficients: Float[Tensor, " k"], bases: Float[Tensor, "k rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return Σᵢ cᵢAᵢ: one factor of the update.

    Example:
        >>> combine(torch.tensor([1.0, 2.0]), torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])).tolist()
        [[3.0, 2.0]]
    """
    return (coefficients @ bases.flatten(1)).view(bases.shape[1:])


def delta_weight(
    alpha: Float[Tensor, " k"],
    beta: Float[Tensor, " l"],
    A_bases: Float[Tensor, "k r n"],
    B_bases: Float[Tensor, "l m r"],
    A_start: Float[Tensor, "r n"],
    scale: float,
) -> Float[Tensor, "m n"]:
    """Return ΔW = s·(Σⱼ βⱼBⱼ)(A₀ + Σᵢ αᵢAᵢ), of rank at most r, from bases that are all at hand."""
    return scale * combine(beta, B_bases) @ (A_start + combine(alpha, A_bases))


def coefficient_gradients(
    G: Float[Tensor, "m n"],
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    A_bases: Float[Tensor, "k r n"],
    B_bases: Float[Tensor, "l m r"],
    scale: float,
) -> tuple[Float[Tensor, " k"], Float[Tensor, " l"]]:
    """Return ∂L/∂αᵢ = ⟨s·BᵀG, Aᵢ⟩ and ∂L/∂βⱼ = ⟨s·GAᵀ, Bⱼ⟩, where G is the gradient of the whole weight."""
    return torch.einsum("ab,iab->i", scale * B.T @ G, A_bases), torch.einsum("ab,iab->i", scale * G @ A.T, B_bases)


def init_coefficients(
    bases: tuple[int, int], start: str, dtype: torch.dtype, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, " k"], Float[Tensor, " l"]]:
    """Return α = 0 ("offset") or α ~ N(0, 1) ("random"), and β = 0. Either way ΔW = 0, and β has a gradient."""
    device = generator.device if generator is not None else None
    alpha = torch.zeros(bases[0], dtype=dtype)
    if start == "random":
        alpha = torch.randn(bases[0], generator=generator, dtype=dtype, device=device)
    return alpha, torch.zeros(bases[1], dtype=dtype)


def start_matrix(seed: Tensor, rank: int, n: int, dtype: torch.dtype) -> Float[Tensor, "r n"]:
    """Return A₀ ~ U(-1/√n, 1/√n), where LoRA's A starts, as a function of the seed."""
    return uniform(seed, 2, 0, rank * n, dtype).view(rank, n) / n**0.5


class NOLALinear(FactoredLinear):
    """A frozen linear layer with an update s·BA whose factors are mixtures of random matrices drawn from a seed.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, 1 <= r <= min(m, n). It costs time, not trained numbers.
        bases: how many random matrices are mixed into each factor, k = l, or (k, l); each >= 1.
        scale: s > 0. The official code has α/r with its own α: 1 for GPT-2 M, 1/4 for GPT-2 L and LLaMA.
        dropout: probability in [0, 1) of zeroing an input of the update (not of the base).
        start: "offset" or "random", see `init_coefficients`.
        bits: 2 to 8: compute with coefficients that are rounded, their gradients pass straight through; None: as they
            are. May be set later: `layer.bits = 4` rounds a trained layer.
        keep: hold all bases in memory, k·r·n + l·m·r numbers, rather than draw them twice a step. Faster in eager mode;
            a compiled layer draws them all the same, and so does DDP, which writes the seed anew at every step.
        generator: source of the layer's seed, one 63-bit number, and of α where that is random.

    Under DDP all processes take the seed of the first one; no basis is a parameter or a buffer.

    Raises:
        TypeError, ValueError: base is no floating-point linear layer; an argument out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import NOLALinear
        >>> layer = NOLALinear(nn.Linear(64, 64), rank=8, bases=16)
        >>> sum(p.numel() for p in layer.adapter_parameters().values()), layer.lora_factors()[0].shape
        (32, torch.Size([8, 64]))
    """

    adapter_names: tuple[str, ...] = ("alpha", "beta")
    recipe: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        bases: int | tuple[int, int] = 64,
        scale: float = 2.0,
        dropout: float = 0.0,
        start: str = "offset",
        bits: int | None = None,
        keep: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        W = weight_of(base)
        check_rank(rank, W.shape)
        pair = bases if isinstance(bases, tuple) and len(bases) == 2 else (bases, bases)
        for count in pair:
            check_integer("bases", count, low=1)
        check_number("scale", scale, low=0, open_low=True)
        check_number("dropout", dropout, low=0, high=1 - 1e-9)
        if bits is not None:
            check_bits(bits)
        if start not in STARTS:
            raise ValueError(f"start: got {start!r}, wanted one of {STARTS}")
        super().__init__(base)
        self.rank, self.scale, self.start, self.bits, self.keep = rank, float(scale), start, bits, keep
        self._held: dict[int, tuple[Any, Tensor]] = {}  # stream -> of which seed, and its bases
        self.dropout = nn.Dropout(dropout).train(base.training)
        self.register_buffer("recipe", make_recipe(generator).to(W.device))
        dtype = torch.promote_types(W.dtype, torch.float32)
        alpha, beta = init_coefficients(pair, start, dtype, generator)
        self.alpha, self.beta = nn.Parameter(alpha.to(W.device)), nn.Parameter(beta.to(W.device))

    def factors(self) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
        """Return A and B, drawn and mixed. ValueError: the layer is on the meta device, where nothing can be drawn."""
        check_loaded("recipe", self.recipe)
        A = self._mixed(self.alpha, 0, (self.rank, self.in_features))
        if self.start == "offset":
            A = start_matrix(self.recipe[0], self.rank, self.in_features, A.dtype) + A
        return A, self._mixed(self.beta, 1, (self.out_features, self.rank))

    def _mixed(self, c: Tensor, stream: int, shape: tuple[int, int]) -> Tensor:
        c = c if self.bits is None else rounded(c, self.bits)
        if not self.keep or torch.compiler.is_compiling() or self.recipe.is_inference():
            return mixture(c, self.recipe[0], stream, shape)
        tag = (id(self.recipe), self.recipe._version, c.dtype, c.device)
        if self._held.get(stream, (None,))[0] != tag:
            with torch.inference_mode(False):  # who trains later gets the same tensors
                self._held[stream] = tag, draw_bases(self.recipe[0], stream, 0, len(c), shape, len(c), c.dtype)
        with torch.autocast(c.device.type, enabled=False):
            return combine(c, self._held[stream][1])

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·BA."""
        return lora.delta_weight(*self.factors(), self.scale)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·B(A·dropout(x))."""
        return lora.lora_update(self.dropout(x), *self.factors(), self.scale)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, s) with ΔW = s·BA: an ordinary LoRA, which is what export to PEFT's format writes."""
        return *self.factors(), self.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        recipe = state_dict.get(f"{prefix}recipe")
        if recipe is not None and not recipe.is_meta:
            check_recipe(recipe, prefix)
        self._held.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)


PAPER = PaperInfo(
    key="nola",
    part="adapters",
    name="NOLA",
    title="NOLA: Compressing LoRA using Linear Combination of Random Basis",
    authors=(
        *("Soroush Abbasi Koohpayegani", "K L Navaneet", "Parsa Nooralinejad"),
        *("Soheil Kolouri", "Hamed Pirsiavash"),
    ),
    arxiv="2310.02556v2",
    summary="Store a task in a seed and a few hundred coefficients, fewer numbers than LoRA of rank 1.",
    use_when="you store or send thousands of adapters, and fewer numbers than LoRA of rank 1 have to do",
    instead={
        "lora": "an adapter of a few megabytes is small enough: it learns more and trains faster",
        "randlora": "the update needs full rank, and as many numbers as LoRA has are at hand",
    },
    needs=("lora",),
    official_code="UCDvision/NOLA",
    code_licence="MIT",
    equations={
        "A = Σᵢ αᵢAᵢ": "combine",
        "ΔW = BA": "delta_weight",
        "gradients of α and β": "coefficient_gradients",
        "start": "init_coefficients",
    },
    deviations=("A₀ is seeded", "numbers come from a hash of seed and place, not from a generator"),
    aliases=("random basis", "PRANC", "linear combination of random matrices", "coefficients and a seed"),
    status="checked",
    verified="2026-11-28",
    layers={"NOLALinear": NOLALinear},
)
