"""SoRA: equations against loops, the exact invariants in float64, the action after the optimizer, and pruned models."""

import copy
import io
import json
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.core.layers import AdaptedLinear, adapters, merge_adapters, replace_linears
from lowrank_ref.lab.train import Steppable
from lowrank_ref.ranks.sora import (
    ProximalGates,
    SoRALinear,
    gate_groups,
    gated_delta,
    gated_update,
    kept_ranks,
    l1_penalty,
    prune,
    pruned_factors,
    rank_gates,
    released_threshold,
    soft_threshold,
)
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule


def sora(m=6, n=5, rank=4, *, moved=True, dtype=torch.float64, **options):
    """A SoRA layer in float64; `moved` gives B random values, as training would."""
    layer = SoRALinear(nn.Linear(n, m, dtype=dtype), rank, generator=seeded(), **options)
    if moved:
        with torch.no_grad():
            layer.B.copy_(gaussian(m, rank, seed=1))
    return layer


def kill(layer, *dead):
    with torch.no_grad():
        layer.g[list(dead)] = 0.0
    return layer


def net(seed=0, rank=3):
    """Linear, tanh, linear, all in float64, with SoRA on both layers."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    return replace_linears(model, "", partial(SoRALinear, rank=rank, generator=seeded(seed)))


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def train(model, optimizer, actions, steps, seed=0):
    """Take the given steps towards random targets."""
    for step in steps:
        x, y = gaussian(16, 5, seed=100 + step), gaussian(16, 4, seed=200 + step + 1000 * seed)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        for action in actions:
            action.step()


# Each equation against a loop.


@given(shapes())
def test_gated_delta_and_update_by_loops(shape):
    m, n, r = shape
    A, B, g, x, s = gaussian(r, n), gaussian(m, r, seed=1), gaussian(r, seed=2), gaussian(3, n, seed=3), 0.7
    wanted = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        for j in range(n):
            wanted[i, j] = s * sum(B[i, k] * g[k] * A[k, j] for k in range(r))
    assert_close(gated_delta(A, B, g, s), wanted)
    assert_close(gated_update(x, A, B, g, s), x @ wanted.T, 1e-11)


def slow_soft(x, xi):
    return math.copysign(max(abs(x) - xi, 0.0), x)


def slow_released(x, xi):
    if x > xi:
        x -= xi
    if x < -xi:
        x += xi
    return 0.0 if abs(x) < xi else x


numbers = st.floats(-3, 3)
sizes = st.floats(0, 2)


@given(st.lists(numbers, min_size=1, max_size=8), sizes)
def test_thresholds_by_loops(values, xi):
    x = torch.tensor(values, dtype=torch.float64)
    assert_close(soft_threshold(x, xi), torch.tensor([slow_soft(v, xi) for v in values], dtype=torch.float64))
    assert_close(released_threshold(x, xi), torch.tensor([slow_released(v, xi) for v in values], dtype=torch.float64))


def test_threshold_on_known_values():
    x = torch.tensor([0.05, 0.12, 0.15, 0.2, 0.21, 0.3, -0.15, -0.21], dtype=torch.float64)
    soft = torch.tensor([0, 0.02, 0.05, 0.1, 0.11, 0.2, -0.05, -0.11], dtype=torch.float64)
    released = torch.tensor([0, 0, 0, 0.1, 0.11, 0.2, 0, -0.11], dtype=torch.float64)
    assert_close(soft_threshold(x, 0.1), soft)
    assert_close(released_threshold(x, 0.1), released)


def test_l1_penalty_is_the_sum_of_sizes():
    got = l1_penalty([torch.tensor([1.0, -2.0]), torch.tensor([0.5])], 2.0)
    assert got.item() == 7.0


@given(shapes(), st.integers(0, 255))
def test_pruned_factors_keep_the_product(shape, mask):
    m, n, r = shape
    g = gaussian(r, seed=2) * torch.tensor([(mask >> k) & 1 for k in range(r)], dtype=torch.float64)
    A, B = gaussian(r, n), gaussian(m, r, seed=1)
    less_A, less_B = pruned_factors(A, B, g)
    kept = [k for k in range(r) if (mask >> k) & 1]
    assert less_A.shape == (len(kept), n) and less_B.shape == (m, len(kept))
    for place, k in enumerate(kept):
        assert torch.equal(less_A[place], A[k]) and torch.equal(less_B[:, place], B[:, k] * g[k])
    assert_close(less_B @ less_A, B @ torch.diag(g) @ A)


# The threshold operator.


@given(numbers, numbers, sizes)
def test_soft_threshold_is_odd_and_never_stretches(x, y, xi):
    x, y = torch.tensor([x, y], dtype=torch.float64)
    assert torch.equal(soft_threshold(-x, xi), -soft_threshold(x, xi))
    assert (soft_threshold(x, xi) - soft_threshold(y, xi)).abs() <= (x - y).abs() + 1e-15


@given(numbers, sizes, sizes)
def test_soft_thresholds_add_up_and_zero_does_nothing(x, a, b):
    x = torch.tensor(x, dtype=torch.float64)
    assert torch.equal(soft_threshold(x, 0.0), x)
    assert_close(soft_threshold(soft_threshold(x, b), a), soft_threshold(x, a + b))


@given(numbers, sizes)
def test_soft_threshold_is_the_proximal_map(x, xi):
    z = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    cost = 0.5 * (z - x) ** 2 + xi * z.abs()
    got = soft_threshold(torch.tensor(x, dtype=torch.float64), xi)
    assert (got - z[cost.argmin()]).abs() <= 1e-3 + 1e-12
    assert 0.5 * (got - x) ** 2 + xi * got.abs() <= cost.min() + 1e-12


@given(st.floats(0.01, 2), st.floats(-5, 5))
def test_released_threshold_differs_between_one_and_two_thresholds_only(xi, multiple):
    x = torch.tensor(multiple * xi, dtype=torch.float64)
    soft, released = soft_threshold(x, xi), released_threshold(x, xi)
    if abs(multiple) < 1 - 1e-9 or abs(multiple) > 2 + 1e-9:
        assert_close(released, soft)
    elif 1 + 1e-9 < abs(multiple) < 2 - 1e-9:
        assert released == 0 and soft != 0


# The layer.


@given(shapes())
def test_at_the_start_only_b_moves(shape):
    m, n, r = shape
    layer = sora(m, n, r, moved=False)
    assert not layer.delta_weight().any()
    layer(gaussian(5, n)).square().sum().backward()
    assert not layer.g.grad.any() and not layer.A.grad.any() and layer.B.grad.any()


@given(shapes(), st.floats(0.1, 10))
def test_gates_at_one_are_lora(shape, alpha):
    m, n, r = shape
    base = nn.Linear(n, m, dtype=torch.float64)
    ours = SoRALinear(base, r, gate="ones", alpha=alpha, generator=seeded())
    lora = LoRALinear(base, r, alpha=alpha, generator=seeded())
    assert torch.equal(ours.A, lora.A) and ours.scale == lora.scale == alpha / r
    x = gaussian(4, n)
    for layer in (ours, lora):
        with torch.no_grad():
            layer.B.copy_(gaussian(m, r, seed=1))
        layer(x).pow(3).sum().backward()
    assert_close(ours(x), lora(x))
    torch.testing.assert_close(ours.A.grad, lora.A.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.B.grad, lora.B.grad, rtol=1e-12, atol=1e-12)


@given(shapes())
def test_gradient_of_a_gate_is_that_of_its_component(shape):
    m, n, r = shape
    layer, x = sora(m, n, r), gaussian(5, n)
    layer(x).square().sum().backward()
    G = 2 * layer(x).T @ x  # gradient of Σ y² by W
    for k in range(r):
        torch.testing.assert_close(layer.g.grad[k], layer.scale * layer.B[:, k] @ G @ layer.A[k], rtol=1e-9, atol=1e-9)


def test_a_dead_gate_gives_no_gradient_to_its_component_but_gets_one():
    layer = kill(sora(), 1, 3)
    layer(gaussian(7, 5)).square().sum().backward()
    for k in range(4):
        dead = k in (1, 3)
        assert bool(layer.A.grad[k].any()) != dead and bool(layer.B.grad[:, k].any()) != dead
        assert layer.g.grad[k] != 0


@given(st.floats(0.1, 10), st.integers(0, 3))
def test_rescaling_leaves_the_output_but_not_the_penalty(c, k):
    layer, x = sora(), gaussian(3, 5)
    before, penalty = layer(x), l1_penalty([layer.g], 1.0)
    with torch.no_grad():
        layer.B[:, k] *= c
        layer.g[k] /= c
    assert_close(layer(x), before, 1e-11)
    change = layer.g[k].abs() * (1 - c)
    assert_close(l1_penalty([layer.g], 1.0) - penalty, change)


def test_dropout_acts_on_the_input_of_the_update_only():
    layer = sora(3, 400, 2, dropout=0.25)
    x = torch.ones(400, dtype=torch.float64)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.25)
    assert_close(got, layer.base(x) + gated_update(dropped, layer.A, layer.B, layer.g, layer.scale))


def test_gates_start_normal_and_in_float32_beside_bfloat16():
    layer = SoRALinear(nn.Linear(600, 600, dtype=torch.bfloat16), 500, generator=seeded())
    assert layer.g.dtype == torch.float32
    assert abs(layer.g.mean()) < 0.15 and abs(layer.g.std() - 1) < 0.1
    assert torch.equal(sora(gate="ones").g, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"gate": "zeros"}, ValueError, "gate: got 'zeros', wanted 'normal' or 'ones'"),
        ({"rank": 6}, ValueError, "rank: got 6, wanted 1 <= rank <= 5"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"alpha": 0}, ValueError, "alpha: got 0"),
    ],
)
def test_bad_options_raise_and_leave_the_base_trainable(options, error, message):
    base = nn.Linear(5, 6)
    with pytest.raises(error, match=message):
        SoRALinear(base, **{"rank": 2, **options})
    assert all(p.requires_grad for p in base.parameters())


# Pruning.


@given(shapes(), st.integers(0, 255))
def test_a_pruned_layer_is_plain_lora_and_computes_the_same(shape, mask):
    m, n, r = shape
    layer = kill(sora(m, n, r, alpha=3), *[k for k in range(r) if not (mask >> k) & 1])
    less, x, kept = layer.pruned(), gaussian(5, n), bin(mask & (2**r - 1)).count("1")
    if not kept:
        assert less is layer.base and torch.equal(less(x), layer(x))
        return
    assert type(less) is LoRALinear and less.rank == kept and less.scale == 3 / r
    assert_close(less(x), layer(x), 1e-11)
    assert_close(less.merged().weight, layer.merged().weight)
    assert sum(p.numel() for p in less.parameters() if p.requires_grad) == kept * (m + n)
    assert less.A.data_ptr() != layer.A.data_ptr()


def test_a_pruned_layer_keeps_dropout_and_mode():
    layer = sora(dropout=0.3).eval()
    assert layer.pruned().dropout.p == 0.3 and not layer.pruned().dropout.training
    state = torch.get_rng_state()
    layer.train().pruned()
    assert torch.equal(torch.get_rng_state(), state)


def thinned(model):
    """A trained-looking model with gates 0: ranks 2 and 0."""
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.B.copy_(gaussian(*layer.B.shape, seed=3))
        model[0].g[1] = 0.0
        model[2].g.zero_()
    return model


def test_prune_a_model():
    model, x = thinned(net()), gaussian(4, 5)
    assert kept_ranks(model) == {"0": 2, "2": 0}
    y = model(x)
    assert prune(model) is model
    assert type(model[0]) is LoRALinear and model[0].rank == 2 and type(model[2]) is nn.Linear
    assert_close(model(x), y, 1e-12)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (5 + 6)
    assert_close(merge_adapters(model)(x), y, 1e-12)


def test_a_model_that_loses_every_gate_is_the_base_again():
    model, x = net(), gaussian(4, 5)
    base = copy.deepcopy(nn.Sequential(model[0].base, model[1], model[2].base))
    for _, layer in adapters(thinned(model)):
        kill(layer, 0, 1, 2)
    assert torch.equal(prune(model)(x), base(x))
    assert not list(adapters(model)) and not any(p.requires_grad for p in model.parameters())


def test_prune_keeps_other_trained_parameters_and_needs_sora():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    replace_linears(model, "^0", partial(SoRALinear, rank=2), trainable="^2")
    prune(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.A", "0.B", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match="matches nothing"):
        prune(model)
    with pytest.raises(ValueError, match="without a SoRALinear"):
        kept_ranks(model)


def test_pruned_model_round_trips_in_pefts_format(bert, tokens, tmp_path):
    """Different rank in every layer, one layer without any: rank_pattern in the file, same logits here and in peft."""

    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens).logits

    layers = r"attention\.self\.(query|value)$"
    model = replace_linears(bert(), layers, partial(SoRALinear, rank=4, alpha=32, generator=seeded()))
    with torch.no_grad():
        for k, (_, layer) in enumerate(adapters(model)):
            layer.B.copy_(gaussian(16, 4, seed=k))
            layer.g[:k] = 0.0
            layer.g[3] *= k < 3  # ranks 4, 3, 2, 0
    wanted, base = logits(model), logits(bert())
    assert (wanted - base).abs().max() > 1e-2
    assert list(kept_ranks(model).values()) == [4, 3, 2, 0]
    with pytest.raises(ValueError, match="got shapes"):
        save_peft(model, tmp_path / "x")  # a layer of rank 0 cannot be said; prune first
    save_peft(prune(model), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert sorted([config["r"], *config["rank_pattern"].values()]) == [2, 3, 4]
    assert sorted([config["lora_alpha"], *config["alpha_pattern"].values()]) == [16, 24, 32]  # s·r_k, s = 8

    ours = load_peft(bert(), tmp_path / "lora")
    assert_close(logits(ours), wanted, 1e-5)
    assert [layer.rank for _, layer in adapters(ours)] == [4, 3, 2]
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "lora"))
    assert_close(logits(theirs), wanted, 1e-5)


# The action after the optimizer's step.


def test_proximal_gates_is_an_action():
    model = net()
    assert isinstance(ProximalGates(model, torch.optim.Adam(gate_groups(model)), penalty=1.0), Steppable)


@pytest.mark.parametrize("coupled", [True, False])
def test_step_is_an_optimizer_step_followed_by_the_operator(coupled):
    model, twin = net(), net()
    optimizers = [
        torch.optim.SGD([{"params": g["params"], "lr": lr} for g, lr in zip(gate_groups(m), (0.1, 0.02))])
        for m in (model, twin)
    ]
    train(twin, optimizers[1], [], [0])
    train(model, optimizers[0], [ProximalGates(model, optimizers[0], penalty=0.5, coupled=coupled)], [0])
    xi = 0.5 * 0.02 if coupled else 0.5
    for path, g in rank_gates(model).items():
        assert torch.equal(g, soft_threshold(rank_gates(twin)[path].detach(), xi))
    assert torch.equal(model[0].A, twin[0].A) and torch.equal(model[2].B, twin[2].B)


def test_threshold_follows_the_learning_rate_of_the_moment():
    model = kill(net()[0], 0, 1)
    model = nn.Sequential(model)
    optimizer = torch.optim.Adam(gate_groups(model), lr=0.1)
    action = ProximalGates(model, optimizer, penalty=2.0)
    with torch.no_grad():
        model[0].g[2] = 1.0
    for lr, left in ((0.1, 0.8), (0.05, 0.7), (0.0, 0.7)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        action.step()
        assert model[0].g[2].item() == pytest.approx(left, abs=1e-12)


def test_attached_it_keeps_the_gates_of_the_right_order_where_the_wrong_one_keeps_others():
    """The rate falls to 0: after the schedule's step the last thresholds are too small, and the last one is 0."""

    def run(order):
        model = net()
        optimizer = torch.optim.Adam(gate_groups(model), lr=0.3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - (t / 6) ** 0.2))
        action = ProximalGates(model, optimizer, penalty=0.9)
        if order == "attached":
            action.attach(optimizer)
        for step in range(6):
            train(model, optimizer, [], [step])
            for part in {"attached": "s", "right": "as", "wrong": "sa"}[order]:
                (action if part == "a" else schedule).step()
        return {path: g.detach() for path, g in rank_gates(model).items()}

    attached, right, wrong = (run(order) for order in ("attached", "right", "wrong"))
    assert all(torch.equal(g, right[path]) for path, g in attached.items())
    kept = [sum(int(g.count_nonzero()) for g in each.values()) for each in (right, wrong)]
    assert kept[0] < kept[1] == 6


def test_it_attaches_to_the_optimizer_of_its_gates_only():
    model = net()
    optimizer = torch.optim.Adam(gate_groups(model))
    action = ProximalGates(model, optimizer, penalty=1.0)
    with pytest.raises(ValueError, match="optimizer: got another Adam"):
        action.attach(torch.optim.Adam(model.parameters()))
    assert not action.attached
    schedule = SparsifyingSchedule(action, [0.1], first=1, later=1)
    with pytest.raises(ValueError, match="proximal: got one that is not attached"):
        schedule.attach(optimizer)
    action.attach(optimizer)
    assert schedule.attach(optimizer).attached


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_thresholds_are_finite_and_not_negative(bad):
    x = torch.tensor([1.0, -1.0])
    for function in (soft_threshold, released_threshold):
        with pytest.raises(ValueError, match="threshold: got"):
            function(x, bad)
    with pytest.raises(ValueError, match="strength: got"):
        l1_penalty([x], bad)
    model = net()
    action = ProximalGates(model, torch.optim.Adam(gate_groups(model)), penalty=1.0)
    before, action.penalty = copy.deepcopy(model.state_dict()), bad  # set by hand, or loaded
    with pytest.raises(ValueError, match="threshold: got"):
        action.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_without_penalty_nothing_changes():
    plain, gated = net(), net()
    first, second = (torch.optim.Adam(gate_groups(m), lr=0.05) for m in (plain, gated))
    train(plain, first, [], range(5))
    train(gated, second, [ProximalGates(gated, second, penalty=0.0)], range(5))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), gated.parameters()))


def test_a_dead_gate_comes_back_exactly_if_its_step_is_longer_than_the_threshold():
    for penalty, alive in ((0.9, True), (1.1, False)):
        model = nn.Sequential(kill(sora(4, 5, 3), 0, 1, 2))
        optimizer = torch.optim.Adam(gate_groups(model), lr=0.1)  # the first step of Adam has length lr
        train(model, optimizer, [ProximalGates(model, optimizer, penalty=penalty)], [0])
        assert bool(model[0].g.all()) == alive and bool(model[0].g.any()) == alive


def test_gates_reach_exact_zero_and_a_gradient_of_l1_does_not():
    shrunk, penalised = net(), net()
    first, second = (torch.optim.Adam(gate_groups(m), lr=0.05) for m in (shrunk, penalised))
    train(shrunk, first, [ProximalGates(shrunk, first, penalty=0.9)], range(60))
    for step in range(60):
        second.zero_grad()
        loss = (penalised(gaussian(16, 5, seed=100 + step)) - gaussian(16, 4, seed=200 + step)).square().mean()
        (loss + l1_penalty(rank_gates(penalised).values(), 0.9)).backward()
        second.step()
    assert sum(kept_ranks(shrunk).values()) < 6
    assert sum(kept_ranks(penalised).values()) == 6


def test_weight_decay_spares_the_gates():
    model = net()
    rest, own = gate_groups(model, weight_decay=0.5)
    assert (rest["weight_decay"], own["weight_decay"]) == (0.5, 0.0)
    assert {id(p) for p in own["params"]} == {id(g) for g in rank_gates(model).values()}
    everything = [id(p) for group in (rest, own) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([rest, own], lr=0.1)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.equal(model[0].g, before[0].g) and not torch.equal(model[0].A, before[0].A)


def test_one_optimizer_with_two_groups_equals_two_optimizers():
    one, two = net(), net()
    both = torch.optim.AdamW(gate_groups(one, weight_decay=0.1), lr=0.05)
    first, second = (torch.optim.AdamW([group], lr=0.05) for group in gate_groups(two, weight_decay=0.1))
    train(one, both, [ProximalGates(one, both, penalty=0.5)], range(4))
    for step in range(4):
        train(two, first, [], [step])
        second.step()
        ProximalGates(two, second, penalty=0.5).step()
        second.zero_grad()  # `train` cleared the gradients of `first` only
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_same_seed_same_survivors():
    def run(seed):
        model = net(seed)
        optimizer = torch.optim.Adam(gate_groups(model), lr=0.05)
        train(model, optimizer, [ProximalGates(model, optimizer, penalty=0.9)], range(40))
        return torch.cat([g.detach() for g in rank_gates(model).values()])

    assert torch.equal(run(0), run(0)) and 0 < int(run(0).count_nonzero()) < 6
    assert not torch.equal(run(0), run(1))


def test_a_run_with_gates_resumes_bit_identically():
    def build():
        model = net()
        optimizer = torch.optim.Adam(gate_groups(model), lr=0.05)
        return model, optimizer, ProximalGates(model, optimizer, penalty=0.7)

    straight, optimizer, action = build()
    train(straight, optimizer, [action], range(8))
    first, optimizer, action = build()
    train(first, optimizer, [action], range(3))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), action.state_dict()], file)
    file.seek(0)
    second, optimizer, action = build()
    action.penalty = 9.0
    for part, state in zip((second, optimizer, action), torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    for group in optimizer.param_groups:  # the groups are new objects now; the action must see them
        assert group["lr"] == 0.05
    train(second, optimizer, [action], range(3, 8))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters()))


def test_proximal_gates_bad_input():
    model = net()
    optimizer = torch.optim.Adam(gate_groups(model))
    with pytest.raises(ValueError, match="penalty: got -1"):
        ProximalGates(model, optimizer, penalty=-1)
    with pytest.raises(ValueError, match="without a SoRALinear"):
        ProximalGates(nn.Linear(2, 2), optimizer, penalty=1)
    with pytest.raises(ValueError, match=r"optimizer: got none of the gates of \['0', '2'\]"):
        ProximalGates(model, torch.optim.Adam([model[0].A]), penalty=1)
    with pytest.raises(ValueError, match="state: got keys"):
        ProximalGates(model, optimizer, penalty=1).load_state_dict({"penalty": 1.0})


def test_counts():
    layer = SoRALinear(nn.Linear(768, 768, bias=False), 8, generator=seeded())
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 12_296
    with torch.no_grad():
        layer.g[1:] = 0
    assert sum(p.numel() for p in layer.pruned().parameters() if p.requires_grad) == 1_536
    assert isinstance(layer, AdaptedLinear)
