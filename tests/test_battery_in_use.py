"""What use does to layers: others' forwards and hooks, casts, devices, loading, PyTorch's encoder. For every method.

The cases are those of `battery.py`; what a method computes is in `test_battery.py`.
"""

import copy
from functools import partial

import battery
import pytest
import torch
from battery import LAYERS, WEIGHT_LAYERS, M, N, adapter, batch, linear, seeded, tolerance
from torch import nn

from lowrank_ref.adapters import LoRAConv2d, LoRAEmbedding, SingularCoreLinear, SVFitLinear
from lowrank_ref.core.layers import Adapter, WeightLayer, disabled, merge_adapters, replace_linears

each_layer = pytest.mark.parametrize("name", LAYERS)
each_weight_layer = pytest.mark.parametrize("name", WEIGHT_LAYERS)


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance(atol))


def assert_equal_states(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def model_of(name):
    """One adapter inside a model."""
    return replace_linears(nn.Sequential(linear()), "0", lambda base: adapter(name, base=base)).eval()


class Doubled(nn.Linear):
    """Stands for subclasses that compute something of their own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Stands for subclasses that compute what `nn.Linear` does, such as that of `MultiheadAttention`."""


def like(kind):
    """The base layer, as another class."""
    base = kind(N, M, device=battery.DEVICE, dtype=battery.DTYPE)
    base.load_state_dict(linear().state_dict())
    return base


@each_layer
@pytest.mark.parametrize("rows", [8, 200])
def test_a_forward_that_was_set_on_the_base_is_called(name, rows):
    """As accelerate does to move weights. With many rows RandLoRA takes another way."""
    base = linear()
    base.forward = lambda x, forward=base.forward: forward(x) - 1
    layer, x = adapter(name, base=base).eval(), batch(0, rows=rows)
    with torch.no_grad():
        assert_close(layer(x), adapter(name).eval()(x) - 1, 1e-11)
    with pytest.raises(TypeError, match="forward of its own"):
        layer.merged()


@each_layer
def test_a_subclass_is_called_and_not_merged_unless_it_computes_what_its_parent_does(name):
    own, same, x = (
        (adapter(name, base=like(kind)).eval() for kind in (Doubled, Renamed)),
        adapter(name).eval(),
        batch(0),
    )
    own, renamed = own
    assert_close(own(x) - own.base(x), same(x) - same.base(x), 1e-11)
    with pytest.raises(TypeError, match="Doubled with a forward of its own"):
        own.merged()
    assert type(renamed.merged()) is Renamed
    assert_close(renamed.merged()(x), renamed(x), 1e-11)


@each_layer
def test_hooks_of_the_base_run_and_are_not_merged_away(name):
    layer, x, seen = adapter(name).eval(), batch(0), []
    wanted = layer(x)
    handle = layer.base.register_forward_hook(lambda module, inputs, y: seen.append(y) or y + 1)
    assert_close(layer(x), wanted + 1, 1e-11)
    with pytest.raises(TypeError, match="1 hooks"):
        layer.merged()
    handle.remove()
    assert len(seen) == 1
    assert_close(layer.merged()(x), wanted, 1e-11)


@each_layer
def test_hooks_of_an_adapter_move_to_the_merged_layer(name):
    model, seen = model_of(name), []
    handle = model[0].register_forward_hook(lambda module, inputs, y: seen.append(type(module)))
    merge_adapters(model)(batch(0))
    handle.remove()
    model(batch(0))
    assert seen == [nn.Linear]


@each_layer
@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_weight_normed_base_computes_and_merges_right_also_after_loading(name, kind):
    norm = {"new": nn.utils.parametrizations.weight_norm, "old": nn.utils.weight_norm}[kind]

    def build(seed):
        base = linear()
        with torch.no_grad():
            base.weight.copy_(torch.randn(M, N, generator=seeded(seed)))
        return adapter(name, base=norm(base), seed=seed).eval()

    old, new, x = build(1), build(2), batch(0)
    new.load_state_dict(old.state_dict())
    assert_close(new.merged().weight, old.merged().weight, 1e-11)  # before a forward has refreshed `weight`
    wanted = nn.functional.linear(x, old.weight, old.bias)
    assert_close(new(x), wanted, 1e-11)
    assert type(old.merged()) is nn.Linear
    assert_close(old.merged()(x), wanted, 1e-11)


@each_layer
def test_a_base_that_is_loaded_after_the_surgery_is_right_or_an_error(name):
    layer, x = LAYERS[name](linear(torch.float32), generator=seeded()).eval(), batch(0, torch.float32)
    layer.to(torch.bfloat16).to(torch.float32)  # a cast is no other weight
    with torch.no_grad():
        layer.base.weight.copy_(torch.randn(M, N, generator=seeded(3)))
    by_weight = lambda: layer.base(x) + x @ (layer.weight - layer.base.weight).T  # noqa: E731
    for use in (lambda: layer(x), lambda: layer.merged()(x), by_weight):
        if layer.starts_from_weight:
            with pytest.raises(ValueError, match="load the base first"):
                use()
        else:
            torch.testing.assert_close(use(), layer.base(x), rtol=0, atol=1e-5)
    unchanged, wanted = (LAYERS[name](linear(torch.float32), generator=seeded()) for _ in range(2))
    torch.testing.assert_close(unchanged.bfloat16().float()(x), wanted(x), rtol=0, atol=0.05)


@each_layer
def test_all_of_a_layer_may_be_loaded(name):
    """Also what starts from a weight: its own numbers came along."""
    old, new = adapter(name, seed=1), LAYERS[name](like(Renamed), generator=seeded(2))
    with torch.no_grad():
        old.base.weight.copy_(torch.randn(M, N, generator=seeded(3)))
    old._start = None
    new.load_state_dict(old.state_dict())
    assert_close(new.eval()(batch(0)), old.eval()(batch(0)))


@each_layer
def test_weight_is_what_forward_multiplies_with_and_reaches_all_that_trains(name):
    layer, x = adapter(name).eval(), batch(0)
    assert torch.equal(layer.weight, layer.merged().weight) and layer.bias is layer.base.bias
    assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())
    layer(x).square().sum().backward()
    wanted = {key: p.grad.clone() for key, p in layer.adapter_parameters().items()}
    layer.zero_grad()
    nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    for key, p in layer.adapter_parameters().items():
        assert_close(p.grad, wanted[key], 1e-10)
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv = Conv1D(M, N).double()
    conv.weight, conv.bias = nn.Parameter(linear().weight.T.clone()), nn.Parameter(linear().bias.detach().clone())
    assert_close(adapter(name, base=conv).weight, layer.weight.T)
    assert adapter(name, base=linear(torch.bfloat16)).weight.dtype == torch.bfloat16  # some models ask


@each_layer
def test_what_lies_between_two_factors_does_not_overflow_float16(name):
    """The input and the result are far from the largest number, 65,504."""
    layer = adapter(name, base=linear(torch.float16)).eval()
    with torch.no_grad():
        scaled = {"lam": 1e4, "gamma": 1e-4, "A": 1e4, "B": 1e-4, "G1": 1e4, "alpha": 1e4, "beta": 1e-4}
        for key, p in layer.adapter_parameters().items():
            p.mul_(scaled.get(key, 1))
        for key, p in layer.named_buffers():
            p.mul_(scaled.get(key[0], 1)) if p.is_floating_point() else None
    x = 20 * batch(0, torch.float16)
    exact = nn.functional.linear(x.float(), layer.base.weight.float() + layer.delta_weight(), layer.base.bias.float())
    for autocast in (False, True):
        with torch.autocast(battery.DEVICE, torch.float16, enabled=autocast):
            y = layer(x)
        torch.testing.assert_close(y.float(), exact, rtol=0.01, atol=0.01 * exact.abs().max().item())


@each_layer
def test_a_merge_that_float16_cannot_hold_is_refused(name):
    layer = adapter(name, base=linear(torch.float16))
    with torch.no_grad():
        layer.base.weight.fill_(6e4)
        layer._start = None
        for p in layer.adapter_parameters().values():
            p.mul_(1e6)
    with pytest.raises(ValueError, match="float16 can hold"):
        layer.merged()


@each_layer
@pytest.mark.parametrize("rows", [8, 200])
def test_what_was_used_in_inference_mode_trains_afterwards(name, rows):
    with torch.inference_mode():
        layer = adapter(name, base=linear(torch.float32), seed=11)
        with torch.autocast(battery.DEVICE, torch.bfloat16):
            layer(batch(0, torch.float32, rows))
    other = adapter(name, base=linear(torch.float32), seed=11)  # shares what RandLoRA draws once
    for x in (batch(0, torch.float32, rows), batch(1, torch.float32, rows)):
        with torch.autocast(battery.DEVICE, torch.bfloat16):
            other(x).float().sum().backward()
        other(x).sum().backward()
    assert all(p.grad is not None for p in other.adapter_parameters().values())


@pytest.mark.parametrize("name", [*LAYERS, "SVFit, multiplicative", "core, multiplicative"])
def test_over_a_weight_of_zeros_something_trains_or_it_is_refused(name):
    kinds = {"SVFit, multiplicative": SVFitLinear, "core, multiplicative": SingularCoreLinear}
    make = partial(kinds[name], form="multiplicative") if name in kinds else LAYERS[name]
    base = linear(torch.float32)
    nn.init.zeros_(base.weight)
    try:
        layer = make(base, generator=seeded())
    except ValueError as error:
        assert "zero" in str(error) or "largest singular value (multiplicative): got 0" in str(error)
        assert base.weight.requires_grad
        return
    layer(batch(0, torch.float32)).square().sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in layer.adapter_parameters().values())


@each_layer
def test_a_float8_base_is_refused_and_stays_as_it_was(name):
    """PyTorch stores float8 and adds or promotes nothing of it."""
    base = linear(torch.float32).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="got dtype torch.float8_e4m3fn, wanted a floating-point dtype of 16 bits"):
        LAYERS[name](base, generator=seeded())
    assert base.weight.requires_grad


@pytest.mark.parametrize("base, make", [(nn.Embedding(5, 4), LoRAEmbedding), (nn.Conv2d(4, 4, 3), LoRAConv2d)])
def test_a_float8_embedding_or_convolution_too(base, make):
    with pytest.raises(TypeError, match="got dtype torch.float8_e4m3fn, wanted a floating-point dtype of 16 bits"):
        make(base.to(torch.float8_e4m3fn), 2)


@each_layer
def test_a_layer_built_on_the_meta_device_is_loaded_or_refused(name):
    wanted, base = adapter(name, seed=1).eval(), linear().to("meta")
    if wanted.starts_from_weight:
        with pytest.raises(ValueError, match="meta device"):
            LAYERS[name](base, generator=seeded())
        return
    for load in (
        lambda layer: layer.to_empty(device=battery.DEVICE).load_state_dict(wanted.state_dict()),
        lambda layer: layer.load_state_dict(wanted.state_dict(), assign=True),
    ):
        layer = LAYERS[name](linear().to("meta"), generator=seeded()).eval()
        load(layer)
        assert torch.equal(layer(batch(0)), wanted(batch(0)))
    base._hf_hook = "accelerate keeps the weight elsewhere"
    with pytest.raises(ValueError, match="offloaded"):
        LAYERS[name](base, generator=seeded())


@each_layer
def test_a_cast_of_the_model_leaves_what_the_adapter_owns_in_float32(name):
    layer = adapter(name, base=linear(torch.float32))
    before = copy.deepcopy(layer.state_dict())
    layer.to(torch.bfloat16).half()
    assert layer.base.weight.dtype == torch.float16
    for key, value in layer.state_dict().items():
        if not key.startswith("base."):
            assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
    assert {p.dtype for p in layer.double().parameters()} == {torch.float64}


@each_layer
def test_switched_off_it_is_the_base_and_afterwards_itself(name):
    model, x = model_of(name), batch(0)
    y, state = model(x), copy.deepcopy(model.state_dict())
    with disabled(model) as off:
        assert off is model and not any(isinstance(m, Adapter) for m in model.modules())
        assert (
            torch.equal(model(x), linear()(x))
            and model.state_dict().keys() == nn.Sequential(linear()).state_dict().keys()
        )
        model.train()
    assert torch.equal(model.eval()(x), y) and model[0].training is False
    assert_equal_states(model.state_dict(), state)
    with pytest.raises(ValueError, match="contains an adapter"), disabled(nn.Sequential(linear())):
        pass


@each_layer
def test_print_shows_the_rank(name):
    layer = adapter(name)
    assert f"{N} -> {M}" + (f", rank {layer.rank}" if hasattr(layer, "rank") else "") in repr(layer)


def encoder(pattern, make, dtype=torch.float32):
    """PyTorch's encoder in eval mode, which multiplies with the weights of linear layers itself."""
    layer = nn.TransformerEncoderLayer(M, 2, N, batch_first=True, dropout=0.0, dtype=dtype, device=battery.DEVICE)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) / 3)
    return replace_linears(model, pattern, make)


def assert_the_fused_encoder_agrees(model, atol=1e-5):
    x = torch.randn(2, 5, M, generator=seeded()).to(battery.DEVICE)
    mask = torch.zeros(2, 5, dtype=torch.bool, device=battery.DEVICE)
    mask[0, 3:] = True  # with a mask, the layers get a nested tensor
    for options in ({}, {"src_key_padding_mask": mask}):
        results = []
        for fused in (True, False):
            torch.backends.mha.set_fastpath_enabled(fused)
            with torch.no_grad():
                results.append(model(x, **options)[1])
        torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(*results, rtol=0, atol=atol)


@each_layer
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_pytorchs_encoder_computes_with_the_update(name):
    base, make = encoder("linear1", lambda m: m), lambda m: LAYERS[name](m, 2, generator=seeded())
    model = encoder("", make)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=seeded(8)).to(p), alpha=0.2)
    assert_the_fused_encoder_agrees(model)
    x = torch.randn(2, 5, M, generator=seeded()).to(battery.DEVICE)
    assert (model(x) - base(x)).abs().max() > 1e-2
    model.train()(x).square().sum().backward()  # also `out_proj`, whose forward nobody calls
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    wanted = model.eval()(x)
    torch.testing.assert_close(merge_adapters(model)(x), wanted, rtol=0, atol=1e-5)


# Layers that are the weight.


def test_every_layer_of_the_package_is_a_case_here():
    everywhere = {"LoRAEmbedding", "LoRAConv2d", "MaestroConv2d", "LRTokens"}  # no linear layers: tested elsewhere
    abstract = {"AdaptedLinear", "FactoredLinear", "KeepsWide", "Ternary"}

    def below(kind):
        return {sub for child in kind.__subclasses__() for sub in (child, *below(child))}

    # what ALLoRA's chapter compares it with: in tests/adapters/test_allora_family.py and test_allora_flaws.py
    controls = {"ALLoRAVariant", "ASFLoRALinear", "CompensatedLoRALinear", "RankDropoutLoRALinear"}
    ours = {kind.__name__ for kind in below(Adapter) | below(WeightLayer) if kind.__module__.startswith("lowrank_ref.")}
    assert ours - everywhere - abstract - controls == LAYERS.keys() | WEIGHT_LAYERS.keys()


@each_weight_layer
def test_with_a_layer_that_is_the_weight_everything_trains(name):
    make = partial(WEIGHT_LAYERS[name], generator=seeded())
    model = nn.Sequential(linear(), nn.LayerNorm(M), nn.Linear(M, 3)).requires_grad_(False)
    replace_linears(model, "0", make)
    inference = name == "PackedLinear"
    assert {p.requires_grad for p in model.parameters()} == {not inference}
    model = nn.Sequential(linear(), nn.Linear(M, 3).double())
    replace_linears(
        replace_linears(model, "1", LAYERS["LoRALinear"].__call__ if False else partial(LAYERS["LoRALinear"], rank=2)),
        "0",
        make,
    )
    frozen = {path for path, p in model.named_parameters() if not p.requires_grad}
    assert inference or frozen == {"1.base.weight", "1.base.bias"}


@each_weight_layer
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_pytorchs_encoder_computes_with_the_layer(name):
    make = partial(WEIGHT_LAYERS[name], generator=seeded())
    model = encoder("linear", make)
    assert_the_fused_encoder_agrees(model)
    if model.layers[0].linear1.is_product:
        model = encoder("out_proj", make)
        assert_the_fused_encoder_agrees(model)
        attention, x = model.layers[0].self_attn, torch.randn(2, 5, M, generator=seeded()).to(battery.DEVICE)
        plain = copy.deepcopy(attention)
        plain.out_proj = nn.Linear(M, M).to(x)
        plain.out_proj.weight.data, plain.out_proj.bias.data = (
            attention.out_proj.weight.detach(),
            attention.out_proj.bias,
        )
        torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0], rtol=0, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.out_proj: got .* in MultiheadAttention"):
            encoder("out_proj", make)


@each_weight_layer
def test_weight_can_be_read(name):
    """Models ask for its dtype; those that multiply with it get the product, or the layer is refused there."""
    layer = WEIGHT_LAYERS[name](linear(torch.float32), generator=seeded()).eval()
    assert layer.weight.shape == (M, N) and layer.weight.dtype == torch.float32
    if layer.is_product:
        x = batch(0, torch.float32)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=1e-5)


@each_weight_layer
def test_a_second_surgery_a_forward_of_its_own_and_hooks(name):
    make = partial(WEIGHT_LAYERS[name], generator=seeded())
    model = replace_linears(nn.Sequential(linear()), "0", make)
    with pytest.raises(ValueError, match=f"1 {name} .replaced already."):
        replace_linears(model, "0", make)
    with pytest.raises(TypeError, match="Doubled with a forward of its own"):
        replace_linears(nn.Sequential(like(Doubled)), "0", make)
    model, seen = nn.Sequential(linear()), []
    handle = model[0].register_forward_hook(lambda module, inputs, y: seen.append(type(module).__name__))
    replace_linears(model, "0", make)(batch(0))
    handle.remove()
    model(batch(0))
    assert seen == [name]


@each_layer
def test_on_the_meta_device_shapes_come_out_and_a_merge_is_refused(name):
    layer = adapter(name).to("meta")
    try:
        y = layer(batch(0).to("meta"))
    except ValueError as error:  # what draws its bases or looks at its start needs numbers
        assert "meta" in str(error)
    else:
        assert y.is_meta and y.shape == layer.base(batch(0).to("meta")).shape
    with pytest.raises(ValueError, match="meta"):
        layer.merged()
