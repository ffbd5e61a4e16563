"""The shared test beds."""

import torch

from lowrank_ref.lab.beds import (
    digits_shift,
    pretrained_on_digits,
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
