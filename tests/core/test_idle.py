"""An optimizer that was built before the surgery is noticed at its first step."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.optimizers import GaLoreAdamW
from lowrank_ref.pretraining import SLTrainLinear

LORA, SLTRAIN = partial(LoRALinear, rank=2), partial(SLTrainLinear.from_linear, rank=2)
OPTIMIZERS = {"SGD": partial(torch.optim.SGD, lr=0.1), "AdamW": torch.optim.AdamW, "GaLore": GaLoreAdamW}


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def step(model, optimizer):
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layer, kind", [(LORA, "LoRALinear"), (SLTRAIN, "SLTrainLinear")])
@pytest.mark.parametrize("trainable", [None, "^1"])
def test_built_too_early(name, layer, kind, trainable):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    replace_linears(model, "^0", layer, trainable=trainable)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # as often as it is tried
        with pytest.raises(ValueError, match=f"old weights of 2 layers that are {kind} now.*after replace_linears"):
            step(model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layer", [LORA, SLTRAIN])
def test_built_in_time_or_of_another_model(name, layer):
    other = net()
    early = OPTIMIZERS[name](other.parameters())
    model = replace_linears(net(), "^0", layer, trainable="^1")
    everything = OPTIMIZERS[name](model.parameters())
    some = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    head = OPTIMIZERS[name](model[1].parameters())
    for optimizer, trained in ((early, other), (everything, model), (some, model), (head, model)):
        step(trained, optimizer)


def test_a_parameter_added_to_the_optimizer_is_seen():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_linears(model, "^0", LORA)
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    step(model, optimizer)


def test_who_trains_the_base_on_purpose_may():
    model = replace_linears(net(), "^0", LORA)
    optimizer = torch.optim.SGD(model[0].base.requires_grad_(True).parameters(), lr=0.1)
    step(model, optimizer)


def test_nothing_is_kept_alive():
    import gc
    import weakref

    model = net()
    old = [weakref.ref(p) for p in model.parameters()]
    replace_linears(model, "", SLTRAIN)
    gc.collect()
    assert all(ref() is None for ref in old)
