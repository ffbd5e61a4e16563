"""Surgery on models. The adapter here adds one trained matrix: the simplest there is."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_ref.core.layers import (
    AdaptedLinear,
    Adapter,
    WeightLayer,
    adapters,
    is_conv1d,
    is_linear,
    merge_adapters,
    replace_linears,
    replace_modules,
    weight_of,
    with_weight,
)


class Shift(AdaptedLinear):
    adapter_names = ("shift",)

    def __init__(self, base):
        super().__init__(base)
        W = weight_of(base)
        self.shift = nn.Parameter(torch.full(W.shape, 0.5, dtype=torch.promote_types(W.dtype, torch.float32)))

    def delta_weight(self):
        return self.shift


class Conv1D(nn.Module):
    """Stands for transformers' class: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.ModuleDict({"out": nn.Linear(4, 2)}))


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def snapshot(model):
    return {n: (id(m), m.training) for n, m in model.named_modules()}, {
        n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()
    }


def assert_untouched(model, before):
    modules, parameters = snapshot(model)
    assert modules == before[0] and parameters.keys() == before[1].keys()
    for name, (value, grad) in before[1].items():
        assert torch.equal(parameters[name][0], value) and parameters[name][1] == grad, name


# One layer.


def test_kinds_of_layers():
    assert is_linear(nn.Linear(2, 2)) and is_linear(Conv1D(2, 2)) and is_conv1d(Conv1D(2, 2))
    assert not is_linear(nn.Conv1d(2, 2, 1)) and not is_conv1d(nn.Conv1d(2, 2, 1)) and not is_conv1d(nn.Linear(2, 2))


def test_weight_of_is_out_in_and_a_view():
    for layer in (nn.Linear(3, 2), Conv1D(2, 3)):
        assert weight_of(layer).shape == (2, 3)
        assert weight_of(layer).data_ptr() == layer.weight.data_ptr()


def test_weight_of_refuses_other_layers_and_quantised_weights():
    with pytest.raises(TypeError, match="base: got ReLU"):
        weight_of(nn.ReLU())
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"base\.weight: got dtype torch\.int8"):
        weight_of(layer)
    layer.weight = nn.Parameter(torch.ones(2, 3, 1))
    with pytest.raises(ValueError, match=r"base\.weight: got shape \(2, 3, 1\)"):
        weight_of(layer)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Linear(3, 2, bias=False), Conv1D(2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_weight_copies_everything_and_shares_nothing(layer, dtype):
    layer = layer.to(dtype).eval()
    W, x = torch.randn(2, 3), torch.randn(5, 3).to(dtype)
    new = with_weight(layer, W)
    assert type(new) is type(layer) and not new.training and not any(p.requires_grad for p in new.parameters())
    assert new.weight.dtype == dtype and new.weight.is_contiguous()
    bias = None if layer.bias is None else layer.bias
    torch.testing.assert_close(new(x), F.linear(x, W.to(dtype), bias))
    W.zero_()
    assert bool(weight_of(new).abs().min() > 0) and vars(new).keys() == vars(layer).keys()
    if layer.bias is not None:
        assert new.bias.data_ptr() != layer.bias.data_ptr()


def test_adapter_freezes_and_never_writes_its_base():
    base = nn.Linear(3, 2).eval()
    before = base.weight.detach().clone()
    layer = Shift(base)
    assert trained(layer) == ["shift"] and not layer.training
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), F.linear(x, base.weight + 0.5, base.bias))
    merged = layer.train().eval().merged()
    assert torch.equal(merged.weight, before + 0.5) and torch.equal(base.weight, before)
    assert "3 -> 2" in repr(layer)


def test_adapting_an_adapter_raises():
    with pytest.raises(TypeError, match="Shift, an adapter already|wanted nn.Linear"):
        Shift(Shift(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="merge it before"):
        Adapter(Shift(nn.Linear(2, 2)))


def test_update_is_computed_in_the_adapters_dtype_and_returned_in_the_bases():
    layer = Shift(nn.Linear(3, 2).bfloat16())
    layer.update = lambda x: (seen.append(x.dtype), F.linear(x, layer.shift))[1]
    seen = []
    assert layer(torch.randn(4, 3).bfloat16()).dtype == torch.bfloat16 and seen == [torch.float32]


def test_merging_a_bfloat16_base_rounds_once():
    layer = Shift(nn.Linear(64, 64).bfloat16())
    exact = layer.base.weight.double() + 0.5
    assert torch.equal(layer.merged().weight, exact.to(torch.bfloat16))


# Surgery.


def test_replace_linears_adapts_the_matches_and_freezes_the_rest():
    model = net()
    assert replace_linears(model, r"^0$", Shift) is model
    assert trained(model) == ["0.shift"] and [path for path, _ in adapters(model)] == ["0"]


def test_what_is_named_keeps_training_also_through_a_second_call():
    model = replace_linears(net(), r"^0$", Shift, trainable=r"out\.bias$")
    assert trained(model) == ["0.shift", "2.out.bias"]
    replace_linears(model, r"out$", Shift)
    assert trained(model) == ["0.shift", "2.out.shift"]  # the bias now belongs to a frozen base


def test_a_second_call_keeps_what_the_first_one_kept():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    replace_linears(model, "^0$", Shift, trainable=r"^2\.")
    replace_linears(model, "^1$", Shift)
    assert trained(model) == ["0.shift", "1.shift", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda m: replace_linears(m, "attention", Shift),
            ValueError,
            r"pattern: got 'attention'.*near candidates are: ",
        ),
        (lambda m: replace_linears(m, "1", Shift), ValueError, "which matches nothing"),  # a ReLU is no linear layer
        (lambda m: replace_linears(m, "2.oot", Shift), ValueError, r"near candidates are: 2\.out"),
        (lambda m: replace_linears(m, "0", Shift, trainable="head"), ValueError, "trainable: got 'head'"),
        (lambda m: replace_modules(m, "", Shift, accepts=lambda x: True), TypeError, "base: got ReLU|ModuleDict"),
        (lambda m: merge_adapters(m), ValueError, "wanted a model that contains an adapter"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(call, error, message):
    model = net()
    model[0].bias.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_untouched(model, before)


def test_no_adapter_goes_inside_another():
    model = replace_linears(net(), r"^0$", Shift)
    with pytest.raises(ValueError, match="matches nothing"):
        replace_linears(model, r"^0", Shift)


def test_the_second_path_of_a_shared_layer_is_a_path_too():
    shared = nn.Linear(2, 2)
    model = replace_linears(nn.Sequential(shared, nn.ReLU(), shared), "^2$", Shift)
    assert model[0] is model[2] and isinstance(model[0], Shift)


class Tuple(nn.Linear):
    """A router: its forward returns more than a tensor."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.argmax(-1)


class Routed(nn.Linear):
    """Its forward asks for more than a tensor."""

    def forward(self, x, mask):
        return super().forward(x) * mask


class Wide(nn.Linear):
    def forward(self, x):
        return super().forward(x).unsqueeze(0)


@pytest.mark.parametrize(
    "kind, message",
    [
        (Tuple, "Tuple, which returns tuple, wanted a layer that takes"),
        (Routed, "Routed, which raises TypeError.*mask"),
        (Wide, r"Wide, which returns \(1, 1, 4\), wanted a layer .* returns \(\.\.\., 4\)"),
    ],
)
def test_layers_that_take_or_return_something_else_are_refused_by_name(kind, message):
    model = nn.Sequential(nn.Linear(3, 3), kind(3, 4))
    before = snapshot(model)
    with pytest.raises(TypeError, match=message + r".*\(at 1\)"):
        replace_linears(model, "", Shift)
    assert_untouched(model, before)


@pytest.mark.parametrize("made", [None, "LoRA", Shift, torch.ones(2)])
def test_a_factory_that_makes_no_module_is_named(made):
    model = net()
    before = snapshot(model)
    with pytest.raises(TypeError, match="factory: got .* for 0, wanted an nn.Module"):
        replace_linears(model, "", lambda layer: made)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_an_error_of_the_factory_says_at_which_layer(error):
    def fails(layer):
        if layer.out_features == 2:
            raise error("rank: got 64")
        return Shift(layer)

    model = net()
    before = snapshot(model)
    with pytest.raises(error, match=r"rank: got 64 \(at 2\.out\)"):
        replace_linears(model, "", fails)
    assert_untouched(model, before)


class Fails(AdaptedLinear):
    """An adapter whose constructor fails after that of its base class."""

    def __init__(self, base):
        super().__init__(base)
        raise ValueError("too late")


def test_an_adapter_that_cannot_be_built_leaves_its_base_as_it_was():
    base = nn.Linear(2, 2)
    base.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="too late"):
        Fails(base)
    assert trained(base) == ["weight"]


def test_trainable_adds_and_never_unfreezes_a_base():
    model = replace_linears(net(), "^0$", Shift, trainable=".")
    assert trained(model) == ["0.shift", "2.out.weight", "2.out.bias"]
    replace_linears(model, "out", Shift, trainable=".")
    assert trained(model) == ["0.shift", "2.out.shift"]
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="only weights of adapted layers; every adapter keeps its base frozen"):
        replace_linears(model, "^0$", Shift, trainable="^0")
    assert_untouched(model, before)
    tied = replace_linears(Tied(), "out", Shift, trainable=["body", "emb"])
    assert trained(tied) == ["body.weight", "body.bias", "out.shift"]  # emb.weight is the base of `out`


class Whole(WeightLayer):
    """A layer that is the weight: the simplest there is."""

    is_product = True

    def __init__(self, base):
        super().__init__()
        self.kernel = nn.Parameter(base.weight.detach().clone())

    def forward(self, x):
        return F.linear(x, self.kernel)


class Inference(Whole):
    rest_trains = False


def test_one_rule_by_family():
    everything = ["0.kernel", "2.out.weight", "2.out.bias"]
    assert trained(replace_linears(net(), "^0$", Whole)) == everything
    assert trained(replace_linears(net().requires_grad_(False), "^0$", Whole)) == everything
    assert trained(replace_linears(net(), "^0$", Whole, trainable="out")) == everything
    mixed = replace_linears(replace_linears(net(), "out", Shift), "^0$", Whole)
    assert trained(mixed) == ["0.kernel", "2.out.shift"]
    assert trained(replace_linears(replace_linears(net(), "out", Whole), "^0$", Shift)) == ["0.shift"]
    assert trained(replace_linears(net(), "^0$", Inference)) == ["0.kernel"]
    plain = replace_linears(net().requires_grad_(False), "^0$", lambda layer: nn.Linear(3, 4))
    assert trained(plain) == ["0.weight", "0.bias"]  # neither family: nothing else is changed


def test_a_line_in_the_log_says_what_was_done(caplog):
    caplog.set_level("INFO", "lowrank_ref")
    replace_linears(net(), "", Shift)
    replace_linears(net(), "^0$", Whole)
    assert caplog.messages == [
        "adapts 2 layers (Shift): 0, 2.out; trains 20 of 46 numbers",
        "replaces 1 layers (Whole): 0; trains 22 of 22 numbers",
    ]


def test_a_head_that_freezes_with_the_rest_is_a_warning(caplog, capsys):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "classifier": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))})
    replace_linears(model, "body", Shift, trainable="classifier")
    assert not caplog.messages
    model["classifier"].requires_grad_(True)
    replace_linears(merge_adapters(model), "body", Shift)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "froze the head 'classifier'" in caplog.text and 'trainable=["classifier"]' in caplog.text
    replace_linears(merge_adapters(model), "body", Shift)  # it was frozen before
    assert len(caplog.messages) == 1 and capsys.readouterr().out == ""


def test_an_adapted_output_layer_is_a_warning(caplog):
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "score": nn.Linear(2, 3)})
    replace_linears(model, "", Shift)
    assert len(caplog.messages) == 1 and "adapts the output layer 'score' as well" in caplog.text
    caplog.clear()
    replace_linears(merge_adapters(model), "all-linear", Shift, trainable=["score"])
    assert not caplog.messages and trained(model) == ["body.shift", "score.weight", "score.bias"]


def test_models_that_others_wrapped_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="got PEFT's PeftModel.*merge_and_unload"):
        replace_linears(model, "lora_A", Shift)
    with pytest.raises(ValueError, match=r"got PEFT's Linear at '0'"):
        replace_linears(model.base_model.model, "out", Shift)
    replace_linears(model.merge_and_unload(), "out", Shift)


@pytest.mark.usefixtures("group_of_one")
def test_a_model_inside_ddp_is_refused():
    with pytest.raises(ValueError, match="DistributedDataParallel, which would not see new parameters"):
        replace_linears(nn.parallel.DistributedDataParallel(net()), "0", Shift)


@pytest.mark.parametrize(
    "model, factory, message",
    [
        ("gpt2", Shift, "model: got str, wanted an nn.Module|Expected type"),
        (nn.Sequential(nn.Linear(2, 2)), None, "factory: got None, wanted a function of a layer|Expected type"),
        (nn.Sequential(nn.Linear(2, 2)), Shift(nn.Linear(2, 2)), r"factory: got Shift\(.*wanted a function of a layer"),
    ],
)
def test_a_name_in_place_of_a_model_and_a_layer_in_place_of_a_factory_are_named(model, factory, message):
    with pytest.raises(TypeError, match=f"(?s){message}"):
        replace_linears(model, "0", factory)


def test_layers_are_built_in_the_order_of_the_model():
    order = []
    replace_linears(net(), "", lambda layer: order.append(layer.out_features) or Shift(layer))
    assert order == [4, 2]


class Reader(nn.Module):
    """Multiplies with the weight of one layer itself, and asks for the dtype of another."""

    def __init__(self):
        super().__init__()
        self.read, self.asked = nn.Linear(3, 3), nn.Linear(3, 3)
        self.read.weight.requires_grad_(True)

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        return self.asked(x) @ self.read.weight.T


class Rounded(Whole):
    is_product = False
    weight = property(lambda self: self.kernel)

    def forward(self, x):
        return F.linear(x.round(), self.kernel)


def test_who_reads_a_weight_that_is_not_all_the_layer_does_is_named_and_nothing_is_replaced():
    model = nn.ModuleDict({"part": Reader()})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"part\.read: got Rounded in Reader, which takes its `weight`"):
        replace_linears(model, "", Rounded)
    assert_untouched(model, before)
    replace_linears(model, "asked", Rounded)["part"](torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"part\.read: got Dropping .* take dropout = 0"):
        replace_linears(model, "read", Dropping)
    replace_linears(model, "read", Shift)["part"](torch.randn(2, 3)).sum().backward()
    assert model["part"].read.shift.grad.any()


class Dropping(Shift):
    def __init__(self, base):
        super().__init__(base)
        self.dropout = nn.Dropout(0.1)


def test_a_bare_layer_has_no_place_to_swap():
    with pytest.raises(ValueError, match="pattern"):
        replace_linears(nn.Linear(2, 2), "", Shift)
    with pytest.raises(ValueError, match="model: got Shift"):
        merge_adapters(Shift(nn.Linear(2, 2)))


def test_a_layer_at_two_places_becomes_one_adapter_at_both():
    shared = nn.Linear(2, 2)
    model = replace_linears(nn.Sequential(shared, nn.ReLU(), shared), "^0$", Shift)
    assert model[0] is model[2] and trained(model) == ["0.shift"] and len(list(adapters(model))) == 1
    x = torch.randn(3, 2)
    y = model(x)
    merge_adapters(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), y)


def test_merging_twice_raises_and_the_merged_model_is_plain():
    model = replace_linears(net(), "0|out", Shift)
    assert merge_adapters(model) is model and not list(adapters(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    assert model.state_dict().keys() == net().state_dict().keys()
    with pytest.raises(ValueError, match="contains an adapter"):
        merge_adapters(model)


def test_an_infinite_update_is_not_merged_and_nothing_is():
    model = replace_linears(net(), "0|out", Shift)
    with torch.no_grad():
        model[2]["out"].shift[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match="delta_weight: got NaN or infinite"):
        merge_adapters(model)
    assert_untouched(model, before)


class Tied(nn.Module):
    """An output layer that shares the embedding's weight, with the config that transformers gives such a model."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"tie_word_embeddings": True})()
        self.emb, self.body, self.out = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.emb.weight


def test_a_tied_weight_comes_loose_at_the_merge_and_the_config_says_so():
    model = replace_linears(Tied(), "out", Shift)
    assert model.out.base.weight is model.emb.weight
    old = model.emb.weight.detach().clone()
    merge_adapters(model)
    assert torch.equal(model.emb.weight, old) and torch.equal(model.out.weight, old + 0.5)
    assert model.config.tie_word_embeddings is False


class ShiftRows(Adapter):
    adapter_names = ("shift",)

    def __init__(self, base):
        super().__init__(base)
        self.shift = nn.Parameter(torch.ones(base.weight.shape))

    def merged(self):
        return nn.Embedding.from_pretrained(self.base.weight + self.shift)


def test_a_tied_weight_with_adapters_on_both_sides_comes_loose_too():
    model = replace_linears(Tied(), "out", Shift)
    replace_modules(model, "emb", ShiftRows, accepts=lambda m: isinstance(m, nn.Embedding))
    merge_adapters(model)
    torch.testing.assert_close(model.emb.weight - model.out.weight, torch.full((5, 3), 0.5))
    assert model.config.tie_word_embeddings is False


def test_a_merge_elsewhere_leaves_the_tie_alone():
    model = merge_adapters(replace_linears(Tied(), "body", Shift))
    assert model.out.weight is model.emb.weight and model.config.tie_word_embeddings is True
