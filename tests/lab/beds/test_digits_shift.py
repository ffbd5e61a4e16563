"""The shared test beds."""

import pytest
import torch

from lowrank_ref.lab.beds import (
    digits_shift,
    pretrained_on_digits,
    shifted_digits,
)
from lowrank_ref.lab.data import digits


def test_the_upright_network_knows_upright_digits_only():
    model, upright, turned = pretrained_on_digits(), digits(), digits(rotate=90)
    with torch.no_grad():
        score = [(model(d.x_test).argmax(1) == d.y_test).double().mean().item() for d in (upright, turned)]
    assert score[0] > 0.95
    assert score[1] < 0.25


def test_every_call_starts_from_the_same_network():
    first, second = pretrained_on_digits(), pretrained_on_digits()
    for p in first.parameters():
        p.data.zero_()
    assert all(bool(p.abs().sum() > 0) for p in second.parameters())


def test_digits_shift_trains_what_it_is_told():
    def head(model, generator):
        model.requires_grad_(False)
        model.layers[2].requires_grad_(True)

    first, again = (digits_shift(head, 0.1, seed=1, steps=40) for _ in range(2))
    assert first == again
    assert first["trainable"] == 1290
    assert 0.5 < first["accuracy"] < 1 and first["loss"] < 2


def test_groups_scale_the_learning_rate():
    def frozen(model, generator):
        return [{"params": list(model.parameters()), "lr": 0.0}]

    def plain(model, generator):
        return [{"params": list(model.parameters())}]

    start = digits_shift(frozen, 0.01, seed=0, steps=5)
    moved = digits_shift(plain, 0.01, seed=0, steps=5)
    assert start["loss"] > 2 * moved["loss"]


def test_shifts_change_what_they_say_and_nothing_else():
    upright = digits()
    for part in ("train", "valid", "test"):
        x, y = getattr(upright, f"x_{part}"), getattr(upright, f"y_{part}")
        found = {
            shift: (getattr(task, f"x_{part}"), getattr(task, f"y_{part}"))
            for shift in ("turned", "moved", "negative", "relabelled")
            for task in [shifted_digits(shift)]
        }
        assert all(torch.equal(found[shift][1], y) for shift in ("turned", "moved", "negative"))
        assert torch.equal(found["turned"][0], getattr(digits(rotate=90), f"x_{part}"))
        assert torch.equal(found["relabelled"][0], x) and torch.equal(found["relabelled"][1], (y + 1) % 10)
        moved, negative = found["moved"][0][5], found["negative"][0][5]
        for i in range(8):
            for j in range(8):
                assert moved[8 * ((i + 1) % 8) + (j + 1) % 8] == x[5, 8 * i + j]
        torch.testing.assert_close((negative + 0.3) * 16, 16 - (x[5] + 0.3) * 16)  # pixels from 0 to 16


def test_another_shift_is_refused_and_each_is_a_task():
    with pytest.raises(ValueError, match="shift: got 'bent', wanted one of"):
        digits_shift(lambda model, generator: None, 0.1, 0, shift="bent")
    start = [digits_shift(lambda model, g: None, 1e-9, 0, steps=1, shift=s)["accuracy"] for s in ("moved", "negative")]
    assert start[0] < 0.6 and start[1] < 0.6


def test_a_loss_of_ones_own_is_what_is_minimised():
    def nothing(model, x, y):
        return 0.0 * model(x).sum()

    start = digits_shift(lambda model, g: None, 0.01, 0, steps=3, loss_fn=nothing)
    again = digits_shift(lambda model, g: None, 0.02, 1, steps=2, loss_fn=nothing)
    plain = digits_shift(lambda model, g: None, 0.01, 0, steps=3)
    assert start == again and plain["train loss"] < start["train loss"]


def test_finish_sees_the_trained_model_before_it_is_measured():
    seen = []

    def undo(model):
        seen.append(model.layers[0].weight.clone())
        model.load_state_dict(pretrained_on_digits().state_dict())
        return {"kept": 7.0}

    found = digits_shift(lambda model, g: None, 0.01, 0, steps=3, finish=undo)
    untouched = digits_shift(lambda model, g: None, 1e-9, 0, steps=1)
    assert not torch.equal(seen[0], pretrained_on_digits().layers[0].weight)
    assert found["kept"] == 7 and abs(found["loss"] - untouched["loss"]) < 1e-5
    assert "kept" not in digits_shift(lambda model, g: None, 0.01, 0, steps=1, finish=lambda model: None)
