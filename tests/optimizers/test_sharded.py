"""Lending whole matrices, in one process. `tests/test_sharded.py` does it in two."""

import pytest
import torch
from battery import network
from torch import nn

from lowrank_ref.optimizers import GaLoreAdamW
from lowrank_ref.optimizers.sharded import is_sharded, whole, whole_matrices


def test_a_basis_of_a_shard_is_another_one():
    """So GaLore gathers: without it, steps of shards are not the shards of the step."""
    whole_step, halves = network(), [network() for _ in range(2)]
    for model in (whole_step, *halves):
        model(torch.ones(2, 12, dtype=torch.float64)).square().sum().backward()
    W = whole_step[0].weight
    GaLoreAdamW([{"params": [W], "rank": 2}], lr=0.05, weight_decay=0.1).step()
    rows = []
    for i, model in enumerate(halves):
        part = nn.Parameter(model[0].weight.detach().chunk(2)[i].clone())
        part.grad = model[0].weight.grad.chunk(2)[i].clone()
        GaLoreAdamW([{"params": [part], "rank": 2}], lr=0.05, weight_decay=0.1).step()
        rows.append(part.detach())
    assert (torch.cat(rows) - W).abs().max() > 1e-3


def test_plain_parameters_are_lent_as_they_are():
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    state = {p: {"step": 1}}
    with whole_matrices([p], state) as lent:
        assert lent[0] is p and state[lent[0]] == {"step": 1}
    assert whole(p) is p and not is_sharded(p)


class Spread(torch.Tensor):
    """Stands for a sharded parameter."""

    def full_tensor(self):
        return torch.zeros(2, 2)


def test_the_state_comes_back_when_a_step_fails():
    p = torch.ones(2, 2).as_subclass(Spread)
    p.grad = torch.ones(2, 2)
    state = {p: {"step": 3}}
    with pytest.raises(RuntimeError, match="no step"), whole_matrices([p], state) as lent:
        assert torch.equal(lent[0].grad, torch.ones(2, 2)) and list(state) == [lent[0]]
        raise RuntimeError("no step")
    assert state == {p: {"step": 3}}
