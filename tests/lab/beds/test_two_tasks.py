"""The bed of an old and a new task."""

import pytest

from lowrank_ref.lab.beds.two_tasks import frontier, knows_upright, share_right, two_tasks
from lowrank_ref.lab.data import digits


def nothing(model, generator):
    model.requires_grad_(False)
    model.layers[2].weight.requires_grad_(True)


def test_the_network_knows_the_old_task_only_and_decay_leaves_weights_near_zero():
    shares = []
    for decay in (0.0, 0.5):
        model = knows_upright(decay, steps=300)
        assert share_right(model, digits()) > 0.94 and share_right(model, digits(rotate=90)) < 0.3
        W = model.layers[1].weight.detach()
        shares.append(float((W.abs() < 0.1 * W.std()).double().mean()))
    assert shares[1] > shares[0]


def test_every_call_starts_from_the_same_network():
    first, second = knows_upright(steps=20), knows_upright(steps=20)
    for p in first.parameters():
        p.data.zero_()
    assert all(bool(p.abs().sum() > 0) for p in second.parameters())


def test_it_trains_what_it_is_told_and_repeats(monkeypatch):
    monkeypatch.setattr(knows_upright, "__kwdefaults__", {"steps": 50})
    first, again = (two_tasks(nothing, 0.01, 1, steps=20, images=100) for _ in range(2))
    assert first == again and first["trainable"] == 2560
    assert first.keys() == {"old", "new", "old valid", "new valid", "trainable"}


def test_the_frontier_is_between_two_rates_and_nowhere_else():
    keys = ("lr", "new valid", "new", "old", "old valid")
    rows = [
        dict(zip(keys, values))
        for values in ((1, 0.2, 0.2, 0.9, 0.9), (2, 0.6, 0.5, 0.7, 0.8), (4, 0.5, 0.5, 0.1, 0.1))
    ]
    found = frontier(rows, 0.4)
    assert found == pytest.approx({"old": 0.8, "new": 0.35, "old valid": 0.85, "lr": 1.5})
    assert frontier(rows, 0.61) is None and frontier(rows, 0.2) is None
    assert frontier([*rows, {"lr": 0.5, "error": "diverged"}], 0.4) == found
    with pytest.raises(ValueError, match="^level: got"):
        frontier(rows, 1.5)
