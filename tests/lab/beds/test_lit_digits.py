"""Digits lit from a side: the light, the split, and a VAE that learns them."""

import pytest
import torch
from torch.nn import functional as F

from lowrank_ref.lab.beds import DigitVAE, light_reading, lit, lit_digits, train_lit, train_vae
from lowrank_ref.lab.data import mnist5k


def test_the_light_equals_a_loop():
    x, light = torch.rand(2, 1, 14, 14), torch.tensor([-1.0, 0.4])
    shown = lit(x, light)
    for i in range(2):
        for column in range(14):
            r = -1 + 2 * column / 13
            wanted = (0.3 + 0.7 * x[i, 0, :, column]) * (1 + 0.8 * light[i] * r) / 1.8
            torch.testing.assert_close(shown[i, 0, :, column], wanted)
    assert shown.min() > 0 and shown.max() <= 1


def test_the_split_and_whom_the_light_follows():
    data = lit_digits(3)
    counts = [len(data.labelled[0]), len(data.valid[0]), len(data.unlabelled)]
    assert counts == [300, 200, 3500] and {len(x) for x, _ in data.tests.values()} == {1000}
    assert torch.equal(lit_digits(3).unlabelled, data.unlabelled)
    assert not torch.equal(lit_digits(4).unlabelled, data.unlabelled)
    read = light_reading(data.unlabelled, data.light)
    assert (read(data.unlabelled) - data.light).square().mean().sqrt() < 0.1
    for (x, y), sign in ((data.labelled, 1), (data.valid, 1), (data.tests["iid"], 1), (data.tests["anti"], -1)):
        assert ((read(x) > 0) == ((y < 5) == (sign > 0))).double().mean() > 0.99
    x, y = data.tests["uniform"]
    assert abs(((read(x) > 0) == (y < 5)).double().mean() - 0.5) < 0.1
    assert torch.equal(data.tests["above"][1], y) and data.tests["above"][0].shape == x.shape
    assert torch.equal(lit(data.unlit, torch.zeros(300)), (0.3 + 0.7 * data.unlit) / 1.8)
    rows = F.avg_pool2d(mnist5k().x_train[:4000], 2)
    assert rows.shape[0] == sum(counts)


def test_a_vae_learns_light_and_is_the_same_under_a_seed():
    x = lit_digits(0).unlabelled[:1000]
    one, two = (train_vae(x, seed=1, epochs=30) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    error = (one.generator(one.encode(x)) - x).square().flatten(1).sum(1).mean()
    assert error < 0.9 * (x - x.mean(0)).square().flatten(1).sum(1).mean()


def test_the_start_of_the_first_layer():
    one, tenth = (DigitVAE(first=f, generator=torch.Generator().manual_seed(0)) for f in (1.0, 0.1))
    torch.testing.assert_close(tenth.generator[0].weight, 0.1 * one.generator[0].weight)
    assert torch.equal(tenth.generator[2].weight, one.generator[2].weight)


def test_training_with_edits():
    x, y = lit_digits(0).labelled
    seen = []

    def edited(model, rows, labels):
        assert torch.equal(labels, y[rows])
        seen.append(len(rows))
        return x[rows]

    one, two, plain = (train_lit((x, y), e, lr=1e-2, seed=2, epochs=20) for e in (edited, edited, None))
    assert seen == [100] * 120
    for model in (one, two, plain):
        assert (model(x).argmax(1) == y).double().mean() > 0.7
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_bad_input():
    data = lit_digits(0)
    for call, word in (
        (lambda: train_vae(data.unlabelled, seed=0, penalty=0.0), "penalty"),
        (lambda: train_vae(data.unlabelled, seed=0, epochs=0), "epochs"),
        (lambda: DigitVAE(0), "latent"),
        (lambda: DigitVAE(width=0), "width"),
        (lambda: DigitVAE(first=-1.0), "first"),
        (lambda: train_lit(data.labelled, None, lr=0.0, seed=0), "lr"),
        (lambda: train_lit(data.labelled, None, lr=0.1, seed=0, epochs=0), "epochs"),
        (lambda: train_lit(data.labelled, None, lr=0.1, seed=0, weight=-1.0), "weight"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    with pytest.raises(TypeError, match="seed"):
        lit_digits(0.5)
