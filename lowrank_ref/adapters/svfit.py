r"""SVFit: freeze both bases of the SVD of W, and train its largest singular values only: r numbers a layer.

Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
arXiv 2409.05926v1.

| in the paper                                           | here                                           |
|--------------------------------------------------------|------------------------------------------------|
| W = U·diag(σ)·Vᵀ = W_r + W_e                           | `principal_split`                              |
| y = (U_r·diag(σ)·V_rᵀ + W_e) x, σ trained              | `split_forward`; `svfit_update`, the same      |
| the top r values hold 99 % of the information          | `energy_rank`                                  |
| ΔW = U_r·diag(δ)·V_rᵀ, δ = σ - σ⁰                      | `delta_weight`                                 |
| what of a wanted change D the method can write         | `projected`                                    |

Letters: W (m, n), U (m, r), Vh = Vᵀ (r, n), S the pretrained values σ⁰, δ what is added to them.

Reconstructed. No official code is known, and of the paper the abstract and parts of the introduction were read. Ours
are: "information" as Σσ² (`power=1` reads it as Σσ); all singular values by default, the only count that makes the
paper's "16 times fewer" than LoRA of rank 8 exact; no scale, no clamp (σ < 0 is a reflection); training δ from 0.
That is the same function as training σ from σ⁰, but the start is W to the bit, and weight decay pulls to W, not to 0.
Relatives: with all values it is SVFT's plain form; `form="multiplicative"`, δ = S ⊙ (z - 1), is SVF of Transformer²;
an r × r matrix in δ's place is in `singular_core`. Controls, which train other directions, are in `singular_pairs`.
Cost per layer: r trained numbers, Adam 2r; r(m+n) frozen numbers for the bases, one SVD at the start, O(mn·min(m, n));
2r(m+n) extra FLOPs a token until merged, in forward and in backward. DDP broadcasts the bases at each forward: give it
`broadcast_buffers=False` when all processes start from the same weights.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.singular_pairs import choose_pairs, fingerprint
from lowrank_ref.core.checks import check_number
from lowrank_ref.core.layers import AdaptedLinear, weight_of
from lowrank_ref.core.linalg import svd
from lowrank_ref.core.registry import PaperInfo


def principal_split(
    W: Float[Tensor, "m n"], rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"], Float[Tensor, "m n"]]:
    """Return U, S, Vh of the r largest singular triples, and the rest W_e = W - U·diag(S)·Vh.

    Raises:
        TypeError, ValueError: W is no finite floating-point matrix, or rank is not in [1, min(m, n)].
    """
    U, S, Vh = svd(W, rank)
    return U, S, Vh, W - U * S @ Vh


def energy_rank(S: Float[Tensor, " k"], share: float = 0.99, *, power: int = 2) -> int:
    """Return the smallest r whose first r values hold `share` of the sum Σσᵖ over all values.

    Args:
        S: singular values, falling, >= 0.
        share: τ in (0, 1].
        power: p, 2 for the energy; 1 for the other reading of the paper.

    Raises:
        TypeError, ValueError: share or power out of range.

    Example:
        >>> S = torch.tensor([3.0, 1.0, 0.3, 0.1])
        >>> energy_rank(S), energy_rank(S, power=1)
        (2, 4)
    """
    check_number("share", share, low=0, high=1, open_low=True)
    if power not in (1, 2):
        raise ValueError(f"power: got {power!r}, wanted 1 or 2")
    held = S.double().pow(power).cumsum(0)
    return int((held < share * held[-1]).sum()) + 1


def split_forward(
    x: Float[Tensor, "*batch n"],
    U: Float[Tensor, "m r"],
    sigma: Float[Tensor, " r"],
    Vh: Float[Tensor, "r n"],
    rest: Float[Tensor, "m n"],
) -> Float[Tensor, "*batch m"]:
    """Return (U·diag(σ)·Vh + W_e) x for every row: the paper's form, which the tests hold equal to the layer."""
    return F.linear(x, U * sigma @ Vh + rest)


def delta_weight(U: Float[Tensor, "m r"], delta: Float[Tensor, " r"], Vh: Float[Tensor, "r n"]) -> Float[Tensor, "m n"]:
    """Return ΔW = U·diag(δ)·Vh.

    Example:
        >>> delta_weight(torch.eye(2), torch.tensor([3.0, -1.0]), torch.eye(2)).tolist()
        [[3.0, 0.0], [0.0, -1.0]]
    """
    return U * delta @ Vh


def svfit_update(
    x: Float[Tensor, "*batch n"], U: Float[Tensor, "m r"], delta: Float[Tensor, " r"], Vh: Float[Tensor, "r n"]
) -> Float[Tensor, "*batch m"]:
    """Return U(δ ⊙ (Vh x)) for every row, r(m+n+1) products. Backward keeps Vh x, (tokens, r), and nothing else."""
    return F.linear(delta * F.linear(x, Vh), U)


def projected(U: Float[Tensor, "m r"], D: Float[Tensor, "m n"], Vh: Float[Tensor, "r n"]) -> Float[Tensor, " r"]:
    """Return δᵢ = uᵢᵀ D vᵢ, the diagonal of UᵀDV: ΔW is then as close to D as it can be, ‖D‖² - ‖δ‖² away.

    With D the gradient of the loss at W + ΔW, it is the gradient of δ.
    """
    return (U.T @ D * Vh).sum(dim=1)


class SVFitLinear(AdaptedLinear):
    """A frozen linear layer whose singular values train: ΔW = U·diag(δ)·Vh.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r, how many of the largest singular values train; None takes all, or as many as `energy` asks for.
        energy: share τ in (0, 1] of Σσ² that the r largest have to hold; not together with rank.
        form: "additive" trains δ = σ - σ⁰; "multiplicative" trains z - 1 of σ = z·σ⁰, so that Adam's step on a value
            is proportional to it.
        pairs: which directions train, see `singular_pairs.choose_pairs`.
        store_bases: whether `state_dict` has U and Vh; loading then refuses triples of an unrelated weight. Without
            them it has 3r numbers, and loading asks for the same values and `singular_pairs.fingerprint` of the bases.
        generator: source of the controls' directions; "top" draws nothing.

    Raises:
        TypeError, ValueError: no finite linear layer, all zero if "multiplicative", or an argument out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import SVFitLinear
        >>> layer = SVFitLinear(nn.Linear(6, 4))
        >>> layer.delta.shape, layer.delta_weight().abs().max().item()
        (torch.Size([4]), 0.0)
    """

    adapter_names: tuple[str, ...] = ("delta",)
    starts_from_weight = True
    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int | None = None,
        *,
        energy: float | None = None,
        form: str = "additive",
        pairs: str = "top",
        store_bases: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if form not in ("additive", "multiplicative"):
            raise ValueError(f"form: got {form!r}, wanted 'additive' or 'multiplicative'")
        super().__init__(base)
        W = weight_of(base).detach()
        if energy is not None:
            if rank is not None:
                raise ValueError(f"rank, energy: got {rank} and {energy}, wanted one of the two")
            rank = energy_rank(svd(W)[1], energy)
        self.rank = min(W.shape) if rank is None else rank
        self.pairs, self.form, self.store_bases = pairs, form, store_bases
        U, S, Vh = choose_pairs(W, self.rank, pairs, generator)
        check_number(f"largest singular value ({form})", float(S.max()), low=0, open_low=form == "multiplicative")
        self.register_buffer("U", U, persistent=store_bases)
        self.register_buffer("S", S)
        self.register_buffer("Vh", Vh, persistent=store_bases)
        if not store_bases:
            self.register_buffer("mark", fingerprint(U, Vh))
        self.delta = nn.Parameter(self.initial())

    def initial(self) -> Tensor:
        """Return δ = 0: training starts at W."""
        return torch.zeros_like(self.S)

    def added(self) -> Float[Tensor, "*shape"]:
        """Return what is added to the singular values: δ, or S ⊙ (z - 1)."""
        return self.delta if self.form == "additive" else self.delta * self.S

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return U·diag(δ)·Vh."""
        return delta_weight(self.U, self.added(), self.Vh)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return U(δ ⊙ (Vh x))."""
        return svfit_update(x, self.U, self.added(), self.Vh)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (Vh, U·diag(δ), 1): an exact LoRA of rank r, what export to PEFT's format writes."""
        return self.Vh, self.U * self.added(), 1.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bounds = {} if self.store_bases else {"S": 1e-4 * float(self.S.max()), "mark": 1e-3}
        for name, bound in bounds.items():
            own, got = getattr(self, name), state_dict.get(f"{prefix}{name}")
            if got is None or got.is_meta or got.shape != own.shape:
                continue  # what PyTorch says of those is better
            if not torch.allclose(got.to(own), own, rtol=0, atol=bound):
                raise ValueError(f"{prefix}{name}: got that of other bases, wanted that of this layer's weight")
        self._check_bases(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_bases(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse stored singular triples that are not about those of this weight; a rounded copy of it is welcome."""
        got = [state_dict[key] for key in (f"{prefix}U", f"{prefix}S", f"{prefix}Vh") if key in state_dict]
        fits = [g.shape for g in got if not g.is_meta] == [own.shape for own in (self.U, self.S, self.Vh)]
        comes_along = any(key.startswith(f"{prefix}base.") for key in state_dict)
        W = weight_of(self.base).detach()
        if not fits or comes_along or W.is_meta or self.pairs not in ("top", "bottom", "any"):
            return  # what PyTorch says of missing names and other shapes is better
        U, S, Vh, W = (t.to(self.U) for t in (*got, W))
        if (W @ Vh.T - U * S).norm() > 0.3 * W.norm() * (self.rank / min(W.shape)) ** 0.5:
            raise ValueError(f"{prefix}U, {prefix}Vh: got those of another weight, wanted those of this layer's")


PAPER = PaperInfo(
    key="svfit",
    part="adapters",
    name="SVFit",
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    authors=(
        *("Chengwei Sun", "Jiwei Wei", "Yujia Wu", "Yiming Shi"),
        *("Shiyuan He", "Zeyu Ma", "Ning Xie", "Yang Yang"),
    ),
    arxiv="2409.05926v1",
    summary="Fine-tune a layer with as many numbers as it has singular values, and see what no such update can reach.",
    use_when="you keep many tasks of one base model, each a mild shift, and a vector a layer is all you can store",
    instead={
        "lora": "a task needs new directions: at 23 times the numbers it is far better on three of our four shifts",
        "randlora": "the update has to be of full rank and free of the directions of W",
    },
    needs=("lora",),
    equations={
        "W = W_r + W_e": "principal_split",
        "forward": "split_forward",
        "ΔW": "delta_weight",
        "99 % of the information": "energy_rank",
    },
    deviations=(
        "no official code; only abstract and parts of the introduction were read",
        "δ = σ - σ⁰ trains, from 0",
        "all singular values by default",
        "the 99 % are of Σσ²",
    ),
    aliases=("singular value fine-tuning", "SVF", "SVFT", "LoRA-XS", "singular values"),
    status="draft",
    verified="2026-11-28",
    layers={"SVFitLinear": SVFitLinear},
)
