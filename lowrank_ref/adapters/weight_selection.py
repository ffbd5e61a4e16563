"""Which weights of a matrix to train: the smallest, as SaRA does, or its controls; and one threshold for many."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowrank_ref.core.checks import check_floating, check_integer, check_number

#: Which weights train. All but the first are controls.
RULES = ("smallest", "largest", "middle", "random")


def below(P: Float[Tensor, "m n"], threshold: float) -> Int[Tensor, " k"]:
    """Return the flat places, in rising order, where abs P < θ: zeros are always there. ValueError: θ < 0.

    Example:
        >>> below(torch.tensor([[0.5, -0.01], [0.0, 0.03]]), 0.02).tolist()
        [1, 2]
    """
    check_number("threshold", threshold, low=0)
    return (P.abs() < threshold).flatten().nonzero()[:, 0]


def smallest(P: Float[Tensor, "m n"], count: int) -> Int[Tensor, " k"]:
    """Return the flat places, in rising order, of the `count` entries of smallest magnitude; of equal ones the first.

    Raises:
        TypeError, ValueError: not 0 <= count <= mn.

    Example:
        >>> smallest(torch.tensor([[0.5, -0.1], [0.1, 0.0]]), 2).tolist()
        [1, 3]
    """
    return pick_entries(P, count, "smallest")


def pick_entries(
    P: Float[Tensor, "m n"], count: int, rule: str = "smallest", generator: torch.Generator | None = None
) -> Int[Tensor, " k"]:
    """Return the places of `count` entries by a rule, as int32 where that is wide enough.

    Args:
        P: (m, n).
        count: k, 0 <= k <= mn.
        rule: "smallest", "largest"; "middle": those around the median of abs P; "random".
        generator: draws for "random".

    Raises:
        TypeError, ValueError: another rule, or a count out of range.
    """
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, wanted one of {RULES}")
    check_integer("count", count, low=0)
    if count > P.numel():
        raise ValueError(f"count: got {count}, wanted at most the {P.numel()} weights of a {tuple(P.shape)} matrix")
    if rule == "random":
        device = generator.device if generator is not None else P.device
        order = torch.randperm(P.numel(), generator=generator, device=device).to(P.device)
    else:
        order = P.abs().flatten().sort(stable=True).indices
    first = {"largest": P.numel() - count, "middle": (P.numel() - count) // 2}.get(rule, 0)
    places = order[first : first + count].sort().values
    return places.to(torch.int32) if P.numel() < 2**31 else places


def threshold_for_density(weights: Iterable[Tensor], density: float) -> float:
    """Return θ such that a share of all these weights together lies below it: fewer, where several are equal to it.

    Args:
        weights: tensors of any shape, at least one number.
        density: in [0, 1); 0.05 for the 50M of a diffusion model of 860M in the paper.

    Raises:
        TypeError, ValueError: a number out of range, no tensor.

    Example:
        >>> threshold_for_density([torch.tensor([0.5, -0.25]), torch.tensor([0.125, 2.0])], 0.5)
        0.5
    """
    check_number("density", density, low=0, high=1)
    sizes = []
    for W in weights:
        check_floating("weights", W)
        sizes.append(W.detach().abs().flatten().to(torch.promote_types(W.dtype, torch.float32)))
    total = sum(map(len, sizes))
    count = round(density * total)
    if count >= total:
        raise ValueError(f"density: got {density} of {total} weights, wanted some, but not all of them")
    return torch.cat([s.to(sizes[0].device) for s in sizes]).kthvalue(count + 1).values.item()
