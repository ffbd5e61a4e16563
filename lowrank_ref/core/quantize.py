"""Block-wise 8-bit storage of optimizer moments with a dynamic code (Dettmers et al. 2021, arXiv 2110.02861)."""

import functools

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lowrank_ref.core.checks import check_finite, check_floating, check_loaded

BLOCK = 256


@functools.cache
def dynamic_code(signed: bool) -> Float[Tensor, " 256"]:
    """Return the 256 values of the dynamic 8-bit code, sorted, with 0 and 1 among them.

    Seven decades from 1e-7 to 1, each split evenly from its tenth to its end: the number of points doubles from decade
    to decade, so that large values are precise and small ones keep their size. The signed code mirrors this, but
    for -1: 0 takes that place, and it begins at -0.993.

    Args:
        signed: True for values in [-1, 1] (first moment), False for [0, 1] (second moment).

    Returns:
        Values, float32, shape (256,).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        points = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1.0, points + 1, dtype=torch.float64)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles.tolist(), *((-middles).tolist() if signed else [])]
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_blockwise(
    x: Float[Tensor, "*shape"], *, signed: bool
) -> tuple[UInt8[Tensor, "*shape"], Float[Tensor, " blocks"]]:
    """Round every entry, relative to the largest of its block of 256, to the nearest code value.

    Args:
        x: any shape, finite in float32; >= 0 everywhere when `signed` is False.
        signed: which code.

    Returns:
        Codes, uint8, shape of x; the largest magnitude of each block, float32, shape (ceil(numel/256),).

    Raises:
        TypeError, ValueError: x is not floating point, not finite in float32 (float64 can be larger), negative with
            signed=False, or on the meta device.
    """
    check_floating("x", x)
    check_loaded("x", x)
    flat = x.float().flatten()
    check_finite("x", flat)
    if not signed and bool((flat < 0).any()):
        raise ValueError("x: got negative entries, wanted x >= 0 with signed=False")
    code = dynamic_code(signed).to(x.device)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    peak = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(peak > 0, peak, 1.0)[:, None]
    codes = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: flat.numel()].view(x.shape), peak


def dequantize_blockwise(
    codes: UInt8[Tensor, "*shape"], peak: Float[Tensor, " blocks"], *, signed: bool
) -> Float[Tensor, "*shape"]:
    """Return the values that `quantize_blockwise` stored, float32, shape of the codes.

    Raises:
        ValueError: codes are no bytes, or there is not one peak for each block of 256.
    """
    if codes.dtype != torch.uint8 or peak.shape != (-(-codes.numel() // BLOCK),):
        got = f"codes of {codes.dtype} and shape {tuple(codes.shape)}, {tuple(peak.shape)} peaks"
        raise ValueError(f"codes, peak: got {got}, wanted bytes and one peak for each {BLOCK}")
    values = dynamic_code(signed).to(codes.device)[codes.flatten().int()]
    scale = peak.repeat_interleave(BLOCK)[: values.numel()]
    return (values * scale).view(codes.shape)
