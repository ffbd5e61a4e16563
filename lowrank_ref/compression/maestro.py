"""Maestro: train W = B·A at full rank, but let each step use only the first b components, so that they get an order.

The trained network holds a family of smaller ones: cut every product after its first components, and what is left is
a working network. Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", 2308.14929.

| in the paper                                          | here                                                 |
|-------------------------------------------------------|------------------------------------------------------|
| y = B[:, :b]·A[:b]·x + bias                           | `prefix_product`, `MaestroLinear`                    |
| start: W = UΣVᵀ, A = √Σ·Vᵀ, B = U·√Σ                  | `nested_optimum`                                     |
| nested objective: mean over all (layer, b)            | `rank_pairs`; `RankSampler` in `maestro_training.py` |
| R = Σ_b ‖A[b:]‖ + ‖B[:, b:]‖, hierarchical lasso      | `group_lasso`                                        |
| I_b = ‖A[b:]‖·‖B[:, b:]‖, keep I_b >= ε               | `importance`; `RankShrinker`                         |
| ‖A_b‖·‖B_b‖, the same without tails                   | `strengths`                                          |
| cut to a budget, then slice (the code has no budget)  | `ranks_within`; `deployed` in `maestro_layers.py`    |

Letters: W (m, n), A (r, n), B (m, r), r = min(m, n); "b:" means components b to r, counted from 1. A convolution is its
matrix (m, C·k·k). Equations carry no numbers here: they follow the official code, in the letters of this book.

Deviations. Ranks are integers; the official code passes b/r and takes ⌈r·(b/r)⌉, which rounding can raise by one.
What was dropped cannot come back; there, a mask may grow again. Dropped rows stay in the penalty, as there. A layer
keeps at least one component; there, none may be left. Roots carry +1e-12, as the gradient of √0 is not a number. Left
out: the pass of the whole network as teacher (on by default there, off in the scripts) and the lasso of single rows.

Cost per layer: r(m+n) trained numbers, up to twice the dense layer's mn; cut at b, b(m+n) numbers and 2b(m+n) FLOPs a
token. `deployed` builds small layers, or dense ones where b(m+n) > mn. Convolutions and surgery: `maestro_layers.py`;
samplers and shrinking: `maestro_training.py`. Works under DDP if all processes seed their sampler alike.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_finite, check_matrix, check_number, check_rank
from lowrank_ref.core.layers import WeightLayer, is_conv1d, linear_like, weight_of
from lowrank_ref.core.linalg import svd
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.core.weights import trained_factors


def prefix_product(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], rank: int) -> Float[Tensor, "m n"]:
    """Return B[:, :b]·A[:b], the weight after a cut at b = rank; a ValueError unless 1 <= rank <= r."""
    check_rank(rank, (B.shape[1], A.shape[0]))
    return B[:, :rank] @ A[:rank]


def nested_optimum(
    C: Float[Tensor, "m n"], covariance: Float[Tensor, "n n"] | None = None
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return A, B whose every prefix minimises E‖Cx - B[:, :b]A[:b]x‖²: what ordered training of a linear map finds.

    With white inputs it is the SVD C = UΣVᵀ, A = √Σ·Vᵀ, B = U·√Σ. With E[xxᵀ] = LLᵀ it is that of C·L, so that
    directions count by their use; C = I gives PCA.

    Args:
        C: target (m, n), or a weight to split.
        covariance: E[xxᵀ] (n, n), symmetric positive definite; None stands for the identity.

    Raises:
        TypeError, ValueError: C is no finite matrix, or covariance has another shape or is not positive definite.
    """
    check_matrix("C", C)
    if covariance is None:
        U, S, Vh = svd(C)
        return S.sqrt()[:, None] * Vh, U * S.sqrt()
    check_matrix("covariance", covariance)
    if covariance.shape != (C.shape[1], C.shape[1]):
        raise ValueError(f"covariance: got shape {tuple(covariance.shape)}, wanted {(C.shape[1], C.shape[1])}")
    L, bad = torch.linalg.cholesky_ex(covariance)
    if bad:
        raise ValueError("covariance: got a matrix without a Cholesky factor, wanted a positive definite one")
    U, S, Vh = svd(C @ L)
    return torch.linalg.solve_triangular(L, S.sqrt()[:, None] * Vh, upper=False, left=False), U * S.sqrt()


def tail_norms(M: Float[Tensor, "r d"]) -> Float[Tensor, " r"]:
    """Return ‖M[b:]‖_F for b = 1 to r, the norms of rows b to r, in float32 or wider; a falling sequence."""
    squares = M.to(torch.promote_types(M.dtype, torch.float32)).square().sum(dim=1)
    return (squares.flip(0).cumsum(0).flip(0) + 1e-12).sqrt()


def group_lasso(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> Float[Tensor, ""]:
    """Return R = Σ_b ‖A[b:]‖ + ‖B[:, b:]‖. Component b lies in b of the r groups, so late ones pay most."""
    return tail_norms(A).sum() + tail_norms(B.T).sum()


def importance(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> Float[Tensor, " r"]:
    """Return I_b = ‖A[b:]‖·‖B[:, b:]‖ for every b: never rising, so that a threshold keeps a prefix."""
    return tail_norms(A) * tail_norms(B.T)


def strengths(A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]) -> Float[Tensor, " r"]:
    """Return ‖A_b‖·‖B_b‖ for every b, the norm of component b's part of the product; after an SVD it is σ_b."""
    return A.norm(dim=1) * B.norm(dim=0)


def rank_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return all pairs (layer, b) with 1 <= b <= ranks[layer]: one pass of the sampler, before it is shuffled."""
    return [(layer, b) for layer, rank in enumerate(ranks) for b in range(1, rank + 1)]


def ranks_within(importances: Sequence[Float[Tensor, " _"]], costs: Sequence[float], budget: float) -> list[int]:
    """Return the ranks left by the lowest common threshold whose layers together cost at most the budget.

    A layer's rank is the number of its components at or above the threshold.

    Args:
        importances: one sequence per layer. `strengths(A, B)` or singular values, divided by the norm of the layer's,
            allot well; `importance(A, B)` does not: a tail of many small components looks strong, so wide layers win.
        costs: price of one component of each layer, > 0: m + n for parameters, times the places for FLOPs.
        budget: what Σ rank·cost may reach.

    Returns:
        One rank per layer, each at least 1.

    Raises:
        ValueError: the lengths differ, a number is not finite, or one component in every layer is already too much.
    """
    if not importances or len(importances) != len(costs):
        raise ValueError(f"costs: got {len(costs)}, wanted one for each of {len(importances)} layers, at least one")
    for cost, sizes in zip(costs, importances):
        check_number("costs", float(cost), low=0, open_low=True)
        check_finite("importances", sizes)
    check_number("budget", budget)
    found = [1] * len(costs)
    if sum(costs) > budget:
        raise ValueError(f"budget: got {budget}, wanted at least {sum(costs)}, the price of rank 1 everywhere")
    for threshold in torch.cat([i.double() for i in importances]).sort(descending=True).values:
        ranks = [max(1, int((i.double() >= threshold).sum())) for i in importances]
        if sum(rank * cost for rank, cost in zip(ranks, costs)) > budget:
            break
        found = ranks
    return found


class MaestroLinear(WeightLayer):
    """A linear layer as the product of two trained factors, of which the first `width` components act.

    Args:
        A: (r, n); B: (m, r); bias: (m,) or None. The layer trains copies of them; floating-point matrices that do not
            fit together, or are none, raise a TypeError or ValueError.

    Attributes:
        rank: components kept; it falls from r as training shrinks the layer, and travels in the state dict.
        cut: components in use in training mode, or None for all that are kept. Set by a sampler, not saved.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.compression import MaestroLinear
        >>> MaestroLinear.from_linear(nn.Linear(8, 6)).plain(rank=1)[0]
        Linear(in_features=8, out_features=1, bias=False)
    """

    is_product, weight = True, property(lambda self: self.dense_weight(self.width))

    def __init__(
        self, A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], bias: Float[Tensor, " m"] | None = None
    ) -> None:
        super().__init__()
        self.A, self.B, self.bias = trained_factors(A, B, bias)
        self.rank, self.cut, self.kind = A.shape[0], cast(int | None, None), cast(type[nn.Module], nn.Linear)

    @classmethod
    def from_linear(cls, base: nn.Module) -> "MaestroLinear":
        """Split the weight of `nn.Linear` or GPT-2's `Conv1D` by its SVD; the function stays the same."""
        W = weight_of(base).detach()
        A, B = nested_optimum(W)
        layer = cls(A.to(W.dtype), B.to(W.dtype), cast(Tensor | None, base.bias)).train(base.training)
        layer.kind = type(base) if is_conv1d(base) else nn.Linear
        return layer

    @property
    def width(self) -> int:
        """Components in use now, which is the cut in training mode, if there is one, and never more than the rank."""
        return min(self.cut, self.rank) if self.training and self.cut is not None else self.rank

    def kept(self) -> tuple[Float[Tensor, "b n"], Float[Tensor, "m b"]]:
        """Return the factors of the kept components, A[:rank] and B[:, :rank]."""
        return self.A[: self.rank], self.B[:, : self.rank]

    def dense_weight(self, width: int | None = None) -> Float[Tensor, "..."]:
        """Return what the first `width` components multiply to, or all kept ones, in the shape of the old layer."""
        return prefix_product(self.A, self.B, self.rank if width is None else width)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return B[:, :b](A[:b]x) + bias with b = `width`."""
        return F.linear(F.linear(x, self.A[: self.width]), self.B[:, : self.width], self.bias)

    def plain(self, rank: int | None = None) -> nn.Module:
        """Return new ordinary layers cut at `rank`: two thin ones or a smaller dense one. ValueError: another rank."""
        rank = self.rank if rank is None else rank
        check_rank(rank, (self.rank, self.rank))
        m, n = len(self.B), self.A.shape[1]
        if rank * (m + n) > m * n:
            return self.first(prefix_product(self.A, self.B, rank), self.bias).train(self.training)
        thin = nn.Sequential(self.first(self.A[:rank], None), self.second(self.B[:, :rank], self.bias))
        vars(thin)["taken"] = "factored"  # so that `save_pretrained` says what `from_pretrained` could not build
        return thin.train(self.training)

    def first(self, W: Tensor, bias: Tensor | None) -> nn.Module:
        """Return an ordinary layer with this weight, of the class that was replaced, that reads what this one reads."""
        return linear_like(self.kind if bias is not None else nn.Linear, W, bias)  # a Conv1D has a bias always

    def second(self, W: Tensor, bias: Tensor | None) -> nn.Module:
        """Return an ordinary layer with this weight that mixes components into outputs."""
        return linear_like(nn.Linear, W, bias)

    def get_extra_state(self) -> Tensor:
        """Let the state dict carry the rank."""
        return torch.tensor(self.rank)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the rank from a state dict. ValueError: more than there are components."""
        check_rank(int(state), self.A.shape[:1], "rank")
        self.rank = int(state)

    def extra_repr(self) -> str:
        """Show shape and rank in `print(model)`."""
        return f"{self.A.shape[1]} -> {self.B.shape[0]}, rank {self.rank} of {self.A.shape[0]}"


PAPER = PaperInfo(
    key="maestro",
    part="compression",
    name="Maestro",
    title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    authors=("Samuel Horváth", "Stefanos Laskaridis", "Shashank Rajput", "Hongyi Wang"),
    arxiv="2308.14929",
    summary="Train every layer as an ordered product of factors, so that one network contains all its smaller ones.",
    use_when="you want one network that can be cut to many sizes, and its ranks found while it trains",
    instead={"trp": "one small network is enough: the lasso or an SVD of a trained network is simpler and as good"},
    needs=("primer",),
    official_code="SamuelHorvath/Maestro-LoD",
    code_licence="Apache-2.0",
    equations={"cut at b": "prefix_product", "start": "nested_optimum", "R": "group_lasso", "I_b": "importance"},
    deviations=(
        "ranks are passed as integers, not as shares",
        "what was dropped cannot come back, and each layer keeps at least one component",
    ),
    aliases=("ordered dropout", "low-rank ordered decomposition", "LoD", "progressive shrinking", "nested networks"),
    status="draft",
    verified="2026-11-28",
)
