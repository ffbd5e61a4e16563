"""What the comparison's benchmarks build on: sizes that keep their budget, cuts that keep it too, and wider sweeps."""

import math
import sys
from pathlib import Path

import pytest
import torch

from lowrank_ref.core.layers import adapters
from lowrank_ref.lab.beds import digits_shift, measure_planted, planted_rank, pretrained_on_digits

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
adapter_arms = pytest.importorskip("adapter_arms")
bench_comparison = pytest.importorskip("bench_comparison")
rank_allocators = pytest.importorskip("rank_allocators")

DIGITS = bench_comparison.DIGITS
LIMITS = adapter_arms.budgets(pretrained_on_digits(), DIGITS)


def prepared(name, size):
    model = pretrained_on_digits()
    return model, adapter_arms.put(name, model, size, DIGITS, torch.Generator().manual_seed(0))


def test_budgets_are_what_lora_trains():
    assert LIMITS == [586, 1172, 2344, 4688]


@pytest.mark.parametrize("name", list(adapter_arms.METHODS))
@pytest.mark.parametrize("budget", LIMITS)
def test_the_size_that_fits_keeps_the_budget_and_the_next_one_does_not(name, budget):
    method, plain = adapter_arms.METHODS[name], pretrained_on_digits()
    size = adapter_arms.fitting(name, plain, DIGITS, budget)
    if size is None:
        assert name in ("full", "head only", "DoRA")
        return
    model, setup = prepared(name, size)
    if "cut" not in name and name != "LoRA-Squeeze":
        assert 0 < adapter_arms.stored_size(model, DIGITS)["numbers"] <= budget
    if method.numbers is not None:
        shapes = adapter_arms.layer_shapes(plain, DIGITS)
        counts = [adapter_arms.count(method, shapes, s) for s in method.sizes(shapes, 2 * budget)]
        assert adapter_arms.count(method, shapes, size) == max(c for c in counts if c <= budget)
        if "cut" not in name and name != "LoRA-Squeeze":
            assert adapter_arms.stored_size(model, DIGITS)["numbers"] == adapter_arms.count(method, shapes, size)


@pytest.mark.parametrize("name", ["full cut", "SVD cut", "cut, then finish", "LoRA-Squeeze"])
def test_what_is_cut_stores_the_budget_and_starts_from_more(name):
    row = bench_comparison.digits_row(name, 2, 0.01, 0, 6)
    assert 800 < row["numbers"] <= 1172 < row["trainable"] and row["bytes"] == 4 * row["numbers"]
    assert row["state bytes"] == 8 * row["trainable"]


def test_a_cut_at_full_rank_changes_nothing():
    """The change of all weights, written as factors, is the change: an unlimited budget keeps the loss."""
    model, setup = prepared("full cut", 128)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight += 0.1 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    before = model(x)
    setup.finish(model)
    assert len(dict(adapters(model))) == 3 and torch.allclose(model(x), before, atol=1e-4)


def test_a_cut_halfway_goes_on_with_the_factors_that_are_left():
    model, setup = prepared("cut, then finish", 1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    (action,) = setup.actions(model, optimizer, 4)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        action.step()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == trained == {id(p) for p in optimizer.state}
    assert sum(p.numel() for p in held) <= 586 and action.state_dict() == {"done": 4}
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_bytes_are_those_of_the_file():
    assert adapter_arms.stored_size(prepared("LoRA", 1)[0], DIGITS)["bytes"] == 4 * 586
    frames = adapter_arms.stored_size(prepared("LoRA-SB", 4)[0], DIGITS)
    assert frames == {"numbers": 48, "bytes": 4 * (48 + 4 * 586)}  # the frames lie in its file
    assert adapter_arms.stored_size(prepared("biases", 0)[0], DIGITS)["bytes"] == 4 * 266


def test_a_row_is_repeatable_and_a_diverged_one_says_so():
    first, again = (bench_comparison.digits_row("NOLA", 20, 0.05, 1, 5) for _ in range(2))
    assert {k: v for k, v in first.items() if k != "train s"} == {k: v for k, v in again.items() if k != "train s"}
    assert bench_comparison.digits_row("LoRA", 1, 1e18, 0, 5) == {"error": "diverged"}


def test_a_sweep_is_widened_until_its_best_is_inside():
    asked = []

    def loss(lr):
        asked.append(lr)
        return abs(math.log2(lr) - 5)  # best at 32

    tried = adapter_arms.widen(loss, 1.0)
    assert tried == [2.0**k for k in range(-3, 7)] and set(asked) == set(tried)
    assert len(adapter_arms.widen(lambda lr: abs(math.log2(lr)), 1.0, rates=9)) == 9
    assert adapter_arms.widen(loss, 1.0, rates=11) == [*tried, 128.0]  # more of them, and the same ones
    assert len(adapter_arms.widen(lambda lr: math.inf, 1.0)) == 7  # nothing to go after
    assert adapter_arms.widen(lambda lr: -lr, 1.0, most=2)[-1] == 32  # and an end of it
    assert adapter_arms.widen(lambda lr: lr, 1.0, first=5, most=1) == [0.125, 0.25, 0.5, 1.0, 2.0, 4.0]


def test_a_sweep_takes_the_mean_and_counts_divergence_as_the_worst():
    sweep = adapter_arms.Sweep(lambda lr, seed: {"valid loss": lr + seed} if lr < 2 else {"error": "diverged"}, (0, 2))
    assert sweep.mean(1.0) == 2 and sweep.mean(3.0) == math.inf
    rows = [{"method": "a", "lr": lr} for lr in (1, 2, 2)] + [{"method": "b", "lr": 1}, {"method": "c", "lr": 3}]
    assert adapter_arms.rates_tried(rows, ["a", "b"]) == 2 and adapter_arms.rates_tried([], ["a"]) == 0


def test_one_process_at_a_time_holds_an_arm(tmp_path):
    claimed, path = adapter_arms.claimed, tmp_path / "x.json"
    with claimed(path, "LoRA") as mine, claimed(path, "LoRA") as other, claimed(tmp_path, "b") as third:
        assert mine and third and not other
    with claimed(path, "LoRA") as again:
        assert again


def test_every_method_has_an_arm_at_the_large_budget():
    arms = adapter_arms.arms(pretrained_on_digits(), DIGITS, LIMITS)
    assert {name for name, _ in arms.values()} == set(adapter_arms.METHODS)
    assert arms["LoRA r=8"] == ("LoRA", 8) and arms["biases"] == ("biases", 0)


@pytest.mark.parametrize("name", list(rank_allocators.ALLOCATORS))
def test_every_allocator_runs_on_the_planted_bed(name):
    setting = rank_allocators.ALLOCATORS[name].settings[-1]
    row = bench_comparison.planted_row(name, setting, 0.005, 0, 8)
    assert row["rank"] == sum(row[f"rank {i}"] for i in range(4)) and row["mse"] > 0
    assert {f"real {i}" for i in range(4)} <= set(row)
    if name == "oracle":
        assert [row[f"rank {i}"] for i in range(4)] == [0, 1, 1, 8]
    if "cut" in name:
        assert row["rank"] <= setting
    assert measure_planted(planted_rank(0), planted_rank(0).base)["rank"] == 0


def test_the_bed_hands_the_row_what_the_method_returns():
    row = bench_comparison.digits_row("LoRA", 1, 0.03, 0, 3)
    plain = digits_shift(lambda model, g: adapter_arms.put("LoRA", model, 1, DIGITS, g).groups, 0.03, 0, steps=3)
    assert row["loss"] == round(plain["loss"], 5) and row["train s"] > 0
