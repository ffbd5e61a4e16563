r"""RandLoRA: a full-rank update at LoRA's price. Frozen random bases, the same for all layers; diagonals are trained.

Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987v2.

| in the paper                                     | here                                                      |
|--------------------------------------------------|-----------------------------------------------------------|
| ΔW = Σⱼ BⱼΛⱼAΓⱼ, j = 1..n, n = ⌈d/r⌉             | `delta_weight`, `block_count`                             |
| ΛⱼAΓⱼ of all j without storing them for backward | `randlora_bases`: `mixed_rows`                            |
| ΔW x, never forming ΔW                           | `randlora_update`                                         |
| (W + ΔW) x, with one product or two              | `fused_linear`, `products.randlora_linear`                |
| Λ = 0, Γ = 1/d                                   | `init_diagonals`                                          |
| scale: official code, PEFT                       | `randlora_scaling`                                        |
| random bases: uniform, normal, binary, sparse    | `randlora_bases`: `random_rows`, `random_a`               |
| PEFT's order of blocks                           | `randlora_bases`: `to_peft`, `from_peft`                  |

Letters: the paper's D × d weight, D >= d, is W (m, n) or its transpose here, so D = max(m, n) and d = min(m, n). The
number of blocks is `blocks`, since n is taken; Λ is `lam` (blocks, r), Γ is `gamma` (blocks, d), one row a diagonal.

Bases and checkpoints. The bases are a function of the generator's *seed*, not of its state: all layers made with one
generator share them. A layer's `recipe` buffer holds the seed and one column of A as a check; with Λ and Γ it is all a
`state_dict` holds. Loading draws the bases of the stored seed again, and refuses if they came out different. Under DDP
all take the recipe of the first process; under FSDP, or where DDP is compiled, start every process with the same seed.
Bases are no buffers: nothing broadcasts, shards or stores them.

Deviations. The scale s is an argument (papers and codes use four conventions). Bases are divided by their
distribution's standard deviation (the code: by the sample's). Columns of a ternary A that are all zero are drawn again:
with them ΔW is not of full rank. The last block keeps rank r when r does not divide d.

Cost per layer: blocks·(r + d) trained numbers, about d²/r + d; Adam twice that; the bases blocks·D·r + r·d once for the
model. Extra FLOPs a token: 2·blocks·r·(D + d); or, where fewer, 2Dd (fused: 0) and 2·blocks·r·D·d a step to make ΔW.
"""

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.randlora_bases import (
    RandomBases,
    checked_bases,
    mixed_rows,
    seed_of,
    shared_bases,
    stacked,
    writes,
)
from lowrank_ref.core.checks import check_number, check_rank
from lowrank_ref.core.layers import AdaptedLinear, weight_of
from lowrank_ref.core.products import computing_dtype, randlora_linear, through_delta
from lowrank_ref.core.registry import PaperInfo


def block_count(d: int, rank: int) -> int:
    """Return ⌈d/r⌉, the smallest number of rank-r blocks that can reach full rank d = min(m, n)."""
    return math.ceil(d / rank)


def randlora_scaling(alpha: float, rank: int, blocks: int = 1) -> float:
    """Return s = α/(r√blocks), the official code's scale (α = 2r: s = 2/√blocks); PEFT leaves √blocks out (s = 20)."""
    return alpha / (rank * math.sqrt(blocks))


def init_diagonals(W: Float[Tensor, "m n"], rank: int) -> tuple[Float[Tensor, "blocks r"], Float[Tensor, "blocks d"]]:
    """Return Λ = 0 and Γ = 1/d, float32 or wider: ΔW = 0, but the gradient of Λ is not, so training can start."""
    d, dtype = min(W.shape), torch.promote_types(W.dtype, torch.float32)
    gamma = torch.full((block_count(d, rank), d), 1 / d, dtype=dtype, device=W.device)
    return gamma.new_zeros(len(gamma), rank), gamma


def delta_weight(
    A: Float[Tensor, "r d"],
    B: Float[Tensor, "blocks D r"],
    lam: Float[Tensor, "blocks r"],
    gamma: Float[Tensor, "blocks d"],
    scale: float,
) -> Float[Tensor, "D d"]:
    """Return ΔW = s·Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ), shape (D, d), of rank d for almost all bases, λ and γ.

    One product of (D, blocks·r) and (blocks·r, d) is the whole sum. A layer with m < n uses the transpose.

    Example:
        >>> one = torch.ones
        >>> delta_weight(one(1, 2), one(2, 2, 1), one(2, 1), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 0.5).tolist()
        [[0.5, 1.0], [0.5, 1.0]]
    """
    return stacked(B).T @ mixed_rows(A, scale * lam, gamma)


def randlora_update(
    x: Float[Tensor, "*batch n"],
    A: Float[Tensor, "r d"],
    B: Float[Tensor, "blocks D r"],
    lam: Float[Tensor, "blocks r"],
    gamma: Float[Tensor, "blocks d"],
    scale: float,
    *,
    wide: bool = False,
) -> Float[Tensor, "*batch m"]:
    """Return x ΔWᵀ for every row of x, without forming ΔW; with `wide`, ΔW (m, n) is the transpose, m = d, n = D."""
    rows, columns = mixed_rows(A, scale * lam, gamma), stacked(B)
    return F.linear(F.linear(x, columns), rows.T) if wide else F.linear(F.linear(x, rows), columns.T)


def fused_linear(
    x: Float[Tensor, "*batch n"], W: Float[Tensor, "m n"], bias: Tensor | None, delta: Float[Tensor, "m n"]
) -> Float[Tensor, "*batch m"]:
    """Return x (W + ΔW)ᵀ + b in one product. The sum is rounded to W's dtype: in bfloat16 small updates are lost."""
    return F.linear(x, (W + delta).to(W.dtype), bias)


class RandLoRALinear(AdaptedLinear):
    """A frozen linear layer with a trained full-rank update s·Σⱼ BⱼΛⱼAΓⱼ.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r of each block, 1 <= r <= min(m, n). *Smaller* trains more: about d²/r numbers.
        scale: s > 0. Tune it or the learning rate, not both.
        dropout: probability in [0, 1) of zeroing an input of the update (not of the base).
        distribution, sparsity: of the bases, see `randlora_bases.random_rows`.
        fused: compute with W + ΔW (`fused_linear`); not together with dropout.
        generator: its seed is that of the bases; layers of equal seed share them.

    Raises:
        TypeError, ValueError: base is no floating-point linear layer; an argument out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import RandLoRALinear
        >>> layer = RandLoRALinear(nn.Linear(64, 64), rank=4)
        >>> sum(p.numel() for p in layer.adapter_parameters().values()), len(layer.lam)
        (1088, 16)
    """

    adapter_names: tuple[str, ...] = ("lam", "gamma")
    no_decay = ("gamma",)  # the gradient of Λ is proportional to Γ: at 0 nothing trains
    bases: RandomBases
    recipe: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        scale: float = 20.0,
        dropout: float = 0.0,
        distribution: str = "uniform",
        sparsity: float = 3.0,
        fused: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        W = weight_of(base)
        check_rank(rank, W.shape)
        check_number("scale", scale, low=0, open_low=True)
        check_number("dropout", dropout, low=0, high=1 - 1e-9)
        if fused and dropout:
            raise ValueError(f"fused: got True with dropout {dropout}, wanted dropout 0 (base and update share x)")
        super().__init__(base)
        self.rank, self.scale, self.distribution, self.sparsity = rank, float(scale), distribution, float(sparsity)
        self.fused, self.dropout = fused, nn.Dropout(dropout).train(base.training)
        self.lam, self.gamma = map(nn.Parameter, init_diagonals(W.detach(), rank))
        self.bases = self._bases(seed_of(generator))
        self.register_buffer("recipe", self.bases.recipe.to(W.device, copy=True))
        self._read: int | None = 0  # how often the recipe was written when it was last read; None: for the last time

    def _bases(self, seed: int) -> RandomBases:
        """Return the bases of this seed, large enough, on the device and in the dtype of Λ."""
        bases = shared_bases(seed, self.rank, self.distribution, self.sparsity, self.lam.device, self.lam.dtype)
        bases.grow(*self._size())
        self._place = self.lam.device
        return bases

    def _size(self) -> tuple[int, int, int]:
        return len(self.lam), max(self.out_features, self.in_features), self.gamma.shape[1]

    def _follow(self) -> None:
        """Have the bases of the recipe, where Λ is. DDP writes the first process's recipe into that of all others."""
        if not (torch.compiler.is_compiling() or self.lam.is_meta):
            if self._read not in (None, writes(self.recipe)):
                self._read = None if torch.distributed.is_initialized() else writes(self.recipe)  # once: it goes on so
                self.bases = checked_bases(self._bases(int(self.recipe[0])), self.recipe)
            if self._place != self.lam.device:  # `load_state_dict(assign=True)` has put Λ elsewhere
                self.bases = self._bases(self.bases.seed)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (A, B, lam, gamma), the arguments of `delta_weight` and `to_peft`."""
        self._follow()
        return *self.bases.slices(*self._size()), self.lam, self.gamma

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return ΔW, or its transpose where m < n."""
        delta = delta_weight(*self.factors(), self.scale)
        return delta.T if self.out_features < self.in_features else delta

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return dropout(x) ΔWᵀ through the factors."""
        return randlora_update(self.dropout(x), *self.factors(), self.scale, wide=self.out_features < self.in_features)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return base(x) + x ΔWᵀ, shape (..., m): through ΔW (`randlora_linear`) if fused or where FLOPs are fewer."""
        blocks, D, d = self._size()
        pays = self.fused or through_delta(x.shape[:-1].numel(), D, d, blocks * self.rank)
        if not (pays and self.as_one(x)):
            return super().forward(x)
        self._follow()
        A, B = self.bases.slices(blocks, D, d, computing_dtype(x))
        frozen = (weight_of(self.base), cast(Any, self.base.bias), A, stacked(B))
        return randlora_linear(x, *frozen, self.lam, self.gamma, self.scale, fused=self.fused)

    def _apply(self, fn: Any, recurse: bool = True) -> "RandLoRALinear":
        super()._apply(fn, recurse)
        self.bases = self._bases(self.bases.seed)  # the bases move with the model, once for all layers
        self.recipe = self.bases.recipe.to(self.lam.device, copy=True)  # `to_empty` would leave none
        self._read = 0
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        recipe = state_dict.get(f"{prefix}recipe")
        if recipe is not None and recipe.shape == self.recipe.shape and not recipe.is_meta:
            self.bases = checked_bases(self._bases(int(recipe[0])), recipe, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read = writes(self.recipe)


PAPER = PaperInfo(
    key="randlora",
    part="adapters",
    name="RandLoRA",
    title="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    authors=(
        *("Paul Albert", "Frederic Z. Zhang", "Hemanth Saratchandran"),
        *("Cristian Rodriguez-Opazo", "Anton van den Hengel", "Ehsan Abbasnejad"),
    ),
    arxiv="2502.00987v2",
    summary="Train an update of full rank with as few numbers as LoRA, where the update you need has a flat spectrum.",
    use_when="you need a change of high rank at LoRA's size; expect 1.7 times LoRA's time a step",
    instead={"lora": "the change is of low rank, or time a step is what is short"},
    needs=("lora",),
    official_code="PaulAlbert31/RandLoRA",
    equations={"ΔW = Σⱼ BⱼΛⱼAΓⱼ": "delta_weight", "ΔW x": "randlora_update", "initialisation": "init_diagonals"},
    deviations=("the scale is an argument", "all-zero columns of a ternary A are drawn again"),
    aliases=("random bases", "full-rank adapters", "ternary bases"),
    status="checked",
    verified="2026-11-24",
    layers={"RandLoRALinear": RandLoRALinear},
)
