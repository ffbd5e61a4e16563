"""The two base classes of layers: what they freeze, and what they show of themselves."""

import inspect

import pytest
import torch
from torch import nn

from lowrank_ref.adapters import DoRALinear, LoRALinear
from lowrank_ref.core.bases import AdaptedLinear, WeightLayer
from lowrank_ref.lowbit import BitLinear
from lowrank_ref.pretraining import SLTrainLinear


def test_an_adapter_freezes_its_base_and_trains_its_own():
    layer = LoRALinear(nn.Linear(6, 4), rank=2)
    assert isinstance(layer, AdaptedLinear)
    assert not any(p.requires_grad for p in layer.base.parameters())
    assert set(layer.adapter_parameters()) == {"A", "B"}
    assert all(p.requires_grad for p in layer.adapter_parameters().values())


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, AdaptedLinear])
def test_help_shows_the_arguments_of_an_adapter(kind):
    """Also on the reference pages and in editors: not those of the metaclass's call, which takes any."""
    found = inspect.signature(kind)
    assert [*found.parameters] == [*inspect.signature(kind.__init__).parameters][1:]
    assert {"base"} <= set(found.parameters) and "args" not in found.parameters


def test_an_adapter_of_an_adapter_is_refused():
    with pytest.raises(TypeError, match="base: got LoRALinear"):
        LoRALinear(LoRALinear(nn.Linear(6, 4), rank=2), rank=2)


@pytest.mark.parametrize("layer", [BitLinear(nn.Linear(6, 4)), SLTrainLinear(6, 4, rank=1, density=0.2)])
def test_a_layer_that_is_the_weight_shows_the_weight_it_computes_with(layer):
    assert isinstance(layer, WeightLayer) and layer.rest_trains
    if layer.is_product:
        x = torch.ones(2, 6)
        wanted = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        assert torch.allclose(layer(x), wanted, atol=1e-5)
    else:  # PyTorch's encoder looks for hooks before it multiplies by itself
        assert layer._forward_pre_hooks
