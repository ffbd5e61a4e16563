"""NOLA's coefficients in a few bits: rounding with one step a vector, training through it, and packing into bytes.

The paper rounds the coefficients, not the bases, and so neither A nor B. Its official code has the switches, "quantized
aware training" among them, but no rounding; the rule here is the plainest one: symmetric and uniform, with the largest
coefficient at the outermost level.
"""

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from lowrank_ref.core.checks import check_finite, check_floating, check_integer


def check_bits(bits: int) -> None:
    """Require 2 to 8 bits.

    Raises:
        TypeError, ValueError: anything else.
    """
    check_integer("bits", bits, low=2)
    if bits > 8:
        raise ValueError(f"bits: got {bits}, wanted an integer from 2 to 8")


def _grid(c: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return whole numbers as floats, and the step between levels. Ties go to the even number."""
    levels = 2 ** (bits - 1) - 1
    step = c.abs().max() / levels
    return (c / torch.where(step > 0, step, 1.0)).round().clamp(-levels, levels), step


def quantize(c: Float[Tensor, " k"], bits: int) -> tuple[Int8[Tensor, " k"], Float[Tensor, ""]]:
    """Return codes in ±(2^(bits-1) - 1) and the step, max|c| over the largest code, with c ≈ step·codes.

    Raises:
        TypeError, ValueError: bits not in 2 ... 8, or c is no finite floating-point tensor.

    Example:
        >>> codes, step = quantize(torch.tensor([0.7, -0.36, 0.0]), 4)
        >>> codes.tolist(), round(step.item(), 3)
        ([7, -4, 0], 0.1)
    """
    check_bits(bits)
    check_floating("c", c)
    check_finite("c", c)
    codes, step = _grid(c, bits)
    return codes.to(torch.int8), step


def rounded(c: Float[Tensor, " k"], bits: int) -> Float[Tensor, " k"]:
    """Return step·codes of `quantize`. The gradient passes through as if nothing had been rounded (straight-through).

    Raises:
        TypeError, ValueError: bits not in 2 ... 8.
    """
    check_bits(bits)
    codes, step = _grid(c.detach(), bits)
    return codes * step + (c - c.detach())


def pack_codes(codes: Int8[Tensor, " k"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Write codes of `quantize` one after the other, ⌈k·bits/8⌉ bytes; the lowest bit comes first.

    Example:
        >>> pack_codes(torch.tensor([7, -7], dtype=torch.int8), 4).tolist()
        [14]
    """
    above = codes.int() + 2 ** (bits - 1) - 1
    flat = ((above[:, None] >> torch.arange(bits, device=codes.device)) & 1).flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_codes(data: UInt8[Tensor, " bytes"], bits: int, count: int) -> Int8[Tensor, " count"]:
    """Return the codes that `pack_codes` wrote.

    Raises:
        ValueError: another number of bytes than `count` codes take, or a code that `quantize` never gives.
    """
    wanted = -(-count * bits // 8)
    if len(data) != wanted:
        raise ValueError(f"data: got {len(data)} bytes, wanted {wanted} for {count} codes of {bits} bits")
    flat = ((data.int()[:, None] >> torch.arange(8, device=data.device)) & 1).flatten()[: count * bits]
    codes = (flat.view(count, bits) << torch.arange(bits, device=data.device)).sum(1) - (2 ** (bits - 1) - 1)
    if bool((codes >= 2 ** (bits - 1)).any()):
        raise ValueError(f"data: got the code {2 ** (bits - 1)}, wanted at most {2 ** (bits - 1) - 1} with {bits} bits")
    return codes.to(torch.int8)
