r"""LoRA-SB: train an r × r core between two frozen frames that come from the first step of full fine-tuning.

Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
Fine-Tuning", arXiv 2411.19557v4. The form of the update is LoRA-XS's: Bałazy et al., arXiv 2405.17604v3.

| in the papers                                | here                          |
|----------------------------------------------|-------------------------------|
| W₀x + s·B R A x                              | `core_update`, `delta_weight` |
| ΔW₁ = -η·sign(Σ∇L)                           | `first_step`                  |
| LoRA-SB: B = U_r, R = S_r, A = V_rᵀ of ΔW₁   | `update_approximation`        |
| (1/s²)(BᵀB)⁻¹ ∂L/∂R (AAᵀ)⁻¹ (theorem 3)      | `optimal_gradient`            |
| Σ∇L over a few samples; all of it on a model | `gradient_start`              |
| LoRA-XS: B = U_r, A = Σ_r V_rᵀ of W₀         | `svd_frames`                  |

Letters: A, B, R as in the papers; G is the gradient of the whole weight, η (`step_size`) the first step of the warm-up.

Deviations. The gradient pass runs in eval mode: the official code leaves dropout on. Frames and core are float32 or
wider; the code rounds them to bfloat16, which costs their orthonormality 1e-3. η is an argument; the code divides the
rate by a count of batches of the gradient pass, not of optimizer steps. The SVD is exact up to 1,024 rows or columns,
else randomised with 10 directions and 4 iterations to spare (the code: none to spare, 10 iterations; LoRA-XS:
scikit-learn's). R takes no weight decay: decay would take back the step that is built in.

Cost per layer: r² trained numbers, Adam twice that; a file holds r² + r(m + n), for A and B depend on data and have to
travel. 2r(m + n + r) extra FLOPs a token until merged, or 2r(m + n) and 2mr² a step, as `lora_linear` takes B R as one.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_matrix, check_number, check_rank
from lowrank_ref.core.layers import FactoredLinear, weight_of
from lowrank_ref.core.linalg import randomized_svd, svd
from lowrank_ref.core.registry import PaperInfo

#: Up to this many rows or columns an SVD is exact; beyond, a random sketch saves most of its time.
EXACT = 1024
Start = tuple[Float[Tensor, "r n"], Float[Tensor, "r r"], Float[Tensor, "m r"]]


def delta_weight(
    A: Float[Tensor, "r n"], R: Float[Tensor, "r r"], B: Float[Tensor, "m r"], scale: float
) -> Float[Tensor, "m n"]:
    """Return ΔW = s·B R A, shape (m, n), in the span of B's columns and A's rows.

    Example:
        >>> one = torch.ones
        >>> delta_weight(torch.tensor([[1.0, 2.0]]), 3 * one(1, 1), torch.tensor([[1.0], [0.0]]), 0.5).tolist()
        [[1.5, 3.0], [0.0, 0.0]]
    """
    return scale * (B @ R @ A)


def core_update(
    x: Float[Tensor, "*batch n"],
    A: Float[Tensor, "r n"],
    R: Float[Tensor, "r r"],
    B: Float[Tensor, "m r"],
    scale: float,
) -> Float[Tensor, "*batch m"]:
    """Return s·B(R(Ax)) for every row, without forming ΔW."""
    return scale * F.linear(F.linear(F.linear(x, A), R), B)


def truncated_svd(
    W: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Return U, S, Vh of the top `rank` singular triples: exact for min(m, n) <= `EXACT`, else from a random sketch.

    Raises:
        TypeError, ValueError: rank is not an integer in [1, min(m, n)], or W is not finite.
    """
    check_rank(rank, W.shape)
    if min(W.shape) <= EXACT:
        return svd(W, rank)
    return randomized_svd(W, rank, oversample=10, iterations=4, generator=generator)


def first_step(G: Float[Tensor, "m n"], step_size: float) -> Float[Tensor, "m n"]:
    """Return ΔW₁ = -η·sign(G), Adam's first step on the whole weight. sign(0) = 0."""
    return -step_size * G.sign()


def update_approximation(step: Float[Tensor, "m n"], rank: int, generator: torch.Generator | None = None) -> Start:
    """Return A = V_rᵀ, R = diag(S_r), B = U_r: orthonormal frames, and B R A is the best rank-r part of the step.

    Raises:
        TypeError, ValueError: step is no finite matrix, or all zero (a head of zeros behind the layer lets no gradient
            through), or rank is out of range.
    """
    check_matrix("step", step)
    if not bool(step.any()):
        raise ValueError("step: got zeros only, wanted a step that has a direction")
    U, S, Vh = truncated_svd(step, rank, generator)
    return Vh, S.diag(), U


def optimal_gradient(
    gradient: Float[Tensor, "r r"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], scale: float
) -> Float[Tensor, "r r"]:
    """Return (1/s²)(BᵀB)⁻¹ ∂L/∂R (AAᵀ)⁻¹: the X whose s·B X A is nearest to the whole weight's gradient (theorem 3).

    With orthonormal frames and s = 1 it is ∂L/∂R itself (theorem 5).
    """
    return torch.linalg.solve(A @ A.T, torch.linalg.solve(B.T @ B, gradient), left=False) / scale**2


class LoRASBLinear(FactoredLinear):
    """A frozen linear layer with a trained core R between frozen frames, s·B R A.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        A, R, B: frames (r, n) and (m, r), and the core's start (r, r), such as `update_approximation` returns; copied.
        scale: s > 0. With Adam it only multiplies the learning rate.
        dropout: probability in [0, 1) of zeroing an input of the update (not of the base).

    It does not start at the base: ΔW = s·B R A, for LoRA-SB one truncated step of full fine-tuning.

    Raises:
        TypeError, ValueError: base is no floating-point linear layer; A, R, B do not fit; an argument out of range.

    Example:
        >>> import torch
        >>> from lowrank_ref.adapters import LoRASBLinear
        >>> from lowrank_ref.adapters.lora_sb import first_step, update_approximation
        >>> base, gradient = torch.nn.Linear(6, 4), torch.randn(4, 6)
        >>> layer = LoRASBLinear(base, *update_approximation(first_step(gradient, 0.1), 2))
        >>> [tuple(p.shape) for p in layer.adapter_parameters().values()]
        [(2, 2)]
    """

    adapter_names: tuple[str, ...] = ("R",)
    no_decay = ("R",)
    starts_from_weight = True  # the frames are those of this weight, or of a gradient at this weight
    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, A: Tensor, R: Tensor, B: Tensor, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        W = weight_of(base)
        for name, value in {"A": A, "R": R, "B": B}.items():
            check_matrix(name, value)
        (m, n), r = W.shape, len(R)
        check_rank(r, W.shape)
        if (A.shape, R.shape, B.shape) != ((r, n), (r, r), (m, r)):
            got = f"{tuple(A.shape)}, {tuple(R.shape)}, {tuple(B.shape)}"
            raise ValueError(f"A, R, B: got shapes {got}, wanted {(r, n)}, {(r, r)}, {(m, r)} for a {(m, n)} weight")
        check_number("scale", scale, low=0, open_low=True)
        check_number("dropout", dropout, low=0, high=1 - 1e-9)
        super().__init__(base)
        self.rank, self.scale, self.dropout = r, float(scale), nn.Dropout(dropout).train(base.training)
        dtype = torch.promote_types(W.dtype, torch.float32)
        own = [t.detach().to(W.device, dtype).clone(memory_format=torch.contiguous_format) for t in (A, R, B)]
        self.register_buffer("A", own[0])
        self.R = nn.Parameter(own[1])
        self.register_buffer("B", own[2])

    @classmethod
    def empty(cls, base: nn.Module, rank: int = 8, **options: Any) -> "LoRASBLinear":
        """Return a layer whose frames and core are zero, for `load_adapters` to fill: no gradient pass is needed.

        Raises:
            TypeError, ValueError: rank is not an integer in [1, min(m, n)].
        """
        (m, n) = weight_of(base).shape
        check_rank(rank, (m, n))
        return LoRASBLinear(base, torch.zeros(rank, n), torch.zeros(rank, rank), torch.zeros(m, rank), **options)

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·B R A."""
        return delta_weight(self.A, self.R, self.B, self.scale)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return s·B(R(A·dropout(x)))."""
        return core_update(self.dropout(x), self.A, self.R, self.B, self.scale)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B R, s): the same update as a LoRA of rank r, which export to PEFT's format writes."""
        return self.A, self.B @ self.R, self.scale


PAPER = PaperInfo(
    key="lora_sb",
    part="adapters",
    name="LoRA-SB",
    title="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    authors=(
        *("Kaustubh Ponkshe", "Raghav Singhal", "Eduard Gorbunov"),
        *("Alexey Tumanov", "Samuel Horvath", "Praneeth Vepakomma"),
    ),
    arxiv="2411.19557v4",
    summary="Train r² numbers a layer between two frozen frames, and take the frames from the task's first gradient.",
    use_when="you may train only a few hundred numbers a layer, and have a sample of the task at hand before you start",
    instead={"lora": "the file is what has to be small: LoRA-SB's is as large as LoRA's of the same rank"},
    needs=("lora",),
    official_code="CERT-Lab/lora-sb",
    equations={
        "s·B R A": "delta_weight",
        "ΔW₁ = -η·sign(Σ∇L)": "first_step",
        "B, R, A of ΔW₁": "update_approximation",
        "theorem 3": "optimal_gradient",
    },
    deviations=(
        "the gradient pass runs without dropout",
        "frames in float32, not bfloat16",
        "η is an argument",
        "R takes no weight decay",
    ),
    aliases=("LoRA-XS", "silver bullet", "update approximation", "extremely small adapters"),
    status="checked",
    verified="2026-11-28",
)
