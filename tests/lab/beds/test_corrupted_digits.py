"""Digits of 14x14, their corruptions, and networks that learn them."""

import pytest
import torch

from lowrank_ref.lab.beds import ResidualBlock, corrupted_digits, residual_network, train_with_chains


def test_the_split_and_what_is_corrupted():
    data = corrupted_digits()
    assert [len(part[0]) for part in (data.train, data.valid, data.test)] == [3200, 800, 600]
    assert data.train[0].shape[1:] == (1, 14, 14) and data.train[0].min() >= 0 and data.train[0].max() <= 1
    assert len(data.corrupted) == 24 and all(x.shape == data.test[0].shape for x in data.corrupted.values())
    assert data is corrupted_digits()
    rows = {row.numpy().tobytes() for row in data.train[0]}
    assert not rows & {row.numpy().tobytes() for row in torch.cat([data.valid[0], data.test[0]])}


def test_a_network_is_a_sequence_that_can_be_cut():
    state = torch.get_rng_state()
    model = residual_network(12, 3, seed=4)
    assert torch.equal(torch.get_rng_state(), state) and len(model) == 7
    x = torch.rand(5, 1, 14, 14)
    assert torch.equal(model[4:](model[:4](x)), model(x))
    assert sum(p.numel() for p in model.parameters()) == 196 * 12 + 12 + 3 * (2 * (144 + 12) + 24) + 24 + 130
    assert torch.equal(residual_network(12, 3, seed=4)(x), model(x))
    block = ResidualBlock(12, 0.5).eval()
    h = torch.randn(3, 12)
    torch.testing.assert_close(block(h), h + block.second(block.first(block.norm(h)).relu()))


@pytest.mark.parametrize("weight", [None, 12.0])
def test_training_learns_and_is_the_same_under_a_seed(weight):
    x, y = (part[:300] for part in corrupted_digits().train)
    state = torch.get_rng_state()
    one, two = (
        train_with_chains(residual_network(24, 1, dropout=0.1), x, y, epochs=6, seed=1, batch=50, weight=weight)
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state) and not one.training
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert (one(x).argmax(1) == y).double().mean() > 0.7


def test_bad_input():
    x, y = torch.rand(4, 1, 14, 14), torch.zeros(4).long()
    for call, word in (
        (lambda: residual_network(0, 1), "width"),
        (lambda: residual_network(4, 0), "blocks"),
        (lambda: ResidualBlock(4, 1.0), "dropout"),
        (lambda: train_with_chains(residual_network(4, 1), x, y, epochs=0, seed=0), "epochs"),
        (lambda: train_with_chains(residual_network(4, 1), x, y, epochs=1, seed=0, lr=0.0), "lr"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
