"""Groups of an optimizer: which of a model's trained parameters take weight decay, by the rules of its layers."""

from typing import Any

from torch import nn

from lowrank_ref.core.checks import check_number


def optimizer_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the groups of an optimizer over all trained parameters of a model.

    Decay takes no part of what a layer class lists in its attribute `no_decay`, such as SoRA's gates or RandLoRA's Γ,
    nor of vectors and scalars: biases, gains of norms, magnitudes.

    Args:
        model: holds at least one parameter that trains.
        lr: learning rate of all groups.
        weight_decay: λ >= 0 of the others.

    Returns:
        Two groups for an optimizer with this rate, one decayed by λ and one not at all; an empty one is left out.

    Raises:
        TypeError, ValueError: lr or weight_decay out of range, or nothing trains.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.core.groups import optimizer_groups
        >>> from lowrank_ref.ranks import SoRALinear
        >>> decayed, spared = optimizer_groups(SoRALinear(nn.Linear(6, 4), rank=2), lr=0.1, weight_decay=0.5)
        >>> [tuple(p.shape) for p in decayed["params"]], [tuple(p.shape) for p in spared["params"]]
        ([(2, 6), (4, 2)], [(2,)])
    """
    check_number("lr", lr, low=0)
    check_number("weight_decay", weight_decay, low=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"model: got {type(model).__name__} without a parameter that trains, wanted at least one")
    free = {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "no_decay", ())}
    free |= {id(p) for p in trained if p.ndim < 2}
    groups = [
        {
            "params": [p for p in trained if (id(p) in free) == spared],
            "lr": lr,
            "weight_decay": 0.0 if spared else weight_decay,
        }
        for spared in (False, True)
    ]
    return [group for group in groups if group["params"]]
