r"""LoLDU: factor W = P·L·diag(D)·U by Gaussian elimination, freeze the triangles, and train the diagonal: r numbers.

Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
arXiv 2410.13618v1.

| in the paper and its code                              | here                                            |
|--------------------------------------------------------|-------------------------------------------------|
| W = P·L·D·U                                            | `ldu`                                           |
| z⁰, the start of z, in eight ways                      | `ldu_factors`: `start_diagonal`                 |
| R = W - s·P·L_r·diag(D_r)·U_r                          | `ldu_residual`                                  |
| y = (R + s·P·L_r·diag(z)·U_r) x                        | `residual_forward`; the layer computes the same |
| ΔW = s·P·L_r·diag(z - z⁰)·U_r                          | `delta_weight`                                  |
| gradient of z                                          | `diagonal_gradient`                             |

Letters: W (m, n), k = min(m, n), `left` = P·L_r (m, r), `right` = U_r (r, n), D the pivots, s a scale.

Deviations. W stays and ΔW is added; the official code puts R in the place of W and rebuilds the whole weight at each
forward. δ = z - z⁰ trains, from 0: the same function, bit-exactly W at the start, and decay pulls to W. Of the code's
starts "s_uniform", "s_normal", "ones" and "zeros" its R knows nothing, so that it starts elsewhere; here R has every
start (`compensated=False`: none). P is an index, applied to L once; the code keeps it dense (m, m). Pivots of 0, by
which the code divides, are replaced (`ldu`). s = 1 by default; the code has α/r. The scale that trains in the paper's
figure, and not in its code, is `trains="both"`. Elimination runs on the CPU: pivots do not depend on the device.

Cost per layer: r trained numbers (r + 1 with the scale), Adam 2r; r(m+n) frozen numbers for the triangles, one LU at
the start, O(mnk); 2r(m+n) extra FLOPs a token until merged. `ldu_factors` has controls, which train other factors.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.ldu_factors import (
    check_elimination,
    check_mark,
    choose_factors,
    factor_mark,
    start_diagonal,
)
from lowrank_ref.adapters.svfit import projected, svfit_update
from lowrank_ref.core.checks import check_matrix, check_number, check_rank
from lowrank_ref.core.layers import AdaptedLinear, weight_of
from lowrank_ref.core.registry import PaperInfo

#: What can train. The official code trains the diagonal, the paper's figure both.
LDU_TRAINS = ("diagonal", "scale", "both")


def ldu(
    W: Float[Tensor, "m n"],
) -> tuple[Int[Tensor, " m"], Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Return order, L, D, U with W = L[order]·diag(D)·U, by elimination with partial pivoting, float32 or wider.

    Row i of W is row order[i] of L·diag(D)·U. L is unit lower triangular with entries in [-1, 1], U unit upper
    triangular. Where a pivot vanishes, next to eps·max(m, n) of the largest number: a row of U that is zero gets a one
    on its diagonal, and D is 0; any other row is divided by its largest entry, and its diagonal is about 0.

    Raises:
        TypeError, ValueError: W is no finite floating-point matrix.

    Example:
        >>> order, L, D, U = ldu(torch.tensor([[1.0, 2.0], [4.0, 4.0]]))
        >>> order.tolist(), L.tolist(), D.tolist(), U.tolist()
        ([1, 0], [[1.0, 0.0], [0.25, 1.0]], [4.0, 1.0], [[1.0, 1.0], [0.0, 1.0]])
    """
    check_matrix("W", W)
    P, L, V = torch.linalg.lu(W.to("cpu", torch.promote_types(W.dtype, torch.float32)))
    D, size = V.diagonal(), V.abs()
    limit = torch.finfo(V.dtype).eps * max(W.shape) * size.max()
    peak = V.gather(1, size.argmax(dim=1, keepdim=True)).squeeze(1)
    D = torch.where(D.abs() > limit, D, peak)  # a pivot of nothing
    dead = D.abs() <= limit  # a row of nothing
    U = torch.where(dead[:, None], torch.eye(*V.shape, dtype=V.dtype), V / torch.where(dead, 1.0, D)[:, None])
    D = torch.where(dead, 0.0, D)
    return P.argmax(dim=1).to(W.device), L.to(W.device), D.to(W.device), U.to(W.device)


def ldu_residual(
    W: Float[Tensor, "m n"],
    left: Float[Tensor, "m r"],
    z: Float[Tensor, " r"],
    right: Float[Tensor, "r n"],
    scale: float = 1.0,
) -> Float[Tensor, "m n"]:
    """Return R = W - s·P·L_r·diag(z)·U_r: with the z that training starts from, the layer starts at W."""
    return W - scale * (left * z @ right)


def residual_forward(
    x: Float[Tensor, "*batch n"],
    rest: Float[Tensor, "m n"],
    left: Float[Tensor, "m r"],
    z: Float[Tensor, " r"],
    right: Float[Tensor, "r n"],
    scale: float | Tensor = 1.0,
) -> Float[Tensor, "*batch m"]:
    """Return (R + s·P·L_r·diag(z)·U_r) x for every row: the official form, to which tests hold the layer equal."""
    return F.linear(x, rest + scale * (left * z @ right))


def delta_weight(
    left: Float[Tensor, "m r"], delta: Float[Tensor, " r"], right: Float[Tensor, "r n"], scale: float = 1.0
) -> Float[Tensor, "m n"]:
    """Return ΔW = s·P·L_r·diag(δ)·U_r."""
    return scale * (left * delta @ right)


def diagonal_gradient(
    left: Float[Tensor, "m r"], G: Float[Tensor, "m n"], right: Float[Tensor, "r n"], scale: float = 1.0
) -> Float[Tensor, " r"]:
    """Return ∂L/∂zᵢ = s·lᵢᵀ G uᵢ, with lᵢ a column of P·L and uᵢ a row of U."""
    return scale * projected(left, G, right)


class LoLDULinear(AdaptedLinear):
    """A frozen linear layer whose pivots train: ΔW = s·P·L_r·diag(z - z⁰)·U_r.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, the first r of the min(m, n) pivots, 1 <= r; None takes all.
        scale: s > 0, the official code's α/r. With Adam it multiplies the learning rate.
        start: z⁰, one of `LDU_STARTS`. Without a trained scale it changes nothing, if compensated.
        compensated: whether R is made with z⁰. If not, it is made with D, and the layer does not start at W.
        trains: "diagonal", "scale" or "both"; the scale is one number a layer, σ, from s.
        factors: "ldu", or a control, see `ldu_factors.choose_factors`.
        store_bases: whether `state_dict` has the factors; loading then refuses those of an unrelated weight. Without
            them it has r numbers and a `ldu_factors.factor_mark`, which loading compares.
        generator: source of what a start or a control draws; the method draws nothing.

    Raises:
        TypeError, ValueError: no finite linear layer, or an argument out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import LoLDULinear
        >>> layer = LoLDULinear(nn.Linear(6, 4))
        >>> layer.delta.shape, layer.delta_weight().abs().max().item()
        (torch.Size([4]), 0.0)
    """

    starts_from_weight = True
    left: Tensor
    right: Tensor
    D: Tensor
    z_start: Tensor
    mark: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int | None = None,
        *,
        scale: float = 1.0,
        start: str = "lu",
        compensated: bool = True,
        trains: str = "diagonal",
        factors: str = "ldu",
        store_bases: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if trains not in LDU_TRAINS:
            raise ValueError(f"trains: got {trains!r}, wanted one of {LDU_TRAINS}")
        check_number("scale", scale, low=0, open_low=True)
        super().__init__(base)
        W = weight_of(base).detach()
        self.rank = min(W.shape) if rank is None else rank
        check_rank(self.rank, W.shape)
        self.scale, self.start, self.compensated = float(scale), start, compensated
        self.trains, self.factors, self.store_bases = trains, factors, store_bases
        left, D, right = choose_factors(*ldu(W), self.rank, factors, generator)
        self.register_buffer("left", left, persistent=store_bases)
        self.register_buffer("D", D, persistent=store_bases)
        self.register_buffer("right", right, persistent=store_bases)
        told = trains != "diagonal" or not compensated  # only then z⁰ changes what is computed
        self.register_buffer("z_start", start_diagonal(D, start, generator), persistent=told)
        if not store_bases:
            self.register_buffer("mark", factor_mark(left, right))
        self.adapter_names = {"diagonal": ("delta",), "scale": ("sigma",), "both": ("delta", "sigma")}[trains]
        self.no_decay = tuple(name for name in self.adapter_names if name == "sigma")
        if trains != "scale":
            self.delta = nn.Parameter(torch.zeros_like(D))
        if trains != "diagonal":
            self.sigma = nn.Parameter(torch.full_like(D[:1], self.scale))

    def coefficients(self) -> Float[Tensor, " r"]:
        """Return what multiplies lᵢuᵢᵀ: σ·z - s·z⁰, with D in the place of z⁰ if not compensated."""
        reference = self.z_start if self.compensated else self.D
        moved = self.z_start - reference + (0 if self.trains == "scale" else self.delta)
        if self.trains == "diagonal":
            return self.scale * moved
        return self.sigma * moved + (self.sigma - self.scale) * reference

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·P·L_r·diag(z - z⁰)·U_r."""
        return delta_weight(self.left, self.coefficients(), self.right)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return P·L_r((z - z⁰)s ⊙ (U_r x))."""
        return svfit_update(x, self.left, self.coefficients(), self.right)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (U_r, P·L_r·diag(s(z - z⁰)), 1): an exact LoRA of rank r, what export to PEFT's format writes."""
        return self.right, self.left * self.coefficients(), 1.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self.store_bases:
            check_mark(state_dict, prefix, self.mark)
        elif self.factors in ("ldu", "normalised"):
            own = {"left": self.left, "D": self.D, "right": self.right}
            check_elimination(state_dict, prefix, weight_of(self.base).detach(), own)
        super()._load_from_state_dict(state_dict, prefix, *args)


PAPER = PaperInfo(
    key="loldu",
    part="adapters",
    name="LoLDU",
    title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    authors=("Yiming Shi", "Jiwei Wei", "Yujia Wu", "Ran Ran", "Chengwei Sun", "Shiyuan He", "Yang Yang"),
    arxiv="2410.13618v1",
    summary="Train the pivots of a weight's LU factorisation, r numbers a layer.",
    use_when="you keep one vector a layer for each task and cannot afford an SVD of each weight at the start",
    instead={
        "svfit": "an SVD of each weight is affordable: the same count of numbers, on directions sorted by size",
        "lora": "a few thousand numbers a layer are at hand",
    },
    needs=("svfit",),
    official_code="SKDDJ/LoLDU",
    code_licence="MIT by its setup.py, without a licence file",
    equations={
        "W = P L D U": "ldu",
        "residual": "ldu_residual",
        "forward": "residual_forward",
        "ΔW": "delta_weight",
        "gradient of z": "diagonal_gradient",
    },
    deviations=(
        "every start of z is compensated in the residual",
        "δ = z - z⁰ trains, from 0, beside the whole W",
        "the permutation is an index, applied once",
        "vanishing pivots are replaced",
        "s = 1",
    ),
    aliases=("LDU", "LU decomposition", "lower-diag-upper", "triangular factors", "minLoLDU"),
    status="checked",
    verified="2026-11-29",
    layers={"LoLDULinear": LoLDULinear},
)
