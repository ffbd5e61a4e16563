"""Several norms at once: what survives all attacks, and when one of three balls comes for free.

| source                                                             | here             |
|--------------------------------------------------------------------|------------------|
| union accuracy (RAMP, 2402.06827; Tramer and Boneh, 1904.13000)    | `union_accuracy` |
| l2 ball inside the hull of l1 and l∞ balls (Croce and Hein, 2020)  | `hull_radius`    |
| the same question for any of the three                             | `is_free`        |

A *threat* is a mapping norm -> radius, such as {math.inf: 8 / 255, 2: 0.5, 1: 12}. A linear classifier that
withstands two balls withstands their convex hull: if the third ball lies inside, it needs no training. For other
networks this is a heuristic, and the hull ignores the box [0, 1]^d.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.modes import eval_mode
from lowrank_ref.robustness.attack_losses import check_labels, cross_entropy, dlr
from lowrank_ref.robustness.attacks import Attacked, SampleLoss, apgd, check_known
from lowrank_ref.robustness.projections import NORMS


@torch.no_grad()
def right(
    model: nn.Module, x: Float[Tensor, "samples *shape"], y: Int64[Tensor, " samples"]
) -> Bool[Tensor, " samples"]:
    """Say which samples the model, in eval mode, classifies as y. Labels out of range or NaN: a ValueError."""
    with eval_mode(model):
        logits = model(x)
    check_labels(y, logits.shape[1])
    check_known("logits", ~logits.isnan())
    return logits.argmax(1) == y


def survivors(
    model: nn.Module,
    x: Float[Tensor, "samples *shape"],
    y: Int64[Tensor, " samples"],
    threat: Mapping[float, float],
    *,
    steps: int = 50,
    losses: Sequence[SampleLoss] = (cross_entropy, dlr),
    attack: Callable[..., Attacked] = apgd,
) -> dict[str | float, Bool[Tensor, " samples"]]:
    """Attack every sample in every norm and say which stay right.

    Args:
        model: maps images to logits.
        x: clean images in [0, 1].
        y: labels.
        threat: norm -> radius >= 0.
        steps: of each attack.
        losses: one attack each; a sample survives a norm if it survives all of them.
        attack: `apgd` or `pgd`.

    Returns:
        "clean" and each norm -> truth value per sample. What is wrong without an attack does not survive one.
    """
    alive: dict[str | float, Tensor] = {"clean": right(model, x, y)}
    for norm, epsilon in threat.items():
        alive[norm] = alive["clean"].clone()
        for loss in losses:
            found = attack(model, x, y, norm=norm, epsilon=epsilon, steps=steps, loss=loss, sparsity=0.2)
            alive[norm] &= right(model, found.x_adv, y)
    return alive


def union_accuracy(correct: Bool[Tensor, "attacks samples"]) -> float:
    """Return the share of samples that are right under every attack.

    Raises:
        TypeError, ValueError: no truth values, or none for (attacks, samples), at least one of each.

    Example:
        >>> union_accuracy(torch.tensor([[True, True, False], [False, True, True]]))
        0.3333333333333333
    """
    if correct.dtype != torch.bool:
        raise TypeError(f"correct: got dtype {correct.dtype}, wanted truth values")
    if correct.ndim != 2 or correct.numel() == 0:
        raise ValueError(f"correct: got shape {tuple(correct.shape)}, wanted (attacks, samples), at least one of each")
    return correct.all(dim=0).double().mean().item()


def accuracies(alive: Mapping[str | float, Bool[Tensor, " samples"]]) -> dict[str, float]:
    """Return "clean", "linf", "l2", "l1" (those attacked) and "union" from what `survivors` found."""
    names = {"clean": "clean", math.inf: "linf", 2: "l2", 1: "l1"}
    each = {names[key]: ok.double().mean().item() for key, ok in alive.items()}
    return {**each, "union": union_accuracy(torch.stack(list(alive.values())))}


def hull_radius(epsilon_1: float, epsilon_inf: float, d: int) -> float:
    """Return the radius of the largest l2 ball inside conv(B_1(ε₁) ∪ B_∞(ε_∞)) of R^d.

    A ball of radius ρ is inside iff ρ‖w‖₂ <= max(ε₁‖w‖_∞, ε_∞‖w‖₁) for every w (support functions). The worst w has
    k = floor(ε₁/ε_∞) equal entries and one of size a = ε₁/ε_∞ - k relative to them: ρ = ε₁/√(k + a²), about √(ε₁ε_∞).

    Raises:
        TypeError, ValueError: a radius that is not > 0, or d that is no integer >= 1.

    Example:
        >>> round(hull_radius(12, 8 / 255, 3072), 3)
        0.614
    """
    check_number("epsilon_1", epsilon_1, low=0, open_low=True)
    check_number("epsilon_inf", epsilon_inf, low=0, open_low=True)
    check_integer("d", d, low=1)
    ratio = min(max(epsilon_1 / epsilon_inf, 1.0), float(d))  # beyond these ends one ball contains the other
    k = math.floor(ratio)
    return max(epsilon_1, epsilon_inf * ratio) / math.sqrt(k + (ratio - k) ** 2)


def is_free(norm: float, threat: Mapping[float, float], d: int) -> bool:
    """Say whether the ball of one norm lies inside the convex hull of the balls of the two others.

    Args:
        norm: one of math.inf, 2, 1.
        threat: norm -> radius > 0, for all three.
        d: dimension.

    Raises:
        ValueError: another norm, or a radius that is missing.
    """
    if norm not in NORMS or set(threat) != set(NORMS):
        raise ValueError(f"norm, threat: got {norm!r} and {dict(threat)}, wanted one of {NORMS} and a radius for each")
    e_inf, e_2, e_1 = threat[math.inf], threat[2], threat[1]
    if norm == 2:
        return e_2 <= hull_radius(e_1, e_inf, d)
    if norm == 1:  # the farthest points of the l1 ball are ±ε₁ on an axis
        return e_1 <= max(e_2, e_inf)
    return e_inf * d <= max(e_1, e_2 * math.sqrt(d))  # those of the l∞ ball are its corners
