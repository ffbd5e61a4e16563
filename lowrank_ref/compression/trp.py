"""TRP: every m-th step each weight is replaced by its truncated SVD, between them training is ordinary and dense.

Xu et al., "Trained Rank Pruning for Efficient Deep Neural Networks", arXiv 1812.02402 (longer: 2004.14566, IJCAI 2020);
what both leave open is taken from the repository yuhuixu1993/Trained-Rank-Pruning at 8cc7470.

| in the paper and its code                               | here                                              |
|---------------------------------------------------------|---------------------------------------------------|
| W (N, C, kh, kw) as a matrix: "NC", "VH", "ND"          | `to_matrix` of `conv_matrices.py`                 |
| k(e) = min{k : Σ_{j<=k} σ_j² >= e·Σσ_j²}                | `rank_at_energy`, `rank_at_threshold`             |
| T(W; e) = U_k diag(σ_k) V_kᵀ                            | `truncation(...).weight`                          |
| sub-gradient of ‖T‖_*: U_k V_kᵀ                         | `truncation(...).subgradient`                     |
| t ≡ 0 mod m: W ← T(W), then W ← W - η(∇L(W) + λU_kV_kᵀ) | `TrainedRankPruning`: `truncate`, `nuclear_term`  |
| the layers that are listed                              | `released_layers`                                 |
| two thin layers in place of one, and their cost         | `split_model`, `split_macs` of `conv_matrices.py` |

Letters: N output channels, C input channels, a kernel kh x kw, r the rank, m the period. The schemes are "channel",
"spatial" and "decoupled"; the last has a matrix (C, kh·kw) for each output channel, with a rank of its own.

Deviations. The period counts steps of the whole run, in the code those of each epoch. The nuclear term is part of the
loss: `nuclear_term()` has the value λ‖T‖_* and the gradient λU_kV_kᵀ, so that clipping, accumulation and DDP see it as
any other loss; it acts in steps right after a truncation only, as in the code, so its mean strength is λ/m. A failing
SVD raises; there, the layer is skipped silently. A layer keeps rank 1 at least. Any stride is split.

Mind that T is no projection. e is a share of what the last truncation left, so T(T(W)) can have a lower rank than
T(W), without any training; ranks stand still only where σ_k² > (1 - e)Σσ_j², which means k < 1/(1 - e) (`rank_limit`).

Cost. Training: the dense model and its optimizer state, and every m steps an SVD of each matrix (p, q), about
6·p·q·min(p, q) FLOPs; `by_gram` finds the same from products and an eigendecomposition of size min(p, q). After the
split: `split_macs`. Under DDP each process truncates the same weights to the same ones, given the same hardware. FSDP
shards weights; this does not work there.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowrank_ref.compression.conv_matrices import check_scheme, from_matrix, prunable, to_matrix
from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_finite, check_integer, check_loaded, check_number
from lowrank_ref.core.matching import Pattern
from lowrank_ref.core.registry import PaperInfo


def rank_at_energy(S: Float[Tensor, "*p k"], energy: float) -> Int[Tensor, "*p"]:
    """Return the least k whose singular values hold the share e of all squares, at least 1.

    Args:
        S: singular values in falling order, or a stack of such rows.
        energy: e in (0, 1], else a ValueError; 1 keeps all of them.

    Example:
        >>> rank_at_energy(torch.tensor([3.0, 2.0, 1.0]), 0.9).item()  # 9, 13 and 14 of 14
        2
    """
    check_number("energy", energy, low=0, high=1, open_low=True)
    if energy == 1:
        return torch.full(S.shape[:-1], S.shape[-1], device=S.device)
    squares = (S / S[..., :1].clamp_min(torch.finfo(S.dtype).tiny)).double().square()
    before = squares.cumsum(-1) - squares  # held by those in front
    return (before < energy * squares.sum(-1, keepdim=True)).sum(-1).clamp_min(1)


def rank_limit(energy: float) -> int:
    """Return the largest rank that T(.; e) can leave as it is, the greatest integer under 1/(1 - e).

    If rank k stays, σ_k² > (1 - e)Σσ_j² >= (1 - e)kσ_k². Training may keep more. A ValueError unless 0 < e < 1.

    Example:
        >>> rank_limit(0.9), rank_limit(0.95)
        (9, 19)
    """
    check_number("energy", energy, low=0, high=1 - 1e-9, open_low=True)
    return math.ceil(1 / (1 - energy) - 1e-6) - 1


def rank_at_threshold(S: Float[Tensor, "*p k"], threshold: float) -> Int[Tensor, "*p"]:
    """Return how many singular values are at least τ, at least 1. ValueError: a negative threshold."""
    check_number("threshold", threshold, low=0)
    return S.ge(threshold).sum(-1).clamp_min(1)


class Truncation(NamedTuple):
    """T(W), the sub-gradient of its nuclear norm, both in the shape of W, and the rank, the largest of a stack."""

    weight: Tensor
    subgradient: Tensor
    rank: int


def _matrix(W: Tensor, scheme: str) -> Tensor:
    check_loaded("W", W)
    check_finite("W", W)
    M = to_matrix(W.detach(), scheme)
    return M.to(torch.promote_types(M.dtype, torch.float32))


def _back(M: Tensor, W: Tensor, scheme: str) -> Tensor:
    return from_matrix(M.to(W.dtype), tuple(W.shape), scheme)


def truncation(W: Float[Tensor, "..."], energy: float, scheme: str = "channel") -> Truncation:
    """Return T(W; e) = U_k diag(σ_k) V_kᵀ and U_k V_kᵀ. With e = 1 the weight is W itself, to the bit.

    Half precision is computed in float32. TypeError, ValueError: no finite weight, another scheme, or e outside (0, 1].
    """
    M = _matrix(W, scheme)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    k = rank_at_energy(S, energy)
    kept = torch.arange(S.shape[-1], device=S.device) < k[..., None]
    U = U * (kept & (S > 0))[..., None, :]
    T = W.detach().clone() if energy == 1 else _back((U * S[..., None, :]) @ Vh, W, scheme)
    return Truncation(T, _back(U @ Vh, W, scheme), int(k.max()))


def by_gram(W: Float[Tensor, "..."], energy: float, scheme: str = "channel") -> Truncation:
    """Return what `truncation` does, from eigenvectors of the smaller Gram matrix: T = U_kU_kᵀM, faster on a GPU.

    Squaring loses singular values under 3e-4 of the largest in float32; where e is so near to 1 that one of them is
    kept, the two differ.
    """
    M = _matrix(W, scheme)
    wide = M.shape[-2] <= M.shape[-1]
    X = M if wide else M.mT
    squares, Q = torch.linalg.eigh(X @ X.mT)
    S, Q = squares.clamp_min(0).sqrt().flip(-1), Q.flip(-1)
    k = rank_at_energy(S, energy)
    kept = torch.arange(S.shape[-1], device=S.device) < k[..., None]
    inverse = torch.where(kept & (S > 0), 1 / S.clamp_min(torch.finfo(S.dtype).tiny), 0)
    products = [(Q * weights[..., None, :]) @ (Q.mT @ X) for weights in (kept.to(X.dtype), inverse)]
    T, sub = (_back(P if wide else P.mT, W, scheme) for P in products)
    return Truncation(W.detach().clone() if energy == 1 else T, sub, int(k.max()))


def matrix_nuclear_norm(W: Float[Tensor, "..."], scheme: str = "channel") -> Float[Tensor, ""]:
    """Return ‖M‖_* = Σσ. Its gradient is UVᵀ with all singular vectors: the nuclear term without TRP, for any step."""
    return torch.linalg.svdvals(to_matrix(W, scheme)).sum()


class TrainedRankPruning(Action):
    """Truncates the weights of a model in place after every m-th step, and offers the nuclear term as a loss.

    The paper truncates before the first step too: call `truncate()` once. After the last step the weights are not
    low-rank, unless that step was a multiple of m: `split_model` cuts once more.

    Args:
        model: its weights are overwritten, in the same parameters; the optimizer's momentum stays as it is.
        pattern: which layers; None takes `released_layers`.
        scheme: "channel", "spatial" or "decoupled", see `to_matrix`.
        energy: e in (0, 1], share of the squared singular values that a truncation keeps; 1 changes nothing.
        every: m >= 1.
        penalty: λ >= 0 of the nuclear term in steps that follow a truncation.
        gram: truncate by `by_gram`.

    Attributes:
        ranks: path -> rank at the last truncation.

    Raises:
        TypeError, ValueError: an option out of range, or as `prunable`.

    Example:
        >>> from torch import nn, optim
        >>> from lowrank_ref.compression import TrainedRankPruning
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> optimizer = optim.SGD(model.parameters(), lr=0.1)
        >>> pruning = TrainedRankPruning(model, every=10, penalty=3e-4).attach(optimizer)
        >>> pruning.truncate()
        >>> list(pruning.ranks), bool(pruning.nuclear_term() > 0)
        (['2'], True)
    """

    state_names = ("steps", "ranks", "subgradients")

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern | None = None,
        *,
        scheme: str = "channel",
        energy: float = 0.9,
        every: int = 5,
        penalty: float = 0.0,
        gram: bool = False,
    ) -> None:
        check_scheme(scheme)
        check_number("energy", energy, low=0, high=1, open_low=True)
        check_integer("every", every, low=1)
        check_number("penalty", penalty, low=0)
        self.layers, self.steps = prunable(model, pattern), 0
        self.scheme, self.energy, self.every, self.penalty, self.gram = scheme, energy, every, penalty, gram
        self.ranks: dict[str, int] = {}
        self.subgradients: dict[str, Tensor] = {}

    def act(self) -> None:
        """Count a step, and truncate if it is time."""
        self.steps += 1
        self.subgradients = {}
        if self.steps % self.every == 0:
            self.truncate()

    @torch.no_grad()
    def truncate(self) -> None:
        """Replace every weight by T(W). A weight that is not finite raises a ValueError, and no weight changes."""
        cut = by_gram if self.gram else truncation
        found = {path: cut(layer.weight, self.energy, self.scheme) for path, layer in self.layers.items()}
        for path, cut_weight in found.items():
            self.layers[path].weight.copy_(cut_weight.weight)
        self.ranks = {path: f.rank for path, f in found.items()}
        self.subgradients = {path: f.subgradient for path, f in found.items()} if self.penalty else {}

    def nuclear_term(self) -> Float[Tensor, ""]:
        """Return λΣ⟨U_kV_kᵀ, W⟩, which is λΣ‖T‖_* with gradient λU_kV_kᵀ; zero in steps without a truncation."""
        total = next(iter(self.layers.values())).weight.new_zeros(())
        for path, sub in self.subgradients.items():
            total = total + self.penalty * (sub.to(total.device) * self.layers[path].weight).sum()
        return total

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take back what `state_dict` returned. ValueError: the state of something else."""
        self._check_keys(dict(state))
        check_integer("steps", state["steps"], low=0)
        if strangers := {*state["ranks"], *state["subgradients"]} - self.layers.keys():
            raise ValueError(f"state: got layers {sorted(strangers)}, wanted some of {sorted(self.layers)}")
        super().load_state_dict(dict(state))


PAPER = PaperInfo(
    key="trp",
    part="compression",
    name="TRP",
    title="Trained Rank Pruning for Efficient Deep Neural Networks",
    authors=("Yuhui Xu", "Yuxi Li", "Shuai Zhang", "Wei Wen", "Botao Wang", "Wenrui Dai", "Yingyong Qi", "Yiran Chen")
    + ("Weiyao Lin", "Hongkai Xiong"),
    arxiv="1812.02402",
    summary="Truncate every weight by its SVD again and again while it trains, and split it without a loss at the end.",
    use_when="you train a network anyway, want thin pairs in the end, and will choose no ranks and no moment to cut",
    instead={"maestro": "you want one network that can be cut to many sizes"},
    needs=("primer",),
    official_code="yuhuixu1993/Trained-Rank-Pruning",
    code_licence="none stated",
    equations={"T(W; e)": "truncation", "k(e)": "rank_at_energy", "step": "TrainedRankPruning"},
    deviations=("the nuclear term is a loss", "the period counts steps of the whole run", "any stride can be split"),
    aliases=("trained rank pruning", "nuclear norm", "SVD in training", "channel-wise decomposition", "spatial SVD"),
    status="draft",
    verified="2026-11-29",
)
