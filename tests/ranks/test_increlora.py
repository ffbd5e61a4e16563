"""IncreLoRA: equations against loops, rounds of growth, what a run leaves, and states of the allocator."""

import copy
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.ranks.growing_linear import IncreLoRALinear, grown_ranks
from lowrank_ref.ranks.growth_schedule import growth_groups, growth_schedule
from lowrank_ref.ranks.increlora import (
    RankGrowth,
    largest,
    orthogonality,
    orthogonality_penalty,
    sensitivity,
    smoothed,
)


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# Each equation against a loop.


@given(shapes())
def test_sensitivity_by_a_loop(shape):
    m, n, _ = shape
    W, G = gaussian(m, n), gaussian(m, n, seed=1)
    total = sum(abs(float(W[i, j] * G[i, j])) for i in range(m) for j in range(n))
    assert_close(sensitivity(W, G), torch.tensor(total / (m * n), dtype=torch.float64))
    assert_close(sensitivity(W, G, 0.5), torch.tensor(total / math.sqrt(m * n), dtype=torch.float64))


@given(st.floats(0.1, 10), st.floats(-10, -0.1))
def test_sensitivity_knows_the_product_only(c, d):
    A, B, lam, G = gaussian(2, 5), gaussian(4, 2, seed=1), gaussian(2, seed=2), gaussian(4, 5, seed=3)
    wanted = sensitivity((B * lam) @ A, G)
    torch.testing.assert_close(sensitivity((c * B * (d * lam)) @ (A / (c * d)), G), wanted)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=6), st.floats(0, 0.99), st.floats(0, 0.99))
def test_smoothing_by_a_loop(values, beta1, beta2):
    I, U, importance, spread = 0.0, 0.0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for S in values:
        I = beta1 * I + (1 - beta1) * S
        U = beta2 * U + (1 - beta2) * abs(S - I)
        S = torch.tensor([S], dtype=torch.float64)
        importance, spread = smoothed(S, importance, spread, (beta1, beta2))
    assert_close(torch.cat([importance, spread]), torch.tensor([I, U], dtype=torch.float64))


def test_smoothing_on_known_values():
    I, U = torch.zeros(2, 1, dtype=torch.float64)
    found = []
    for S in (1.0, 3.0):
        I, U = smoothed(torch.full((1,), S, dtype=torch.float64), I, U, (0.85, 0.85))
        found.append((I.item(), U.item(), (I * U).item()))
    wanted = [(0.15, 0.1275, 0.019125), (0.5775, 0.47175, 0.272435625)]
    assert all(a == pytest.approx(b, abs=1e-12) for got, right in zip(found, wanted) for a, b in zip(got, right))


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=8), st.integers(0, 9))
def test_largest_by_sorting_first_of_equals_first(values, count):
    wanted = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert largest(torch.tensor(values), count) == wanted


@given(shapes())
def test_orthogonality_by_loops(shape):
    m, n, r = shape
    A, B = gaussian(r, n), gaussian(m, r, seed=1)
    sums = []
    for rows in (A, B.T):
        sums.append(sum((float(rows[i] @ rows[j]) - (i == j)) ** 2 for i in range(r) for j in range(r)))
    assert_close(orthogonality(A, B, squared=True), torch.tensor(sum(sums), dtype=torch.float64), 1e-9)
    assert_close(orthogonality(A, B), torch.tensor(sum(map(math.sqrt, sums)), dtype=torch.float64), 1e-9)


def test_orthogonality_is_zero_where_it_should_be_and_its_gradient_finite():
    A, B = torch.eye(3, 5, requires_grad=True), torch.eye(4, 3, requires_grad=True)
    R = orthogonality(A, B)
    R.backward()
    assert R == 0 and not A.grad.any() and not B.grad.any()


# Models.


def net(*, widths=(5, 6, 4, 3), capacity=8, **options):
    torch.manual_seed(5)
    layers = [nn.Linear(n, m) for n, m in zip(widths, widths[1:])]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).double()
    return replace_linears(model, "", partial(IncreLoRALinear, capacity=capacity, generator=seeded(), **options))


def made(budget=6, every=2, warmup=1, lr=0.05, layers=None, **options):
    model = net(**(layers or {}))
    optimizer = torch.optim.Adam(growth_groups(model), lr=lr)
    return model, optimizer, RankGrowth(model, optimizer, budget=budget, every=every, warmup=warmup, **options)


def take(model, optimizer, growth, steps, weight=0.1):
    for step in steps:
        optimizer.zero_grad()
        loss = F.mse_loss(model(gaussian(16, 5, seed=100 + step)), gaussian(16, 3, seed=200 + step))
        (loss + weight * orthogonality_penalty(model)).backward()
        optimizer.step()
        growth.step()


def test_penalty_is_the_mean_over_all_factors_with_the_reserve():
    model = net()
    wanted = sum(orthogonality(torch.cat([m.A0, m.A1]), torch.cat([m.B0, m.B1], 1)) for m in model[::2]) / 6
    assert_close(orthogonality_penalty(model), wanted)
    for layer in model[::2]:
        layer.finish()
    wanted = sum(orthogonality(m.A0, m.B0) for m in model[::2]) / 6
    assert_close(orthogonality_penalty(model), wanted)
    with pytest.raises(ValueError, match="model: got Linear without an IncreLoRALinear"):
        orthogonality_penalty(nn.Linear(2, 2))


def test_a_whole_run_against_a_slow_one():
    """I, U, rounds and births computed anew from gradients of the dense matrices."""
    model, optimizer, growth = made(budget=7, every=3, warmup=4, lr=0.1, count=2)
    layers = list(model[::2])
    I, U, births = [0.0] * 3, [0.0] * 3, [[], [], []]
    for step in range(1, 16):
        x, y = gaussian(16, 5, seed=100 + step), gaussian(16, 3, seed=200 + step)
        deltas = [layer.delta_weight().detach().requires_grad_() for layer in layers]
        h = x
        for layer, delta in zip(layers, deltas):
            h = torch.tanh(layer.base(h) + h @ delta.T)
        F.mse_loss(h, y).backward()
        total = sum(1 + len(b) for b in births)
        if total < 7:
            for k, delta in enumerate(deltas):
                S = (delta * delta.grad).abs().mean().item()
                I[k] = 0.85 * I[k] + 0.15 * S
                U[k] = 0.85 * U[k] + 0.15 * abs(S - I[k])
            if step > 4 and step % 3 == 0:
                room = [k for k in range(3) if 1 + len(births[k]) < min(layers[k].delta_weight().shape)]
                for k in sorted(room, key=lambda k: -I[k] * U[k])[: min(2, 7 - total)]:
                    births[k].append(step)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        growth.step()
        assert list(growth.births.values()) == [tuple(b) for b in births]
        assert_close(growth.importance, torch.tensor(I, dtype=torch.float64))
        assert_close(growth.spread, torch.tensor(U, dtype=torch.float64))
    assert growth.finished and sum(len(b) for b in births) == 4


def test_rounds_come_when_they_should():
    """K = 72 layers, from rank 1 to a mean of 2, three a round: 24 rounds, at most rank 25 in one layer."""
    rounds = [t for t in range(1, 3001) if t > 100 and t % 100 == 0]
    assert len(rounds[: math.ceil((144 - 72) / 3)]) == 24 and rounds[:2] == [200, 300] and rounds[23] == 2500
    _, _, growth = run = made(budget=5, every=4, warmup=4)
    take(*run, range(12))
    assert sorted(sum(growth.births.values(), ())) == [8, 12]


def test_the_end_of_growth():
    model, optimizer, growth = made(budget=7, every=1, warmup=0)
    take(model, optimizer, growth, range(6))
    assert growth.finished and growth.total == sum(grown_ranks(model).values()) == 7
    most = 1 + len({t for times in growth.births.values() for t in times})
    for layer in model[::2]:
        assert layer.score is None and layer.rank <= most
        if layer.room:
            assert not getattr(layer, f"lam{layer.grown + 1}").any()
    x = gaussian(4, 5)
    merged = nn.Sequential(*[part.merged() if isinstance(part, IncreLoRALinear) else part for part in model])
    assert_close(merged(x), model(x))
    before = growth.importance.clone()
    take(model, optimizer, growth, range(6, 9))
    assert torch.equal(growth.importance, before) and growth.steps == 9


def test_a_layer_at_its_capacity_is_passed_over():
    model, optimizer, growth = made(budget=6, every=1, warmup=0, layers={"capacity": 2})
    take(model, optimizer, growth, range(8))
    assert list(grown_ranks(model).values()) == [2, 2, 2] and growth.finished


def test_the_last_round_is_clipped_and_blocks_stay_whole():
    model, optimizer, growth = made(budget=7, every=1, warmup=0, count=3, layers={"block": 2})
    take(model, optimizer, growth, range(4))
    assert growth.total == 7 and sorted(grown_ranks(model).values()) in ([1, 3, 3], [1, 1, 5])


def test_no_budget_to_spend_is_a_fixed_rank_one():
    """The same as rank-1 factors with λ, by hand."""
    model, optimizer, growth = made(budget=3)
    assert growth.finished and not orthogonality_penalty(model).isnan()
    A, B, lam = (
        [getattr(m, f"{name}0").detach().clone().requires_grad_() for m in model[::2]] for name in ("A", "B", "lam")
    )
    plain = torch.optim.Adam([*A, *B, *lam], lr=0.05)
    take(model, optimizer, growth, range(4), weight=0.0)
    for step in range(4):
        h = gaussian(16, 5, seed=100 + step)
        for k, layer in enumerate(model[::2]):
            h = torch.tanh(layer.base(h) + 8.0 * (h @ A[k].T) * lam[k] @ B[k].T)
        plain.zero_grad()
        F.mse_loss(h, gaussian(16, 3, seed=200 + step)).backward()
        plain.step()
    for k, layer in enumerate(model[::2]):
        assert_close(layer.A0, A[k], 1e-9)
        assert_close(layer.lam0, lam[k], 1e-9)


def test_the_same_seed_gives_the_same_ranks():
    first, second = (made(budget=8, every=2) for _ in range(2))
    for run in (first, second):
        take(*run, range(14))
    assert first[2].births == second[2].births and grown_ranks(first[0]) == grown_ranks(second[0])


def test_the_reserve_without_penalty_moves_as_far_as_adam_steps():
    """Its gradient is 1e-5 of an active component's, which Adam's division takes away again."""
    model, optimizer, growth = made(lr=0.01)
    before = model[0].A1.detach().clone()
    take(model, optimizer, growth, [0], weight=0.0)
    model[0].lam0.data.fill_(1.0)
    moved = (model[0].A1 - before).abs()
    assert 0 < moved.max() <= 0.01 + 1e-9


# States.


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    straight = made(budget=8, every=2, layers={"capacity": 6})
    take(*straight, range(14))
    first = made(budget=8, every=2, layers={"capacity": 6})
    take(*first, range(7))
    torch.save([part.state_dict() for part in first], tmp_path / "x")
    second = made(budget=8, every=2, layers={"capacity": 6})
    for part, state in zip(second, torch.load(tmp_path / "x", weights_only=True)):
        part.load_state_dict(state)
    take(*second, range(7, 14))
    assert second[2].births == straight[2].births
    wanted = straight[0].state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in second[0].state_dict().items())


def test_a_state_without_its_model_or_of_other_layers_is_refused():
    run = made(budget=8, every=2)
    take(*run, range(7))
    fresh = made(budget=8, every=2)[2]
    before = copy.deepcopy(fresh.state_dict())
    state = run[2].state_dict()
    with pytest.raises(ValueError, match="wanted the model loaded before"):
        fresh.load_state_dict(state)
    with pytest.raises(ValueError, match="state: got layers"):
        fresh.load_state_dict({**state, "births": {"elsewhere": ()}})
    with pytest.raises(ValueError, match="state: got layers"):
        fresh.load_state_dict({**state, "importance": torch.zeros(2)})
    assert str(fresh.state_dict()) == str(before)


def test_a_saved_state_does_not_change_as_training_goes_on():
    run = made(budget=8, every=2)
    take(*run, range(5))
    state = run[2].state_dict()
    before = copy.deepcopy(state)
    take(*run, range(5, 9))
    assert str(state) == str(before) and run[2].births != before["births"]


# What is refused.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"budget": 2}, ValueError, "budget: got 2, wanted an integer >= 3"),
        ({"budget": 99}, ValueError, "budget: got 99, wanted 3 plus whole blocks, at most 12"),
        ({"budget": 6.0}, TypeError, "budget"),
        ({"budget": 6, "layers": {"block": 2}}, ValueError, "budget: got 6, wanted 3 plus whole blocks"),
        ({"every": 0}, ValueError, "every: got 0"),
        ({"count": 0}, ValueError, "count: got 0"),
        ({"warmup": -1}, ValueError, "warmup: got -1"),
        ({"betas": (0.5, 1.0)}, ValueError, "betas: got 1"),
        ({"betas": (torch.nan, 0.5)}, ValueError, "betas: got nan"),
        ({"power": 2.0}, ValueError, "power: got 2"),
    ],
)
def test_bad_options_raise(options, error, message, no_shape_checks):
    with pytest.raises(error, match=message):
        made(**options)


def test_a_model_without_layers_and_an_optimizer_without_their_parameters_are_refused():
    model = net()
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(
        ValueError, match=r"optimizer: got not all parameters of \['0', '2', '4'\], wanted those of growth"
    ):
        RankGrowth(model, plain, budget=6, every=2)
    with pytest.raises(ValueError, match="model: got Sequential without an IncreLoRALinear"):
        RankGrowth(nn.Sequential(LoRALinear(nn.Linear(4, 4), 2)), plain, budget=6, every=2)
    mixed = nn.Sequential(IncreLoRALinear(nn.Linear(4, 4)), IncreLoRALinear(nn.Linear(4, 4), block=2))
    with pytest.raises(ValueError, match=r"model: got blocks of sizes \[1, 2\]"):
        RankGrowth(mixed, torch.optim.SGD(mixed.parameters(), lr=0.1), budget=4, every=2)
    assert all(layer.score is None for layer in (*model[::2], *mixed))


def test_a_round_without_scores_is_an_error_that_changes_nothing():
    model, _, growth = made(every=1, warmup=0)
    with pytest.raises(RuntimeError, match="act: got no score of any layer"):
        growth.step()
    assert grown_ranks(model) == {"0": 1, "2": 1, "4": 1}


def test_a_round_where_every_score_is_zero_lets_nothing_grow():
    """As of layers behind a head that starts at zero."""
    model, optimizer, growth = made(every=1, warmup=0)
    (0.0 * model(gaussian(4, 5)).sum()).backward()
    growth.step()
    assert growth.total == 3
    take(model, optimizer, growth, range(4))
    assert growth.total == 6


def test_schedule_and_training_loop(tmp_path):
    """With the laboratory's loop, whose actions are the allocator and the schedule."""
    from lowrank_ref.lab.train import train

    def go(steps, checkpoint=None):
        model, optimizer, growth = made(budget=8, every=2)
        schedule = growth_schedule(optimizer, growth, steps=20, warmup=2)
        batch = lambda i: (gaussian(16, 5, seed=100 + i), gaussian(16, 3, seed=200 + i))  # noqa: E731
        loss = lambda model, x, y: F.mse_loss(model(x), y) + 0.1 * orthogonality_penalty(model)  # noqa: E731
        train(
            model,
            batch,
            loss,
            optimizer,
            steps=steps,
            actions=[growth, schedule],
            checkpoint=checkpoint,
            progress=False,
        )
        return model, growth

    straight, growth = go(14)
    go(7, tmp_path / "x")
    resumed, again = go(14, tmp_path / "x")
    assert again.births == growth.births and growth.total == 8
    wanted = straight.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in resumed.state_dict().items())
