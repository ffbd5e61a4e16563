import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear, rslora_scaling
from lowrank_ref.adapters.dora_pissa import dora_weight, pissa_factors
from lowrank_ref.core.linalg import svd


@st.composite
def shapes(draw):
    """(m, n, r): tall, wide, square; r from 1 to min(m, n), and often one of the two ends."""
    m, n = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return m, n, draw(st.sampled_from([1, min(m, n)]) | st.integers(1, min(m, n)))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(layer):
    """Shift every trained number, as training would."""
    with torch.no_grad():
        for i, p in enumerate(layer.adapter_parameters().values()):
            p.add_(gaussian(*p.shape, seed=10 + i), alpha=0.3)
    return layer


def base(m, n):
    layer = nn.Linear(n, m, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(gaussian(m, n, seed=9))
        layer.bias.copy_(gaussian(m, seed=8))
    return layer


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# DoRA.


@given(shapes())
def test_dora_weight_by_loops(shape):
    m, n, _ = shape
    V, magnitude = gaussian(m, n), gaussian(m, seed=1)
    W = dora_weight(V, magnitude)
    for i in range(m):
        norm = sum(V[i, j].item() ** 2 for j in range(n)) ** 0.5
        assert W[i].tolist() == pytest.approx([magnitude[i].item() * V[i, j].item() / norm for j in range(n)])


@given(shapes())
def test_dora_starts_at_the_base(shape):
    m, n, r = shape
    layer, x = DoRALinear(base(m, n), r), gaussian(4, n)
    assert torch.equal(layer(x), layer.base(x))
    assert_close(layer.delta_weight(), torch.zeros(m, n, dtype=torch.float64))


@given(shapes())
def test_dora_with_the_norms_of_v_is_lora(shape):
    m, n, r = shape
    layer = moved(DoRALinear(base(m, n), r, alpha=3))
    lora = LoRALinear(layer.base, r, alpha=3)
    with torch.no_grad():
        lora.A.copy_(layer.A)
        lora.B.copy_(layer.B)
        layer.magnitude.copy_((layer.base.weight + lora.delta_weight()).norm(dim=1))
    x = gaussian(4, n)
    assert_close(layer(x), lora(x))
    assert_close(layer.delta_weight(), lora.delta_weight())


@given(shapes())
def test_dora_rows_have_the_trained_length(shape):
    m, n, r = shape
    layer = moved(DoRALinear(base(m, n), r))
    assert_close(layer.merged().weight.norm(dim=1), layer.magnitude.detach().abs())
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == r * (m + n) + m


@given(shapes(), st.booleans())
def test_dora_forward_and_gradients_are_those_of_its_weight(shape, detach_norm):
    """The cheap forward against the definition, with the norm held constant in backward and without; so too ΔW."""
    m, n, r = shape
    layer, x = moved(DoRALinear(base(m, n), r, alpha=3, detach_norm=detach_norm)), gaussian(4, n)
    parameters = list(layer.adapter_parameters().values())
    V = layer.base.weight + layer.scale * layer.B @ layer.A
    wanted = x @ dora_weight(V, layer.magnitude, detach_norm=detach_norm).T + layer.base.bias
    gradients = torch.autograd.grad(wanted.pow(3).sum(), parameters)
    for out in (layer(x), x @ (layer.base.weight + layer.delta_weight()).T + layer.base.bias):
        assert_close(out, wanted)
        for mine, its in zip(torch.autograd.grad(out.pow(3).sum(), parameters), gradients):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


def test_dora_norm_is_detached_on_request_only():
    V, magnitude = gaussian(3, 4).requires_grad_(), torch.ones(3, dtype=torch.float64)
    free, held = (
        torch.autograd.grad(dora_weight(V, magnitude, detach_norm=d).pow(3).sum(), V)[0] for d in (False, True)
    )
    assert not torch.allclose(free, held)
    # with a free norm the loss ignores the length of a row, so the gradient is orthogonal to it
    assert_close((free * V).sum(dim=1), torch.zeros(3, dtype=torch.float64))


def test_dora_refuses_a_row_without_direction():
    for value in (0.0, torch.nan, torch.inf):
        layer = base(3, 2)
        with torch.no_grad():
            layer.weight[1] = value
        with pytest.raises(ValueError, match=r"base\.weight: got zero, NaN or infinite rows \[1\]"):
            DoRALinear(layer, 1)
        assert layer.weight.requires_grad


# PiSSA.


@given(shapes(), st.floats(0.1, 10))
def test_pissa_factors_are_the_best_rank_r_part(shape, scale):
    m, n, r = shape
    W = gaussian(m, n)
    A, B = pissa_factors(W, r, scale)
    U, S, Vh = svd(W, r)
    assert A.shape == (r, n) and B.shape == (m, r)
    assert_close(scale * B @ A, U @ S.diag() @ Vh)
    assert_close(A @ A.T, (S / scale).diag())  # both factors carry √(S/s)
    assert_close(B.T @ B, (S / scale).diag())


@given(shapes(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]))
def test_pissa_starts_at_the_base(shape, precision):
    m, n, r = shape
    dtype, atol = precision
    layer, x = PiSSALinear(base(m, n).to(dtype), r), gaussian(4, n).to(dtype)
    assert_close(layer(x), layer.base(x), atol)


@given(shapes())
def test_pissa_is_lora_on_the_residual_base(shape):
    """The paper's form, W - s·B₀A₀ frozen and A, B trained: same outputs, same gradients."""
    m, n, r = shape
    layer, x = moved(PiSSALinear(base(m, n), r, alpha=3)), gaussian(4, n)
    residual = base(m, n)
    with torch.no_grad():
        residual.weight.sub_(layer.scale * layer.B0 @ layer.A0)
    lora = LoRALinear(residual, r, alpha=3)
    with torch.no_grad():
        lora.A.copy_(layer.A)
        lora.B.copy_(layer.B)
    assert_close(layer(x), lora(x), 1e-11)
    for model in (layer, lora):
        model(x).pow(3).sum().backward()
    for mine, its in ((layer.A.grad, lora.A.grad), (layer.B.grad, lora.B.grad)):
        torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-8)


@given(shapes(), st.booleans())
def test_pissa_is_a_lora_of_twice_the_rank_on_the_original_base(shape, rslora):
    m, n, r = shape
    layer = moved(PiSSALinear(base(m, n), r, **({"scaling": rslora_scaling} if rslora else {})))
    A, B, s = layer.lora_factors()
    assert A.shape == (2 * r, n) and B.shape == (m, 2 * r)
    assert_close(layer.base.weight + s * B @ A, layer.merged().weight)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == r * (m + n)


def test_pissa_needs_no_randomness():
    layer = base(4, 3)
    state = torch.get_rng_state()
    first, second = PiSSALinear(layer, 2), PiSSALinear(layer, 2)
    assert torch.equal(first.A, second.A) and torch.equal(torch.get_rng_state(), state)


def test_pissa_checkpoint_fits_the_original_base():
    trained, fresh = moved(PiSSALinear(base(4, 3), 2)), PiSSALinear(base(4, 3), 2)
    with torch.no_grad():
        for t in (fresh.A0, fresh.B0):  # singular vectors of another backend could differ
            t.neg_()
    fresh.load_state_dict(trained.state_dict())
    x = gaussian(2, 3)
    assert torch.equal(fresh(x), trained(x))


def test_pissa_refuses_nan_weights():
    layer = base(4, 3)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="W: got 1 NaN"):
        PiSSALinear(layer, 2)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("there", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pissa_trains_every_component_also_where_the_weight_has_none(there, dtype):
    layer = base(5, 4)
    with torch.no_grad():
        layer.weight.copy_(gaussian(5, there) @ gaussian(there, 4, seed=1))
    layer = PiSSALinear(layer.to(dtype), 3)
    x = gaussian(6, 4).to(dtype)
    assert_close(layer(x), layer.base(x), 1e-12 if dtype == torch.float64 else 1e-5)
    assert_close(layer.scale * layer.B @ layer.A, layer.base.weight, 1e-12 if dtype == torch.float64 else 1e-5)
    layer(x).square().sum().backward()
    size = layer.A.grad.norm(dim=1) + layer.B.grad.norm(dim=0)
    assert (size > 1e-3 * size.max()).all()
