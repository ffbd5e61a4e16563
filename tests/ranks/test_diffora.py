"""DiffoRA: equations against loops, the exact invariants in float64, the layer, and bad input."""

import copy
import io
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears
from lowrank_ref.ranks.diffora import (
    DiffoRALinear,
    couple_logits,
    gated_module_delta,
    gated_module_update,
    logit_gradient,
    module_logits,
    relaxed_gates,
    search_layers,
    top_modules,
)


def searched(m=6, n=5, rank=3, *, logit=0.0, **options):
    """A layer in float64 whose B is not zero."""
    layer = DiffoRALinear(nn.Linear(n, m, dtype=torch.float64), rank, generator=seeded(), **options)
    with torch.no_grad():
        layer.B.copy_(gaussian(m, rank, seed=1))
        layer.logit.fill_(logit)
    return layer


def net(seed=0, rank=2):
    """Linear, tanh, linear, tanh, linear, in float64, all searched."""
    torch.manual_seed(5)
    sizes = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)]
    return replace_linears(
        nn.Sequential(*sizes).double(), "", partial(DiffoRALinear, rank=rank, generator=seeded(seed))
    )


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# Each equation against a loop.


@given(shapes(), st.floats(0, 2))
def test_gated_delta_and_update_by_loops(shape, gate):
    m, n, r = shape
    A, B, x, s = gaussian(r, n), gaussian(m, r, seed=1), gaussian(3, n, seed=3), 0.7
    g = torch.tensor([gate], dtype=torch.float64)
    wanted = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        for j in range(n):
            wanted[i, j] = gate * s * sum(B[i, k] * A[k, j] for k in range(r))
    assert_close(gated_module_delta(A, B, g, s), wanted)
    assert_close(gated_module_update(x, A, B, g, s), x @ wanted.T, 1e-11)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7))
def test_relaxed_gates_by_loops(values):
    logits = torch.tensor(values, dtype=torch.float64)
    assert_close(relaxed_gates(logits).tolist(), [1 / (1 + math.exp(-v)) for v in values])
    total = sum(math.exp(v) for v in values)
    soft = relaxed_gates(logits, "softmax")
    assert_close(soft.tolist(), [len(values) * math.exp(v) / total for v in values], 1e-11)
    assert soft.mean().item() == pytest.approx(1)


def slow_top(logits, count):
    """Take the largest again and again; of equal ones the first."""
    left, taken = list(logits), []
    for _ in range(count):
        best = left[0]
        for path in left:
            if logits[path] > logits[best]:
                best = path
        taken.append(best)
        left.remove(best)
    return tuple(path for path in logits if path in taken)


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=8), st.data())
def test_top_modules_by_loops_with_ties(values, data):
    logits = {f"layer{i}": v / 2 for i, v in enumerate(values)}
    count = data.draw(st.integers(1, len(values)))
    kept = top_modules(logits, count)
    assert kept == slow_top(logits, count) and len(kept) == count


@given(st.lists(st.integers(-2, 2), min_size=2, max_size=4))
def test_top_modules_of_each_group(values):
    logits = {f"{layer}.{kind}": v + layer for layer in range(3) for kind, v in enumerate(values)}
    groups = {path: path[0] for path in logits}
    kept = top_modules(logits, 1, groups=groups)
    apart = [slow_top({p: v for p, v in logits.items() if p[0] == str(layer)}, 1) for layer in range(3)]
    assert kept == tuple(path for found in apart for path in found)


# Exact invariants of the card.


@given(shapes())
def test_open_gates_are_lora_and_closed_ones_the_base(shape):
    m, n, r = shape
    layer, x = searched(m, n, r, logit=800.0), gaussian(4, n)
    lora = LoRALinear(layer.base, r, generator=seeded())
    assert torch.equal(lora.A, layer.A) and lora.scale == layer.scale
    with torch.no_grad():
        lora.B.copy_(layer.B)
    assert torch.equal(layer(x), lora(x)) and torch.equal(layer.delta_weight(), lora.delta_weight())
    with torch.no_grad():
        layer.logit.fill_(-800.0)
    assert torch.equal(layer(x), layer.base(x)) and not layer.delta_weight().any()


def test_at_zero_the_update_is_half_of_loras():
    layer, lora = searched(), LoRALinear(nn.Linear(5, 6).double(), 3, generator=seeded())
    with torch.no_grad():
        lora.B.copy_(layer.B)
    assert layer.gate().item() == 0.5
    assert torch.equal(layer.delta_weight(), lora.delta_weight() / 2)


@given(shapes(), st.floats(-4, 4))
def test_the_gradient_of_a_logit(shape, logit):
    m, n, r = shape
    layer, x = searched(m, n, r, logit=logit), gaussian(5, n)
    layer(x).pow(3).sum().backward()
    W = layer.merged().weight.detach().requires_grad_()
    F.linear(x, W, layer.bias).pow(3).sum().backward()
    found = logit_gradient(W.grad, layer.A, layer.B, layer.logit, layer.scale)
    size = (W.grad.norm() * layer.B.norm() * layer.A.norm()).item() * layer.scale + 1
    assert_close(layer.logit.grad, found.detach(), 1e-12 * size)
    gate, slow = 1 / (1 + math.exp(-logit)), 0.0
    for i in range(m):
        for j in range(n):
            slow += float(W.grad[i, j]) * sum(float(layer.B[i, k] * layer.A[k, j]) for k in range(r))
    assert found.item() == pytest.approx(gate * (1 - gate) * layer.scale * slow, rel=1e-9, abs=1e-9 * size)


@given(shapes())
def test_at_the_start_only_b_moves(shape):
    m, n, r = shape
    layer = DiffoRALinear(nn.Linear(n, m).double(), r, generator=seeded())
    assert not layer.delta_weight().any()
    layer(gaussian(5, n)).square().sum().backward()
    assert not layer.logit.grad.any() and not layer.A.grad.any() and layer.B.grad.any()


@given(shapes(), st.floats(-3, 3), st.floats(0.2, 5))
def test_gate_and_b_can_trade_so_one_level_cannot_tell_them_apart(shape, logit, c):
    m, n, r = shape
    layer, x = searched(m, n, r, logit=logit), gaussian(3, n)
    before, gate = layer(x).detach(), torch.sigmoid(torch.tensor(logit, dtype=torch.float64)) / c
    if not 1e-6 < gate < 1 - 1e-6:
        return
    with torch.no_grad():
        layer.B.mul_(c)
        layer.logit.fill_(float(torch.logit(gate)))
    torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)


def test_the_derivative_of_the_sigmoid_at_zero_is_a_quarter():
    layer = searched()
    G = gaussian(6, 5, seed=4)
    wanted = layer.scale * (G * (layer.B @ layer.A)).sum() / 4
    assert_close(logit_gradient(G, layer.A, layer.B, layer.logit, layer.scale).sum(), wanted)


def test_numbers_of_the_card():
    """L = 12, N = 6: the search trains 442,368 + 72 numbers at r = 4 and width 768, the kept half 221,184."""
    layer = DiffoRALinear(nn.Linear(768, 768), 4)
    each = sum(p.numel() for p in layer.adapter_parameters().values())
    assert 72 * each == 442_368 + 72 and 36 * (each - 1) == 221_184
    assert len(top_modules({str(i): 0.0 for i in range(72)}, 36)) == 36


# The layer.


@given(shapes())
def test_merged_is_unmerged_and_exported(shape):
    m, n, r = shape
    layer, x = searched(m, n, r, logit=0.7), gaussian(4, n)
    assert_close(layer.merged()(x), layer(x), 1e-11)
    A, B, scale = layer.lora_factors()
    assert_close(scale * B @ A, layer.delta_weight())


def test_dropout_acts_on_the_input_of_the_update_only():
    layer = searched(3, 400, 2, dropout=0.25)
    x = torch.ones(400, dtype=torch.float64)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.25)
    assert_close(got, layer.base(x) + gated_module_update(dropped, layer.A, layer.B, layer.gate(), layer.scale))


def test_a_relaxed_model_exports_to_peft(tmp_path):
    model, x = net(), gaussian(3, 5)
    with torch.no_grad():
        for i, layer in enumerate(search_layers(model).values()):
            layer.B.copy_(gaussian(*layer.B.shape, seed=i))
            layer.logit.fill_(i - 1.0)
    plain = nn.Sequential(*(copy.deepcopy(m.base) if isinstance(m, DiffoRALinear) else m for m in model))
    save_peft(model, tmp_path)
    assert_close(load_peft(plain, tmp_path)(x), model(x), 1e-6)
    assert_close(merge_adapters(copy.deepcopy(model))(x), model(x), 1e-11)


def test_coupled_gates_are_a_softmax_over_the_model():
    model = net()
    with torch.no_grad():
        for i, layer in enumerate(search_layers(model).values()):
            layer.logit.fill_(i / 2)
    couple_logits(model)
    gates = torch.cat([layer.gate() for layer in search_layers(model).values()])
    assert_close(gates, 3 * torch.tensor([0, 0.5, 1.0], dtype=torch.float64).softmax(0))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        search_layers(twin)["0"].logit.fill_(9.0)  # a copy's gates look at the copy's logits
    assert search_layers(twin)["2"].gate() < 0.1 < 0.5 < search_layers(model)["2"].gate()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = net(seed=3)
    couple_logits(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_close(other(gaussian(2, 5)), model(gaussian(2, 5)))


def test_coupled_gates_in_groups_and_their_gradients():
    model, x = net(), gaussian(4, 5)
    couple_logits(model, groups={"0": "a", "2": "a", "4": "b"})
    with torch.no_grad():
        for i, layer in enumerate(search_layers(model).values()):
            layer.B.copy_(gaussian(*layer.B.shape, seed=i))
            layer.logit.fill_(0.3 * i)
    gates = {path: layer.gate().item() for path, layer in search_layers(model).items()}
    assert gates["4"] == 1 and gates["0"] + gates["2"] == pytest.approx(2)
    model(x).square().sum().backward()
    a, b = model[0].logit.grad.clone(), model[2].logit.grad.clone()
    assert_close(a, -b, 1e-9) and a.any()
    assert not model[4].logit.grad.any()  # alone in its group


def test_the_gradient_of_coupled_logits():
    model, x = net(), gaussian(4, 5)
    couple_logits(model)
    layers = list(search_layers(model).values())
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.B.copy_(gaussian(*layer.B.shape, seed=i))
            layer.logit.fill_(0.3 * i)
    merged = merge_adapters(copy.deepcopy(model)).requires_grad_(True)
    for network in (model, merged):
        network(x).pow(3).sum().backward()
    G = [layer.weight.grad for layer in merged if isinstance(layer, nn.Linear)]
    u = [(layer.scale * (g * (layer.B @ layer.A)).sum()).item() for layer, g in zip(layers, G)]
    gates = [layer.gate().item() for layer in layers]
    mean = sum(gate * value for gate, value in zip(gates, u)) / len(u)
    for layer, gate, value in zip(layers, gates, u):
        assert layer.logit.grad.item() == pytest.approx(gate * (value - mean), rel=1e-9)


def test_module_logits_reads_a_model():
    model = net()
    assert module_logits(model) == {"0": 0.0, "2": 0.0, "4": 0.0}
    assert [path for path, _ in adapters(model)] == ["0", "2", "4"]


# Bad input.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 6}, ValueError, "rank: got 6, wanted 1 <= rank <= 5"),
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"alpha": 0}, ValueError, "alpha: got 0"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
    ],
)
def test_bad_options_raise_and_leave_the_base_trainable(options, error, message):
    base = nn.Linear(5, 6)
    with pytest.raises(error, match=message):
        DiffoRALinear(base, **{"rank": 2, **options})
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_a_base_of_another_dtype_is_refused(dtype):
    base = nn.Linear(5, 6)
    base.weight = nn.Parameter(base.weight.to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match="base"):
        DiffoRALinear(base, 2)


@pytest.mark.parametrize("x", [torch.ones(3, 4), torch.ones(3, 5, dtype=torch.int64)])
def test_activations_that_do_not_fit_are_refused(x):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        DiffoRALinear(nn.Linear(5, 6), 2)(x)


def test_an_empty_batch_gives_an_empty_result():
    assert searched()(gaussian(0, 5)).shape == (0, 6)


@pytest.mark.parametrize(
    "logits, count, groups, error, message",
    [
        ({"a": 0.0, "b": 1.0}, 3, None, ValueError, "count: got 3, wanted at most 2"),
        ({"a": 0.0, "b": 1.0}, 0, None, ValueError, "count: got 0"),
        ({"a": 0.0}, 1.0, None, TypeError, "count"),
        ({"a": math.nan}, 1, None, ValueError, r"logits\['a'\]"),
        ({}, 1, None, ValueError, "count: got 1, wanted at most 0"),
        ({"a": 0.0, "b": 1.0}, 1, {"a": 0}, ValueError, "groups: got none for \\['b'\\]"),
        ({"a": 0.0, "b": 1.0, "c": 1.0}, 2, {"a": 0, "b": 1, "c": 1}, ValueError, "wanted at most 1"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(logits, count, groups, error, message):
    with pytest.raises((error, TypeError), match=message):
        top_modules(logits, count, groups=groups)


def test_another_relaxation_and_a_model_without_search_are_refused():
    with pytest.raises(ValueError, match="relax: got 'hard', wanted 'sigmoid' or 'softmax'"):
        relaxed_gates(torch.zeros(2), "hard")
    for function in (search_layers, module_logits, couple_logits):
        with pytest.raises(ValueError, match="model: got Linear without a DiffoRALinear"):
            function(nn.Linear(3, 3))
    model = net()
    with pytest.raises(ValueError, match="groups: got none for"):
        couple_logits(model, groups={"0": 1})
    assert search_layers(model)["0"]._group is None


def test_a_damaged_state_is_refused():
    layer = searched()
    before = copy.deepcopy(layer.state_dict())
    for state in ({k: v for k, v in before.items() if k != "logit"}, {**before, "logit": torch.zeros(2)}):
        with pytest.raises(RuntimeError, match="logit"):
            copy.deepcopy(layer).load_state_dict(state)
