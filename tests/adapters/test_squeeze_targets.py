"""Which layers LoRA-Squeeze cuts, to which ranks, and how factors are read and written."""

from functools import partial

import pytest
import torch
from battery import gaussian, network, seeded
from torch import nn

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear, peft_ranks
from lowrank_ref.adapters.squeeze_targets import (
    lora_of,
    lora_parts,
    set_factors,
    squeezable,
    take_rank,
    target_ranks,
    trained_layers,
)
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.core.peft import pattern_rank, rank_patterns


def net(make=LoRALinear):
    return replace_linears(network(), "", partial(make, rank=4, generator=seeded()))


def test_targets_are_all_layers_or_those_that_a_pattern_names():
    model = net()
    assert target_ranks(model, 3) == {"0": 3, "2": 3}
    assert target_ranks(model, 99) == {"0": 4, "2": 4}  # never more than a layer has
    assert target_ranks(model, {"2": 1}) == {"2": 1}
    assert target_ranks(model, {"^2": 1, "2|0": 3}) == {"0": 3, "2": 1}  # the first that matches
    with pytest.raises(ValueError, match="rank: got 3, which names no layer, wanted .* 0, 2"):
        target_ranks(model, {"2": 1, "3": 2})


def test_patterns_follow_pefts_rule_for_ends_of_paths():
    for path, rank in {"a.up": 4, "b.layers.up": 4, "a.group": None, "upper": None}.items():
        assert pattern_rank({"up": 4}, path) == rank
    assert pattern_rank({"^up": 4}, "a.up") is None


def test_patterns_tell_only_what_differs():
    told = rank_patterns({"a": (4, 2.0), "b.c": (4, 2.0), "d": (1, 0.25)})
    assert told == {"r": 4, "lora_alpha": 8, "rank_pattern": {"^d": 1}, "alpha_pattern": {"^d": 0.25}}
    assert peft_ranks(net()) == {"r": 4, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}}
    assert rank_patterns({"b.c": (1, 1.0), "a": (2, 1.0), "d": (2, 1.0)})["rank_pattern"] == {r"^b\.c": 1}


def test_parts_of_a_layer_have_no_graph_and_a_new_one_computes_the_same():
    layer = LoRALinear(nn.Linear(5, 6).double(), 3, dropout=0.25).eval()
    layer.B.data = gaussian(6, 3)
    A, B, scale = lora_parts(layer)
    assert not A.requires_grad and not B.requires_grad
    new = lora_of(layer, A, B, scale)
    assert new.base is layer.base and new.dropout.p == 0.25 and not new.training
    torch.testing.assert_close(new(gaussian(2, 5)), layer(gaussian(2, 5)), rtol=0, atol=1e-12)


def test_new_factors_are_new_parameters_that_train_as_the_old_did():
    layer = LoRALinear(nn.Linear(5, 6), 3)
    old, _ = layer.A, layer.B.requires_grad_(False)
    A = torch.ones(5, 2)
    set_factors(layer, A.T, torch.zeros(6, 2), 3)
    assert layer.A is not old and layer.A.requires_grad and not layer.B.requires_grad and layer.A.is_contiguous()
    assert layer.rank == 2 and layer.scale == 3.0
    A.zero_()
    assert bool((layer.A == 1).all())  # a copy


def test_a_layer_takes_the_rank_of_whole_factors_only():
    layer = LoRALinear(nn.Linear(5, 6), 3)
    A, B = torch.ones(2, 5), torch.ones(6, 2)
    for state in ({}, {"A": A}, {"A": A, "B": torch.ones(6, 1)}, {"A": torch.ones(2, 4), "B": B}, {"A": 1, "B": B}):
        take_rank(layer, state, "")
        assert layer.rank == len(layer.A) == 3
    take_rank(layer, {"x.A": A, "x.B": B}, "x.")
    assert layer.rank == len(layer.A) == layer.B.shape[1] == 2


def test_what_cannot_be_cut_is_named():
    assert list(squeezable(net(PiSSALinear))) == ["0", "2"]
    with pytest.raises(ValueError, match="model: got DoRALinear at '0', DoRALinear at '2'"):
        squeezable(net(DoRALinear))
    model = net(PiSSALinear)
    held = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="model: got PiSSALinear at '0', wanted LoRALinear only"):
        trained_layers(model, held)
    model = net()
    with pytest.raises(ValueError, match="optimizer: got no factors of '2'"):
        trained_layers(model, torch.optim.SGD(model[0].adapter_parameters().values(), lr=0.1))
    assert [path for path, _ in adapters(model)] == ["0", "2"]
