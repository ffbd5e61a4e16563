"""Which parameters take weight decay."""

from functools import partial

import pytest
import torch
from torch import nn

from lowrank_ref.adapters import DoRALinear, LoRALinear, LoRAXSLinear, RandLoRALinear
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lowbit import HGFLinear
from lowrank_ref.ranks import DiffoRALinear, SoRALinear


def groups_of(make):
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    replace_linears(model, "^0", make, trainable=r"^(1|2)\.")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = optimizer_groups(model, 0.1, 0.5)
    assert (decayed["lr"], decayed["weight_decay"], spared["lr"], spared["weight_decay"]) == (0.1, 0.5, 0.1, 0.0)
    found = [{names[id(p)] for p in group["params"]} for group in (decayed, spared)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found[0] | found[1] == trained and not found[0] & found[1]
    torch.optim.AdamW([decayed, spared])
    return found


@pytest.mark.parametrize(
    "make, decayed, spared",
    [
        (LoRALinear, {"0.A", "0.B"}, set()),
        (DoRALinear, {"0.A", "0.B"}, {"0.magnitude"}),
        (SoRALinear, {"0.A", "0.B"}, {"0.g"}),
        (DiffoRALinear, {"0.A", "0.B"}, {"0.logit"}),
        (RandLoRALinear, {"0.lam"}, {"0.gamma"}),
        (LoRAXSLinear, set(), {"0.R"}),
    ],
)
def test_layers_say_what_takes_no_decay(make, decayed, spared):
    got = groups_of(partial(make, rank=2))
    assert got == [decayed | {"2.weight"}, spared | {"1.weight", "1.bias", "2.bias"}]


def test_the_gate_of_hgf_is_spared():
    layer = HGFLinear(nn.Linear(6, 4), 2)
    spared = optimizer_groups(layer, 0.1, 0.5)[1]["params"]
    assert any(p is layer.theta for p in spared) and not any(p is layer.A for p in spared)


def test_one_group_where_all_are_alike_and_none_where_nothing_trains():
    [group] = optimizer_groups(LoRALinear(nn.Linear(6, 4), 2), 0.1)
    assert len(group["params"]) == 2
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="model: got Linear without a parameter that trains"):
        optimizer_groups(model, 0.1)
    for options, message in (({"lr": -1.0}, "lr: got -1.0"), ({"lr": 0.1, "weight_decay": -0.5}, "weight_decay: got")):
        with pytest.raises(ValueError, match=message):
            optimizer_groups(model.requires_grad_(), **options)


def test_a_shared_parameter_comes_once():
    first = SoRALinear(nn.Linear(4, 4), 2)
    model = nn.ModuleDict({"a": first, "b": first})
    assert sum(len(group["params"]) for group in optimizer_groups(model, 0.1, 0.5)) == 3
