"""CoDyRA: the ramp against the released loop, the cycle of tasks, the bounds, and what is refused."""

import copy
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears
from lowrank_ref.ranks.codyra import (
    CoDyRALinear,
    RankSelection,
    chance_ranks,
    forgetting_bound,
    ramp_of_shrink,
    threshold_ramp,
    update_norm_bound,
    weight_after_task,
)
from lowrank_ref.ranks.sora import (
    ProximalGates,
    SoRALinear,
    gate_groups,
    kept_ranks,
    prune,
    rank_gates,
    released_threshold,
    soft_threshold,
)
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels
from lowrank_ref.ranks.task_sequence import finish_task, start_task

assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def net():
    """Linear, tanh, linear, all in float64, the second smaller than the first."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def started(rank=4, seed=0, gate="normal"):
    return start_task(net(), "", rank, gate=gate, generator=seeded(seed))


def train(model, optimizer, steps, selection=None, seed=0):
    """Take steps towards random targets; return them all."""
    for step in range(steps):
        x, y = gaussian(16, 5, seed=100 + step), gaussian(16, 3, seed=200 + step + 1000 * seed)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        if selection is not None:
            selection.step()
    return model


# The ramp.


def slow_ramp(steps, largest, levels, dense):
    """What the released loop does, its variables written out."""
    grid, place, threshold, found = torch.linspace(0, largest, levels, dtype=torch.float64), 0, 0.0, []
    before = dense * steps
    every = int((steps - before) // levels)
    for iteration in range(steps):
        if every > 0 and iteration >= before and iteration % every == 0:
            place += 1
            threshold = grid[min(levels - 1, place)].item()
        found.append(threshold if iteration > before else 0.0)
    return found


@given(st.integers(4, 300), st.floats(0, 2), st.integers(2, 12), st.sampled_from([0, 0.25, 0.3, 0.5, 0.77]))
def test_the_ramp_is_that_of_the_released_loop(steps, largest, levels, dense):
    wanted = slow_ramp(steps, largest, levels, dense)
    if (steps - dense * steps) // levels < 1:
        assert not any(wanted)  # the released loop then never shrinks
        with pytest.raises(ValueError, match="steps: got"):
            threshold_ramp(steps, largest, levels=levels, dense=dense)
        return
    got = threshold_ramp(steps, largest, levels=levels, dense=dense)
    assert got == pytest.approx(wanted, abs=1e-12)
    assert len(got) == steps and all(a <= b for a, b in zip(got, got[1:]))
    assert not any(got[: int(dense * steps) + 1]) and got[-1] == largest


def test_the_ramp_of_the_released_run():
    ramp = threshold_ramp(500, 0.005)
    first = next(i for i, kappa in enumerate(ramp) if kappa)
    assert (first, ramp.index(0.005)) == (251, 490)
    assert ramp[251] == pytest.approx(1.0204e-4, abs=1e-8) and sum(ramp) == pytest.approx(0.6499, abs=1e-5)


@given(st.integers(10, 300), st.floats(0, 3), st.integers(2, 5))
def test_a_ramp_by_its_sum(steps, shrink, levels):
    ramp = ramp_of_shrink(steps, shrink, levels=levels)
    assert sum(ramp) == pytest.approx(shrink, abs=1e-12)
    assert ramp == pytest.approx(threshold_ramp(steps, ramp[-1], levels=levels))


def test_soras_schedule_over_the_same_levels_differs_in_one_step():
    """With half the steps on level 0, SoRA's schedule shrinks by the first level once more, at the first step."""
    ramp, found = threshold_ramp(20, 0.4, levels=5), []
    model = started(1)
    optimizer = torch.optim.SGD(gate_groups(model), lr=0.0)
    proximal = ProximalGates(model, optimizer, penalty=0.0, coupled=False)
    plan = SparsifyingSchedule(proximal, [0.0, *threshold_levels(0.1, 0.4, 4)], first=10, later=2)
    for _ in range(20):
        found.append(proximal.penalty)
        proximal.step()
        plan.step()
    differ = [step for step in range(20) if abs(found[step] - ramp[step]) > 1e-12]
    assert differ == [10] and found[10] == 0.1 and ramp[10] == 0.0


def test_survivors_by_chance():
    assert chance_ranks(16, 0.65) == pytest.approx(8.25, abs=0.005)
    assert chance_ranks(7, 0.0) == 7.0
    w = torch.randn(200_000, generator=seeded(), dtype=torch.float64)
    for kappa in ramp_of_shrink(500, 0.65):
        w = soft_threshold(w, kappa)
    assert 16 * (w != 0).double().mean().item() == pytest.approx(8.25, abs=0.06)
    w = torch.randn(200_000, generator=seeded(), dtype=torch.float64)
    for kappa in threshold_ramp(500, 0.005):
        w = released_threshold(w, kappa)
    assert 16 * (w != 0).double().mean().item() == pytest.approx(8.20, abs=0.06)


# The layer and the action.


@given(shapes())
def test_the_update_by_loops_with_scale_one(shape):
    m, n, r = shape
    layer = CoDyRALinear(nn.Linear(n, m, dtype=torch.float64), r, generator=seeded())
    layer.B.data = gaussian(m, r, seed=1)
    wanted = torch.zeros(m, n, dtype=torch.float64)
    for k in range(r):
        for i in range(m):
            for j in range(n):
                wanted[i, j] += layer.g[k].detach() * layer.B[i, k].detach() * layer.A[k, j].detach()
    assert_close(layer.delta_weight().detach(), wanted)
    assert layer.scale == 1.0 and isinstance(layer, SoRALinear)


@pytest.mark.parametrize("gate", ["normal", "ones"])
def test_a_task_starts_at_the_model_before(gate):
    x, base = gaussian(4, 5), net()
    model = started(gate=gate)
    assert torch.equal(model(x), base(x))
    assert [layer.rank for _, layer in adapters(model)] == [4, 3]  # r cut to min(m, n)
    ones = [bool((g == 1).all()) for g in rank_gates(model).values()]
    assert ones == [gate == "ones"] * 2


def test_a_step_is_an_optimizer_step_followed_by_the_threshold_of_that_step():
    model, twin = started(), started()
    first, second = (torch.optim.AdamW(gate_groups(m), lr=0.02, weight_decay=0) for m in (model, twin))
    selection = RankSelection(model, first, steps=6, shrink=0.9, levels=2, dense=0.4)
    ramp = ramp_of_shrink(6, 0.9, levels=2, dense=0.4)
    assert selection.thresholds == ramp and sum(ramp) == pytest.approx(0.9)
    train(model, first, 6, selection)
    for step in range(6):
        x, y = gaussian(16, 5, seed=100 + step), gaussian(16, 3, seed=200 + step)
        second.zero_grad()
        (twin(x) - y).square().mean().backward()
        second.step()
        for g in rank_gates(twin).values():
            g.data = torch.where(g.abs() > ramp[step], g - g.sign() * ramp[step], torch.zeros_like(g)).detach()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert_close(p.detach(), q.detach())
    selection.step()
    assert selection.done == 7 and selection.penalty == ramp[-1]


def test_without_gradients_the_count_never_grows():
    model = started()
    optimizer = torch.optim.SGD(gate_groups(model), lr=0.0)
    selection = RankSelection(model, optimizer, steps=40, shrink=1.0, levels=5)
    start, counts = {path: g.detach().clone() for path, g in rank_gates(model).items()}, [7]
    for _ in range(40):
        selection.step()
        counts.append(sum(kept_ranks(model).values()))
    assert all(a >= b for a, b in zip(counts, counts[1:])) and counts[-1] < 7
    for path, g in rank_gates(model).items():
        assert_close(g.detach(), soft_threshold(start[path], 1.0))


def test_a_resumed_selection_goes_on(no_shape_checks):
    def run(stop):
        model = started()
        optimizer = torch.optim.Adam(gate_groups(model), lr=0.05)
        selection = RankSelection(model, optimizer, steps=10, shrink=0.8, levels=3)
        train(model, optimizer, stop, selection)
        return model, optimizer, selection

    whole, _, done = run(10)
    half, optimizer, selection = run(6)
    again, other, resumed = run(0)
    again.load_state_dict(half.state_dict()), other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(selection.state_dict())
    for step in range(6, 10):
        x, y = gaussian(16, 5, seed=100 + step), gaussian(16, 3, seed=200 + step)
        other.zero_grad()
        (again(x) - y).square().mean().backward()
        other.step(), resumed.step()
    assert resumed.done == done.done == 10
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))
    for state, error in (({}, ValueError), ({"done": -1}, ValueError), ({"done": 1.5}, TypeError)):
        with pytest.raises(error, match="state: got keys|done: got"):
            resumed.load_state_dict(state)
        assert resumed.done == 10


# The end of a task.


@given(shapes(), st.integers(0, 255))
def test_the_weight_after_a_task_by_loops(shape, mask):
    m, n, r = shape
    W, A, B = gaussian(m, n, seed=3), gaussian(r, n), gaussian(m, r, seed=1)
    w = gaussian(r, seed=2) * torch.tensor([(mask >> k) & 1 for k in range(r)], dtype=torch.float64)
    wanted = W.clone()
    for k in range(r):
        if w[k] != 0:
            wanted += w[k] * torch.outer(B[:, k], A[k])
    assert_close(weight_after_task(W, A, B, w), wanted)
    layer = CoDyRALinear(nn.Linear(n, m, dtype=torch.float64), r, generator=seeded())
    layer.base.weight.data, layer.A.data, layer.B.data, layer.g.data = W.clone(), A, B, w
    assert_close(layer.merged().weight, wanted)
    if not w.any():
        assert weight_after_task(W, A, B, w) is W and torch.equal(layer.merged().weight, W)


def test_three_tasks_leave_a_plain_network_and_the_sum_of_their_updates():
    x, model = gaussian(4, 5), net()
    kinds = [type(m) for m in model.modules()]
    base, count = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
    total = {path: torch.zeros_like(base.get_submodule(path).weight) for path in ("0", "2")}
    ranks = dict.fromkeys(total, 0)
    for task in range(3):
        start_task(model, "", 4, gate="normal", generator=seeded(task))
        optimizer = torch.optim.Adam(gate_groups(model), lr=0.05)
        train(model, optimizer, 12, RankSelection(model, optimizer, steps=12, shrink=0.5, levels=4), seed=task)
        deltas, y = {path: layer.delta_weight().detach() for path, layer in adapters(model)}, model(x).detach()
        kept = kept_ranks(model)
        left = finish_task(model)
        assert_close(model(x), y)
        for path, update in left.items():
            assert update.rank == kept[path] >= torch.linalg.matrix_rank(deltas[path])
            assert update.norm == pytest.approx(deltas[path].norm().item())
            total[path] += deltas[path]
            ranks[path] += update.rank
    assert [type(m) for m in model.modules()] == kinds
    assert sum(p.numel() for p in model.parameters()) == count and not list(adapters(model))
    for path, delta in total.items():
        moved = model.get_submodule(path).weight - base.get_submodule(path).weight
        assert_close(moved.detach(), delta.detach())
        assert torch.linalg.matrix_rank(moved) <= ranks[path]


def test_a_shrink_beyond_all_weights_changes_no_bit():
    model, base = started(), net()
    optimizer = torch.optim.Adam(gate_groups(model), lr=0.01)
    train(model, optimizer, 12, RankSelection(model, optimizer, steps=12, shrink=9.0, levels=2))
    assert all(update.rank == 0 and update.norm == 0 for update in finish_task(model).values())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters()))


def test_without_shrink_and_with_frozen_weights_at_one_it_is_lora_with_scale_one():
    x, ours, lora = gaussian(4, 5), net(), net()
    for task in range(2):
        start_task(ours, "", 3, gate="ones", generator=seeded(task))
        for g in rank_gates(ours).values():
            g.requires_grad_(False)
        replace_linears(lora, "", partial(LoRALinear, rank=3, alpha=3))
        for (_, mine), (_, other) in zip(adapters(ours), adapters(lora)):
            other.A.data.copy_(mine.A)
        for model in (ours, lora):
            factors = [p for p in model.parameters() if p.requires_grad]
            assert len(factors) == 4
            train(model, torch.optim.Adam(factors, lr=0.05), 8, seed=task)
        finish_task(ours), merge_adapters(lora)
        assert_close(ours(x), lora(x))


def test_a_finished_task_can_be_exported_as_lora_before_its_merge(bert, tokens, tmp_path):
    model = start_task(bert(), r"attention\.self\.(query|value)$", 4, generator=seeded())
    with torch.no_grad():
        for k, (_, layer) in enumerate(adapters(model)):
            layer.B.copy_(gaussian(16, 4, seed=k))
            layer.g[:k] = 0.0
        wanted = model.eval()(tokens).logits
    save_peft(prune(model), tmp_path / "lora")
    with torch.no_grad():
        again = load_peft(bert(), tmp_path / "lora").eval()(tokens).logits
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-5)


# The bounds.


@given(shapes(), st.integers(1, 255))
def test_the_norm_of_an_update_is_bounded_by_its_rank(shape, mask):
    m, n, r = shape
    A, B = gaussian(r, n), gaussian(m, r, seed=1)
    w = gaussian(r, seed=2) * torch.tensor([(mask >> k) & 1 for k in range(r)], dtype=torch.float64)
    update = B @ torch.diag(w) @ A
    assert update.norm() <= update_norm_bound(A, B, w) + 1e-12
    assert torch.linalg.matrix_rank(update) <= w.count_nonzero()
    slow = math.sqrt(sum(float(v != 0) for v in w)) * float(abs(w).max())
    slow *= float(torch.linalg.svdvals(A)[0] * torch.linalg.svdvals(B)[0])
    assert float(update_norm_bound(A, B, w)) == pytest.approx(slow, abs=1e-12)


def test_the_bound_of_the_norm_is_reached():
    eye = torch.eye(3, dtype=torch.float64)
    w = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64)
    assert update_norm_bound(eye, eye, w).item() == pytest.approx((eye * w).norm().item())


@given(shapes(), st.floats(0, 3))
def test_a_quadratic_loss_rises_by_no_more_than_the_bound(shape, size):
    """ℓ(W) = ½·mean ‖(W - W*)x‖²: its Hessian is that of the inputs, L their largest eigenvalue."""
    m, n, _ = shape
    X, best, W = gaussian(20, n, seed=4), gaussian(m, n, seed=5), gaussian(m, n, seed=6)
    update = size * gaussian(m, n, seed=7)

    def loss(V):
        return 0.5 * ((V - best) @ X.T).square().sum() / len(X)

    hessian = X.T @ X / len(X)
    gradient = (W - best) @ hessian
    smoothness = torch.linalg.eigvalsh(hessian)[-1].item()
    rise = (loss(W + update) - loss(W)).item()
    assert rise <= forgetting_bound(gradient.norm().item(), smoothness, update.norm().item()) + 1e-9
    at_best = 0.5 * torch.trace(update @ hessian @ update.T).item()
    assert (loss(best + update) - loss(best)).item() == pytest.approx(at_best, abs=1e-9)


# What is refused.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 10.0}, TypeError, "steps"),
        ({"steps": 9}, ValueError, "steps: got 9, of which 4.5 shrink, wanted 5"),
        ({"levels": 1}, ValueError, "levels"),
        ({"levels": True}, TypeError, "levels"),
        ({"dense": 1.0}, ValueError, "dense"),
        ({"dense": -0.1}, ValueError, "dense"),
        ({"dense": math.nan}, ValueError, "dense"),
        ({"dense": 1j}, TypeError, "dense"),
        ({"shrink": -1.0}, ValueError, "shrink"),
        ({"shrink": math.inf}, ValueError, "shrink"),
        ({"shrink": "much"}, TypeError, "shrink"),
    ],
)
def test_bad_ramps(options, error, message):
    options = {"steps": 20, "shrink": 0.5, "levels": 5} | options
    with pytest.raises(error, match=message):
        ramp_of_shrink(**options)
    model = started()
    optimizer = torch.optim.Adam(gate_groups(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        RankSelection(model, optimizer, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("largest", [-0.1, math.nan, math.inf])
def test_bad_thresholds(largest):
    with pytest.raises(ValueError, match="largest: got"):
        threshold_ramp(20, largest, levels=5)


def test_a_selection_needs_gates_that_its_optimizer_trains():
    model = started()
    with pytest.raises(ValueError, match="without a SoRALinear"):
        RankSelection(net(), torch.optim.Adam(net().parameters()), steps=200)
    with pytest.raises(ValueError, match="optimizer: got none of the gates"):
        RankSelection(model, torch.optim.Adam([model[0].A]), steps=200)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": -1}, ValueError, "rank: got -1"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"gate": "zeros"}, ValueError, "gate: got 'zeros'"),
        ({"pattern": "nowhere"}, ValueError, "matches no"),
        ({"trainable": "nowhere"}, ValueError, "trainable"),
    ],
)
def test_a_task_that_cannot_start_leaves_the_model(options, error, message):
    model = net()
    before, kinds = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(error, match=message):
        start_task(model, **{"pattern": "", "rank": 2} | options)
    assert str(model) == kinds and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_refuses_what_lora_refuses():
    base = nn.Linear(5, 6)
    for options, error in (({"rank": 6}, ValueError), ({"rank": 0}, ValueError), ({"dropout": 1.0}, ValueError)):
        with pytest.raises(error, match="rank|dropout"):
            CoDyRALinear(base, **{"rank": 2} | options)
    with pytest.raises(TypeError, match="base"):
        CoDyRALinear(nn.Conv2d(2, 2, 1), 1)
    assert all(p.requires_grad for p in base.parameters())


def test_tasks_do_not_overlap():
    model = started()
    text = str(model)
    with pytest.raises(ValueError, match="a task that is not finished"):
        start_task(model, "", 2)
    assert str(model) == text
    finish_task(model)
    with pytest.raises(ValueError, match="without a SoRALinear"):
        finish_task(model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_damaged_update_is_not_merged(bad):
    model = started()
    model[2].B.data[0, 0] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN or inf"):
        finish_task(model)
    assert len(list(adapters(model))) == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if not k.endswith("2.B"))


@pytest.mark.parametrize("arguments", [(-1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan)])
def test_bad_bounds(arguments):
    with pytest.raises(ValueError, match="gradient_norm|smoothness|update_norm"):
        forgetting_bound(*arguments)


def test_bad_chances():
    for arguments, error in (((0, 1.0), ValueError), ((2.0, 1.0), TypeError), ((2, -1.0), ValueError)):
        with pytest.raises(error, match="rank|shrink"):
            chance_ranks(*arguments)


def test_an_empty_batch_passes():
    model = started()
    assert model(torch.empty(0, 5, dtype=torch.float64)).shape == (0, 3)
