"""GaLore's variants: 8-bit moments beside 32-bit and bitsandbytes' ones, Adafactor beside galore-torch's, per-layer."""

import copy
import gc
import math
import weakref
from functools import partial

import pytest
import torch
from battery import assert_resumes
from torch import nn

from lowrank_ref.core.accounting import state_bytes, state_numel
from lowrank_ref.core.quantize import dequantize_blockwise, quantize_blockwise
from lowrank_ref.lab.train import train as lab_train
from lowrank_ref.optimizers.galore import GaLoreAdamW, GaLoreSGD, projectors
from lowrank_ref.optimizers.galore_variants import (
    SMALLEST_8BIT,
    GaLoreAdafactor,
    GaLoreAdamW8bit,
    adafactor_direction,
    per_layer_updates,
)

LARGE = (64, 80)  # with rank 64, R is (64, 80): 5120 numbers, so that the moments are stored in 8 bits
GALORES = [GaLoreAdamW, GaLoreSGD, GaLoreAdafactor, GaLoreAdamW8bit]


def randoms(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def follow(cls, W0, gradients, **options):
    """Take one step for each gradient; return the weights W_0, W_1, ..., the optimizer and the state of W."""
    W = nn.Parameter(W0.clone())
    optimizer = cls([W], **options)
    path = [W0]
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        path.append(W.detach().clone())
    return path, optimizer, optimizer.state[W]


# --- 8-bit moments ----------------------------------------------------------------------------------------------------


def distance(path, other) -> float:
    """‖W - W'‖ at the end, relative to the way from the start."""
    return float((path[-1] - other[-1]).norm() / (other[-1] - other[0]).norm())


@pytest.mark.parametrize("rank", [64, None])
def test_8bit_moments_follow_the_32bit_ones(rank):
    """Measured on four seeds after 20 steps: 0.0159 to 0.0166."""
    W, gradients = randoms(*LARGE), [randoms(*LARGE, seed=t) for t in range(1, 21)]
    rough, exact = (follow(cls, W, gradients, rank=rank, gap=7)[0] for cls in (GaLoreAdamW8bit, GaLoreAdamW))
    assert 0.01 < distance(rough, exact) < 0.025


def test_8bit_moments_follow_bitsandbytes_more_closely_than_32bit_ones():
    """Measured on three seeds: 0.0018 to 0.0020, from the place of eps and other rounding of the smallest numbers."""
    optim = pytest.importorskip("bitsandbytes").optim
    W, gradients = randoms(*LARGE), [randoms(*LARGE, seed=t) for t in range(1, 21)]
    ours, exact = (follow(cls, W, gradients, eps=1e-8)[0] for cls in (GaLoreAdamW8bit, GaLoreAdamW))
    theirs = follow(optim.Adam8bit, W, gradients, lr=0.01, eps=1e-8)[0]
    assert distance(theirs, exact) > 0.012
    assert distance(ours, theirs) < 0.004


def test_a_large_number_in_a_block_does_not_make_its_neighbours_jump():
    """One gradient in a hundred is 3000 times larger. With moments V rounded to zero, weights moved by 500, not 0.2."""
    sizes = torch.where(randoms(*LARGE, seed=7) > 2.3, 3000.0, 1.0)
    path, _, _ = follow(GaLoreAdamW8bit, randoms(*LARGE), [sizes * randoms(*LARGE, seed=t) for t in range(1, 41)])
    assert (path[-1] - path[0]).abs().max() < 0.3


def test_one_8bit_step_is_adam_from_the_decoded_moments():
    gradients = [randoms(*LARGE, seed=t) for t in range(1, 5)]
    path, _, before = follow(GaLoreAdamW8bit, randoms(*LARGE), gradients[:3], rank=64)
    M = dequantize_blockwise(before["M_codes"], before["M_peak"], signed=True)
    V = dequantize_blockwise(before["V_codes"], before["V_peak"], signed=False)
    P = projectors(gradients[0], 64)["left"]
    R = P.T @ gradients[3]
    M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
    N = M / (V.sqrt() + 1e-6) * math.sqrt(1 - 0.999**4) / (1 - 0.9**4)

    longer, _, after = follow(GaLoreAdamW8bit, randoms(*LARGE), gradients, rank=64)
    torch.testing.assert_close(longer[4], path[3] - 0.01 * 0.25 * (P @ N), rtol=1e-5, atol=1e-6)
    for name, moment in (("M", M), ("V", V)):
        codes, peak = quantize_blockwise(moment, signed=name == "M")
        codes = codes if name == "M" else codes.clamp(min=1)  # V is never rounded to zero
        torch.testing.assert_close(after[f"{name}_peak"], peak)
        apart = (after[f"{name}_codes"].int() - codes.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01  # numbers next to the middle of two codes


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_8bit_state_takes_the_bytes_of_the_formula(dtype, size):
    _, optimizer, state = follow(GaLoreAdamW8bit, randoms(*LARGE).to(dtype), [randoms(*LARGE).to(dtype)], rank=64)
    assert {key: state[key].dtype for key in state if key != "step"} == {
        "left": dtype,
        "M_codes": torch.uint8,
        "M_peak": torch.float32,
        "V_codes": torch.uint8,
        "V_peak": torch.float32,
    }
    assert state_bytes(optimizer) == 64 * 64 * size + 2 * (5120 + 4 * math.ceil(5120 / 256))


@pytest.mark.parametrize("shape, eight", [((63, 65), False), ((64, 64), True)])
def test_fewer_than_4096_moments_stay_in_float32(shape, eight):
    W, gradients = randoms(*shape).bfloat16(), [randoms(*shape, seed=1).bfloat16()]
    _, _, state = follow(GaLoreAdamW8bit, W, gradients)
    assert SMALLEST_8BIT == 4096
    assert state.keys() == ({"step", "M_codes", "M_peak", "V_codes", "V_peak"} if eight else {"step", "M", "V"})
    if not eight:
        assert state["M"].dtype == state["V"].dtype == torch.float32


def test_where_eps_stands_is_told_by_a_small_gradient():
    """ε before bias correction, as in `GaLoreAdamW`; the official 8-bit class and algorithm 2 add it afterwards."""
    G = randoms(*LARGE) * 1e-6
    path, _, _ = follow(GaLoreAdamW8bit, torch.zeros(LARGE), [G], lr=1.0, eps=1e-3)
    before = 0.1 * G / ((0.001 * G**2).sqrt() + 1e-3) * math.sqrt(0.001) / 0.1
    after = G / (G.abs() + 1e-3)
    torch.testing.assert_close(path[1], -before, rtol=1e-4, atol=1e-9)
    assert float(after.norm() / before.norm()) == pytest.approx(0.001**-0.5, rel=0.01)


def test_small_8bit_is_the_32bit_optimizer_to_the_bit():
    W, gradients = randoms(6, 4), [randoms(6, 4, seed=t) for t in range(1, 8)]
    exact = follow(GaLoreAdamW, W, gradients, rank=2, gap=3)[0][-1]
    assert torch.equal(follow(GaLoreAdamW8bit, W, gradients, rank=2, gap=3)[0][-1], exact)


# --- Adafactor --------------------------------------------------------------------------------------------------------


def test_adafactor_direction_number_by_number():
    row, col = torch.zeros(2).double(), torch.zeros(3).double()
    rows, cols = [0.0] * 2, [0.0] * 3
    clipped = []
    for t in range(1, 5):
        R = randoms(2, 3, seed=t, dtype=torch.float64) * t  # growing, so that some are clipped
        D = adafactor_direction(R, row, col, t, decay=0.7, eps=1e-3, clip=1.1)
        keep = 1 - t**-0.7
        square = [[R[i, j].item() ** 2 + 1e-3 for j in range(3)] for i in range(2)]
        rows = [keep * rows[i] + (1 - keep) * sum(square[i]) / 3 for i in range(2)]
        cols = [keep * cols[j] + (1 - keep) * (square[0][j] + square[1][j]) / 2 for j in range(3)]
        mean = sum(rows) / 2
        wanted = [[R[i, j].item() / math.sqrt(rows[i] * cols[j] / mean) for j in range(3)] for i in range(2)]
        rms = math.sqrt(sum(x * x for line in wanted for x in line) / 6)
        clipped.append(rms > 1.1)
        wanted = torch.tensor(wanted, dtype=torch.float64) / max(1.0, rms / 1.1)
        torch.testing.assert_close(D, wanted, rtol=1e-12, atol=0)
    assert set(clipped) == {True, False}
    torch.testing.assert_close(row, torch.tensor(rows, dtype=torch.float64))
    torch.testing.assert_close(col, torch.tensor(cols, dtype=torch.float64))


def test_a_gradient_of_rank_one_squared_is_adafactors_exact_case():
    """If |R| = a bᵀ, the factored moment is the full one, and the first direction is the sign of R."""
    R = torch.outer(randoms(4), randoms(5, seed=1))
    D = adafactor_direction(R, torch.zeros(4), torch.zeros(5), 1)
    torch.testing.assert_close(D, R.sign())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "side, proj_type",
    [("smaller", "std"), ("larger", "reverse_std"), ("left", "left"), ("right", "right"), ("both", "full")],
)
def test_fourteen_adafactor_steps_equal_galore_torch(side, proj_type, weight_decay):
    """The official one decays before its step, W ← cW - D; ours after, W ← c(W - D): so our W is c times theirs."""
    official = pytest.importorskip("galore_torch")
    shapes = [(8, 5), (5, 8), (6, 6), (4, 3), (7,)]  # the last two are not projected
    c = 1 - 0.05 * weight_decay

    def run(build, start=1.0):
        weights = [nn.Parameter(randoms(*shape) * start) for shape in shapes]
        optimizer = build(weights[:3], weights[3:])
        for t in range(14):
            for i, W in enumerate(weights):
                W.grad = randoms(*W.shape, seed=100 * t + i)
            optimizer.step()
        return [W.detach() for W in weights]

    def basis(G, rank, *, start=None):
        """Return the official projector's vectors, with LAPACK's signs. A right basis comes as a transposed view."""
        if G.is_contiguous():
            return torch.linalg.svd(G, full_matrices=False).U[:, :rank]
        return torch.linalg.svd(G.T, full_matrices=False).Vh[:rank].T

    def ours(projected, rest, gap=5):
        groups = [{"params": projected, "rank": 3, "gap": gap, "scale": 0.25, "side": side}, {"params": rest}]
        return GaLoreAdafactor(groups, lr=0.05, weight_decay=weight_decay, basis=basis)

    def theirs(projected, rest):
        group = {"params": projected, "rank": 3, "update_proj_gap": 5, "scale": 0.25, "proj_type": proj_type}
        options = {"relative_step": False, "scale_parameter": False, "weight_decay": weight_decay}
        return official.GaLoreAdafactor([group, {"params": rest}], lr=0.05, **options)

    wanted = run(theirs, start=1 / c)
    for W, V in zip(run(ours), wanted):
        torch.testing.assert_close(W, c * V, rtol=1e-5, atol=1e-5)
    others = run(partial(ours, gap=7))
    assert all((W - c * V).abs().max() > 1e-2 for W, V in zip(others[:3], wanted[:3]))


@pytest.mark.parametrize("side", ["smaller", "larger", "left", "right", "both"])
def test_adafactor_state_is_one_number_for_each_row_and_column_of_r(side):
    _, optimizer, _ = follow(GaLoreAdafactor, randoms(9, 5), [randoms(9, 5, seed=1)], rank=2, side=side)
    wanted = {"smaller": 10 + 9 + 2, "larger": 18 + 2 + 5, "left": 18 + 2 + 5, "right": 10 + 9 + 2, "both": 28 + 2 + 2}
    assert state_numel(optimizer) == wanted[side]


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_what_is_no_matrix_keeps_a_full_second_moment(shape):
    gradients = [randoms(*shape, seed=t) * 0.5 for t in range(1, 5)]
    path, _, _ = follow(GaLoreAdafactor, randoms(*shape), gradients, lr=0.1, clip=1e9)
    W, V = path[0], 0.0
    for t, G in enumerate(gradients, start=1):
        V = (1 - t**-0.8) * V + t**-0.8 * G**2
        W = W - 0.1 * G / torch.sqrt(V)
    torch.testing.assert_close(path[-1], W)


def test_adafactor_keeps_float32_moments_of_half_precision_weights():
    W, gradients = randoms(8, 5).bfloat16(), [randoms(8, 5, seed=t).bfloat16() for t in range(1, 5)]
    path, _, state = follow(GaLoreAdafactor, W, gradients, rank=3)
    assert state["row"].dtype == state["col"].dtype == torch.float32
    assert path[-1].dtype == state["right"].dtype == torch.bfloat16


@pytest.mark.parametrize("name, value", [("decay", 0.0), ("clip", -1.0), ("clip", float("nan"))])
def test_adafactors_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}"):
        GaLoreAdafactor([nn.Parameter(torch.ones(3, 2))], **{name: value})


# --- What both share with GaLoreAdamW ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [GaLoreAdafactor, GaLoreAdamW8bit])
@pytest.mark.parametrize("rank", [64, None])
def test_weight_decay_comes_after_the_step_and_is_not_scaled(rank, cls):
    W, gradients = randoms(*LARGE), [randoms(*LARGE, seed=1)]
    plain = follow(cls, W, gradients, rank=rank, lr=0.1)[0][-1]
    decayed = follow(cls, W, gradients, rank=rank, lr=0.1, weight_decay=0.5)[0][-1]
    torch.testing.assert_close(decayed, plain * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("cls", [GaLoreAdafactor, GaLoreAdamW8bit])
def test_scale_is_a_learning_rate_and_rate_zero_makes_the_state_only(cls):
    W, gradients = randoms(*LARGE), [randoms(*LARGE, seed=t) for t in range(1, 4)]
    one = follow(cls, W, gradients, lr=0.02, scale=0.3, rank=64, gap=2)[0][-1]
    torch.testing.assert_close(follow(cls, W, gradients, lr=0.06, scale=0.1, rank=64, gap=2)[0][-1], one)
    path, _, state = follow(cls, W, gradients[:1], lr=0.0, rank=64)
    assert torch.equal(path[0], path[1]) and len(state) > 2


@pytest.mark.parametrize("cls", [GaLoreAdafactor, GaLoreAdamW8bit])
@pytest.mark.parametrize("rank", [64, None])
def test_zero_gradients_move_nothing(cls, rank):
    path, _, _ = follow(cls, randoms(*LARGE), [torch.zeros(LARGE)] * 3, rank=rank, gap=2)
    assert torch.equal(path[0], path[-1])


@pytest.mark.parametrize("cls", [GaLoreAdafactor, GaLoreAdamW8bit])
def test_bfloat16_stays_finite(cls):
    gradients = [randoms(*LARGE, seed=t).bfloat16() for t in range(10)]
    path, _, _ = follow(cls, randoms(*LARGE).bfloat16(), gradients, rank=64, gap=5, lr=0.1)
    assert bool(path[-1].isfinite().all()) and path[-1].dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [GaLoreAdafactor, GaLoreAdamW8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_resumes_to_the_bit(cls, dtype):
    def build():
        weights = [nn.Parameter(randoms(*shape).to(dtype)) for shape in (LARGE, (6, 4), (5,))]
        groups = [{"params": weights[:1], "rank": 64}, {"params": weights[1:2], "rank": 2}, {"params": weights[2:]}]
        return weights, cls(groups, lr=0.1, gap=3)

    assert_resumes(build, lambda W, t: randoms(*W.shape, seed=t).to(dtype))


@pytest.mark.parametrize("cls", [GaLoreAdafactor, GaLoreAdamW8bit])
def test_changing_bases_reach_a_target_of_full_rank(cls):
    """Measured: 2e-13 and 4e-5."""
    target, W = randoms(*LARGE), nn.Parameter(torch.zeros(LARGE))
    optimizer = cls([W], lr=0.5, rank=56, gap=20, scale=0.5)  # R is (56, 80): 4480 numbers
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for _ in range(100):
        W.grad = W.detach() - target
        optimizer.step()
        schedule.step()
    assert (W.detach() - target).square().sum() < 1e-3 * target.square().sum()


# --- Per-layer updates ------------------------------------------------------------------------------------------------


def training(cls):
    """Return a small model, its optimizer with both kinds of groups, a scheduler, and the loss of step t."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    for i, p in enumerate(model.parameters()):
        p.data = randoms(*p.shape, seed=i)
    groups = [{"params": [model[0].weight, model[2].weight], "rank": 2}, {"params": [model[0].bias, model[2].bias]}]
    optimizer = cls(groups, lr=0.1, gap=2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    def loss(t):
        return (model(randoms(8, 6, seed=10 + t)) - randoms(8, 3, seed=50 + t)).square().mean()

    return model, optimizer, schedule, loss


def train(optimizer, schedule, loss, times):
    for t in times:
        loss(t).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def equal(model, other) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("cls", GALORES)
def test_per_layer_updates_equal_ordinary_steps_to_the_bit(cls):
    ordinary, *rest = training(cls)
    train(*rest, range(6))
    model, optimizer, schedule, loss = training(cls)
    per_layer_updates(optimizer)
    for t in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        loss(t).backward()
        assert all(p.grad is None for p in model.parameters())
        moved = [p.detach().clone() for p in model.parameters()]
        assert not any(torch.equal(p, q) for p, q in zip(before, moved))
        optimizer.step()  # moves nothing: it only opens the next step
        assert all(torch.equal(p, q) for p, q in zip(moved, model.parameters()))
        schedule.step()
    assert equal(model, ordinary)


def test_at_most_one_gradient_is_alive():
    model, optimizer, _, loss = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    alive = []
    for p in model.parameters():  # called when a gradient is computed, before it is stored
        p.register_hook(lambda _: alive.append(sum(q.grad is not None for q in model.parameters())))
    loss(0).backward()
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SGD])
def test_another_optimizer_is_refused_at_once(other, no_shape_checks):
    with pytest.raises(TypeError, match=f"optimizer: got {other.__name__}, wanted a GaLore optimizer"):
        per_layer_updates(other(nn.Linear(2, 2).parameters()))


def test_a_second_call_is_refused_until_the_hooks_are_removed():
    model, optimizer, schedule, loss = training(GaLoreAdamW)
    hooks = per_layer_updates(optimizer)
    for again in (optimizer, GaLoreSGD(model.parameters())):
        with pytest.raises(ValueError, match="optimizer: got per-layer updates already"):
            per_layer_updates(again)
    train(optimizer, schedule, loss, range(2))  # the first hooks are as they were
    for hook in hooks:
        hook.remove()
    per_layer_updates(optimizer)
    train(optimizer, schedule, loss, range(2))


def test_several_processes_are_refused_before_anything_moves(monkeypatch):
    """Each would step by its own gradient, since they are averaged only afterwards."""
    model, optimizer, _, loss = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="backward: got 2 processes"):
        loss(0).backward()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))


@pytest.mark.parametrize("cls", GALORES)
def test_a_grad_scaler_is_refused_and_works_without_the_hooks(cls):
    model, optimizer, _, loss = training(cls)
    hooks = per_layer_updates(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(0)).backward()
    with pytest.raises(RuntimeError, match="step: got a GradScaler"):
        scaler.step(optimizer)
    for hook in hooks:
        hook.remove()
    ordinary, plain, _, its_loss = training(cls)
    ordinary.load_state_dict(model.state_dict())
    plain.load_state_dict(optimizer.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(1)).backward()
    scaler.step(optimizer)
    its_loss(1).backward()
    plain.step()
    assert equal(model, ordinary)


def test_a_clip_that_finds_no_gradient_is_refused_in_the_training_loop():
    model, optimizer, _, loss = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    with pytest.raises(
        ValueError, match="optimizer: got per-layer updates, which step inside backward, wanted no clip"
    ):
        lab_train(model, lambda i: (i,), lambda _, t: loss(t), optimizer, steps=2, clip=1.0, progress=False)


def test_a_flattened_parameter_is_named_in_backward():
    model, optimizer, _, _ = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    W = model[0].weight
    W.data = W.data.flatten()
    with pytest.raises(ValueError, match=r"params: got shape \(30,\), wanted \(5, 6\)"):
        W.sum().backward()


def test_a_second_backward_before_step_is_refused_as_accumulation():
    model, optimizer, _, loss = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    loss(0).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"second pass before optimizer.step\(\).* no accumulation"):
        loss(1).backward()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    optimizer.zero_grad()
    optimizer.step()
    loss(1).backward()  # is welcome again
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters()))


@pytest.mark.parametrize("cls", GALORES)
def test_removed_hooks_give_back_ordinary_steps(cls):
    ordinary, *rest = training(cls)
    train(*rest, range(6))
    model, optimizer, schedule, loss = training(cls)
    hooks = per_layer_updates(optimizer)
    train(optimizer, schedule, loss, range(3))
    for hook in hooks:
        hook.remove()
    loss(3).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    train(optimizer, schedule, loss, range(3, 6))
    assert equal(model, ordinary)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_raises_in_backward_and_spares_its_layer(value):
    model, optimizer, schedule, loss = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    train(optimizer, schedule, loss, range(2))
    W = model[0].weight
    before, state = W.detach().clone(), copy.deepcopy(optimizer.state[W])
    spoil = W.register_hook(lambda G: G * value)
    with pytest.raises(ValueError, match="grad: got NaN or infinity"):
        loss(2).backward()
    assert torch.equal(W, before)
    assert state["step"] == optimizer.state[W]["step"] == 2
    assert all(torch.equal(optimizer.state[W][key], state[key]) for key in ("left", "M", "V"))
    spoil.remove()
    optimizer.zero_grad()
    optimizer.step()
    train(optimizer, schedule, loss, [2])  # goes on
    assert not torch.equal(W, before)


def test_a_state_can_be_loaded_while_the_hooks_are_on():
    ordinary, *rest = training(GaLoreAdamW)
    train(*rest, range(3))
    model, optimizer, schedule, loss = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    model.load_state_dict(ordinary.state_dict())
    optimizer.load_state_dict(rest[0].state_dict())
    schedule.load_state_dict(rest[1].state_dict())
    train(*rest, range(3, 6))
    train(optimizer, schedule, loss, range(3, 6))
    assert equal(model, ordinary)


def test_a_parameter_without_gradient_is_left_alone():
    model, optimizer, _, loss = training(GaLoreAdamW)
    per_layer_updates(optimizer)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    loss(0).backward()
    assert torch.equal(before, model[0].weight) and model[0].weight not in optimizer.state
    assert model[2].weight in optimizer.state


def test_per_layer_updates_keep_nothing_alive():
    """A hook that held its optimizer would keep model and state in memory for ever, out of the collector's sight."""
    model = nn.Linear(3, 2)
    optimizer = GaLoreAdamW(model.parameters())
    per_layer_updates(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weight = weakref.ref(model.weight)
    del model, optimizer
    gc.collect()
    assert weight() is None


def test_per_layer_updates_of_a_lost_optimizer_raise():
    model = nn.Linear(3, 2)
    per_layer_updates(GaLoreAdamW(model.parameters()))
    gc.collect()
    with pytest.raises(RuntimeError, match="optimizer that is gone"):
        model(torch.ones(1, 3)).sum().backward()
