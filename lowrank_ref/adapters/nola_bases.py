r"""NOLA's frozen random matrices: every number is a function of seed and place, so none has to be kept.

Number c of a stream is the c-th word of SplitMix64 (Steele, Lea and Flood 2014), an integer that is added, shifted and
multiplied modulo 2⁶⁴, of which 24 bits become a fraction. It is the same on every device, in every dtype of 32 bits or
more and under every version of PyTorch, a block can be drawn without those before it, no generator's state changes, and
the compiler sees plain tensor operations. A `torch.Generator` promises none of these.

A layer's streams are 0 for the Aᵢ, 1 for the Bⱼ, 2 for A₀. In each, matrix i has the numbers i·size to (i + 1)·size - 1
in row order, so more bases begin with the same ones.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

#: SplitMix64's three constants, as signed numbers.
STEP, FIRST, SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
#: How many numbers are drawn together on a CPU, whose cache holds them; a GPU wants more to do at once.
BLOCKS = {"cpu": 2**16}
GPU_BLOCK = 2**21


def _word(seed: Int64[Tensor, ""], place: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Return SplitMix64's word at each place >= 1. The masks of the last three lines make `>>` shift in zeros."""
    # This `&` changes nothing, but has inductor multiply 64-bit numbers, not its own.
    z = (place & (2**63 - 1)) * STEP + seed
    z = (z ^ ((z >> 30) & (2**34 - 1))) * FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def words(seed: Int64[Tensor, ""], stream: int, start: int, count: int) -> Int64[Tensor, " count"]:
    """Return the random words start ... start + count - 1 of a stream, on the seed's device.

    Each stream is a SplitMix64 whose seed is word number `stream` of the one that `seed` starts.
    """
    own = _word(seed, seed.new_full((), stream + 1))
    return _word(own, torch.arange(start + 1, start + count + 1, device=seed.device))


def uniform(
    seed: Int64[Tensor, ""], stream: int, start: int, count: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " count"]:
    """Return numbers start ... start + count - 1 of a stream, uniform in (-1, 1): odd multiples of 2⁻²⁴, never 0.

    Args:
        seed: any 64-bit number, int64 tensor without dimensions.
        stream: 0, 1, 2 ...
        start, count: which numbers, both >= 0.
        dtype: float32 and float64 hold the same values.
    """
    return ((words(seed, stream, start, count) >> 40).to(dtype) + 0.5) * 2.0**-23


def draw_bases(
    seed: Int64[Tensor, ""], stream: int, start: int, stop: int, shape: tuple[int, int], total: int, dtype: torch.dtype
) -> Float[Tensor, "count rows columns"]:
    """Return the random matrices start ... stop - 1 of `total`: entries from U(-1, 1)/√total."""
    size = shape[0] * shape[1]
    return uniform(seed, stream, start * size, (stop - start) * size, dtype).view(-1, *shape) / total**0.5


class _Mixture(torch.autograd.Function):
    """Σᵢ cᵢAᵢ. Forward keeps the seed alone, backward draws the same matrices again, each a block at a time."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, seed: Tensor, stream: int, shape: tuple[int, int], step: int) -> Tensor:
        ctx.save_for_backward(seed.clone())  # DDP may write the buffer it comes from before backward reads it
        ctx.which = stream, shape, step, len(c), c.dtype
        out = c.new_zeros(shape[0] * shape[1])
        with torch.autocast(c.device.type, enabled=False):
            for i in range(0, len(c), step):
                part = c[i : i + step]
                out = out + part @ draw_bases(seed, stream, i, i + len(part), shape, len(c), c.dtype).flatten(1)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, None, None]:
        (seed,) = ctx.saved_tensors
        stream, shape, step, total, dtype = ctx.which
        grads = []
        with torch.autocast(G.device.type, enabled=False):
            for i in range(0, total, step):
                block = draw_bases(seed, stream, i, min(i + step, total), shape, total, dtype)
                grads.append(block.flatten(1) @ G.flatten())
        return torch.cat(grads), None, None, None, None


def mixture(
    coefficients: Float[Tensor, " k"],
    seed: Int64[Tensor, ""],
    stream: int,
    shape: tuple[int, int],
    block: int | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return Σᵢ cᵢAᵢ as `nola.combine` does, without ever holding all Aᵢ.

    Args:
        coefficients: c, float32 or wider; the result and the bases have their dtype.
        seed: of the layer, on the coefficients' device.
        stream: which of its streams.
        shape: of each Aᵢ.
        block: how many random numbers to draw together; None takes what suits the device. At least one matrix is drawn
            at a time. Another block changes the result by rounding only.
    """
    if block is None:
        block = BLOCKS.get(coefficients.device.type, GPU_BLOCK)
    step = max(1, block // (shape[0] * shape[1]))
    return _Mixture.apply(coefficients, seed, stream, shape, step)


def make_recipe(generator: torch.Generator | None = None) -> Int64[Tensor, "2"]:
    """Draw a seed; return it with its check, which is all that a checkpoint needs of the bases. On the CPU."""
    device = generator.device if generator is not None else "cpu"
    seed = torch.empty((), dtype=torch.int64, device=device).random_(generator=generator).cpu()
    return torch.stack([seed, words(seed, 0, 0, 10).sum()])


def check_recipe(recipe: Tensor, prefix: str = "") -> None:
    """Require that a recipe's check is the sum (modulo 2⁶⁴) of the first ten words that its seed draws here.

    Raises:
        ValueError: it is not, or these are no two 64-bit numbers (casting a seed to another dtype destroys it).
    """
    if recipe.dtype != torch.int64 or recipe.shape != (2,):
        got = f"{recipe.dtype} of shape {tuple(recipe.shape)}"
        raise ValueError(f"{prefix}recipe: got {got}, wanted a seed and its check, int64")
    seed, check = recipe.cpu()
    if check != words(seed, 0, 0, 10).sum():
        raise ValueError(f"{prefix}recipe: got seed {int(seed)} with the check of other bases, wanted its own")
