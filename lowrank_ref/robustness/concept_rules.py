"""Ways to make one score of the similarities of a class's concepts: CGBC's rivals.

Each takes S (..., M), finite, and returns (...). `mean_embedding_scores` and `weighted_embedding_scores` need features:
they sum concepts before they meet an image, as prompt ensembling does.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_number
from lowrank_ref.robustness.cgbc import (
    concept_similarities,
    marginal_score,
    median_and_mad,
    outlier_share,
    trim_weights,
)


def mean_embedding_scores(
    images: Float[Tensor, "batch d"], concepts: Float[Tensor, "classes m d"], *, scale: float = 100.0
) -> Float[Tensor, "batch classes"]:
    """Return scale·cosine with the mean of a class's unit concept features: prompt ensembling (2103.00020).

    Raises:
        TypeError, ValueError: a scale <= 0.
    """
    centre = F.normalize(concepts, dim=-1).mean(dim=1, keepdim=True)
    return concept_similarities(images, centre, scale=scale).squeeze(-1)


def weighted_embedding_scores(
    images: Float[Tensor, "batch d"],
    concepts: Float[Tensor, "classes m d"],
    weights: Float[Tensor, "*batch classes m"],
    *,
    scale: float = 100.0,
) -> Float[Tensor, "batch classes"]:
    """Return scale·cosine with the weighted sum of a class's unit concept features; with equal weights their mean.

    Args:
        images: features of images, of any length.
        concepts: features of concepts, of any length.
        weights: w >= 0, such as `trim_weights`: one set for each image (batch, classes, m), or for all (classes, m).
        scale: the model's logit scale, > 0.

    Raises:
        TypeError, ValueError: a scale <= 0.
    """
    check_number("scale", scale, low=0, open_low=True)
    centre = F.normalize(torch.einsum("...km,kmd->...kd", weights, F.normalize(concepts, dim=-1)), dim=-1)
    return scale * torch.einsum("bd,kd->bk" if weights.ndim == 2 else "bd,bkd->bk", F.normalize(images, dim=-1), centre)


def mean_score(S: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """Return the mean: the prior alone."""
    return S.mean(dim=-1)


def max_score(S: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """Return the largest: the likeliest concept alone."""
    return S.amax(dim=-1)


def median_score(S: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """Return the lower median."""
    return S.median(dim=-1).values


def softmax_score(S: Float[Tensor, "*batch m"], *, temperature: float = 1.1) -> Float[Tensor, "*batch"]:
    """Return Σ softmax(S/τ)·S; the code's "prior map". ValueError: temperature <= 0."""
    check_number("temperature", temperature, low=0, open_low=True)
    return marginal_score(S, (S / temperature).softmax(dim=-1))


def hard_trim(S: Float[Tensor, "*batch m"], *, share: float = 0.1, side: str = "lower") -> Float[Tensor, "*batch"]:
    """Return the mean without the lowest int(share·M) concepts, and with `side="both"` without as many highest.

    Raises:
        TypeError, ValueError: a share out of [0, 0.5), or another side.
    """
    check_number("share", share, low=0, high=0.5 - 1e-9)
    if side not in ("lower", "both"):
        raise ValueError(f"side: got {side!r}, wanted 'lower' or 'both'")
    cut = int(share * S.shape[-1])
    ordered = S.sort(dim=-1).values
    return ordered[..., cut : S.shape[-1] - cut * (side == "both")].mean(dim=-1)


def cauchy_score(S: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """Return the mean under the weights 1/(1 + z²), z = (S - m)/MAD."""
    m, mad = median_and_mad(S)
    return marginal_score(S, 1 / (1 + ((S - m) / mad).square()))


def huber_score(S: Float[Tensor, "*batch m"], *, confidence: float = 0.05) -> Float[Tensor, "*batch"]:
    """Return m + t·mean clip((S - m)/t, -1, 1) with t = MAD·max(1, √(2 log(2/confidence)/(M·ρ̂))), ρ̂ >= 1/M.

    Raises:
        TypeError, ValueError: a confidence out of (0, 1].
    """
    check_number("confidence", confidence, low=0, high=1, open_low=True)
    m, mad = median_and_mad(S)
    share = outlier_share(S).clamp_min(1 / S.shape[-1])
    t = mad * (2 * math.log(2 / confidence) / (S.shape[-1] * share)).sqrt().clamp_min(1)
    return m.squeeze(-1) + (t * ((S - m) / t).clamp(-1, 1)).mean(dim=-1)


def upper_half(S: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    """Return the mean of those above the median, and of the median with weight ½: one-sided soft trim as κ → ∞."""
    m = S.median(dim=-1, keepdim=True).values
    return marginal_score(S, torch.where(m == S, 0.5, (m < S).to(S.dtype)))


def fixed_trim(S: Float[Tensor, "*batch m"], kappa: float, *, side: str = "lower") -> Float[Tensor, "*batch"]:
    """Return the soft trim with a κ >= 0 that no image changes. ValueError: κ < 0, or another side."""
    check_number("kappa", kappa, low=0)
    return marginal_score(S, trim_weights(S, kappa, side=side))


#: Rules by name, each a function of S, those of the official code, and the plain mean of similarities.
SCORE_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean_score,
    "max": max_score,
    "median": median_score,
    "softmax": softmax_score,
    "hard trim": hard_trim,
    "symmetric trim": lambda S: hard_trim(S, share=0.2, side="both"),
    "Cauchy": cauchy_score,
    "Huber": huber_score,
}
