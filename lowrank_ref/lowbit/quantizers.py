"""One small quantiser for all schemes: a number format, a rule for scales, and the block that shares a scale.

| scheme                            | format       | rule          | block            |
|-----------------------------------|--------------|---------------|------------------|
| int8, a tensor, a row or a tile   | int8         | absmax        | all, (1, -), (32, 32) |
| FP8, current scaling              | E4M3, E5M2   | absmax        | all, (1, -)      |
| FP8, delayed scaling              | E4M3, E5M2   | `DelayedScale` | all             |
| MXFP8, MXFP6, MXFP4               | E4M3 … E2M1  | floor … even  | (1, 32)          |
| NVFP4                             | E2M1         | two-level     | (1, 16)          |
| NF4                               | NF4          | absmax        | (1, 64)          |
| ternary (BitNet b1.58)            | ternary      | absmean       | all              |
| bf16, fp16, fixed point           | themselves   | none          | -                |

A quantiser is emulated: it returns ordinary tensors that hold only values which the scheme can store, x̂ = s·Q(x/s). So
it saves neither memory nor time. Blocks lie along the last axis, or are tiles of the last two; axes before them count
as many matrices. Where a block does not fit, zeros fill it up and are cut off again. bitsandbytes lays its blocks of
NF4 along the flattened tensor instead.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_names, check_number, check_wide
from lowrank_ref.lowbit.number_formats import FORMATS, Format, GridFormat, leading_power, nearest, stochastic

#: Rules for scales, with the bits that one scale takes.
SCALE_RULES = {"none": 0, "absmax": 32, "absmean": 32, "floor": 8, "ceil": 8, "rceil": 8, "even": 8, "two-level": 8}


def to_blocks(x: Float[Tensor, "*batch m n"], block: tuple[int | None, int | None]) -> Float[Tensor, "..."]:
    """Return the (a, b) blocks of the last two axes, shape (..., ⌈m/a⌉, a, ⌈n/b⌉, b); None is the whole axis."""
    m, n = x.shape[-2:]
    a, b = block[0] or max(m, 1), block[1] or max(n, 1)
    return F.pad(x, (0, -n % b, 0, -m % a)).unflatten(-1, (-1, b)).unflatten(-3, (-1, a))


def from_blocks(blocks: Float[Tensor, "..."], shape: torch.Size) -> Float[Tensor, "..."]:
    """Undo `to_blocks` for a matrix of this shape."""
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]


def power_scale(peak: Float[Tensor, "..."], form: Format, rule: str) -> Float[Tensor, "..."]:
    """Return the scale 2^E of an MX block from its largest magnitude, E in [-127, 127], float64.

    With E_max the exponent of the format's largest value: floor, ⌊log2 peak⌋ - E_max, the OCP standard's, which cuts
    off what exceeds the range; ceil, ⌈log2 peak⌉ - E_max; rceil, ⌈log2(peak / largest)⌉; even, as floor, but of the
    peak rounded to the format's mantissa. A peak of 0 gives 2^-127.
    """
    top = 2.0 ** torch.tensor(form.largest).log2().floor().item()
    if rule == "rceil":
        peak, top = peak.double() / form.largest, 1.0
    if rule == "even" and isinstance(form, GridFormat):
        spacing = leading_power(peak) * 2.0**-form.mantissa
        peak = torch.where(spacing > 0, (peak.double() / spacing).round() * spacing, 0.0)
    power = leading_power(peak)
    if rule in ("ceil", "rceil"):
        power = torch.where(power < peak, 2 * power, power)
    return (power / top).clamp(2.0**-127, 2.0**127)


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A function of a tensor: x̂ = s·Q(h·x/s)/h, one s a block.

    The quotient is taken in x's dtype, float32 at least; Q rounds it in float64. At random, a number is drawn for each
    entry of the padded blocks, in the order of `to_blocks`.

    Attributes:
        form: number format, one of `FORMATS` or another.
        rule: of `SCALE_RULES`, how a block's s comes from its numbers.
        block: rows and columns that share a scale, None for all of them.
        stochastic: round at random without bias, in the place of to nearest.
        headroom: h in (0, 1]: rounds h·x/s and divides by h, so that "floor" with h = ¾ never saturates E2M1.

    Raises:
        TypeError, ValueError: another rule, a block that is no pair of integers >= 1 or None, h out of range, or
            absmean over parts of rows.

    Example:
        >>> import torch
        >>> from lowrank_ref.lowbit import FORMATS, QUANTIZERS, Quantizer
        >>> Quantizer(form=FORMATS["int4"])(torch.tensor([[1.2, 7.0]])).tolist()
        [[1.0, 7.0]]
        >>> x = torch.tensor([[0.1, 0.2, 1.0, 12.7]])
        >>> [round(v, 2) for v in QUANTIZERS["int8 row"](x)[0].tolist()]
        [0.1, 0.2, 1.0, 12.7]
        >>> QUANTIZERS["MXFP4"](x).tolist(), QUANTIZERS["MXFP4"].bits((8, 64))
        ([[0.0, 0.0, 1.0, 12.0]], 4.25)
    """

    form: Format
    rule: str = "absmax"
    block: tuple[int | None, int | None] = (None, None)
    stochastic: bool = False
    headroom: float = 1.0

    def __post_init__(self) -> None:
        check_names("rule", [self.rule], SCALE_RULES)
        if not isinstance(self.block, tuple) or len(self.block) != 2:
            raise ValueError(f"block: got {self.block!r}, wanted a pair (rows, columns), None for all")
        for side in self.block:
            if side is not None:
                check_integer("block", side, low=1)
        if self.rule == "absmean" and self.block not in ((None, None), (1, None)):
            raise ValueError(f"block: got {self.block} with absmean, wanted the whole tensor or whole rows")
        check_number("headroom", self.headroom, low=0, high=1, open_low=True)

    def at_random(self) -> "Quantizer":
        """Return the same quantiser with stochastic rounding."""
        return replace(self, stochastic=True)

    def scales(self, x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "..."]:
        """Return s > 0 for each block, shape (..., ⌈m/a⌉, 1, ⌈n/b⌉, 1), in x's dtype, float32 at least."""
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        blocks, least = to_blocks(wide, self.block).abs(), torch.finfo(torch.float32).tiny
        if self.rule == "none":
            return torch.ones_like(blocks[..., :1, :, :1])
        if self.rule == "absmean":
            return blocks.mean((-3, -1), keepdim=True).clamp_min(least)
        peak = blocks.amax((-3, -1), keepdim=True)
        if self.rule == "absmax":
            return (peak / self.form.largest).clamp_min(least)
        if self.rule == "two-level":  # a tensor's scale in float32, and one in E4M3 for each block
            whole = (peak.amax((-4, -2), keepdim=True) / (448 * self.form.largest)).clamp_min(least)
            return whole * nearest((peak / self.form.largest / whole).clamp(2.0**-6, 448), FORMATS["E4M3"]).to(whole)
        return power_scale(peak, self.form, self.rule).to(wide.dtype)

    def __call__(
        self, x: Float[Tensor, "*shape"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*shape"]:
        """Return x̂, shape and dtype of x, detached. One axis is one row. NaN stays; an infinity spoils its block.

        Raises:
            TypeError: x is not floating point of 16 bits or more.
        """
        check_wide("x", x)
        if not x.numel():
            return x.detach().clone()
        matrix = x.detach().reshape(1, -1) if x.ndim < 2 else x.detach()
        s = self.scales(matrix)
        scaled = to_blocks(matrix.to(s.dtype), self.block) / s * self.headroom
        q = stochastic(scaled, self.form, generator=generator) if self.stochastic else nearest(scaled, self.form)
        return from_blocks(q.to(s.dtype) * s / self.headroom, matrix.shape).reshape(x.shape).to(x.dtype)

    def bits(self, shape: tuple[int, ...]) -> float:
        """Return the bits that one number of a tensor of this shape takes, its share of the scales included."""
        example = torch.empty(shape, device="meta")
        example = example.reshape(1, -1) if example.ndim < 2 else example
        blocks = to_blocks(example, self.block)[..., :1, :, :1].numel()
        whole = 32 if self.rule == "two-level" else 0
        return self.form.bits + (blocks * SCALE_RULES[self.rule] + whole) / example.numel()


class DelayedScale:
    """FP8's delayed scaling: the scale of a step comes from the largest magnitudes of the steps before it.

    No tensor has to be read twice, once for its maximum and once to cast it. What grows past the old maximum saturates.

    Args:
        form: number format.
        history: how many maxima are kept, H >= 1.
        margin: the scale leaves so many powers of two free.

    Raises:
        TypeError, ValueError: history is no integer >= 1, margin none >= 0.

    Example:
        >>> import torch
        >>> from lowrank_ref.lowbit import FORMATS, DelayedScale
        >>> delayed = DelayedScale(FORMATS["E4M3"], history=1)
        >>> [round(delayed(torch.tensor([v])).item()) for v in (448.0, 4480.0, 4480.0)]  # clips once
        [448, 448, 4480]
    """

    def __init__(self, form: Format, *, history: int = 1024, margin: int = 0) -> None:
        check_integer("history", history, low=1)
        check_integer("margin", margin, low=0)
        self.form, self.margin, self.history = form, margin, history
        self.peaks: list[float] = []
        self.scale = 1.0

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return x̂ with the scale of before, then take note of x. A maximum of 0 or infinity changes nothing."""
        found = (nearest(x.detach().double() / self.scale, self.form) * self.scale).to(x.dtype)
        peak = float(x.detach().abs().amax())
        if 0 < peak < float("inf"):
            self.peaks = [*self.peaks, peak][-self.history :]
            self.scale = max(self.peaks) / self.form.largest * 2.0**self.margin
        return found


def _row(form: str, width: int | None = None, rule: str = "absmax") -> Quantizer:
    return Quantizer(form=FORMATS[form], rule=rule, block=(1, width))


#: Name -> quantiser, of the schemes that the survey's families stand for.
QUANTIZERS: dict[str, Quantizer] = {
    **{name: Quantizer(form=FORMATS[name], rule="none") for name in ("bf16", "fp16")},
    **{f"{name} tensor": Quantizer(form=FORMATS[name]) for name in ("int8", "E4M3", "E5M2")},
    **{f"{name} row": _row(name) for name in ("int8", "int4", "E4M3", "E5M2", "E2M1", "NF4")},
    "int8 32×32": Quantizer(form=FORMATS["int8"], block=(32, 32)),
    "int8 block": _row("int8", 32),
    "int4 block": _row("int4", 32),
    "MXFP8": _row("E4M3", 32, "floor"),
    "MXFP6": _row("E2M3", 32, "floor"),
    "MXFP4": _row("E2M1", 32, "floor"),
    "NVFP4": _row("E2M1", 16, "two-level"),
    "NF4": _row("NF4", 64),
    "dynamic 8-bit": _row("dynamic 8-bit", 256),
    "dynamic 8-bit, unsigned": _row("dynamic 8-bit, unsigned", 256),
    "ternary": Quantizer(form=FORMATS["ternary"], rule="absmean"),
}
