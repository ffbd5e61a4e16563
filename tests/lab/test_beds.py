"""The shared test beds."""

import math

import pytest
import torch

from lowrank_ref.lab.beds import digits_shift, markov_language, markov_pretraining, pretrained_on_digits
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


def test_the_markov_language_follows_its_odds():
    """With two letters known the counts' entropy is the stated one; with one known it is clearly higher."""
    rows, held_out, entropy = markov_language()
    assert rows.shape == (16_000, 25) and held_out.shape == (1_000, 25)
    assert rows.min() == 0 and rows.max() == 15
    triples = rows.unfold(1, 3, 1).reshape(-1, 3)
    counts = torch.zeros(16, 16, 16).index_put(tuple(triples.T), torch.ones(len(triples)), accumulate=True)

    def conditional(counts):
        odds = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        return float(-(counts * odds.clamp_min(1e-9).log()).sum() / counts.sum())

    assert conditional(counts) == pytest.approx(entropy, abs=0.02)
    assert conditional(counts.sum(0)) > entropy + 0.5


def test_markov_pretraining_repeats_and_learns():
    def adam(model, generator, lr):
        model.embed.requires_grad_(False)
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)

    first, second = (
        markov_pretraining(adam, 0.01, 0, steps=20, measure=lambda m: {"norm": m.head.weight.norm().item()})
        for _ in range(2)
    )
    assert first == second and first["loss"] < math.log(16) and first["norm"] > 0
    assert first["block numbers"] == 2 * (4 * 48 * 48 + 3 * 48 * 128)
    assert markov_pretraining(adam, 0.01, 1, steps=20)["loss"] != first["loss"]
