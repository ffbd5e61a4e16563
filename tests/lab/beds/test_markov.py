"""The shared test beds."""

import math

import pytest
import torch

from lowrank_ref.lab.beds import (
    markov_language,
    markov_pretraining,
)


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
