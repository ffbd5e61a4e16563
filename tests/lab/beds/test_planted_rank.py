"""The shared test beds."""

import copy
from functools import partial

import pytest
import torch

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import merge_adapters, replace_linears
from lowrank_ref.lab.beds import (
    digits_shift,
    measure_planted,
    planted_rank,
    train_planted,
)


def full(model, generator):
    """Train every weight."""


def lora(model, generator, rank):
    replace_linears(model, "", partial(LoRALinear, rank=rank, alpha=16, generator=generator))


def test_the_planted_updates_are_what_they_say():
    task = planted_rank(3, ranks=(0, 2, 5), width=12, rows=64)
    for rank, update in zip((0, 2, 5), task.updates):
        S = torch.linalg.svdvals(update)
        assert torch.allclose(S, torch.tensor([1.0] * rank + [0.0] * (12 - rank)), atol=1e-5)
    h = task.x_test
    for layer, update in zip(task.base.layers, task.updates):
        h = h + torch.tanh(h @ (layer.weight + update).T)
    assert torch.allclose(h, task.y_test, atol=1e-5)
    h = task.x_train
    for layer, update in zip(task.base.layers, task.updates):
        h = h + torch.tanh(h @ (layer.weight + update).T)
    assert abs((task.y_train - h).std() - task.noise) < 0.005
    assert not any(p.requires_grad for p in task.base.parameters())


def test_a_task_is_drawn_from_its_seed_only():
    state = torch.get_rng_state()
    first = planted_rank(5, rows=32)
    planted_rank.cache_clear()
    again, other = planted_rank(5, rows=32), planted_rank(6, rows=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.y_train, again.y_train) and torch.equal(first.updates[3], again.updates[3])
    assert not torch.equal(first.y_train, other.y_train)
    assert first.ranks == (0, 1, 1, 8)


def test_one_step_cannot_rise_and_fall():
    with pytest.raises(ValueError, match="steps: got 1"):
        train_planted(planted_rank(rows=32), lambda model, g: None, lr=1e-3, steps=1)


def test_bad_ranks_are_refused():
    for ranks in ((), (1, 33), (-1,)):
        with pytest.raises(ValueError, match="ranks: got"):
            planted_rank(ranks=ranks)


def test_the_truth_measures_as_the_truth():
    task = planted_rank(0)
    model = copy.deepcopy(task.base)
    start = measure_planted(task, model)
    assert start["rank"] == 0 and start["mse"] > 0.05
    assert start["error 3"] == pytest.approx(8**0.5, rel=1e-4) and start["error 0"] == 0
    for layer, update in zip(model.layers, task.updates):
        layer.weight.data += update
    truth = measure_planted(task, model, tolerance=0.25)
    assert truth["mse"] < 1e-9 and truth["train mse"] == pytest.approx(0.05**2, rel=0.05)
    assert [truth[f"rank {i}"] for i in range(4)] == [0, 1, 1, 8] and truth["rank"] == 10


def test_adapters_and_their_merged_weights_measure_the_same():
    task = planted_rank(0)
    model = train_planted(task, partial(lora, rank=3), 5e-3, steps=30)
    ranks = measure_planted(task, model)
    merged = measure_planted(task, merge_adapters(model))
    assert ranks["rank"] == 12 and ranks["rank 0"] == 3
    assert merged["mse"] == pytest.approx(ranks["mse"], rel=1e-3)
    assert merged["error 3"] == pytest.approx(ranks["error 3"], rel=1e-3)


def test_training_is_deterministic_and_leaves_the_base():
    task = planted_rank(0)
    before = copy.deepcopy(task.base.state_dict())
    first, again, other = (train_planted(task, full, 3e-3, seed=s, steps=20) for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)
    assert all(torch.equal(value, before[key]) for key, value in task.base.state_dict().items())


def test_a_fit_of_the_right_ranks_reaches_the_floor_and_one_too_small_does_not():
    """The three facts that the chapters on ranks build on, each with a wide margin."""
    task = planted_rank(0)

    def oracle(model, generator):
        for i, rank in enumerate(task.ranks):
            if rank:
                factory = partial(LoRALinear, rank=rank, alpha=2 * rank, generator=generator)
                replace_linears(model, f"^layers.{i}$", factory)
        model.layers[0].requires_grad_(False)

    floor = task.floor(sum(r * (64 - r) for r in task.ranks))
    right = measure_planted(task, train_planted(task, oracle, 5e-3), tolerance=0.25)
    small = measure_planted(task, train_planted(task, partial(lora, rank=4), 5e-3))
    large = measure_planted(task, train_planted(task, partial(lora, rank=12), 5e-3), tolerance=0.25)
    assert 0.5 * floor < right["mse"] < 2 * floor
    assert small["mse"] > 50 * right["mse"]
    assert 2 * right["mse"] < large["mse"] < 8 * right["mse"]
    assert [right[f"rank {i}"] for i in range(4)] == [large[f"rank {i}"] for i in range(4)] == [0, 1, 1, 8]


def test_actions_run_after_every_step_of_both_beds():
    class Count:
        def __init__(self):
            self.steps = 0

        def step(self):
            self.steps += 1

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    count, rates = Count(), []

    def actions(model, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return [count]

    train_planted(planted_rank(0), full, 1e-3, steps=7, actions=actions)
    digits_shift(full, 1e-2, 0, steps=5, actions=actions)
    assert count.steps == 12 and rates == [1e-3, 1e-2]


def test_evaluations_are_called_on_the_way():
    seen = []

    def note(model):
        seen.append(model.layers[0].weight.clone())
        return {}

    train_planted(planted_rank(0), full, 1e-3, steps=6, evaluate=note, every=2)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[2])


def test_a_penalty_is_added_to_the_loss():
    def pull(model):
        return 10 * sum(layer.weight.square().sum() for layer in model.layers)

    task = planted_rank(0)
    free, pulled = (train_planted(task, full, 1e-2, steps=40, penalty=p) for p in (None, pull))
    assert pulled.layers[0].weight.norm() < 0.8 * free.layers[0].weight.norm()
