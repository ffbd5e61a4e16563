"""A picture with less in it: down to r x r pixels and up again, as a fixed matrix of rank r on each axis.

The filter is Pillow's default, Keys' cubic with a = -1/2, widened by the factor of reduction on the way down; weights
beyond the border are left out and the rest divided by their sum. Pillow rounds to 8 bits and clips after each of the
two passes over each resize; here nothing is rounded or clipped, so that the operator is linear and works in any range.
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_integer, check_wide

Bucket = tuple[int, int]


def cubic(d: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return Keys' kernel at the distance d: 1 at 0, 0 at 1 and from 2 on.

    Example:
        >>> cubic(torch.tensor([0.0, 0.5, 1.0, 1.5])).tolist()
        [1.0, 0.5625, 0.0, -0.0625]
    """
    d = d.abs()
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, 0.0))


@functools.cache
def resize_matrix(size: int, side: int) -> Float[Tensor, "side size"]:
    """Return the float64 matrix that resizes one axis from `size` to `side` pixels; its rows sum to 1. Do not write it.

    Raises:
        TypeError, ValueError: no whole numbers >= 1.
    """
    check_integer("size", size, low=1)
    check_integer("side", side, low=1)
    ratio = size / side
    centre = (torch.arange(side, dtype=torch.float64) + 0.5) * ratio
    place = torch.arange(size, dtype=torch.float64) + 0.5
    weights = cubic((place - centre[:, None]) / max(ratio, 1.0))
    return weights / weights.sum(1, keepdim=True)


@functools.cache
def low_resolution_matrix(size: int, side: int) -> Float[Tensor, "size size"]:
    """Return U·D, down to `side` pixels and up again: rank `side`; the identity where side >= size. Do not write it.

    Raises:
        TypeError, ValueError: no whole numbers >= 1.

    Example:
        >>> torch.linalg.matrix_rank(low_resolution_matrix(32, 8)).item()
        8
    """
    check_integer("size", size, low=1)
    check_integer("side", side, low=1)
    if side >= size:
        return torch.eye(size, dtype=torch.float64)
    return resize_matrix(side, size) @ resize_matrix(size, side)


def low_resolution(
    x: Float[Tensor, "*batch height width"], side: int | Sequence[int]
) -> Float[Tensor, "*batch height width"]:
    """Return the pictures with as much detail as side x side pixels hold, at their old size.

    Args:
        x: pictures (..., H, W), floating point.
        side: r >= 1 for all pictures, or one for each entry of the first axis. An axis that is no longer than r stays.

    Raises:
        TypeError: x is not floating point, or a side no whole number.
        ValueError: a side below 1, fewer than two axes, or another number of sides than pictures.
    """
    check_wide("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (..., height, width)")
    if isinstance(side, int):
        rows, columns = (low_resolution_matrix(size, side).to(x) for size in x.shape[-2:])
        return rows @ x @ columns.T
    sides = list(side)
    if x.ndim < 3 or len(sides) != len(x):
        raise ValueError(f"side: got {len(sides)} sides for shape {tuple(x.shape)}, wanted one for each picture")
    one = (len(x), *[1] * (x.ndim - 3))
    rows, columns = (
        torch.stack([low_resolution_matrix(size, r) for r in sides]).to(x).view(*one, size, size)
        for size in x.shape[-2:]
    )
    return rows @ x @ columns.mT


def draw_sides(bucket: Bucket, count: int, generator: torch.Generator | None = None) -> list[int]:
    """Draw so many sides r, evenly from [low, high).

    Raises:
        TypeError, ValueError: not 1 <= low < high, whole numbers.
    """
    low, high = bucket
    check_integer("bucket[0]", low, low=1)
    check_integer("bucket[1]", high, low=low + 1)
    device = generator.device if generator is not None else None
    return torch.randint(low, high, (count,), generator=generator, device=device).tolist()
