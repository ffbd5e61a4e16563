"""Values of every format against torch's dtypes, ml_dtypes and bitsandbytes; both ways of rounding against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.lowbit import FORMATS, fixed_point, integer_format, nearest, stochastic
from lowrank_ref.lowbit.number_formats import TableFormat, leading_power, normal_float4

TORCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "E4M3": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
}
ML_DTYPES = {
    "E4M3": "float8_e4m3fn",
    "E5M2": "float8_e5m2",
    "E2M3": "float6_e2m3fn",
    "E3M2": "float6_e3m2fn",
    "E2M1": "float4_e2m1fn",
}
each = pytest.mark.parametrize("name", FORMATS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wide_numbers(form, count=100_000):
    """Numbers over all sizes that the format knows, some on its values and halfway between them."""
    g = seeded()
    size = torch.rand(count, generator=g, dtype=torch.float64) * 12 - 9
    x = torch.randn(count, generator=g, dtype=torch.float64).sign() * form.largest * 10.0 ** size.clamp(max=0)
    values = form.values()[:: max(1, len(form.values()) // 1000)]
    return torch.cat([x, values, (values[1:] + values[:-1]) / 2]).float().clamp(form.bottom, form.largest).double()


# The values.


@pytest.mark.parametrize(
    ("name", "count", "largest", "normal", "smallest"),
    [
        ("bf16", 2 * (254 * 128 + 128) - 1, 3.3895313892515355e38, 2.0**-126, 2.0**-133),
        ("fp16", 2 * (30 * 1024 + 1024) - 1, 65504, 2.0**-14, 2.0**-24),
        ("E4M3", 253, 448, 2.0**-6, 2.0**-9),
        ("E5M2", 247, 57344, 2.0**-14, 2.0**-16),
        ("E2M3", 63, 7.5, 1, 0.125),
        ("E3M2", 63, 28, 0.25, 0.0625),
        ("E2M1", 15, 6, 1, 0.5),
        ("int8", 255, 127, 128, 1),
        ("int4", 15, 7, 8, 1),
        ("ternary", 3, 1, 2, 1),
    ],
)
def test_the_known_numbers_of_each_format(name, count, largest, normal, smallest):
    """Counts are those of all finite codes less one: plus and minus zero are one value."""
    form = FORMATS[name]
    values = form.values()
    assert len(values) == count and values.max() == largest == form.largest and values.min() == form.bottom
    assert 2.0**form.least == normal and values[values > 0].min() == smallest
    assert torch.equal(values, -values.flip(0))


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
def test_all_finite_codes_of_torch_are_the_values(name):
    codes = torch.arange(256, dtype=torch.uint8).view(TORCH[name]).double()
    codes = codes[codes.isfinite()]
    assert len(codes) == {"E4M3": 254, "E5M2": 248}[name]
    assert torch.equal(codes.unique(), FORMATS[name].values())


@pytest.mark.parametrize("name", ML_DTYPES)
def test_all_codes_of_ml_dtypes_are_the_values(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np

    codes = np.arange(2 ** FORMATS[name].bits, dtype=np.uint8).view(getattr(ml_dtypes, ML_DTYPES[name]))
    codes = torch.tensor(codes.astype(np.float64))
    assert torch.equal(codes[codes.isfinite()].unique(), FORMATS[name].values())
    x = wide_numbers(FORMATS[name])
    theirs = x.numpy().astype(getattr(ml_dtypes, ML_DTYPES[name])).astype(np.float64)
    assert torch.equal(nearest(x, FORMATS[name]), torch.tensor(theirs))


@pytest.mark.parametrize("name", TORCH)
def test_casts_agree_with_torch(name):
    x = wide_numbers(FORMATS[name])
    assert torch.equal(nearest(x, FORMATS[name]), x.float().to(TORCH[name]).double())


def test_ties_of_e2m1_go_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nearest(ties, FORMATS["E2M1"]).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert nearest(-ties, FORMATS["E2M1"]).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_nf4_is_bitsandbytes_table():
    functional = pytest.importorskip("bitsandbytes").functional
    theirs = functional.get_4bit_type("nf4", device="cpu").double()
    torch.testing.assert_close(torch.tensor(normal_float4(), dtype=torch.float64), theirs, rtol=0, atol=3e-5)


def test_nf4_by_the_written_numbers():
    above = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    below = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911]
    torch.testing.assert_close(torch.tensor(normal_float4()), torch.tensor([*below, 0, *above]), rtol=0, atol=1e-4)


def test_fixed_point_is_twos_complement():
    form = fixed_point(3, 2)
    assert form.bits == 5 and form.values().tolist() == [k / 4 for k in range(-16, 16)]
    assert nearest(torch.tensor([9.0, -9.0, 0.3, 0.375, 0.125]), form).tolist() == [3.75, -4, 0.25, 0.5, 0]
    assert fixed_point(1, 0).values().tolist() == [-1, 0]


def test_integers_are_floats_with_one_exponent():
    x = torch.tensor([0.5, 1.5, -2.5, 7.4, 90.0])
    assert nearest(x, integer_format(4)).tolist() == [0, 2, -2, 7, 7]
    assert integer_format(4).spacing(x[:4]).tolist() == [1] * 4


# Rounding.


@each
def test_values_stay_and_rounding_is_monotone(name):
    form = FORMATS[name]
    values = form.values()
    assert torch.equal(nearest(values, form), values)
    assert torch.equal(stochastic(values, form, generator=seeded()), values)
    x = wide_numbers(form).sort().values
    assert bool((nearest(x, form).diff() >= 0).all())
    if form.bottom == -form.largest and not isinstance(form, TableFormat):
        assert torch.equal(nearest(-x, form), -nearest(x, form))


@each
def test_the_nearest_value_by_brute_force(name):
    form = FORMATS[name]
    values = form.values()
    values = values if len(values) < 1000 else values[values.abs() < 1e-3][::1]
    top = float(values.max())
    x = (torch.rand(300, generator=seeded(), dtype=torch.float64) * 2 - 1) * top
    x = x if form.bottom < 0 else x.abs()
    distance = (x[:, None] - values).abs().amin(1)
    torch.testing.assert_close((nearest(x, form) - x).abs(), distance, rtol=0, atol=1e-12 * top)


@each
def test_beyond_the_ends_is_the_end_and_nan_stays(name):
    form = FORMATS[name]
    x = torch.tensor([math.inf, -math.inf, 2.0, -3.0], dtype=torch.float64) * form.largest
    for found in (nearest(x, form), stochastic(x, form, generator=seeded())):
        assert found.tolist() == [form.largest, form.bottom, form.largest, form.bottom]
    if not isinstance(form, TableFormat):
        assert nearest(torch.tensor([math.nan]), form).isnan().all()
        assert stochastic(torch.tensor([math.nan]), form).isnan().all()


@pytest.mark.parametrize("name", ["bf16", "E4M3", "E5M2", "E2M1", "int8", "NF4", "dynamic 8-bit", "ternary"])
def test_stochastic_rounding_is_unbiased_and_takes_neighbours_only(name):
    """The mean of 10⁵ draws lies within five standard errors of x; the nearest value, for each x, does not."""
    form, draws, g = FORMATS[name], 100_000, seeded()
    share = torch.tensor([0.1, -0.37, 0.81, 0.003], dtype=torch.float64)
    x = share if isinstance(form, TableFormat) else share * min(form.largest, 4.0)
    low, high = form.neighbours(x)
    found = stochastic(x.expand(draws, -1), form, generator=g)
    assert bool(((found == low) | (found == high)).all())
    chance = (x - low) / (high - low)
    error = (high - low) * (chance * (1 - chance) / draws).sqrt()
    assert bool(((found.mean(0) - x).abs() <= 5 * error + 1e-12).all())
    assert bool(((nearest(x, form) - x).abs() > 5 * error).all())


@given(st.floats(-6, 6), st.integers(0, 99))
def test_one_draw_by_hand(value, seed):
    x = torch.tensor([value], dtype=torch.float64)
    values = FORMATS["E2M1"].values()
    low = max(v for v in values.tolist() if v <= value)
    high = min(v for v in values.tolist() if v >= value)
    u = torch.rand(1, generator=seeded(seed), dtype=torch.float64).item()
    wanted = high if high > low and u < (value - low) / (high - low) else low
    assert stochastic(x, FORMATS["E2M1"], generator=seeded(seed)).item() == wanted


def test_a_sum_in_bfloat16_stands_still_or_moves():
    """1 + 2⁻⁹ is 1 to nearest, for ever; at random it is right on average."""
    x = torch.full((100_000,), 1 + 2.0**-9)
    assert bool((nearest(x, FORMATS["bf16"]) == 1).all())
    mean = stochastic(x, FORMATS["bf16"], generator=seeded()).mean().item()
    assert math.isclose(mean, 1 + 2.0**-9, abs_tol=1e-4)


@given(st.floats(-1e300, 1e300, allow_subnormal=False))
def test_the_leading_power(value):
    wanted = 0.0 if value == 0 else 2.0 ** (math.frexp(value)[1] - 1)
    assert leading_power(torch.tensor(value, dtype=torch.float64)).item() == wanted


@pytest.mark.usefixtures("no_shape_checks")
def test_refuses():
    for call in (nearest, stochastic):
        with pytest.raises(TypeError, match="x: got dtype torch.int64"):
            call(torch.tensor([1]), FORMATS["int8"])
    for bad, error in ((1, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="bits: got"):
            integer_format(bad)
    with pytest.raises(ValueError, match="whole: got 0"):
        fixed_point(0, 1)
    with pytest.raises(ValueError, match="fraction: got -1"):
        fixed_point(2, -1)
