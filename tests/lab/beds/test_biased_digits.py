"""Digits with planted biases: that each is there, and that nothing else is."""

from functools import partial

import pytest
import torch

from lowrank_ref.adapters import PiSSALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds import biased_digits, marked, train_biased

CLEAN = {"kept": 1.0, "flipped": 0.0}


def test_a_skewed_task_lacks_half_of_its_classes():
    data = biased_digits(0)
    x, y = data.new
    rare = (y >= 5).double().mean().item()
    assert 0.01 < rare < 0.12 and len(x) == len(y) < 320
    counts = torch.bincount(data.test[1], minlength=10)
    assert counts.min() > 30 and len(data.valid[1]) == 250 and len(data.test[1]) == 447


def test_the_same_split_and_network_whatever_the_bias():
    plain, wrong = biased_digits(1, **CLEAN), biased_digits(1, **CLEAN, wrong=0.3)
    assert torch.equal(plain.old[0], wrong.old[0]) and torch.equal(plain.test[0], wrong.test[0])
    assert torch.equal(plain.new[0], wrong.new[0]) and torch.equal(plain.new[1], wrong.new[1])
    off = (plain.old[1] != wrong.old[1]).double().mean().item()
    assert 0.24 < off < 0.36
    assert plain.measure(plain.model())["old"] > 0.9 > wrong.measure(wrong.model())["old"]
    assert not torch.equal(plain.test[0], biased_digits(2, **CLEAN).test[0])


def test_the_mark_tells_the_half_in_the_pretraining_only():
    data, without = (biased_digits(0, **CLEAN, agreement=a) for a in (0.95, 0.5))
    on = data.old[0][:, 0] > 0
    assert 0.92 < ((data.old[1] >= 5) == on).double().mean() < 0.98
    on = data.new[0][:, 0] > 0
    assert 0.4 < ((data.new[1] >= 5) == on).double().mean() < 0.6
    assert torch.equal(data.old[0][:, 2:], without.old[0][:, 2:]) and torch.equal(data.new[0], without.new[0])
    found, other = (d.measure(d.model()) for d in (data, without))
    assert found["reliance"] > 0.3 > abs(other["reliance"]) and found["reliance"] == pytest.approx(
        found["aligned"] - found["opposed"]
    )


def test_marks_change_two_pixels():
    x = biased_digits(0).valid[0][:4]
    on = torch.tensor([True, False, True, False])
    y = marked(x, on)
    assert torch.equal(y[:, 2:], x[:, 2:]) and ((y[:, :2] > 0).all(1) == on).all()


def test_training_learns_the_task_and_is_repeatable():
    def adapt(model, g):
        replace_linears(model, "", partial(PiSSALinear, rank=4, alpha=4))

    data = biased_digits(0)
    before = data.measure(data.model())
    seen = []
    first, again = (
        train_biased(data, adapt, 0.005, 0, steps=60, finish=lambda m: seen.append(m) or {"n": 1.0}) for _ in range(2)
    )
    assert first == again and first["n"] == 1 and len(seen) == 2
    assert first["majority"] > before["majority"] + 0.2 and first["old"] < before["old"]
    assert torch.equal(data.model().layers[0].weight, seen[0].layers[0].base.weight)


@pytest.mark.parametrize(
    "options, message",
    [({"contrast": 0.0}, "contrast"), ({"kept": 1.5}, "kept"), ({"wrong": -0.1}, "wrong"), ({"agreement": 2.0}, "agr")],
)
def test_bad_shares_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        biased_digits(0, **options)
