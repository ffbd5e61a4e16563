r"""SaRA: train the weights of smallest magnitude, as they stand, and freeze all others.

Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", arXiv
2409.06633v2 (ICLR 2025); official code sjtuplayer/SaRA at ea21192.

| in the paper                                          | here                                        |
|-------------------------------------------------------|---------------------------------------------|
| M = 1[abs P < θ] (eq. 2)                              | `weight_selection.below`                    |
| P ∘ M trains, the rest is frozen (eq. 3)              | `SaRALinear`                                |
| ‖P ∘ M‖_*, the rank loss, and its gradient (eq. 4, 5) | `nuclear_norm`, `rank_penalty`              |
| forward: P[M] ← p (eq. 6)                             | `placed_values.placed`, `masked_product`    |
| backward: ∇p = (∇P)[M] (eq. 7)                        | `placed_values.values_gradient`             |
| M' = M ∘ 1[abs P < θ] half-way                        | `sara_progress.ProgressiveSelection`        |
| learning rate 10⁻³·exp(-350 θ)                        | `learning_rate`                             |
| VLHI, the paper's score                               | `vlhi`                                      |

Letters: W (m, n) is the frozen weight P₀; p is `values` (k,), its places `support` (k,), flat i·n + j in rising order.

Deviations. θ is one for all layers (`threshold`) or such that a layer trains a stated share (`density`). Linear layers
only: no biases, no norms. The loss holds the penalty of all layers, or of one drawn, times their count; the official
code adds one, undivided, after clipping; its default optimizer, none at all. That code also starts from abs p. After
the switch frozen entries get no gradient and are put back after each step, so that optimizer and file keep their
shapes. Decay pulls p to 0, as in the paper; take none to train a change.

Cost per layer: k trained numbers, Adam state twice that; 4 bytes of place and 1 of mask each. FLOPs of a dense layer.
One (m, n) temporary at a time, in forward and backward. Autograd's own graph would keep W with p for every layer.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.placed_values import masked_product, placed
from lowrank_ref.adapters.weight_selection import below, pick_entries
from lowrank_ref.core.checks import check_matrix, check_number
from lowrank_ref.core.layers import AdaptedLinear, adapters, weight_of
from lowrank_ref.core.products import computing_dtype
from lowrank_ref.core.registry import PaperInfo


def learning_rate(threshold: float) -> float:
    """Return the paper's rate for a threshold θ >= 0, 10⁻³·exp(-350 θ), made for diffusion models and AdamW.

    Raises:
        TypeError, ValueError: θ is no number >= 0.

    Example:
        >>> [round(1e4 * learning_rate(theta), 3) for theta in (2e-3, 8e-4, 2e-4)]
        [4.966, 7.558, 9.324]
    """
    check_number("threshold", threshold, low=0)
    return 1e-3 * math.exp(-350 * threshold)


@torch.no_grad()
def nuclear_subgradient(X: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Return U_r·V_rᵀ of the r singular values above eps·max(m, n)·σ₁: a subgradient of ‖·‖_* at X."""
    U, S, Vh = torch.linalg.svd(X.to(torch.promote_types(X.dtype, torch.float32)), full_matrices=False)
    kept = torch.finfo(S.dtype).eps * max(X.shape) * S[0] < S
    return (U[:, kept] @ Vh[kept]).to(X.dtype)


def nuclear_norm(X: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    """Return ‖X‖_* = <U_r·V_rᵀ, X>, with U_r·V_rᵀ as its gradient, also where X has not full rank.

    Raises:
        TypeError, ValueError: X is no finite floating-point matrix.
    """
    check_matrix("X", X.detach())
    return (nuclear_subgradient(X) * X).sum()


def rank_penalty(
    model: nn.Module, *, of: str = "weight", one: bool = False, generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """Return Σ ‖P ∘ M‖_* over the SaRA layers of a model, to be added, times λ, to the loss.

    Args:
        model: holds at least one SaRA layer.
        of: "weight", as in the paper, or "update": Σ ‖(P - P₀) ∘ M‖_*.
        one: take one layer, drawn evenly, times the count of layers; its mean is the sum, at the cost of one SVD.
        generator: draws it.

    Raises:
        ValueError: no layer, or another word.
    """
    if of not in ("weight", "update"):
        raise ValueError(f"of: got {of!r}, wanted 'weight' or 'update'")
    layers = [*sara_layers(model).values()]
    count = 1
    if one:
        device = generator.device if generator is not None else None
        drawn = int(torch.randint(len(layers), (), generator=generator, device=device))
        layers, count = [layers[drawn]], len(layers)
    return count * torch.stack([layer.nuclear_norm(of) for layer in layers]).sum()


def vlhi(fid: Sequence[float], clip: Sequence[float]) -> list[float]:
    """Return the paper's score in [0, 2] of each of some models: FID (low is good) and CLIP, each scaled to [0, 1].

    Raises:
        ValueError: lists of different lengths, or a column of equal numbers, which has no scale.

    Example:
        >>> vlhi([130.0, 150.0, 140.0], [26.0, 28.0, 28.0])
        [1.0, 1.0, 1.5]
    """
    if len(fid) != len(clip) or len(set(fid)) < 2 or len(set(clip)) < 2:
        raise ValueError(f"fid, clip: got {list(fid)} and {list(clip)}, wanted as many of each, not all the same")
    return [
        (max(fid) - f) / (max(fid) - min(fid)) + (c - min(clip)) / (max(clip) - min(clip)) for f, c in zip(fid, clip)
    ]


def sara_layers(model: nn.Module) -> dict[str, "SaRALinear"]:
    """Return path -> SaRA layer; a model without one raises a ValueError."""
    found = {path: layer for path, layer in adapters(model) if isinstance(layer, SaRALinear)}
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without a SaRALinear, wanted at least one")
    return found


class SaRALinear(AdaptedLinear):
    """A linear layer whose smallest weights train, and nothing else: P = W with p at the places of M.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        density: share of the weights that train, in [0, 1], those of smallest magnitude; of equal ones the first.
        threshold: θ >= 0 in the place of a density: all weights below it train. See `threshold_for_density`.
        rule: "smallest" is the method, others of `RULES` are controls with as many weights.
        generator: source of what the rule "random" draws; the method draws nothing.

    Raises:
        TypeError, ValueError: no finite linear layer, or an argument out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.adapters import SaRALinear
        >>> layer = SaRALinear(nn.Linear(6, 4), density=0.25)
        >>> layer.values.shape, layer.delta_weight().count_nonzero().item()
        (torch.Size([6]), 0)
    """

    adapter_names = ("values",)
    starts_from_weight = True
    #: What `save_peft` says when it refuses.
    no_lora = "SaRA's update is sparse and of high rank, no LoRA: merge it, or write it with save_sara"
    support: Tensor
    active: Tensor
    threshold: Tensor

    def __init__(
        self,
        base: nn.Module,
        density: float = 0.1,
        *,
        threshold: float | None = None,
        rule: str = "smallest",
        generator: torch.Generator | None = None,
    ) -> None:
        W = weight_of(base).detach()
        check_matrix("base.weight", W)
        check_number("density", density, low=0, high=1)
        count = round(density * W.numel()) if threshold is None else len(below(W, threshold))
        support = pick_entries(W, count, rule, generator)
        super().__init__(base)
        values = W.reshape(-1)[support].to(torch.promote_types(W.dtype, torch.float32))
        self.rule = rule
        self.values = nn.Parameter(values)
        self.register_buffer("support", support)
        self.register_buffer("active", torch.ones_like(support, dtype=torch.bool))
        bound = W.abs().max() if count == W.numel() else W.abs().flatten().kthvalue(count + 1).values
        self.register_buffer("threshold", values.new_tensor(bound.item() if threshold is None else threshold))

    def masked_values(self, of: str = "weight") -> Float[Tensor, " k"]:
        """Return p, or p - P₀[M] if `of` is "update", with zeros for what the progressive step froze."""
        moved = self.values - weight_of(self.base).reshape(-1)[self.support] if of == "update" else self.values
        return moved * self.active

    def nuclear_norm(self, of: str = "weight") -> Float[Tensor, ""]:
        """Return ‖P ∘ M‖_*, with Σ zᵢpᵢ over the trained entries as its form: Z = U_r·V_rᵀ is a constant."""
        values = self.masked_values(of)
        empty = values.new_zeros(self.out_features, self.in_features)
        Z = nuclear_subgradient(placed(empty, values.detach(), self.support))
        return Z.reshape(-1)[self.support] @ values

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return (p - P₀[M]) at its places and zeros elsewhere; entries that are not active get no gradient."""
        values = torch.where(self.active, self.values, self.values.detach())
        moved = values - weight_of(self.base).reshape(-1)[self.support].to(values.dtype)
        return placed(moved.new_zeros(self.out_features, self.in_features), moved, self.support)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return x Pᵀ + b; beside a base of another kind, base(x) + x ΔWᵀ."""
        if not self.as_one(x):
            return super().forward(x)
        x = x.to(computing_dtype(x))
        y = masked_product(x, weight_of(self.base), self.values, self.support, self.active)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Show shape and how much trains."""
        return f"{super().extra_repr()}, {int(self.active.sum())} of {self.in_features * self.out_features} train"


PAPER = PaperInfo(
    key="sara",
    part="adapters",
    name="SaRA",
    title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    authors=(
        *("Teng Hu", "Jiangning Zhang", "Ran Yi", "Hongrui Huang"),
        *("Yabiao Wang", "Lizhuang Ma"),
    ),
    arxiv="2409.06633v2",
    summary="Train the weights of smallest magnitude where they stand, and leave all others as they are.",
    use_when="you are short of memory, and may give up the last points on the new task to keep more of the old",
    instead={"lora": "the update must be a file of its own in everybody's format"},
    needs=("lora", "sltrain"),
    official_code="sjtuplayer/SaRA",
    code_licence="none stated",
    equations={"P ∘ M": "SaRALinear", "rank loss": "rank_penalty", "rate": "learning_rate", "score": "vlhi"},
    deviations=("p starts with its sign", "the rank loss acts on p", "linear layers only"),
    aliases=("sparse fine-tuning", "magnitude selection", "nuclear norm", "unstructural backpropagation"),
    status="draft",
    verified="2026-11-29",
)
