r"""LoRA-Squeeze: train LoRA at a generous rank, then cut it to the rank you want by an SVD that never forms ΔW.

Vulić, Grycner, de Laroussilhe, Pfeiffer, "LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of
LoRA Modules", arXiv 2602.10993v2.

| in the paper                                       | here                                             |
|----------------------------------------------------|--------------------------------------------------|
| QR of B and Aᵀ, SVD of s·R_B R_Aᵀ (algorithm 2)    | `core.linalg.factored_svd`                       |
| randomised SVD, 10 directions and 2 iterations     | `core.linalg.randomized_factored_svd`            |
| ΔW ≈ s'·B'A' of rank k                             | `split_factors`, `squeezed_factors`              |
| energy kept, V(k) = Σ_{i≤k} S_i² / Σ S_i²          | `retained_energy`, `rank_for_energy`             |
| Post-Squeeze (Cont-Squeeze: train on afterwards)   | `squeeze`                                        |
| In-Squeeze: the rank falls in steps while training | `squeeze_training.LoRASqueezer`, `halving_plan`   |

Letters: A (r, n) and B (m, r) before, A' (k, n) and B' (m, k) after; s, s' the scales; S the singular values of s·BA.

Choices. Of the paper only the abstract was read, the rest is at second hand: we do not know how it shares S between B'
and A', what becomes of the scale, and what of the optimizer's moments. Here: in equal parts (`split="balanced"`), s' =
s, and moments start again at zero (`moments="reset"`). Each is an option; all give the same ΔW, and other training
afterwards. "left" is what huggingface/peft 0.21.2 does in `convert_to_lora`, with s' = 1. A direction with S_i = 0
would get zeros on both sides and never train: it gets a row of A' of length 1/√3, as long as LoRA's own start, beside a
column of zeros in B'. The paper's sketch is an option: as the core is only r × r, its exact SVD is the default.

Cost: a squeeze of one layer takes O((m + n)r² + r³) products, against O(mn·min(m, n)) of ΔW's SVD. Trained numbers fall
from r(m + n) to k(m + n), Adam's from twice that; the peak of memory is still that of r.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.squeeze_targets import Ranks, lora_of, lora_parts, squeezable, target_ranks
from lowrank_ref.core.checks import check_finite, check_number, check_rank
from lowrank_ref.core.layers import Model, replace_modules
from lowrank_ref.core.linalg import factored_svd, randomized_factored_svd
from lowrank_ref.core.registry import PaperInfo

#: How the singular values are shared between B' and A'.
SPLITS = ("balanced", "left")


def split_factors(
    U: Float[Tensor, "m k"], S: Float[Tensor, " k"], Vh: Float[Tensor, "k n"], scale: float, split: str = "balanced"
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "m k"]]:
    """Return A', B' with s'·B'A' = U diag(S) Vh: √(S/s')·Vh and U·√(S/s'), or ("left") Vh and U·S/s'.

    Args:
        U, S, Vh: a truncated SVD.
        scale: s' > 0.
        split: "balanced" or "left".

    Raises:
        TypeError, ValueError: scale or split is none of these.

    Example:
        >>> A, B = split_factors(torch.eye(2)[:, :1], torch.tensor([8.0]), torch.eye(2)[:1], 2.0)
        >>> A.tolist(), B.tolist()
        ([[2.0, 0.0]], [[2.0], [0.0]])
    """
    check_number("scale", scale, low=0, open_low=True)
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, wanted one of {SPLITS}")
    dead = torch.finfo(S.dtype).eps * max(len(U), Vh.shape[1]) * S[:1] >= S
    if split == "left":
        return Vh.clone(), U * torch.where(dead, 0.0, S / scale)
    root = (S / scale).sqrt()
    return torch.where(dead, torch.full_like(S, 3**-0.5), root)[:, None] * Vh, U * torch.where(dead, 0.0, root)


def squeezed_factors(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    scale: float,
    rank: int,
    *,
    new_scale: float | None = None,
    split: str = "balanced",
    oversample: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "m k"], Float[Tensor, " _"]]:
    """Return A', B' of rank k, with s'·B'A' nearest to s·BA of all matrices of that rank, and singular values of s·BA.

    Args:
        A, B: factors, in float32 or wider results are as wide.
        scale: s > 0.
        rank: k, 1 <= k <= min(m, n, r).
        new_scale: s' > 0; None keeps s.
        split: see `split_factors`.
        oversample: None takes the exact SVD of the r × r core; a number takes a random sketch with so many directions
            to spare (10 in the paper), and returns its k singular values only.
        generator: source of the sketch.

    Raises:
        TypeError, ValueError: A or B is no finite matrix of floating point, or a number is out of range.
    """
    check_number("scale", scale, low=0, open_low=True)
    if oversample is None:
        U, S, Vh = factored_svd(A, B)
        check_rank(rank, (len(B), A.shape[1], len(A)))
    else:
        U, S, Vh = randomized_factored_svd(A, B, rank, oversample=oversample, generator=generator)
    S = scale * S
    return *split_factors(U[:, :rank], S[:rank], Vh[:rank], scale if new_scale is None else new_scale, split), S


def retained_energy(S: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
    """Return V(1) ... V(r), the share of Σ S_i² in the first k; all ones where S is zero.

    Raises:
        ValueError: an empty spectrum, a negative entry, NaN or infinity.

    Example:
        >>> retained_energy(torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0])).tolist()[0:2]
        [0.6666666865348816, 0.8333333134651184]
    """
    check_finite("S", S)
    if not len(S) or bool((S < 0).any()):
        raise ValueError("S: got an empty spectrum or a negative number, wanted singular values >= 0")
    sums = (S / S.max().clamp_min(torch.finfo(S.dtype).tiny)).square().cumsum(0)
    return sums / sums[-1] if bool(sums[-1] > 0) else torch.ones_like(S)


def rank_for_energy(S: Float[Tensor, " r"], share: float) -> int:
    """Return the smallest k >= 1 with V(k) >= share, up to rounding. A share outside (0, 1] is a ValueError.

    Example:
        >>> rank_for_energy(torch.tensor([3.0, 1.0, 0.1]), 0.95)
        2
    """
    check_number("share", share, low=0, high=1, open_low=True)
    V = retained_energy(S)
    return 1 + int((share - 8 * torch.finfo(V.dtype).eps > V).sum())


def carried_moments(
    old: tuple[Tensor, Tensor, float], new: tuple[Tensor, Tensor, float], moments: tuple[Tensor, Tensor], power: int
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "m k"]]:
    """Return the moments of A' and B' out of those of A and B, for `moments="carry"`.

    With A' = M A and B' = B N, the gradient of A' is (s'/s)·Nᵀ times that of A, and that of B' is (s'/s) times that of
    B, times Mᵀ. First moments (power 1) go the same way; second moments (power 2) with all coefficients squared, which
    takes the entries of a column for independent.

    Args:
        old, new: (A, B, s) and (A', B', s').
        moments: of A (r, n) and of B (m, r).
        power: 1 or 2.
    """
    (A, B, s), (A_new, B_new, s_new) = old, new
    M, N = A_new @ torch.linalg.pinv(A.to(A_new)), torch.linalg.pinv(B.to(B_new)) @ B_new
    ratio = s_new / s
    left, right = ((ratio * T).pow(power) for T in (N.T, M.T))
    return left @ moments[0].to(A_new), moments[1].to(B_new) @ right


@torch.no_grad()
def ranks_for_energy(model: nn.Module, share: float) -> dict[str, int]:
    """Return a `rank_pattern` with the smallest rank of each layer that keeps this share of its energy.

    Raises:
        TypeError, ValueError: share is no number in (0, 1], or what `squeezable` refuses.
    """
    parts = {path: lora_parts(layer) for path, layer in squeezable(model).items()}
    return {"^" + re.escape(path): rank_for_energy(factored_svd(A, B)[1], share) for path, (A, B, _) in parts.items()}


@torch.no_grad()
def squeeze(
    model: Model,
    rank: Ranks,
    *,
    scale: float | None = None,
    split: str = "balanced",
    oversample: int | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Put LoRA layers of smaller rank in the place of all that a finished model has (Post-Squeeze).

    To train on (Cont-Squeeze), build a new optimizer. `save_peft` writes the ranks into PEFT's `rank_pattern`, and a
    model that `load_peft` has read can be squeezed.

    Args:
        model: its adapters are LoRA layers inside. Changed in place, or not at all.
        rank: k for all layers, or a `rank_pattern` as PEFT's: regular expression for the end of a path -> k; layers
            that it does not name stay. A layer of smaller rank keeps its own.
        scale: s' of all layers that change; None keeps that of each.
        split, oversample, generator: see `squeezed_factors`.

    Returns:
        The same model; layers that were squeezed are `LoRALinear`, with their dropout and mode.

    Raises:
        TypeError, ValueError: an argument out of range, a pattern that names no layer, other adapters in the model, or
            factors that are not finite.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from lowrank_ref import LoRALinear, replace_linears
        >>> from lowrank_ref.adapters import squeeze
        >>> model = replace_linears(nn.Sequential(nn.Linear(6, 5)), "", partial(LoRALinear, rank=4))
        >>> squeeze(model, 2)[0].rank
        2
    """
    layers = {path: layer for path, layer in squeezable(model).items() if path}
    if not layers:
        raise ValueError(f"model: got the layer {type(model).__name__} itself, wanted a model that contains it")
    new = {}
    for path, k in target_ranks(model, rank).items():
        A, B, s = lora_parts(layers[path])
        s_new = s if scale is None else scale
        options: dict[str, Any] = {"split": split, "oversample": oversample, "generator": generator}
        A_new, B_new, _ = squeezed_factors(A, B, s, k, new_scale=s_new, **options)
        new[id(layers[path])] = lora_of(layers[path], A_new.to(A.dtype), B_new.to(B.dtype), s_new)
    return replace_modules(model, "", lambda layer: new[id(layer)], accepts=lambda module: id(module) in new)


PAPER = PaperInfo(
    key="lora_squeeze",
    part="adapters",
    name="LoRA-Squeeze",
    title="LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of LoRA Modules",
    authors=("Ivan Vulić", "Adam Grycner", "Quentin de Laroussilhe", "Jonas Pfeiffer"),
    arxiv="2602.10993v2",
    summary="Train LoRA at a generous rank, then cut it by an SVD of its thin factors, once or in steps.",
    use_when="you have a LoRA of a rank that is too large to serve, and can train on for some steps at the small one",
    instead={"lora": "you know the rank you can serve: train at it, and try a restart of Adam early"},
    needs=("lora",),
    equations={
        "algorithm 2": "squeezed_factors",
        "B', A' of U S Vᵀ": "split_factors",
        "V(k)": "retained_energy",
        "Post-Squeeze": "squeeze",
        "moments after a squeeze": "carried_moments",
    },
    deviations=(
        "exact SVD of the core by default, a sketch as an option",
        "s' = s, balanced split, moments reset: ours; the paper's choice is not known to us",
    ),
    aliases=("post-squeeze", "in-squeeze", "cont-squeeze", "rank annealing", "LoRA compression"),
    status="draft",
    verified="2026-11-29",
)
