"""Low precision on the GPU: the same bits as on the CPU, and real 8-bit products beside their definitions."""

import battery
import pytest
import torch

from lowrank_ref.lowbit import FORMATS, QUANTIZERS, float8_product, int8_product, nearest, stochastic
from lowrank_ref.lowbit.eight_bit_products import scaled_definition, scaled_product, takes_scaled, to_float8

pytestmark = pytest.mark.gpu
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture
def units(device):
    """The device, where it multiplies float8; else the test is skipped."""
    if not takes_scaled(torch.device(device)):
        pytest.skip("needs float8 units: compute capability 8.9 or more")
    return device


def numbers(*shape, seed=0):
    return battery.gaussian(*shape, seed=seed).float()


@pytest.mark.parametrize("name", FORMATS)
def test_formats_round_to_the_same_bits(name, device, generators):
    x = numbers(64, 96) * min(FORMATS[name].largest, 100.0) / 2
    assert torch.equal(nearest(x.to(device), FORMATS[name]).cpu(), nearest(x, FORMATS[name]))
    host, _ = generators()
    again, _ = generators()
    drawn = stochastic(x.to(device), FORMATS[name], generator=host).cpu()
    assert torch.equal(drawn, stochastic(x, FORMATS[name], generator=again))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_agree(name, device):
    """Scales are divisions and maxima: the same bits; means may differ in the last one."""
    x = numbers(64, 96)
    found, wanted = QUANTIZERS[name](x.to(device)).cpu(), QUANTIZERS[name](x)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("pair", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
def test_the_units_meet_the_definition(pair, rows, units):
    """Products of stored numbers are exact; the sum of 512 of them may keep 14 bits, and the result 8."""
    x, W = (numbers(128, 512, seed=s).to(units) for s in (0, 1))
    (q, s), (p, r) = to_float8(x, pair[0], rows=rows), to_float8(W, pair[1], rows=rows)
    found, wanted = scaled_product(q, s, p, r).float(), scaled_definition(q, s, p, r)
    size = scaled_definition(q.float().abs().to(pair[0]), s, p.float().abs().to(pair[1]), r)
    assert bool(((found - wanted).abs() <= 2.0**-8 * wanted.abs() + 2.0**-12 * size).all())


def test_eight_bit_products_are_near_the_exact_one(device):
    x, W = (numbers(128, 512, seed=s).to(device) for s in (0, 1))
    exact = x.double() @ W.double().T
    for found, bound in ((int8_product(x, W), 0.015), (float8_product(x, W, rows=False), 0.05)):
        assert float((found.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_odd_shapes_fall_back(dtype, device):
    x, W = numbers(5, 24).to(device, dtype), numbers(7, 24, seed=1).to(device, dtype)
    found = float8_product(x, W)
    wanted = scaled_definition(*to_float8(x), *to_float8(W))
    torch.testing.assert_close(found.float(), wanted, rtol=2.0**-7, atol=1e-5)
