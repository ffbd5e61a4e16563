"""SoRA's sparsifying schedule: levels by formula, phases by counting."""

import math

import pytest
import torch
from torch import nn

from lowrank_ref.lab.train import Steppable
from lowrank_ref.ranks.sora import ProximalGates, SoRALinear, gate_groups
from lowrank_ref.ranks.sora_schedule import SparsifyingSchedule, threshold_levels


def build(levels=(0.0, 1.0, 3.0), first=3, later=2):
    layer = SoRALinear(nn.Linear(6, 6), 4, gate="ones", generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    proximal = ProximalGates(model, torch.optim.SGD(gate_groups(model), lr=0.1), penalty=9.0)
    return layer, proximal, SparsifyingSchedule(proximal, levels, first=first, later=later)


def test_levels():
    wanted = [0, 1.1667e-4, 2.3333e-4, 3.5e-4, 4.6667e-4, 5.8333e-4, 7e-4]
    assert threshold_levels(0, 7e-4, 7) == pytest.approx(wanted, abs=1e-8)
    for spacing, there, back in (("log", math.exp, math.log), ("geometric", math.log, math.exp)):
        low, high = there(0.5), there(2.0)
        steps = [back(low + k * (high - low) / 4) for k in range(5)]
        assert threshold_levels(0.5, 2.0, 5, spacing) == pytest.approx(steps, rel=1e-12)
    ratios = [b / a for a, b in zip(*(lambda v: (v, v[1:]))(threshold_levels(1e-4, 1e-2, 5, "geometric")))]
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-12)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0.2, 0.1, 3), ValueError, "last: got 0.1"),
        ((-1.0, 0.1, 3), ValueError, "first: got -1"),
        ((0.0, 0.1, 1), ValueError, "count: got 1"),
        ((0.0, 0.1, 2.5), TypeError, "count"),
        ((0.0, 0.1, 3, "geometric"), ValueError, "first: got 0.0"),
        ((0.0, 0.1, 3, "cosine"), ValueError, "spacing: got 'cosine'"),
    ],
)
def test_bad_levels(arguments, error, message):
    with pytest.raises(error, match=message):
        threshold_levels(*arguments)


@pytest.mark.parametrize("first, last", [(0.0, 1e-17), (0.0, 800.0), (700.0, 720.0), (0.0, 7e-4), (1e-3, 1.5)])
def test_log_levels_rise_evenly_in_exp_at_any_size(first, last):
    """exp(800) is no number, and exp(1e-17) is 1: levels were NaN, or all 0."""
    levels = threshold_levels(first, last, 5, "log")
    assert (levels[0], levels[-1]) == (first, last) and all(a < b for a, b in zip(levels, levels[1:]))
    for k in range(1, 4):  # exp(ξ - ξ_N), which no size upsets
        wanted = k / 4 + (1 - k / 4) * math.exp(first - last)
        assert math.exp(levels[k] - last) == pytest.approx(wanted, rel=1e-9)
    if last < 1e-10:
        assert levels == pytest.approx([last * k / 4 for k in range(5)])


def test_geometric_levels_have_one_ratio_at_any_size():
    levels = threshold_levels(1e-300, 1e300, 5, "geometric")
    assert levels == pytest.approx([1e-300, 1e-150, 1.0, 1e150, 1e300], rel=1e-9)


def test_phases():
    layer, proximal, schedule = build()
    assert isinstance(schedule, Steppable) and schedule.steps == 7
    penalties = []
    for _ in range(9):
        penalties.append(proximal.penalty)
        proximal.step()
        schedule.step()
    assert penalties == [0.0] * 3 + [1.0] * 2 + [3.0] * 4
    assert schedule.records == [(0.0, 4), (1.0, 4), (3.0, 4)]  # 1 - 2·0.1 - 2·0.3 = 0.2 is left at the last record
    assert not layer.g.any()  # two steps later it is gone


def test_a_schedule_resumes_in_the_middle_of_a_level():
    _, straight, whole = build()
    for _ in range(9):
        straight.step()
        whole.step()
    layer, proximal, schedule = build()
    for _ in range(4):
        proximal.step()
        schedule.step()
    again, other, resumed = build()
    again.load_state_dict(layer.state_dict())
    other.load_state_dict(proximal.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert other.penalty == 1.0
    for _ in range(5):
        other.step()
        resumed.step()
    assert resumed.records == whole.records and resumed.done == 9
    with pytest.raises(ValueError, match="state: got keys"):
        resumed.load_state_dict({})


def test_a_learning_rate_of_zero_stops_coupled_shrinking_but_not_constant_shrinking():
    layer, proximal, schedule = build()
    for group in proximal.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(7):
        proximal.step()
        schedule.step()
    assert torch.equal(layer.g, torch.ones(4))
    proximal.coupled = False
    proximal.step()
    assert not layer.g.any()


@pytest.mark.parametrize(
    "levels, first, later",
    [((), 1, 1), ((1.0, 1.0), 1, 1), ((-1.0,), 1, 1), ((1.0,), 0, 1), ((math.nan,), 1, 1), ((0.0, math.inf), 1, 1)],
)
def test_bad_schedules(levels, first, later):
    with pytest.raises(ValueError, match="levels|first"):
        build(levels, first, later)
