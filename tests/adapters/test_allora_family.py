"""ALLoRA's relatives: factors against loops, what each control changes and what not, ASF-LoRA, bad input."""

import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from torch import nn

from lowrank_ref.adapters import save_peft
from lowrank_ref.adapters.allora import ALLoRALinear, row_factors
from lowrank_ref.adapters.allora_family import (
    ALLORA_FACTORS,
    ALLoRAVariant,
    ASFLoRALinear,
    asf_update,
    output_factors,
)
from lowrank_ref.core.layers import replace_linears


def moved(layer):
    layer.B.data.copy_(gaussian(*layer.B.shape, seed=1))
    return layer


def variant(m, n, rank, kind=ALLoRAVariant, **options):
    return moved(kind(nn.Linear(n, m).double(), rank, generator=seeded(), **options))


def gradients(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    layer(x).pow(3).sum().backward()
    return layer.A.grad, layer.B.grad, x.grad


def assert_close(got, wanted, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


@given(shapes())
def test_output_factors_and_asf_by_loops(shape):
    m, n, r = shape
    x, A, B = gaussian(3, n, seed=2), gaussian(r, n), gaussian(m, r, seed=1)
    c, scaled = output_factors(x, A, B, 2.0), asf_update(x, A, B, 2.0)
    for s in range(3):
        for i in range(m):
            f = sum(B[i, k].item() * A[k, j].item() * x[s, j].item() for k in range(r) for j in range(n))
            wanted = 1 / math.sqrt(abs(f) + 0.25)
            assert c[s, i].item() == pytest.approx(wanted, rel=1e-6)
            assert scaled[s, i].item() == pytest.approx(f * wanted, rel=1e-6, abs=1e-9)


@given(shapes())
def test_gradients_with_output_factors_by_loops(shape):
    m, n, r = shape
    layer, x = variant(m, n, r, boost=2.0, factors="outputs"), gaussian(3, n, seed=2)
    dA, dB, _ = gradients(layer, x)
    A, B = layer.A.detach(), layer.B.detach()
    c, y = output_factors(x, A, B, 2.0), layer(x).detach()
    wanted = torch.zeros_like(A), torch.zeros_like(B)
    for s in range(3):
        for i in range(m):
            g = c[s, i] * 3 * y[s, i] ** 2 * x[s]
            wanted[0].add_(torch.outer(B[i], g))
            wanted[1][i].add_(A @ g)
    assert_close(dA, wanted[0])
    assert_close(dB, wanted[1])


def test_rows_are_allora_and_every_other_kind_is_not():
    layers = {kind: variant(6, 5, 3, boost=2.0, factors=kind) for kind in ALLORA_FACTORS}
    x = gaussian(4, 5, seed=2)
    plain = ALLoRALinear(layers["rows"].base, 3, boost=2.0)
    plain.load_state_dict(layers["rows"].state_dict())
    wanted = gradients(plain, x)
    for kind, layer in layers.items():
        layer.load_state_dict(plain.state_dict())
        assert_close(layer(x), plain(x))
        got = gradients(layer, x)
        assert_close(got[2], wanted[2])  # the input's gradient is the same for all
        assert torch.allclose(got[1], wanted[1]) == (kind == "rows")


def test_what_each_kind_multiplies_with():
    layer, x = variant(6, 5, 3, boost=2.0), gaussian(4, 5, seed=2)
    rows = row_factors(layer.A, layer.B, 2.0)
    norms = layer.delta_weight().norm(dim=1).detach()
    wanted = {
        "rows": (norms + 0.25) ** -0.5,
        "layer": rows.mean().expand(6),
        "constant": torch.full((6,), 2.0).double(),
        "inverse": 1 / (norms + 0.5),
        "outputs": output_factors(x, layer.A, layer.B, 2.0),
    }
    assert wanted.keys() == set(ALLORA_FACTORS)
    for kind, value in wanted.items():
        layer.factors = kind
        assert_close(layer.gradient_factors(x), value.detach())


@pytest.mark.parametrize("kind", ALLORA_FACTORS)
def test_every_kind_starts_at_eta(kind):
    c = ALLoRAVariant(nn.Linear(5, 6).double(), 3, boost=2.0, factors=kind).gradient_factors(gaussian(4, 5))
    assert_close(c, torch.full_like(c, 2.0))


def test_rescaling_what_goes_below_changes_the_inputs_gradient_alone():
    plain, other = (variant(6, 5, 3, boost=2.0, rescale_input=flag) for flag in (False, True))
    other.load_state_dict(plain.state_dict())
    x = gaussian(4, 5, seed=2)
    assert_close(other(x), plain(x))
    (pA, pB, px), (dA, dB, dx) = gradients(plain, x), gradients(other, x)
    assert_close((dA, dB), (pA, pB))
    c, y = row_factors(plain.A, plain.B, 2.0), plain(x).detach()
    W, delta, g = plain.base.weight.detach(), plain.delta_weight().detach(), 3 * y**2
    assert_close(px, g @ (W + delta))
    assert_close(dx, g @ W + (g * c) @ delta)


def test_only_what_reads_no_activations_gives_a_weight_to_multiply_with():
    plain = variant(6, 5, 3, boost=2.0)
    for options, product in (({}, True), ({"factors": "outputs"}, False), ({"rescale_input": True}, False)):
        layer = variant(6, 5, 3, boost=2.0, **options)
        assert layer.is_product == product
        assert_close(layer.delta_weight(), plain.B @ plain.A)
    with pytest.raises(TypeError, match="x: got None"):
        variant(6, 5, 3, factors="outputs").gradient_factors()


def test_asf_starts_at_the_base_has_its_own_gradient_and_no_matrix(tmp_path):
    layer = ASFLoRALinear(nn.Linear(5, 6).double(), 3, boost=2.0, generator=seeded())
    x = gaussian(4, 5, seed=2)
    assert torch.equal(layer(x), layer.base(x))
    moved(layer)
    parts = x, layer.A, layer.B
    free = [p.detach().clone().requires_grad_() for p in parts]
    assert torch.autograd.gradcheck(lambda *p: asf_update(*p, 2.0), free)
    assert_close(layer(x), layer.base(x) + asf_update(*parts, 2.0))
    assert not torch.allclose(layer(2 * x) - layer.base(2 * x), 2 * (layer(x) - layer.base(x)))
    model = replace_linears(nn.Sequential(nn.Linear(5, 6)), "0", partial(ASFLoRALinear, rank=2))
    for refuse in (layer.merged, lambda: save_peft(model, tmp_path)):
        with pytest.raises(TypeError, match="no linear map"):
            refuse()


def test_bad_options(no_shape_checks):
    with pytest.raises(ValueError, match="factors: got 'columns', wanted one of"):
        variant(4, 3, 2, factors="columns")
    for kind in (ALLoRAVariant, ASFLoRALinear):
        with pytest.raises(ValueError, match="boost: got 0"):
            variant(4, 3, 2, kind, boost=0)
