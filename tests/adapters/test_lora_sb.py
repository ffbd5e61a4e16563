"""LoRA-SB: equations against loops, the exact invariants in float64, bad input, export."""

from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import lora_sb, save_peft
from lowrank_ref.adapters.lora_sb import (
    LoRASBLinear,
    core_update,
    delta_weight,
    first_step,
    optimal_gradient,
    truncated_svd,
    update_approximation,
)
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.peft import read_peft


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def random_start(m, n, r, seed=0):
    return gaussian(r, n, seed=seed), gaussian(r, r, seed=seed + 1), gaussian(m, r, seed=seed + 2)


def layer_of(m, n, r, *, start=None, **options):
    """A float64 layer with random factors, which are not orthonormal, or with a given start."""
    return LoRASBLinear(nn.Linear(n, m, dtype=torch.float64), *(start or random_start(m, n, r)), **options)


def whole_gradient(layer, x):
    """G: the gradient of the sum of cubes with respect to W + ΔW; the core's own is left in R.grad."""
    layer.zero_grad()
    layer(x).pow(3).sum().backward()
    W = layer.merged().weight.detach().requires_grad_()
    F.linear(x, W, layer.bias).pow(3).sum().backward()
    return W.grad


# Each equation against a loop.


@given(shapes())
def test_delta_weight_and_update_by_loops(shape):
    m, n, r = shape
    (A, R, B), x, s = random_start(m, n, r), gaussian(n, seed=5), 0.7
    W = delta_weight(A, R, B, s)
    for i in range(m):
        for j in range(n):
            terms = [(B[i, k] * R[k, p] * A[p, j]).item() for k in range(r) for p in range(r)]
            assert W[i, j].item() == pytest.approx(s * sum(terms))
    wanted = [sum(W[i, j].item() * x[j].item() for j in range(n)) for i in range(m)]
    assert core_update(x, A, R, B, s).tolist() == pytest.approx(wanted)


def test_core_update_takes_any_batch():
    A, R, B = random_start(3, 5, 2)
    for batch in [(), (4,), (2, 3), (0,)]:
        x = gaussian(*batch, 5)
        assert_close(core_update(x, A, R, B, 0.5), x @ delta_weight(A, R, B, 0.5).T)


def test_first_step_by_loops_and_the_sign_of_zero_is_zero():
    G = torch.tensor([[1e-9, -3.0, 0.0], [0.5, 0.0, -1e9]])
    wanted = [[-0.25 if g > 0 else 0.25 if g < 0 else 0.0 for g in row] for row in G.tolist()]
    assert first_step(G, 0.25).tolist() == wanted


@given(shapes(), st.floats(0.1, 4))
def test_3_the_optimal_gradient_is_least_squares(shape, s):
    """On the Kronecker system: vec(s·B X A) = s·(B ⊗ Aᵀ) vec(X), row by row."""
    m, n, r = shape
    A, _, B = random_start(m, n, r)
    G = gaussian(m, n, seed=9)
    found = optimal_gradient(s * B.T @ G @ A.T, A, B, s)
    solved = torch.linalg.lstsq(s * torch.kron(B, A.T.contiguous()), G.reshape(-1, 1)).solution.view(r, r)
    cond = float(torch.linalg.cond(A) * torch.linalg.cond(B)) ** 2
    torch.testing.assert_close(found, solved, rtol=1e-13 * cond, atol=1e-13 * cond / s)


# Exact invariants, numbered as on the card.


@given(shapes())
def test_1_with_a_core_of_zeros_it_is_the_base_bit_for_bit(shape):
    m, n, r = shape
    A, R, B = random_start(m, n, r)
    layer, x = layer_of(m, n, r, start=(A, torch.zeros_like(R), B)), gaussian(4, n)
    assert torch.equal(layer(x), layer.base(x))
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == r * r


@given(shapes(), st.floats(0.1, 4))
def test_2_the_cores_gradient_and_its_step_are_projections(shape, s):
    m, n, r = shape
    layer, x, eta = layer_of(m, n, r, scale=s), gaussian(5, n), 0.1
    A, B = layer.A, layer.B
    before, G = layer.delta_weight().detach(), whole_gradient(layer, x)
    size = float((1 + s) ** 2 * (1 + A.norm() * B.norm()) ** 2 * (1 + G.norm()))
    assert_close(layer.R.grad, s * B.T @ G @ A.T, 1e-13 * size)
    torch.optim.SGD([layer.R], lr=eta).step()
    moved = layer.delta_weight().detach() - before
    assert_close(moved, -eta * s**2 * (B @ B.T) @ G @ (A.T @ A), 1e-13 * size)


@given(shapes())
def test_4_frames_are_orthonormal_and_the_start_is_the_best_of_its_rank(shape):
    m, n, r = shape
    step = first_step(gaussian(m, n), 1e-3)
    A, R, B = update_approximation(step, r)
    eye = torch.eye(r, dtype=torch.float64)
    assert_close(B.T @ B, eye)
    assert_close(A @ A.T, eye)
    assert torch.equal(R, R.diag().diag()) and bool((R.diag()[:-1] >= R.diag()[1:]).all())
    S = torch.linalg.svdvals(step)
    assert (step - B @ R @ A).norm().item() == pytest.approx(S[r:].norm().item(), abs=1e-15)  # Eckart and Young


@given(shapes())
def test_5_a_step_of_the_core_is_the_projected_step_of_the_whole_weight(shape):
    m, n, r = shape
    layer = layer_of(m, n, r, start=update_approximation(first_step(gaussian(m, n), 1e-3), r))
    before, G, eta = layer.delta_weight().detach(), whole_gradient(layer, gaussian(5, n, seed=3)), 0.1
    torch.optim.SGD([layer.R], lr=eta).step()
    P, Q = layer.B @ layer.B.T, layer.A.T @ layer.A
    assert_close(-(layer.delta_weight().detach() - before) / eta, P @ G @ Q, 1e-11 * (1 + float(G.norm())))
    assert_close(optimal_gradient(layer.R.grad, layer.A, layer.B, 1.0), layer.R.grad, 1e-11 * (1 + float(G.norm())))


@given(shapes())
def test_6_at_full_rank_the_start_is_one_step_of_sign_descent(shape):
    m, n, _ = shape
    base, x, eta = nn.Linear(n, m, dtype=torch.float64), gaussian(6, n), 1e-3
    base(x).pow(3).sum().backward()
    layer = LoRASBLinear(base, *update_approximation(first_step(base.weight.grad, eta), min(m, n)))
    assert_close(layer.merged().weight, base.weight - eta * base.weight.grad.sign())


def test_7_the_exported_lora_is_the_same_function_and_the_frames_have_a_gauge(tmp_path):
    m, n, r = 5, 7, 3
    layer, x = layer_of(m, n, r, scale=0.5), gaussian(4, n)
    A, B, s = layer.lora_factors()
    assert_close(layer.base(x) + s * x @ A.T @ B.T, layer(x))
    M, N = gaussian(r, r, seed=7), gaussian(r, r, seed=8)
    R = torch.linalg.solve(M, layer.R) @ torch.linalg.inv(N)
    assert_close(delta_weight(N @ layer.A, R, layer.B @ M, 0.5), layer.delta_weight(), 1e-11)
    save_peft(replace_linears(nn.Sequential(nn.Linear(n, m)), "0", lambda b: half(layer, b)), tmp_path)
    [entry] = read_peft(tmp_path).layers.values()
    assert (entry.rank, entry.scale) == (r, 0.5)
    torch.testing.assert_close((entry.scale * entry.B @ entry.A).double(), layer.delta_weight(), rtol=0, atol=1e-5)


def half(layer, base):
    return LoRASBLinear(base, layer.A, layer.R, layer.B, scale=layer.scale)


def test_7_peft_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    plain, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(3, 6, generator=seeded())
    plain.load_state_dict(model.state_dict())
    start = lambda base: half(layer_of(*base.weight.shape, 2, scale=0.5), base)  # noqa: E731
    replace_linears(model, "", start)
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)


def after_three_steps(layer, optimizer, corrected=False):
    """ΔW after three steps on another base."""
    with torch.no_grad():
        layer.base.weight.copy_(gaussian(5, 6, seed=20))
        layer.base.bias.zero_()
    layer._start = None
    steps = optimizer([layer.R])
    for i in range(3):
        steps.zero_grad()
        (layer(gaussian(8, 6, seed=30 + i)) - 1).square().mean().backward()
        if corrected:  # X in the direction of W, so a step of R that moves W by -η·s·B X A wants X / s
            layer.R.grad = optimal_gradient(layer.R.grad, layer.A, layer.B, layer.scale)
        steps.step()
    return layer.delta_weight().detach()


def run_turned(optimizer, turn):
    """ΔW after three steps; with `turn`, B → B Q₁, A → Q₂ A by orthogonal Q₁, Q₂, and the core turned back."""
    A, R, B = random_start(5, 6, 3)
    Q1, Q2 = (torch.linalg.qr(gaussian(3, 3, seed=s)).Q for s in (11, 12))
    return after_three_steps(
        layer_of(5, 6, 3, start=(Q2 @ A, Q1.T @ R @ Q2.T, B @ Q1) if turn else (A, R, B)), optimizer
    )


def test_9_turned_frames_take_the_same_way_with_sgd_and_another_with_adam():
    sgd = partial(torch.optim.SGD, lr=0.01)
    assert_close(run_turned(sgd, True), run_turned(sgd, False), 1e-10)
    adam = partial(torch.optim.Adam, lr=0.1)
    assert (run_turned(adam, True) - run_turned(adam, False)).abs().max() > 1e-2


def trajectory(optimizer, s, corrected):
    """ΔW after three steps at scale s from the same ΔW, with orthonormal frames."""
    A, R, B = update_approximation(gaussian(5, 6), 3)
    return after_three_steps(layer_of(5, 6, 3, start=(A, R / s, B), scale=s), optimizer, corrected)


def test_the_scale_drops_out_of_the_corrected_step_of_sgd_and_not_of_the_plain_one():
    sgd = partial(torch.optim.SGD, lr=0.05)
    wanted = trajectory(sgd, 1.0, True)
    assert_close(wanted, trajectory(sgd, 1.0, False), 1e-12)  # s = 1: theorem 5
    for s in (0.25, 4.0):
        assert_close(trajectory(sgd, s, True), wanted, 1e-12)
        assert (trajectory(sgd, s, False) - wanted).abs().max() > 1e-2


def test_with_adam_a_scale_is_a_rate():
    wanted = trajectory(partial(torch.optim.Adam, lr=0.1, eps=0), 1.0, False)
    assert_close(trajectory(partial(torch.optim.Adam, lr=0.025, eps=0), 4.0, False), wanted, 1e-12)
    assert (trajectory(partial(torch.optim.Adam, lr=0.1, eps=0), 4.0, False) - wanted).abs().max() > 1e-2


# The SVD.


def test_large_layers_take_a_sketch_that_is_nearly_as_good_and_repeatable(monkeypatch):
    step = first_step(gaussian(60, 50) + 2 * gaussian(60, 1) @ gaussian(1, 50), 1.0)
    exact = truncated_svd(step, 4)
    monkeypatch.setattr(lora_sb, "EXACT", 20)
    U, S, Vh = truncated_svd(step, 4, seeded())
    best, found = (step - exact[0] * exact[1] @ exact[2]).norm(), (step - U * S @ Vh).norm()
    assert best <= found < 1.01 * best and not torch.equal(S, exact[1])
    assert all(torch.equal(a, b) for a, b in zip((U, S, Vh), truncated_svd(step, 4, seeded())))


# The layer.


def test_factors_are_copies_in_float32_or_wider_beside_any_weight():
    A, R, B = (t.bfloat16() for t in random_start(3, 4, 2))
    for dtype, own in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        layer = LoRASBLinear(nn.Linear(4, 3, dtype=dtype), A, R, B)
        assert {layer.A.dtype, layer.R.dtype, layer.B.dtype} == {own}
    R32 = R.float()
    layer = LoRASBLinear(nn.Linear(4, 3), A.float().T.contiguous().T, R32, B.float())
    assert layer.A.is_contiguous() and layer.R.data_ptr() != R32.data_ptr()


def test_dropout_acts_on_the_update_only():
    layer, x = layer_of(3, 4, 2, dropout=0.5), torch.ones(2000, 4, dtype=torch.float64)
    with torch.no_grad():
        y, wanted = (layer.train(training)(x) - layer.base(x) for training in (True, False))
    assert y.std(dim=0).min() > 0.01 and wanted.std(dim=0).max() < 1e-12
    assert_close(y.mean(dim=0), wanted[0], 0.2 * float(wanted.abs().max()) + 0.1)


def test_decay_spares_the_core():
    [group] = optimizer_groups(layer_of(3, 4, 2), 0.1, 0.5)
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 1


def test_an_empty_layer_is_the_base_until_a_file_fills_it(tmp_path):
    base, x = nn.Linear(4, 3), torch.randn(5, 4, generator=seeded())
    old = nn.Sequential(LoRASBLinear(base, *random_start(3, 4, 2), scale=0.5))
    new = nn.Sequential(LoRASBLinear.empty(base, 2, scale=0.5))
    assert torch.equal(new(x), base(x))
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(new(x), old(x)) and not torch.equal(new(x), base(x))


# Bad input.


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"R": torch.ones(4, 4)}, ValueError, r"rank: got 4, wanted 1 <= rank <= 3"),
        ({"A": torch.ones(2, 5)}, ValueError, r"A, R, B: got shapes \(2, 5\), \(2, 2\), \(3, 2\), wanted \(2, 4\)"),
        ({"R": torch.ones(2, 3)}, ValueError, r"A, R, B: got shapes"),
        ({"B": torch.ones(3)}, ValueError, r"B: got shape \(3,\)"),
        ({"A": torch.ones(2, 4).int()}, TypeError, r"A: got dtype torch.int32"),
        ({"R": torch.full((2, 2), torch.nan)}, ValueError, r"R: got 4 NaN"),
        ({"R": torch.ones(0, 0)}, ValueError, r"R: got shape \(0, 0\)"),
        ({"scale": 0.0}, ValueError, r"scale: got 0.0"),
        ({"scale": True}, TypeError, r"scale: got True"),
        ({"dropout": 1.0}, ValueError, r"dropout: got 1.0"),
        ({"base": nn.ReLU()}, TypeError, r"base: got ReLU"),
    ],
)
def test_bad_input_raises_and_leaves_the_base(change, error, message, no_shape_checks):
    base = nn.Linear(4, 3)
    good = {"base": base, "A": torch.ones(2, 4), "R": torch.ones(2, 2), "B": torch.ones(3, 2)}
    with pytest.raises(error, match=message):
        LoRASBLinear(**good | change)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "step, rank, error, message",
    [
        (torch.zeros(3, 4), 2, ValueError, "step: got zeros only"),
        (torch.full((3, 4), torch.inf), 2, ValueError, "step: got 12 NaN or infinite"),
        (torch.ones(3, 4).int(), 2, TypeError, "step: got dtype"),
        (torch.ones(3), 1, ValueError, r"step: got shape \(3,\)"),
        (torch.ones(3, 4), 0, ValueError, "rank: got 0"),
        (torch.ones(3, 4), 4, ValueError, "rank: got 4"),
        (torch.ones(3, 4), 1.0, TypeError, "rank: got 1.0"),
    ],
)
def test_a_bad_step_raises(step, rank, error, message, no_shape_checks):
    with pytest.raises(error, match=message):
        update_approximation(step, rank)


def test_an_empty_layer_checks_its_rank():
    with pytest.raises(ValueError, match="rank: got 4"):
        LoRASBLinear.empty(nn.Linear(4, 3), 4)
