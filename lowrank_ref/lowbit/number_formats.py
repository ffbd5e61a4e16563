"""Number formats as sets of values, and rounding to them: to the nearest one, or at random without bias.

| here                       | what it is                                                                          |
|----------------------------|-------------------------------------------------------------------------------------|
| `GridFormat`               | floats, and integers and fixed point too: floats all of whose numbers are subnormal |
| `TableFormat`              | any values: NF4, the dynamic 8-bit code of optimizer states                         |
| `nearest`, `stochastic`    | rounding; numbers beyond the ends saturate                                          |
| `FORMATS`                  | name -> format                                                                      |

A grid format of p mantissa bits has the spacing 2^(max(e, e_min) - p) around x, where e is the exponent of x, the
floor of log2 of its magnitude. An integer format takes an e_min that no number reaches, so its spacing is 1 all over.
Values agree with torch's float8 dtypes and with ml_dtypes; specials (NaN, infinities) are left out: what comes in as
infinity leaves as the largest number, NaN stays NaN. Everything is computed in float64, so it is exact.
"""

from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_floating, check_integer
from lowrank_ref.core.quantize import dynamic_code

_EXPONENT = 0x7FF0000000000000  # where a float64 keeps it


def leading_power(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2^floor(log2 abs x), float64, exactly; 0 at 0.

    Example:
        >>> leading_power(torch.tensor([0.0, 0.9, -5.0])).tolist()
        [0.0, 0.5, 4.0]
    """
    return (x.double().view(torch.int64) & _EXPONENT).view(torch.float64)


@dataclass(frozen=True)
class GridFormat:
    """Numbers k·spacing, where the spacing doubles from one power of two to the next.

    Attributes:
        name: for tables.
        bits: of one number, sign included.
        mantissa: p, mantissa bits.
        least: e_min, exponent of the smallest normal number; below 2^e_min the spacing stays as it is.
        largest: the largest finite value.
        lowest: the lowest one; None for its mirror image.
    """

    name: str
    bits: int
    mantissa: int
    least: int
    largest: float
    lowest: float | None = None

    @property
    def bottom(self) -> float:
        """The lowest value."""
        return -self.largest if self.lowest is None else self.lowest

    def spacing(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the distance of neighbours around x, float64."""
        return leading_power(x).clamp_min(2.0**self.least) * 2.0**-self.mantissa

    def round_nearest(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round x inside the range; ties go to the even mantissa."""
        spacing = self.spacing(x)
        return (x / spacing).round() * spacing

    def neighbours(self, x: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return low <= x < high, the values around x inside the range."""
        spacing = self.spacing(x)
        low = (x / spacing).floor() * spacing
        return low, low + spacing

    def values(self) -> Float[Tensor, " count"]:
        """Return all finite values, sorted, float64; plus and minus 0 are one."""
        steps = torch.arange(2**self.mantissa, dtype=torch.float64)
        found = [steps * 2.0 ** (self.least - self.mantissa)]
        exponent = self.least
        while 2.0**exponent <= self.largest:
            found.append((1 + steps * 2.0**-self.mantissa) * 2.0**exponent)
            exponent += 1
        up = torch.cat(found)
        up = up[up <= self.largest]
        down = -torch.cat([up[1:], up.new_tensor([-self.bottom])]).unique()
        return torch.cat([down[down >= self.bottom], up]).sort().values


@dataclass(frozen=True)
class TableFormat:
    """Any sorted values. Ties of `nearest` go to the lower one.

    Attributes:
        name: for tables.
        bits: of one number.
        table: the values, rising.
    """

    name: str
    bits: int
    table: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The highest value, by which absmax scales."""
        return self.table[-1]

    @property
    def bottom(self) -> float:
        """The lowest value."""
        return self.table[0]

    def values(self) -> Float[Tensor, " count"]:
        """Return all values, sorted, float64."""
        return torch.tensor(self.table, dtype=torch.float64)

    def round_nearest(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round x inside the range."""
        values = self.values().to(x.device)
        return values[torch.bucketize(x.double().contiguous(), (values[1:] + values[:-1]) / 2)]

    def neighbours(self, x: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return low <= x <= high, the values around x inside the range."""
        values = self.values().to(x.device)
        place = (torch.bucketize(x.double().contiguous(), values, right=True) - 1).clamp(0, len(values) - 2)
        return values[place], values[place + 1]


Format = GridFormat | TableFormat


def nearest(x: Float[Tensor, "*shape"], form: Format) -> Float[Tensor, "*shape"]:
    """Return the value of the format that is nearest to x, float64. Beyond the ends it is the end.

    Raises:
        TypeError: x is not floating point.

    Example:
        >>> nearest(torch.tensor([0.25, 2.5, 100.0]), FORMATS["E2M1"]).tolist()  # ties to even, then saturated
        [0.0, 2.0, 6.0]
    """
    check_floating("x", x)
    return form.round_nearest(x.double().clamp(form.bottom, form.largest))


def stochastic(
    x: Float[Tensor, "*shape"], form: Format, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Return one of the two neighbours of x, the upper one with probability (x - low)/(high - low): x on average.

    Args:
        x: any shape.
        form: the format; beyond its ends the result is the end, and biased.
        generator: draws one uniform float64 number for each entry, on its own device.

    Returns:
        float64, shape of x.

    Raises:
        TypeError: x is not floating point.
    """
    check_floating("x", x)
    x = x.double().clamp(form.bottom, form.largest)
    low, high = form.neighbours(x)
    place = x.device if generator is None else generator.device
    u = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=place).to(x.device)
    return torch.where(u < (x - low) / (high - low), high, torch.where(x.isnan(), x, low))


def integer_format(bits: int) -> GridFormat:
    """Return the symmetric integers, -(2^(bits-1) - 1) to 2^(bits-1) - 1.

    Raises:
        TypeError, ValueError: bits is no integer >= 2.
    """
    check_integer("bits", bits, low=2)
    return GridFormat(f"int{bits}", bits, bits - 1, bits - 1, 2.0 ** (bits - 1) - 1)


def fixed_point(whole: int, fraction: int) -> GridFormat:
    """Return the fixed-point numbers of `whole` bits before the point, sign included, and `fraction` bits after it.

    The spacing is 2^-fraction, the range is from -2^(whole-1) to 2^(whole-1) - 2^-fraction (Gupta et al. 2015).

    Raises:
        TypeError, ValueError: no integers, whole < 1 or fraction < 0.

    Example:
        >>> fixed_point(2, 1).values().tolist()
        [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    """
    check_integer("whole", whole, low=1)
    check_integer("fraction", fraction, low=0)
    top = 2.0 ** (whole - 1)
    name = f"fixed ⟨{whole}, {fraction}⟩"
    return GridFormat(name, whole + fraction, whole - 1 + fraction, whole - 1, top - 2.0**-fraction, -top)


def normal_float4() -> tuple[float, ...]:
    """Return NF4's 16 values in [-1, 1]: quantiles of a normal distribution, 8 above zero, 7 below, and zero.

    Φ⁻¹ at 9 and at 8 evenly spaced points from 0.9677083 to ½, the last of each dropped, over the largest of all.
    (Dettmers et al. 2023, arXiv 2305.14314, and bitsandbytes.)
    """
    first, inverse = 0.9677083, NormalDist().inv_cdf
    above, below = ([inverse(first + (0.5 - first) * i / n) for i in range(n)] for n in (8, 7))
    return tuple(sorted(v / max(above) for v in [0.0, *above, *(-b for b in below)]))


def _dynamic(signed: bool) -> TableFormat:
    values = tuple(dynamic_code(signed).double().tolist())
    return TableFormat("dynamic 8-bit" if signed else "dynamic 8-bit, unsigned", 8, values)


#: Name -> format.
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        GridFormat("bf16", 16, 7, -126, (2 - 2.0**-7) * 2.0**127),
        GridFormat("fp16", 16, 10, -14, 65504.0),
        GridFormat("E4M3", 8, 3, -6, 448.0),
        GridFormat("E5M2", 8, 2, -14, 57344.0),
        GridFormat("E2M3", 6, 3, 0, 7.5),
        GridFormat("E3M2", 6, 2, -2, 28.0),
        GridFormat("E2M1", 4, 1, 0, 6.0),
        integer_format(8),
        integer_format(4),
        GridFormat("ternary", 2, 1, 1, 1.0),
        TableFormat("NF4", 4, normal_float4()),
        _dynamic(True),
        _dynamic(False),
    )
}
