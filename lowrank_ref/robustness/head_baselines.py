"""What a choice of head is compared with: the surest head, and the average of all."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lowrank_ref.core.checks import check_integer


def surest_head(heads: Sequence[Tensor], *, count: int = 2) -> Int64[Tensor, " batch"]:
    """Return for each row the head of the lowest entropy among the first `count`, the earlier of a tie. A baseline.

    Raises:
        TypeError, ValueError: count is not 2 or 3.
    """
    check_integer("count", count, low=2)
    if count > 3:
        raise ValueError(f"count: got {count}, wanted 2 or 3 heads")
    return torch.stack([torch.special.entr(z.softmax(1)).sum(1) for z in heads[:count]]).argmin(0)


def average_heads(heads: Sequence[Tensor]) -> Float[Tensor, "batch classes"]:
    """Return the log of the mean probability of the three heads. A baseline without a choice."""
    return torch.stack([z.log_softmax(1) for z in heads]).logsumexp(0) - math.log(3)
