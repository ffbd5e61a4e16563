"""Hadamard rotations in blocks: both operands of a product are turned, so that outliers are spread before rounding."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer


def hadamard(size: int) -> Float[Tensor, "size size"]:
    """Return the orthonormal Hadamard matrix H, HHᵀ = I, float64; size is a power of two, else a ValueError comes."""
    check_integer("size", size, low=1)
    if size & (size - 1):
        raise ValueError(f"size: got {size}, wanted a power of two")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / math.sqrt(2)
    return H


def rotate_blocks(
    A: Float[Tensor, "*batch p k"], size: int, signs: Float[Tensor, " size"] | None = None
) -> Float[Tensor, "*batch p k_"]:
    """Return A with each `size` columns multiplied by diag(signs)·H; zero columns fill up the last block.

    (A rotated)(B rotated)ᵀ = ABᵀ: one large entry is spread over its block before it is rounded.
    """
    H = hadamard(size).to(A)
    H = H if signs is None else signs.to(A)[:, None] * H
    return (F.pad(A, (0, -A.shape[-1] % size)).unflatten(-1, (-1, size)) @ H).flatten(-2)
