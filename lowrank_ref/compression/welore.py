"""WeLore: one threshold on the normalised singular values of all matrices says which of them are low-rank.

A trained network is cut without data. Matrices that lost half of their rank become factors, and these alone are
fine-tuned. Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly
Emerge from Low-Rank Gradients", 2407.11239v1 (v2, at ICML 2025, has another title).

| in the paper                                                | here                                            |
|-------------------------------------------------------------|-------------------------------------------------|
| normalised singular values, (σ_i - σ_q)/(σ_1 - σ_q)         | `normalised_spectrum`                           |
| pruned_l = #{i: below k}, r_l = q_l - pruned_l              | `pruned_counts`                                 |
| effective rank reduction ERR = Σ pruned_l / Σ q_l           | `rank_reduction`                                |
| line search of k for a wanted ERR                           | `find_threshold`                                |
| baseline: the same share of every matrix                    | `uniform_pruning`                               |
| low-rank component (LRC): pruned_l / q_l > min_ratio        | `is_low_rank`; `plan_ranks` in `spectral_cut`   |
| W ≈ B·A, B = U_r·√S_r, A = √S_r·V_rᵀ                        | `spectral_factors`, `WeLoreLinear`              |
| fine-tuning of LRCs alone (PEFT)                            | `train_low_rank_only` in `spectral_cut`         |
| Fig. 2: cosine of gradients at two steps; GaLore's subspace | `gradient_cosine`, `subspace_overlap`           |

Letters: W (m, n), q = min(m, n), k the threshold, r what is kept; LRC and N-LRC are low-rank components and the
others. Equations carry no numbers: they follow the official code.

Deviations. The paper says "normalised"; the code's is min-max, "minmax" here. Two more are ours: "max", σ_i/σ_1, and
"tail", the share of the energy from i on, for which one threshold means equal relative error everywhere. A flat
spectrum counts as 1 (the code divides 0 by 0). A bias is kept; the code's layer has none. Factors keep the layer's
dtype; there, always bfloat16. With a covariance of the inputs the SVD is that of W·L, E[xxᵀ] = LLᵀ: the rival.

Cost: an SVD of every matrix, once. A low-rank component has r(m+n) numbers, a dense matrix mn: with min_ratio = 0.5 a
square one always shrinks, and half of the rank gone from a square matrix saves nothing. Trained alone, Adam keeps
2·Σ r(m+n) numbers. Works under DDP and `torch.compile`: the layer is two products. Surgery: `spectral_cut.py`.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.compression.maestro import nested_optimum, prefix_product
from lowrank_ref.core.checks import check_finite, check_integer, check_matrix, check_number, check_rank
from lowrank_ref.core.layers import WeightLayer, dense, is_conv1d, linear_like, weight_of
from lowrank_ref.core.linalg import gram_basis
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.core.weights import trained_factors

#: Ways to make the spectra of different matrices comparable.
NORMALISATIONS = ("minmax", "max", "tail")


def normalised_spectrum(S: Float[Tensor, " q"], by: str = "minmax") -> Float[Tensor, " q"]:
    """Return numbers that never rise along the spectrum, in float64: a threshold on them keeps a prefix.

    Args:
        S: singular values, >= 0, falling, not all zero.
        by: "minmax": (σ_i - σ_q)/(σ_1 - σ_q), from 1 to exactly 0, the official code's. "max": σ_i/σ_1. "tail":
            Σ_{j>=i} σ_j² / Σ_j σ_j², the relative squared error of a cut before i.

    Raises:
        ValueError: another `by`, or no such spectrum.

    Example:
        >>> normalised_spectrum(torch.tensor([5.0, 3.0, 1.0])).tolist()
        [1.0, 0.5, 0.0]
    """
    if by not in NORMALISATIONS:
        raise ValueError(f"by: got {by!r}, wanted one of {NORMALISATIONS}")
    check_finite("S", S)
    if S.ndim != 1 or not len(S) or bool((S.diff() > 0).any()) or float(S[-1]) < 0 or float(S[0]) <= 0:
        raise ValueError(f"S: got shape {tuple(S.shape)}, wanted singular values >= 0, falling, the first above 0")
    S = S.double()
    if by == "tail":
        energy = (S / S[0]).square()
        tails = energy.flip(0).cumsum(0).flip(0)
        return tails / tails[0]
    if by == "max":
        return S / S[0]
    return (S - S[-1]) / (S[0] - S[-1]) if S[0] > S[-1] else torch.ones_like(S)


def pruned_counts(spectra: Sequence[Float[Tensor, " _"]], threshold: float, by: str = "minmax") -> list[int]:
    """Return how many directions of each matrix lie below the threshold k: #{i: σ̃_i < k}. ValueError: k < 0."""
    check_number("threshold", threshold, low=0)
    return [int((normalised_spectrum(S, by) < threshold).sum()) for S in spectra]


def rank_reduction(pruned: Sequence[int], sizes: Sequence[int]) -> float:
    """Return ERR = Σ pruned_l / Σ q_l, a share of rank, not of parameters. ValueError: the lengths differ, or are 0."""
    if not sizes or len(pruned) != len(sizes):
        raise ValueError(f"pruned: got {len(pruned)} counts, wanted one for each of {len(sizes)} matrices")
    return sum(pruned) / sum(sizes)


def find_threshold(
    spectra: Sequence[Float[Tensor, " _"]], target: float, by: str = "minmax", *, step: float | None = 5e-4
) -> float:
    """Return the k on the grid 0, step, …, 1 whose ERR is nearest to the target; the smaller one of a tie.

    With step = None the grid is made of all values of the spectra, than which none is finer: "tail" needs it.

    Raises:
        ValueError: no spectra, a target outside [0, 1], or a step outside (0, 1].
    """
    check_number("target", target, low=0, high=1)
    if not len(spectra):
        raise ValueError("spectra: got none, wanted at least one")
    values = torch.cat([normalised_spectrum(S, by) for S in spectra]).sort().values
    if step is not None:
        check_number("step", step, low=0, high=1, open_low=True)
    grid = values if step is None else torch.arange(round(1 / step) + 1, device=values.device).double() * step
    reached = torch.searchsorted(values, grid).double() / len(values)  # how many are strictly below
    gap = (reached - target).abs()
    return float(grid[int((gap <= gap.min() + 1e-12).int().argmax())])  # 1/3 and 2/3 are equally far from 1/2


def uniform_pruning(sizes: Sequence[int], target: float) -> list[int]:
    """Return ⌊target·q_l⌋ for every matrix, the baseline. ValueError: a target outside [0, 1]."""
    check_number("target", target, low=0, high=1)
    return [int(target * q) for q in sizes]


def is_low_rank(pruned: int, size: int, min_ratio: float = 0.4999) -> bool:
    """Tell a low-rank component: it lost more than `min_ratio` of its rank q, the size. ValueError: size < 1."""
    check_integer("size", size, low=1)
    return pruned / size > min_ratio


def spectral_factors(
    W: Float[Tensor, "m n"], rank: int, covariance: Float[Tensor, "n n"] | None = None
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """Return A, B with B·A the best approximation of this rank: of W, or, with a covariance, of its outputs.

    Without one, A = √S·Vᵀ and B = U·√S, so both have the singular values √σ. With E[xxᵀ] given, E‖(W - BA)x‖² is least.

    Raises:
        TypeError, ValueError: no matrix, another rank, or what `nested_optimum` refuses.
    """
    check_matrix("W", W)
    check_rank(rank, W.shape)
    A, B = nested_optimum(W, covariance)
    return A[:rank].contiguous(), B[:, :rank].contiguous()


def _as_pair(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("G", G)
    check_matrix("H", H)
    if G.shape != H.shape:
        raise ValueError(f"H: got shape {tuple(H.shape)}, wanted {tuple(G.shape)}, that of G")
    return G, H


def gradient_cosine(G: Float[Tensor, "m n"], H: Float[Tensor, "m n"]) -> float:
    """Return the cosine of two gradients read as vectors; 0 if one of them is zero."""
    G, H = (M.double().flatten() for M in _as_pair(G, H))
    return float(F.cosine_similarity(G / G.abs().max().clamp_min(1e-300), H / H.abs().max().clamp_min(1e-300), dim=0))


def subspace_overlap(G: Float[Tensor, "m n"], H: Float[Tensor, "m n"], rank: int) -> float:
    """Return ‖PᵀQ‖_F² / r for the top left singular bases P, Q of both: 1 the same subspace, r/m on average by chance.

    GaLore keeps P for T steps: that loses little where P stays right.
    """
    G, H = _as_pair(G, H)
    return float((gram_basis(G.double(), rank).T @ gram_basis(H.double(), rank)).square().sum() / rank)


class WeLoreLinear(WeightLayer):
    """A low-rank component: two thin matrices in the place of a weight, y = B(Ax) + bias.

    Args:
        A: (r, n); B: (m, r); bias: (m,) or None. The layer trains copies of them.

    Raises:
        TypeError, ValueError: A or B is no finite matrix of floating point, or they do not fit together.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.compression import WeLoreLinear
        >>> layer = WeLoreLinear.from_linear(nn.Linear(8, 6), rank=2)
        >>> layer, sum(p.numel() for p in layer.parameters())
        (WeLoreLinear(8 -> 6, rank 2), 34)
    """

    is_product, weight = True, dense

    def __init__(
        self, A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], bias: Float[Tensor, " m"] | None = None
    ) -> None:
        super().__init__()
        self.A, self.B, self.bias = trained_factors(A, B, bias)
        self.kind: type[nn.Module] = nn.Linear

    @classmethod
    def from_linear(cls, base: nn.Module, rank: int, covariance: Float[Tensor, "n n"] | None = None) -> "WeLoreLinear":
        """Cut the weight of `nn.Linear` or GPT-2's `Conv1D` to this rank. The SVD has float32 or wider."""
        W = weight_of(base).detach()
        A, B = spectral_factors(W, rank, covariance)
        layer = cls(A.to(W.dtype), B.to(W.dtype), cast(Tensor | None, base.bias)).train(base.training)
        layer.kind = type(base) if is_conv1d(base) else nn.Linear
        return layer

    @property
    def rank(self) -> int:
        """How many directions are kept, r."""
        return self.A.shape[0]

    def dense_weight(self) -> Float[Tensor, "m n"]:
        """Return B·A."""
        return prefix_product(self.A, self.B, self.rank)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return B(Ax) + bias."""
        return F.linear(F.linear(x, self.A), self.B, self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """Return a dense layer with the weight B·A, of the class that was replaced: the old size comes back."""
        return linear_like(self.kind, self.dense_weight(), self.bias).train(self.training)

    def extra_repr(self) -> str:
        """Show shape and rank in `print(model)`."""
        return f"{self.A.shape[1]} -> {self.B.shape[0]}, rank {self.rank}"


PAPER = PaperInfo(
    key="welore",
    part="compression",
    name="WeLore",
    title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    authors=("Ajay Jaiswal", "Lu Yin", "Zhenyu Zhang", "Shiwei Liu", "Jiawei Zhao", "Yuandong Tian", "Zhangyang Wang"),
    arxiv="2407.11239v1",
    summary="Cut each matrix where its normalised spectrum falls below one threshold, and tune only what was cut deep.",
    use_when="you want a trained network smaller without data, and can train it a little afterwards",
    instead={"maestro": "one network shall be cut to many sizes", "lora": "the network may stay as large as it is"},
    needs=("maestro", "galore"),
    official_code="VITA-Group/WeLore",
    code_licence="",
    equations={"σ̃": "normalised_spectrum", "ERR": "rank_reduction", "k": "find_threshold", "B·A": "spectral_factors"},
    deviations=(
        "a flat spectrum counts as 1, where the code divides 0 by 0",
        "biases are kept, and factors have the layer's dtype",
        "two more normalisations, and the SVD weighted with the inputs' covariance, are rivals of ours",
    ),
    aliases=("low-rank components", "LRC", "N-LRC", "effective rank reduction", "WeLore-COMP", "WeLore-PEFT"),
    status="draft",
    verified="2026-11-29",
)
