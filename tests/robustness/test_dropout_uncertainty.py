"""Monte Carlo dropout: the mean of passes, and nothing left behind."""

import pytest
import torch
from torch import nn

from lowrank_ref.robustness import dropout_probabilities


def model(p=0.5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(p), nn.Linear(32, 3))


def test_it_is_the_mean_of_passes_with_dropout_alone():
    net, x = model().train(), torch.randn(6, 4)
    before, state = [m.training for m in net.modules()], torch.get_rng_state()
    buffers = {k: v.clone() for k, v in net.named_buffers()}
    p = dropout_probabilities(net, x, passes=5, seed=3)
    assert [m.training for m in net.modules()] == before and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, buffers[k]) for k, v in net.named_buffers()) and not p.requires_grad
    net.eval()
    net[3].train()
    torch.manual_seed(3)
    with torch.no_grad():
        wanted = sum(net(x).softmax(1) for _ in range(5)) / 5
    torch.testing.assert_close(p, wanted)
    torch.testing.assert_close(p.sum(1), torch.ones(6))
    assert torch.equal(p, dropout_probabilities(net, x, passes=5, seed=3))
    assert not torch.equal(p, dropout_probabilities(net, x, passes=5, seed=4))


def test_without_dropout_all_passes_are_alike():
    net, x = model(0.0).eval(), torch.randn(6, 4)
    torch.testing.assert_close(dropout_probabilities(net, x), net(x).softmax(1))


@pytest.mark.parametrize(
    "options, error", [({"passes": 0}, ValueError), ({"passes": 2.0}, TypeError), ({"seed": -1}, ValueError)]
)
def test_bad_input(options, error):
    with pytest.raises(error, match=next(iter(options))):
        dropout_probabilities(model(), torch.ones(2, 4), **options)


def test_an_error_inside_puts_the_modes_back():
    net = model().train()
    with pytest.raises(RuntimeError):
        dropout_probabilities(net, torch.ones(2, 5))
    assert all(m.training for m in net.modules())
