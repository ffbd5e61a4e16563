"""Scores for robustness to low resolution: γ, its correction near chance, and means over data sets (SAR, WAR).

Pathak et al., arXiv 2502.03950, by the script that its repository calls equation 1 (shyammarjit/LR0.FM at 8c7ccb6).
A_n is the accuracy at n pixels, A_HR at full resolution (224 in the benchmark), K the number of classes. Below chance
E counts as 0 here; the script squares it, so that being wrong more often than by guessing would count as skill.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_number, check_wide

#: Weights of the 15 data sets in WAR, from the README at 8c7ccb6; they were fitted at 16 pixels and serve for all.
WAR_WEIGHTS = {
    "ImageNet": 0.15556157429688613, "ImageNet-A": 0.970498446080589, "ImageNet-V2": 0.2854574367981364,
    "ImageNet-R": 0.01, "ImageNet-Sketch": 0.021456095637452655, "Caltech101": 0.01, "DTD": 0.505922498560715,
    "Food101": 0.01, "SUN397": 0.407563119725743, "Cars": 0.13583821249199218, "Aircraft": 0.8229545014750042,
    "Pets": 0.08995285864599148, "Flowers102": 0.08972060770047119, "EuroSAT": 1.0, "UCF101": 0.01,
}  # fmt: skip
#: Classes K of the same data sets, as the official script counts them.
CLASSES = {
    "ImageNet": 1000, "ImageNet-A": 200, "ImageNet-V2": 1000, "ImageNet-R": 200, "ImageNet-Sketch": 1000,
    "Caltech101": 102, "DTD": 47, "Food101": 102, "SUN397": 397, "Cars": 196, "Aircraft": 102, "Pets": 37,
    "Flowers102": 102, "EuroSAT": 10, "UCF101": 101,
}  # fmt: skip


def relative_robustness(
    accuracy: Float[Tensor, "*models sets"], high: Float[Tensor, "*models sets"]
) -> Float[Tensor, "*models sets"]:
    """Return γ = A_n / A_HR, which may exceed 1.

    Args:
        accuracy: A_n in [0, 1], not in percent.
        high: A_HR in (0, 1].

    Raises:
        TypeError: no floating-point tensors.
        ValueError: out of range; a model that is never right at full resolution has no γ.
    """
    for name, value in (("accuracy", accuracy), ("high", high)):
        check_wide(name, value)
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{name}: got values outside [0, 1], or NaN, wanted shares, not percent")
    if not bool((high > 0).all()):
        raise ValueError("high: got 0, wanted accuracies > 0, by which one can divide")
    return accuracy / high


def improved_robustness(
    accuracy: Float[Tensor, "*models sets"],
    high: Float[Tensor, "*models sets"],
    chance: Float[Tensor, " sets"] | float,
    *,
    sharpness: float = 200.0,
) -> Float[Tensor, "*models sets"]:
    """Return Γ = γ·(1 - exp(-α·E²)) with E = max(A_HR - chance, 0): γ, but 0 for who only guesses (equation 1).

    Args:
        accuracy: A_n in [0, 1].
        high: A_HR in (0, 1].
        chance: 1/K for K classes.
        sharpness: α > 0; at 200 who is five points above chance keeps 39 % of γ, at ten 86 %.

    Raises:
        TypeError, ValueError: as `relative_robustness`; a sharpness that is not > 0.

    Example:
        >>> round(improved_robustness(torch.tensor([0.09]), torch.tensor([0.15]), 0.1).item(), 4)  # γ = 0.6
        0.2361
    """
    check_number("sharpness", sharpness, low=0, open_low=True)
    skill = (high - chance).clamp_min(0)
    return relative_robustness(accuracy, high) * -torch.expm1(-sharpness * skill.square())


def aggregated_robustness(
    robustness: Float[Tensor, "*models sets"], weights: Float[Tensor, " sets"] | None = None
) -> Float[Tensor, "*models"]:
    """Return Σ w·Γ / Σ w over the data sets: SAR from γ without weights, WAR from Γ with those of the benchmark.

    Raises:
        ValueError: another number of weights than sets, a negative weight, or none above 0.
    """
    if weights is None:
        return robustness.mean(-1)
    if weights.shape != robustness.shape[-1:] or not bool((weights >= 0).all()) or not bool((weights > 0).any()):
        raise ValueError(f"weights: got {weights.tolist()}, wanted {robustness.shape[-1]} numbers >= 0, not all 0")
    return robustness @ weights / weights.sum()
