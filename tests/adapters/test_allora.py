"""ALLoRA: equations against loops, the exact invariants in float64, what stays LoRA and what does not, bad input."""

import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F

from lowrank_ref.adapters import ALLoRALinear, LoRALinear, load_peft, save_peft
from lowrank_ref.adapters.allora import (
    adaptive_factor,
    allora_update,
    rescaled_gradient,
    row_factors,
    update_row_norms,
)
from lowrank_ref.core.layers import replace_linears

BOOSTS = st.sampled_from([0.3, 1.0, 2.0, 16.0])


def base(m, n, dtype=torch.float64):
    layer = nn.Linear(n, m, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(gaussian(m, n, seed=9))
        layer.bias.copy_(gaussian(m, seed=8))
    return layer


def allora(m, n, rank=1, *, moved=True, dtype=torch.float64, **options):
    """A layer; `moved` gives B what training would."""
    layer = ALLoRALinear(base(m, n, dtype), rank, generator=seeded(), **options)
    if moved:
        layer.B.data.copy_(gaussian(m, rank, seed=1))
    return layer


def twin(layer):
    """LoRA of scale 1 with the same numbers."""
    other = LoRALinear(layer.base, layer.rank, alpha=layer.rank)
    other.load_state_dict(layer.state_dict())
    return other


def cubes(y):
    """A loss that couples nothing, whose gradient depends on y."""
    return y.pow(3).sum()


def gradients(layer, x, loss=cubes):
    """Of A, B and x."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    loss(layer(x)).backward()
    return layer.A.grad, layer.B.grad, x.grad


def assert_close(got, wanted, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


# The factors.


@pytest.mark.parametrize("boost", [0.3, 1.0, 2.0, 100.0])
def test_the_factor_by_a_loop_starts_at_its_ceiling_and_falls(boost):
    sizes = torch.tensor([0.0, 1e-3, 0.1, 1.0, 7.0, 1e4], dtype=torch.float64)
    found = adaptive_factor(sizes, boost).tolist()
    assert found == pytest.approx([1 / math.sqrt(s + 1 / boost**2) for s in sizes.tolist()], rel=1e-12)
    assert found[0] == pytest.approx(boost, rel=1e-12) and found == sorted(found, reverse=True) and found[-1] > 0


@given(shapes(), BOOSTS)
def test_row_factors_by_loops(shape, boost):
    m, n, r = shape
    A, B = gaussian(r, n), gaussian(m, r, seed=1)
    for i, c in enumerate(row_factors(A, B, boost).tolist()):
        row = [sum(B[i, k].item() * A[k, j].item() for k in range(r)) for j in range(n)]
        assert c == pytest.approx((math.sqrt(sum(v * v for v in row)) + boost**-2) ** -0.5, rel=1e-9)
        assert 0 < c < boost


@given(shapes(), st.sampled_from([(torch.float64, 1e-7), (torch.float32, 1e-3), (torch.bfloat16, 1e-3)]))
def test_row_norms_are_those_of_the_product(shape, precision):
    m, n, r = shape
    dtype, rtol = precision
    A, B = gaussian(r, n).to(dtype), gaussian(m, r, seed=1).to(dtype)
    found = update_row_norms(A, B)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(found.double(), (B.double() @ A.double()).norm(dim=1), rtol, rtol)


def test_rows_along_the_weakest_direction_are_never_nan():
    A = torch.tensor([[1.0, 0.0], [1.0, 1e-5]])  # κ is about 2e5: its square is beyond float32
    B = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    found = update_row_norms(A, B)
    assert bool(found.isfinite().all()) and found[1] == 0 and found[0] < 1e-3


def test_autocast_does_not_round_the_norms():
    A, B = gaussian(4, 30).float(), gaussian(5, 4, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(update_row_norms(A, B), update_row_norms(A.clone(), B.clone()))
    assert_close(update_row_norms(A, B), (B @ A).norm(dim=1), 1e-5, 0)


@given(shapes())
def test_a_change_of_basis_between_the_factors_changes_no_factor(shape):
    m, n, r = shape
    A, B, M = gaussian(r, n), gaussian(m, r, seed=1), gaussian(r, r, seed=2) + 4 * torch.eye(r).double()
    assert_close(row_factors(torch.linalg.solve(M, A), B @ M, 2.0), row_factors(A, B, 2.0), 1e-8)


# The gradients.


@given(shapes(), BOOSTS)
def test_gradients_by_loops_over_samples_and_rows(shape, boost):
    """Each sample's gradient of each row of BA is rescaled, then A and B get what BA gets, by the chain rule."""
    m, n, r = shape
    layer, x = allora(m, n, r, boost=boost), gaussian(3, n, seed=2)
    dA, dB, _ = gradients(layer, x)
    A, B, c = layer.A.detach(), layer.B.detach(), row_factors(layer.A, layer.B, boost)
    y = layer(x).detach()
    wanted = torch.zeros(r, n).double(), torch.zeros(m, r).double()
    for s in range(len(x)):
        for i in range(m):
            g = 3 * y[s, i] ** 2 * x[s]  # of row i of BA, from this sample
            wanted[0].add_(torch.outer(B[i], c[i] * g))
            wanted[1][i].add_(A @ (c[i] * g))
    assert_close(dA, wanted[0], 1e-9, 1e-9)
    assert_close(dB, wanted[1], 1e-9, 1e-9)


@given(shapes(), BOOSTS)
def test_against_lora_only_the_gradients_of_the_factors_change(shape, boost):
    m, n, r = shape
    layer, x = allora(m, n, r, boost=boost), gaussian(3, n, seed=2)
    plain = twin(layer)
    assert_close(layer(x), plain(x))
    (dA, dB, dx), (_, pB, px) = gradients(layer, x), gradients(plain, x)
    c = row_factors(layer.A, layer.B, boost)
    assert_close(dx, px)
    assert_close(dB, c[:, None] * pB)
    W = plain.merged().weight.detach().requires_grad_()
    cubes(F.linear(x, W, plain.base.bias)).backward()
    assert_close(dA, (layer.B.T * c) @ W.grad, 1e-9)


@given(shapes(), BOOSTS)
def test_the_update_is_the_definition_without_the_product(shape, boost):
    m, n, r = shape
    ends = []
    for definition in (True, False):
        A, B, x = (gaussian(*s, seed=i).requires_grad_() for i, s in enumerate([(r, n), (m, r), (2, 3, n)]))
        c = row_factors(A, B, boost)
        y = x @ rescaled_gradient(B @ A, c).T if definition else allora_update(x, A, B, c)
        cubes(y).backward()
        ends.append((y, A.grad, B.grad, x.grad))
    assert_close(*ends, 1e-9, 1e-9)


def test_the_gradient_of_A_is_no_rescaled_gradient_of_lora():
    layer, x = allora(6, 5, 3, boost=4.0), gaussian(4, 5, seed=2)
    ratio = gradients(layer, x)[0] / gradients(twin(layer), x)[0]
    assert ratio.std(dim=0).min() > 1e-3 and ratio.std(dim=1).min() > 1e-3


@given(shapes(), BOOSTS)
def test_at_the_start_B_gets_eta_times_loras_gradient_and_A_none(shape, boost):
    m, n, r = shape
    layer, x = allora(m, n, r, moved=False, boost=boost), gaussian(3, n, seed=2)
    assert torch.equal(layer(x), layer.base(x))
    dA, dB, _ = gradients(layer, x)
    assert not dA.any()
    assert_close(dB, boost * gradients(twin(layer), x)[1])
    assert_close(layer.gradient_factors(x), torch.full((m,), boost, dtype=torch.float64))


@given(shapes(), BOOSTS)
def test_the_first_step_of_sgd_is_that_of_a_scale_whose_square_is_eta(shape, boost):
    m, n, r = shape
    layer, x = allora(m, n, r, moved=False, boost=boost), gaussian(3, n, seed=2)
    scaled = LoRALinear(layer.base, r, alpha=r * boost**0.5)
    scaled.A.data.copy_(layer.A)
    for one in (layer, scaled):
        gradients(one, x)
        torch.optim.SGD([one.A, one.B], lr=0.01).step()
    assert_close(layer.delta_weight(), scaled.delta_weight(), 1e-8)


def test_limits_of_eta():
    """A large one leaves 1/√norm, a small one is LoRA with the rate times c₀."""
    layer, x = allora(6, 5, 3, boost=1e6), gaussian(4, 5, seed=2)
    assert_close(layer.gradient_factors(x), layer.delta_weight().norm(dim=1) ** -0.5, 1e-9)
    layer.boost = 1e-6
    for got, wanted in zip(gradients(layer, x)[:2], gradients(twin(layer), x)[:2]):
        assert_close(got, 1e-6 * wanted, 1e-9)


def test_gradcheck_passes_for_the_input_and_fails_for_the_factors_by_c():
    layer, x = allora(4, 3, 2, boost=2.0), gaussian(2, 3, seed=2)
    A, B = layer.A.detach(), layer.B.detach()
    c = row_factors(A, B, 2.0)
    assert torch.autograd.gradcheck(lambda x: allora_update(x, A, B, c), x.clone().requires_grad_())
    for which in range(2):
        with pytest.raises(GradcheckError):
            parts = [A.clone(), B.clone()]
            parts[which].requires_grad_()
            torch.autograd.gradcheck(lambda *ab: allora_update(x, *ab, c), parts)
    B = B.clone().requires_grad_()
    upstream = gaussian(2, 4, seed=5)
    (got,) = torch.autograd.grad(allora_update(x, A, B, c), B, upstream)
    assert_close(got, c[:, None] * (upstream.T @ x @ A.T))


def field(layer, x, loss):
    """The update as a function of all trained numbers: vector -> vector."""

    def function(theta):
        a, b = theta.split([layer.A.numel(), layer.B.numel()])
        layer.A.data.copy_(a.view_as(layer.A))
        layer.B.data.copy_(b.view_as(layer.B))
        return torch.cat([g.flatten() for g in gradients(layer, x, loss)[:2]])

    return function


def curl(m, loss, step=1e-5):
    """The largest asymmetry of the field's Jacobian: 0 for the gradient of a loss."""
    layer, x = allora(m, 1, 1, boost=2.0), gaussian(3, 1, seed=2)
    theta = torch.cat([layer.A.detach().flatten(), layer.B.detach().flatten()]).clone()
    f, shift = field(layer, x, loss), torch.eye(len(theta)).double() * step
    J = torch.stack([(f(theta + e) - f(theta - e)) / (2 * step) for e in shift])
    return (J - J.T).abs().max().item() / J.abs().max().item()


def test_the_updates_are_the_gradient_of_no_loss():
    """For one number there is one; for two outputs that the loss couples there is none."""
    assert curl(1, cubes) < 1e-7
    assert curl(2, lambda y: y.sum(dim=1).pow(3).sum()) > 1e-2


def test_no_double_backward():
    layer, x = allora(4, 3, 2), gaussian(2, 3, seed=2).requires_grad_()
    (dx,) = torch.autograd.grad(cubes(layer(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gives_what_float32_gives_up_to_rounding(autocast):
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = allora(6, 5, 3, boost=4.0, dtype=torch.float32 if autocast else dtype)
        x = gaussian(40, 5, seed=2).to(torch.float32 if autocast else dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            y = layer(x)
        y.float().square().mean().backward()
        ends.append([layer.A.grad, layer.B.grad, x.grad.float()])
    assert {g.dtype for g in ends[1]} == {torch.float32}
    for got, wanted in zip(*ends[::-1]):
        assert (got - wanted).norm() < 0.05 * wanted.norm()


def test_accumulated_batches_are_one_batch():
    """The factors read weights only, and weights stand still inside a step."""
    layer, x = allora(6, 5, 3, boost=4.0), gaussian(8, 5, seed=2)
    whole = gradients(layer, x)[:2]
    layer.zero_grad()
    for half in x.split(4):
        cubes(layer(half)).backward()
    assert_close((layer.A.grad, layer.B.grad), whole)


def test_without_gradients_nothing_is_computed_for_them(monkeypatch):
    layer, x = allora(4, 3, 2), gaussian(2, 3, seed=2)
    wanted = layer(x).detach()
    monkeypatch.setattr(ALLoRALinear, "gradient_factors", None)
    with torch.no_grad():
        assert_close(layer(x), wanted)


# Optimizers.


def trajectory(optimizer, rows, boost=2.0, steps=50):
    """B after some steps of its own optimizer, its gradient's rows multiplied with constants, A frozen."""
    layer, x = allora(6, 5, 3, moved=False, boost=boost), gaussian(8, 5, seed=2)
    plain = twin(layer)
    steps_of = optimizer([plain.B])
    for _ in range(steps):
        plain.zero_grad()
        (plain(x) - 1).square().mean().backward()
        plain.B.grad.mul_(rows[:, None])
        steps_of.step()
    return plain.B.detach()


def test_adam_takes_back_what_a_constant_does_to_a_row():
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).double()
    adam = partial(torch.optim.Adam, lr=0.01, eps=1e-12)
    assert_close(trajectory(adam, rows), trajectory(adam, torch.ones(6).double()), 0, 1e-6)
    sgd = partial(torch.optim.SGD, lr=0.01)
    off = trajectory(sgd, rows) - trajectory(sgd, torch.ones(6).double())
    assert off[1:].abs().max() > 1e-2


def test_factors_fall_while_it_trains():
    layer, x = allora(6, 5, 3, moved=False, boost=4.0), gaussian(20, 5, seed=2)
    steps, found = torch.optim.SGD([layer.A, layer.B], lr=0.05), []
    for _ in range(10):
        found.append(layer.gradient_factors(x))
        layer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        steps.step()
    assert bool((found[0] == 4).all()) and bool((found[-1] < 3.9).all())


# As a LoRA.


def test_export_is_lora_of_scale_1(tmp_path):
    def model():
        return nn.Sequential(base(6, 5, torch.float32), nn.Tanh(), base(5, 6, torch.float32))

    make = partial(ALLoRALinear, rank=2, boost=3.0, generator=seeded())
    adapted, x = replace_linears(model(), "", make), gaussian(4, 5)
    for i in (0, 2):
        adapted[i].B.data.copy_(gaussian(*adapted[i].B.shape, seed=i))
    save_peft(adapted, tmp_path)
    loaded = load_peft(model(), tmp_path)
    assert [type(loaded[i]) for i in (0, 2)] == [LoRALinear] * 2 and loaded[0].scale == 1
    assert_close(loaded(x.float()), adapted(x.float()), 1e-5, 1e-6)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert_close(theirs(x.float()), adapted(x.float()), 1e-5, 1e-6)


def test_peft_gives_our_gradient_of_B_over_eta_at_the_start():
    peft = pytest.importorskip("peft")
    ours = allora(6, 5, 2, moved=False, boost=3.0, dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=2, lora_dropout=0.0, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base(6, 5, torch.float32)), config).base_model.model[0]
    theirs.lora_A["default"].weight.data.copy_(ours.A)
    x = gaussian(4, 5).float()
    cubes(theirs(x)).backward()
    assert_close(gradients(ours, x)[1], 3 * theirs.lora_B["default"].weight.grad, 1e-4, 1e-5)


# Bad input.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"boost": 0}, ValueError, "boost: got 0"),
        ({"boost": -1.0}, ValueError, "boost: got -1.0"),
        ({"boost": 1e7}, ValueError, "boost: got 1"),
        ({"boost": math.nan}, ValueError, "boost: got nan"),
        ({"boost": "2"}, TypeError, "boost: got '2'"),
        ({"rank": 7}, ValueError, "rank: got 7"),
    ],
)
def test_bad_options_are_named_and_the_base_stays(options, error, message, no_shape_checks):
    layer = base(6, 6)
    with pytest.raises(error, match=message):
        ALLoRALinear(layer, **{"rank": 2} | options)
    assert layer.weight.requires_grad


def test_a_base_that_trains_or_has_hooks_gets_its_gradients_and_the_factors_theirs():
    """There base and update are two functions, and the gradients the same."""
    x = gaussian(2, 3, 5, seed=2)
    wanted = gradients(allora(6, 5, 3, boost=4.0), x)
    free = allora(6, 5, 3, boost=4.0)
    free.base.requires_grad_(True)
    hooked, seen = allora(6, 5, 3, boost=4.0), []
    hooked.base.register_forward_hook(lambda *_: seen.append(1))
    for layer in (free, hooked):
        for got, value in zip(gradients(layer, x), wanted):
            assert_close(got, value)
    assert free.base.weight.grad.any() and free.base.bias.grad.any() and seen
