"""An optimizer that was built before the surgery is noticed at its first step."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear
from lowrank_ref.core.layers import disabled, merge_adapters, replace_linears
from lowrank_ref.optimizers import GaLoreAdamW, per_layer_updates
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


@pytest.mark.parametrize("rate, warned", [(5e-5, True), (1e-3, False), (0.0, False)])
def test_the_rate_of_full_fine_tuning_is_a_warning_once(rate, warned, caplog):
    model = replace_linears(net(), "^0", LORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        step(model, optimizer)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert not warned or "5e-05 is one for full fine-tuning; adapters want about ten times" in caplog.text


def test_a_warm_up_and_other_parameters_have_their_rate(caplog):
    model = replace_linears(net(), "^0", LORA, trainable="^1")
    groups = [{"params": [model[0].A, model[0].B], "lr": 1e-3}, {"params": model[1].parameters(), "lr": 1e-5}]
    optimizer = torch.optim.AdamW(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 1000)
    step(model, optimizer)
    pissa = replace_linears(net(), "^0", partial(PiSSALinear, rank=2))  # whose paper takes 2e-5
    step(pissa, torch.optim.AdamW(pissa.parameters(), lr=2e-5))
    assert not caplog.messages


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_an_optimizer_that_has_stepped_is_looked_at_again_after_a_surgery():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    replace_linears(model, "^0", LORA)
    with pytest.raises(ValueError, match="build the optimizer after"):
        step(model, optimizer)


@pytest.mark.parametrize("again", [False, True])
def test_an_optimizer_that_was_kept_over_a_merge_is_noticed(again, caplog):
    model = replace_linears(net(), "^0", LORA)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    step(model, optimizer)
    optimizer.zero_grad()
    merge_adapters(model)
    if again:
        step(replace_linears(model, "^0", LORA), optimizer)
        assert "none of the optimizer's 2 tensors has a gradient" in caplog.text
    else:
        model.requires_grad_(True)
        with pytest.raises(ValueError, match="old weights of 2 layers that are Linear now"):
            step(model, optimizer)


def test_a_step_without_any_gradient_is_noticed_once(caplog):
    model = replace_linears(net(), "^0", LORA, trainable="^1")
    optimizer = torch.optim.AdamW(trained(model[0]), lr=1e-2)
    with disabled(model):
        step(model, optimizer)
    assert caplog.messages[0].startswith("none of the optimizer's 2 tensors has a gradient, so that its step changes")
    step(model, optimizer)
    assert len(caplog.messages) == 1


def test_a_closure_and_updates_in_backward_have_their_gradients_elsewhere(caplog):
    model = replace_linears(net(), "^0", LORA)
    closure = lambda: model(torch.ones(3, 4)).sum().backward() or 0.0  # noqa: E731
    torch.optim.SGD(trained(model), lr=0.1).step(closure)
    model.zero_grad()
    torch.optim.SGD(trained(model), lr=0.1).step(closure=closure)
    optimizer = GaLoreAdamW(trained(model), lr=0.1)
    hooks = per_layer_updates(optimizer)
    step(model, optimizer)
    assert hooks and not caplog.messages


def test_the_rate_of_full_fine_tuning_is_told_for_dora_too(caplog):
    model = replace_linears(net(), "^0", partial(DoRALinear, rank=2))
    step(model, torch.optim.AdamW(trained(model), lr=5e-5))
    assert "adapters want about ten times" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate, lost", [(1e-4, True), (1e-2, False)])
def test_steps_that_16_bits_lose_are_told(dtype, rate, lost, caplog):
    """A head that trains in full beside adapters, cast after the surgery; the adapters themselves stay in float32."""
    model = replace_linears(net(), "^0", LORA, trainable="^1")
    with torch.no_grad():
        model[1].weight.fill_(0.5)
    model.to(dtype)
    model(torch.ones(3, 4, dtype=dtype)).sum().backward()
    before = model[1].weight.detach().clone()
    torch.optim.AdamW(trained(model), lr=rate, weight_decay=0.0).step()
    assert torch.equal(before, model[1].weight) == lost
    assert [f"steps of {rate:g} are lost in most numbers of" in text for text in caplog.messages] == [True] * lost


def test_nothing_is_kept_alive():
    import gc
    import weakref

    model = net()
    old = [weakref.ref(p) for p in model.parameters()]
    replace_linears(model, "", SLTRAIN)
    gc.collect()
    assert all(ref() is None for ref in old)
