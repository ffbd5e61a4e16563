"""The flaws as functions: penalties against all masks, the bound of a chain, what a scale is, a start without zero."""

import itertools

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.adapters.allora_flaws import (
    CompensatedLoRALinear,
    RankDropoutLoRALinear,
    input_dropout_penalty,
    rank_dropout_penalty,
    ripple_bound,
)


def assert_close(got, wanted, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def expected_error(x, A, B, target, dropout, scale, where):
    """Mean squared error of each row over all masks, each weighed with its probability."""
    total = torch.zeros(len(x)).double()
    for mask in itertools.product((0, 1), repeat=len(A) if where == "rank" else len(x[0])):
        kept = sum(mask)
        odds = (1 - dropout) ** kept * dropout ** (len(mask) - kept)
        m = torch.tensor(mask).double() / (1 - dropout)
        hidden = (x @ A.T) * m if where == "rank" else (x * m) @ A.T
        total += odds * (target - scale * hidden @ B.T).square().sum(dim=1)
    return total


@pytest.mark.parametrize("where, penalty", [("rank", rank_dropout_penalty), ("inputs", input_dropout_penalty)])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_penalties_are_the_expectation_over_all_masks(where, penalty, dropout):
    x, A, B, target = gaussian(3, 5), gaussian(4, 5, seed=1), gaussian(6, 4, seed=2), gaussian(3, 6, seed=3)
    plain = (target - 0.7 * x @ A.T @ B.T).square().sum(dim=1)
    added = penalty(x, A, B, dropout, 0.7)
    assert_close(expected_error(x, A, B, target, dropout, 0.7, where), plain + added)
    assert bool((added > 0).all()) == (dropout > 0)
    assert not penalty(x, A, 0 * B, dropout).any()  # B = 0: nothing to drop


@given(shapes())
def test_the_penalty_by_loops(shape):
    m, n, r = shape
    x, A, B = gaussian(2, n), gaussian(r, n, seed=1), gaussian(m, r, seed=2)
    for s, found in enumerate(rank_dropout_penalty(x, A, B, 0.2)):
        wanted = sum((A[k] @ x[s]) ** 2 * B[i, k] ** 2 for k in range(r) for i in range(m)) / 4
        assert_close(found, wanted)


def test_at_the_start_neither_factor_is_pulled():
    """The paper calls the pull on B large there; its weight is, its gradient is that weight times B = 0."""
    x, A = gaussian(3, 5), gaussian(4, 5, seed=1).requires_grad_()
    B = torch.zeros(6, 4).double().requires_grad_()
    rank_dropout_penalty(x, A, B, 0.3).sum().backward()
    assert not A.grad.any() and not B.grad.any()


def test_dropout_acts_between_the_factors():
    layer = RankDropoutLoRALinear(nn.Linear(5, 6).double(), 4, alpha=2, dropout=0.5, generator=seeded())
    layer.B.data.copy_(gaussian(6, 4))
    x = gaussian(3, 5, seed=1)
    torch.manual_seed(3)
    got = layer.train()(x)
    torch.manual_seed(3)
    hidden = nn.functional.dropout(x @ layer.A.T, 0.5)
    assert_close(got, layer.base(x) + 0.5 * hidden @ layer.B.T)
    assert_close(layer.eval()(x), layer.base(x) + x @ layer.delta_weight().T)


def test_no_output_of_a_chain_exceeds_the_bound_and_scaled_identities_reach_it():
    weights, updates = ([gaussian(4, 4, seed=10 * k + i) for i in range(5)] for k in (0, 1))
    for scale in (0.0, 0.5, 3.0):
        chain = torch.eye(4).double()
        for W, D in zip(weights, updates):
            chain = (W + scale * D) @ chain
        assert torch.linalg.matrix_norm(chain, 2) <= ripple_bound(weights, updates, scale)
    assert ripple_bound([torch.eye(2)] * 6, [torch.eye(2)] * 6, 2.0) == pytest.approx(3**6)
    with pytest.raises(ValueError):
        ripple_bound([torch.eye(2)], [], 1.0)


def trained(layer, steps):
    x, y = gaussian(20, 5, seed=1), gaussian(20, 6, seed=2)
    for _ in range(20):
        layer.zero_grad()
        (layer(x) - y).square().mean().backward()
        steps.step()
    return layer.delta_weight().detach()


@pytest.mark.parametrize("optimizer, power", [(torch.optim.SGD, 1.0), (torch.optim.Adam, 0.5)])
def test_a_scale_is_a_larger_start_of_A_and_another_rate(optimizer, power):
    """LoRA with scale s is LoRA with scale 1, A√s times as large at the start, and the rate times s (Adam: √s)."""
    scale, ends = 4.0, []
    options = {"eps": 1e-300} if optimizer is torch.optim.Adam else {}
    for own in (True, False):
        layer = LoRALinear(nn.Linear(5, 6).double(), 3, alpha=3 * (scale if own else 1), generator=seeded())
        with torch.no_grad():
            layer.base.weight.copy_(gaussian(6, 5, seed=9))
            layer.base.bias.zero_()
            layer.A.mul_(1 if own else scale**0.5)
        rate = 0.05 if own else 0.05 * scale**power
        ends.append(trained(layer, optimizer([layer.A, layer.B], lr=rate, **options)))
    assert ends[0].abs().max() > 0.1
    assert_close(ends[1], ends[0], 1e-8)


def test_a_compensated_start_is_the_base_and_both_factors_get_a_gradient():
    base, x = nn.Linear(5, 6).double(), gaussian(4, 5)
    layers = [kind(base, 3, generator=seeded()) for kind in (LoRALinear, CompensatedLoRALinear)]
    for layer in layers:
        assert_close(layer(x), base(x))
        layer(x).square().sum().backward()
    assert torch.equal(layers[0].A, layers[1].A)
    assert not layers[0].A.grad.any() and layers[1].A.grad.any() and layers[1].B.grad.any()
    assert layers[1].B.abs().max() <= 6**-0.5


@pytest.mark.parametrize("penalty", [rank_dropout_penalty, input_dropout_penalty])
@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_none_is_named(penalty, dropout):
    with pytest.raises(ValueError, match="dropout: got"):
        penalty(gaussian(2, 3), gaussian(2, 3), gaussian(4, 2), dropout)
