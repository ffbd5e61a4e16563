"""Scales, blocks and quantisers against loops, known errors on Gaussian numbers, and exact symmetries."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.core.quantize import dequantize_blockwise, quantize_blockwise
from lowrank_ref.lowbit import FORMATS, QUANTIZERS, RECIPES, DelayedScale, Quantizer, nearest
from lowrank_ref.lowbit.quantizers import SCALE_RULES, from_blocks, power_scale, to_blocks
from lowrank_ref.lowbit.ternary import absmax_scale, absmean, int8_codes, ternary_codes

sizes = st.integers(1, 9)
SIGNED = [name for name in QUANTIZERS if "unsigned" not in name]
each = pytest.mark.parametrize("name", SIGNED)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(x, q):
    return ((q(x) - x).norm() / x.norm()).item()


# Blocks.


@given(m=sizes, n=sizes, a=st.none() | sizes, b=st.none() | sizes)
def test_blocks_come_back(m, n, a, b):
    x = randn(2, m, n)
    blocks = to_blocks(x, (a, b))
    assert blocks.shape == (2, -(-m // (a or m)), a or m, -(-n // (b or n)), b or n)
    assert torch.equal(from_blocks(blocks, x.shape), x)


@given(m=sizes, n=sizes, a=sizes, b=sizes)
def test_a_tile_by_a_loop(m, n, a, b):
    x, q = randn(m, n, dtype=torch.float64), Quantizer(form=FORMATS["int8"], block=(a, b))
    wanted = torch.zeros_like(x)
    for i in range(0, m, a):
        for j in range(0, n, b):
            tile = x[i : i + a, j : j + b]
            s = tile.abs().max() / 127
            wanted[i : i + a, j : j + b] = (tile / s).round() * s
    torch.testing.assert_close(q(x), wanted, rtol=0, atol=1e-14)


# Known errors.


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("bf16", 0.00166), ("int8 row", 0.0070), ("int8 block", 0.0053), ("dynamic 8-bit", 0.0109),
        ("E4M3 tensor", 0.0265), ("E5M2 tensor", 0.0527), ("MXFP8", 0.0294), ("NF4", 0.0921), ("NVFP4", 0.0950),
        ("int4 block", 0.0970), ("MXFP4", 0.1150), ("ternary", 0.514),
    ],
)  # fmt: skip
def test_errors_on_gaussian_numbers(name, wanted):
    assert math.isclose(relative(randn(4096, 256), QUANTIZERS[name]), wanted, rel_tol=0.05)


@pytest.mark.parametrize(
    ("form", "rule", "wanted"),
    [("E4M3", "rceil", 0.0265), ("E4M3", "ceil", 0.0265), ("E2M1", "rceil", 0.1154), ("E2M1", "ceil", 0.1441)],
)
def test_errors_of_the_other_rules(form, rule, wanted):
    q = Quantizer(form=FORMATS[form], rule=rule, block=(1, 32))
    assert math.isclose(relative(randn(4096, 256), q), wanted, rel_tol=0.05)


def test_a_third_of_gaussian_weights_becomes_zero_in_ternary():
    zeros = (QUANTIZERS["ternary"](randn(1024, 256)) == 0).double().mean().item()
    assert math.isclose(zeros, 0.309, abs_tol=0.01)


# Against the rest of the package, and PyTorch.


@given(m=sizes, n=sizes, seed=st.integers(0, 99))
def test_ternary_and_int8_are_bitnets(m, n, seed):
    W = randn(m, n, seed=seed, dtype=torch.float64)
    beta = absmean(W)
    torch.testing.assert_close(QUANTIZERS["ternary"](W), beta * ternary_codes(W, beta), rtol=1e-12, atol=0)
    s = absmax_scale(W)
    torch.testing.assert_close(QUANTIZERS["int8 row"](W), int8_codes(W, s) / s, rtol=0, atol=1e-12 + 1e-5)


def test_moments_are_those_of_the_packed_code():
    x = randn(3, 256)
    codes, peak = quantize_blockwise(x, signed=True)
    torch.testing.assert_close(QUANTIZERS["dynamic 8-bit"](x), dequantize_blockwise(codes, peak, signed=True))
    v = x.square()
    codes, peak = quantize_blockwise(v, signed=False)
    mine = QUANTIZERS["dynamic 8-bit, unsigned"](v)
    torch.testing.assert_close(mine, dequantize_blockwise(codes, peak, signed=False))
    assert QUANTIZERS["dynamic 8-bit"](-torch.ones(1, 4)).unique().item() == pytest.approx(-0.99297, abs=1e-5)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_formats_without_a_scale_are_casts(name):
    x = randn(5, 7)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert torch.equal(QUANTIZERS[name](x), x.to(dtype).float())


# Rules.


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E2M1"])
def test_powers_by_a_loop(rule, name):
    form, peaks = FORMATS[name], randn(400).abs().double() * 10.0 ** randn(400, seed=1).double()
    top = math.floor(math.log2(form.largest))
    for peak, found in zip(peaks.tolist(), power_scale(peaks, form, rule).tolist()):
        if rule == "even":
            unit = 2.0 ** (math.floor(math.log2(peak)) - form.mantissa)
            peak = round(peak / unit) * unit
        exact = math.log2(peak / form.largest) if rule == "rceil" else math.log2(peak) - top
        assert found == 2.0 ** (math.ceil(exact) if "ceil" in rule else math.floor(exact))


def test_powers_at_the_ends():
    peaks = torch.tensor([0.0, 1e-300, 1e300], dtype=torch.float64)
    for rule in ("floor", "ceil", "rceil", "even"):
        assert power_scale(peaks, FORMATS["E2M1"], rule).tolist() == [2.0**-127, 2.0**-127, 2.0**127]


def test_floor_saturates_and_rceil_does_not():
    x = randn(4096, 256)
    blocks = to_blocks(x, (1, 32)).abs().amax((-3, -1), keepdim=True)
    share = {
        rule: (blocks / power_scale(blocks, FORMATS["E2M1"], rule) > 6).double().mean().item()
        for rule in ("floor", "ceil", "rceil")
    }
    assert 0.2 < share["floor"] < 0.4 and share["ceil"] == share["rceil"] == 0


def test_two_levels_by_a_loop():
    x, found = randn(3, 32), []
    whole = x.abs().max() / (448 * 6)
    for row in x:
        for block in row.split(16):
            part = nearest((block.abs().max() / 6 / whole).clamp(2.0**-6, 448), FORMATS["E4M3"]).float()
            s = whole * part
            found.append(nearest((block / s).clamp(-6, 6), FORMATS["E2M1"]).float() * s)
    torch.testing.assert_close(QUANTIZERS["NVFP4"](x), torch.cat(found).view(3, 32), rtol=1e-6, atol=0)


# Exact symmetries.


@each
def test_zeros_stay_zeros(name):
    x = randn(2, 64)
    x[0] = 0
    assert bool((QUANTIZERS[name](x)[0] == 0).all()) and bool(QUANTIZERS[name](x).isfinite().all())


@each
@pytest.mark.parametrize("power", [-3, 5])
def test_powers_of_two_pass_through(name, power):
    x, q = randn(4, 64), QUANTIZERS[name]
    if q.rule == "none" and name == "fp16":
        power = 1
    assert torch.equal(q(x * 2.0**power), q(x) * 2.0**power)


def test_fixed_point_does_not_follow_a_factor():
    q = Quantizer(form=FORMATS["int8"], rule="none")
    assert not torch.equal(q(randn(4, 4) * 2), q(randn(4, 4)) * 2)


@pytest.mark.parametrize("name", ["MXFP8", "MXFP4"])
def test_a_permutation_inside_a_block_commutes(name):
    x = randn(3, 32)
    order = torch.randperm(32, generator=seeded())
    assert torch.equal(QUANTIZERS[name](x[:, order]), QUANTIZERS[name](x)[:, order])


@each
def test_errors_are_at_most_half_a_step(name):
    q, x = QUANTIZERS[name], randn(8, 64)
    if q.rule in ("absmean", "floor", "two-level"):  # these saturate
        return
    s = q.scales(x)
    scaled = to_blocks(x, q.block) / s
    low, high = q.form.neighbours(scaled.double().clamp(q.form.bottom, q.form.largest))
    bound = from_blocks(((high - low) * s / 2).float(), x.shape)
    beyond = (x.abs() - from_blocks((q.form.largest * s).float().expand_as(scaled), x.shape)).clamp_min(0)
    if name.startswith("dynamic"):
        beyond += 0.008 * x.abs()
    assert bool(((q(x) - x).abs() <= bound * 1.0001 + beyond + 1e-12).all())


@each
def test_shapes_and_dtypes(name):
    q = QUANTIZERS[name]
    for shape in ((), (5,), (3, 5), (2, 3, 40), (0, 4)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            found = q(randn(*shape, dtype=dtype))
            assert found.shape == shape and found.dtype == dtype and not found.requires_grad
    assert torch.equal(q(randn(2, 3, 40))[1], q(randn(2, 3, 40)[1]))  # axes before the last two are other matrices


def test_nan_stays_in_its_block():
    x = randn(2, 64)
    x[0, 0] = math.nan
    for name in ("int8 row", "E4M3 row", "MXFP8", "bf16"):
        found = QUANTIZERS[name](x)
        assert bool(found[0, 0].isnan()) and bool(found[1].isfinite().all())


# Stochastic rounding in a block.


def test_three_quarters_make_mxfp4_unbiased():
    """Without headroom, what lies between 6 and 8 times the scale saturates, and random rounding is biased."""
    x, g = randn(16, 32), seeded()
    base = QUANTIZERS["MXFP4"].at_random()
    off = {}
    for h in (1.0, 0.75):
        q = replace(base, headroom=h)
        mean = torch.stack([q(x, generator=g) for _ in range(1000)]).mean(0)
        off[h] = (mean - x).norm() / x.norm()
    single = relative(x, replace(base, headroom=0.75))
    assert off[0.75] < 3 * single / math.sqrt(1000) and off[1.0] > 3 * off[0.75]


def test_a_generator_repeats_and_moves_on():
    q, x = QUANTIZERS["int4 row"].at_random(), randn(4, 64)
    g = seeded()
    first = q(x, generator=g)
    assert torch.equal(first, q(x, generator=seeded())) and not torch.equal(first, q(x, generator=g))
    torch.manual_seed(0)
    assert torch.equal(first, q(x))


# Bits.


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("bf16", 16), ("MXFP8", 8.25), ("MXFP4", 4.25), ("NF4", 4.5), ("dynamic 8-bit", 8.125)]
    + [("int8 row", 8.125), ("NVFP4", 4.5 + 32 / 65536), ("int8 32×32", 8 + 32 / 1024)],
)
def test_bits_of_a_number(name, wanted):
    assert QUANTIZERS[name].bits((256, 256)) == wanted


def test_bits_of_a_vector_and_of_blocks_that_do_not_fit():
    assert QUANTIZERS["MXFP4"].bits((40,)) == 4 + 2 * 8 / 40


# Delayed scaling.


def test_delayed_is_current_scaling_from_the_second_step_on():
    x, form = randn(50), FORMATS["E4M3"]
    delayed = DelayedScale(form, history=1)
    delayed(x)
    wanted = QUANTIZERS["E4M3 tensor"](x)
    torch.testing.assert_close(delayed(x), wanted, rtol=1e-6, atol=0)


def test_growth_clips_once_and_history_remembers():
    form, one = FORMATS["E4M3"], torch.tensor([448.0])
    recent, longer = DelayedScale(form, history=1), DelayedScale(form, history=4, margin=1)
    assert [recent(one * f).item() for f in (1, 10, 10, 1)] == pytest.approx([448, 448, 4480, 448], rel=0.07)
    for f in (1, 10, 1, 1):
        longer(one * f)
    assert longer.scale == pytest.approx(20)
    before = longer.scale
    longer(torch.zeros(3))
    longer(torch.tensor([math.inf]))
    assert longer.scale == before


# Bad input.


@pytest.mark.usefixtures("no_shape_checks")
def test_refuses():
    with pytest.raises(ValueError, match="rule: got unknown 'absmaxx'"):
        Quantizer(form=FORMATS["int8"], rule="absmaxx")
    for block in (32, (1, 2, 3)):
        with pytest.raises(ValueError, match="block: got"):
            Quantizer(form=FORMATS["int8"], block=block)
    with pytest.raises(ValueError, match="block: got 0"):
        Quantizer(form=FORMATS["int8"], block=(1, 0))
    with pytest.raises(ValueError, match="with absmean"):
        Quantizer(form=FORMATS["ternary"], rule="absmean", block=(1, 32))
    with pytest.raises(ValueError, match="headroom: got 0"):
        Quantizer(form=FORMATS["E2M1"], headroom=0)
    with pytest.raises(TypeError, match="x: got dtype torch.int64"):
        QUANTIZERS["int8 row"](torch.tensor([[1]]))
    with pytest.raises(ValueError, match="history: got 0"):
        DelayedScale(FORMATS["E4M3"], history=0)
    with pytest.raises(ValueError, match="margin: got -1"):
        DelayedScale(FORMATS["E4M3"], margin=-1)
    assert set(SCALE_RULES) >= {q.rule for q in QUANTIZERS.values()}


def test_the_quotient_is_of_the_tensors_own_dtype():
    """A quotient that float32 rounds to a tie goes to the even value, where float64 would not."""
    q, peak = QUANTIZERS["int4 row"], randn(400, 1).abs()
    x = torch.cat([peak, peak / 7 * torch.tensor([0.5, 2.5, 4.5])], 1)
    s = q.scales(x)[:, 0, 0]
    assert torch.equal(q(x), nearest(x / s, q.form).float() * s)
    assert not torch.equal(q(x), nearest(x.double() / s, q.form).float() * s)


def test_random_rounding_draws_for_the_padded_blocks():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    q = QUANTIZERS["MXFP4"].at_random()
    u = torch.rand(5, 1, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s = q.scales(x)[:, 0]  # (5, 2, 1)
    scaled = torch.nn.functional.pad(x, (0, 24)).view(5, 2, 32) / s
    low, high = q.form.neighbours(scaled.double().clamp(-6, 6))
    wanted = torch.where(u[:, 0] < (scaled.clamp(-6, 6) - low) / (high - low), high, low).float() * s
    found = q(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, wanted.flatten(1)[:, :40])


def test_who_rounds_gradients_at_random():
    assert {name for name, r in RECIPES.items() if r.gradient and r.gradient.stochastic} == {"Jetfire", "NVFP4"}
