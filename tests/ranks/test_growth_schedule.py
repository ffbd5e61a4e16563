"""IncreLoRA's groups and clocks: every group warms up from its own birth, and all reach zero together."""

from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.core.layers import replace_linears
from lowrank_ref.ranks.growing_linear import IncreLoRALinear
from lowrank_ref.ranks.growth_schedule import clock, growth_groups, growth_schedule
from lowrank_ref.ranks.increlora import RankGrowth


def net(capacity=4, **options):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    factory = partial(IncreLoRALinear, capacity=capacity, generator=seeded(), **options)
    return replace_linears(model, "^[02]$", factory, trainable="^4")


def test_clock_on_known_values():
    ages = {500: 0.0, 550: 0.5, 600: 1.0, 1550: 0.5, 2500: 0.0, 400: 0.0, 2600: 0.0}
    for t, wanted in ages.items():
        assert clock(t - 500, warmup=100, total=2000) == wanted
    assert clock(0, warmup=0, total=4) == 1.0


@given(st.integers(0, 30), st.integers(1, 60), st.integers(0, 70))
def test_clock_by_the_printed_cases(warmup, total, age):
    got = clock(age, warmup=warmup, total=total)
    assert 0 <= got <= 1 and clock(total, warmup=warmup, total=total) == 0
    if total > warmup:
        assert got == (age / warmup if age < warmup else max(0.0, (total - age) / (total - warmup)))


@pytest.mark.parametrize("advance", [True, False])
def test_groups_are_all_parameters_once_and_their_late_ones_rest(advance):
    model = net(advance=advance)
    groups = growth_groups(model)
    ids = [id(p) for group in groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    own = {id(p) for layer in (model[0], model[2]) for p in layer.parameters(recurse=False)}
    assert len(ids) == len(set(ids)) and set(ids) == trained | own
    assert {id(p) for p in groups[0]["params"]} == trained and id(model[4].weight) in trained
    assert [group["growth"] for group in groups[1:]] == [(path, i) for path in ("0", "2") for i in (1, 2, 3)]
    assert not any(p.requires_grad for group in groups[1:] for p in group["params"])


def test_groups_of_no_layer_or_a_grown_one_are_refused():
    with pytest.raises(ValueError, match="model: got Linear without an IncreLoRALinear"):
        growth_groups(nn.Linear(2, 2))
    model = net()
    model[0].grow()
    with pytest.raises(ValueError, match="model: got layers that have grown"):
        growth_groups(model)


def run(steps, restart=True, times=None):
    """Train, and return the factors of all groups after each step, and the growth."""
    model = net()
    optimizer = torch.optim.Adam(growth_groups(model), lr=0.5)
    growth = RankGrowth(model, optimizer, budget=6, every=4)
    schedule = growth_schedule(optimizer, growth, steps=steps, warmup=3, restart=restart)
    factors = []
    for step in range(steps):
        optimizer.zero_grad()
        (model(gaussian(8, 5, seed=step)) - 1).square().mean().backward()
        optimizer.step()
        growth.step()
        schedule.step()
        factors.append({group.get("growth"): group["lr"] / 0.5 for group in optimizer.param_groups})
    return factors, growth


def test_every_group_has_the_clock_of_its_birth():
    factors, growth = run(30)
    born = {(path, i + 1): t for path, times in growth.births.items() for i, t in enumerate(times)}
    assert sorted(born.values()) == [8, 12, 16, 20]
    for step, found in enumerate(factors, start=1):
        for key, got in found.items():
            start = 0 if key is None else born.get(key, 99)
            wanted = clock(step - start, warmup=3, total=30 - start) if step >= start else 0.0
            assert got == pytest.approx(wanted, abs=1e-15), (step, key)
    assert all(value == 0 for value in factors[-1].values())


def test_one_clock_for_all():
    factors, _ = run(30, restart=False)
    for step, found in enumerate(factors, start=1):
        assert len(set(found.values())) == 1
        assert found[None] == pytest.approx(clock(step, warmup=3, total=30), abs=1e-15)


@pytest.mark.parametrize(
    "options", [{"steps": 3, "warmup": 3}, {"steps": 3.0, "warmup": 1}, {"steps": 3, "warmup": -1}]
)
def test_lengths_that_mean_nothing_are_refused(options, no_shape_checks):
    model = net()
    optimizer = torch.optim.SGD(growth_groups(model), lr=0.5)
    growth = RankGrowth(model, optimizer, budget=6, every=4)
    with pytest.raises((TypeError, ValueError), match="steps|warmup"):
        growth_schedule(optimizer, growth, **options)
