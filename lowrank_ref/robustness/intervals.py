"""How sure a number is: Wilson's interval of a share, and a bootstrap over queries."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_finite, check_integer


def success_interval(successes: int, cases: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share. ValueError: fewer cases than successes, or none.

    Example:
        >>> [round(end, 3) for end in success_interval(19, 20)]
        [0.764, 0.991]
    """
    check_integer("successes", successes, low=0)
    check_integer("cases", cases, low=max(1, successes))
    z, share = 1.959963984540054, successes / cases
    middle, scale = share + z * z / (2 * cases), 1 + z * z / cases
    half = z * math.sqrt(share * (1 - share) / cases + z * z / (4 * cases * cases))
    return (middle - half) / scale, (middle + half) / scale


def bootstrap_interval(
    statistic: Callable[..., Tensor],
    *samples: Float[Tensor, " _"],
    generator: torch.Generator,
    draws: int = 1000,
    together: bool = True,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `statistic(*samples)`, over queries drawn anew with replacement.

    Args:
        statistic: of as many vectors as there are samples; returns a number.
        samples: numbers, one a query, without NaN.
        generator: the source of randomness.
        draws: how often to draw, at least 1.
        together: draw the same queries from all samples (they are the same queries), or each on its own.

    Raises:
        ValueError: no sample, samples of other lengths that shall be drawn together, NaN, or draws < 1.
    """
    check_integer("draws", draws, low=1)
    sizes = {len(sample) for sample in samples}
    if not samples or (together and len(sizes) > 1) or 0 in sizes:
        raise ValueError(f"samples: got lengths {sorted(sizes)}, wanted some numbers, as many in each if together")
    for sample in samples:
        check_finite("samples", sample)
    found = []
    for _ in range(draws):
        rows = [torch.randint(len(s), (len(s),), generator=generator) for s in (samples[:1] if together else samples)]
        found.append(float(statistic(*(s[i] for s, i in zip(samples, rows * len(samples) if together else rows)))))
    low, high = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
