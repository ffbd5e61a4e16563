"""What every adapter and every optimizer must do, whatever the paper. See `battery.py` for the cases."""

import copy
from functools import partial

import battery
import pytest
import torch
from battery import (
    COUNTS,
    LAYERS,
    NOT_RANDOM,
    OPTIMIZERS,
    STARTS_ELSEWHERE,
    M,
    N,
    adapter,
    batch,
    distributed,
    linear,
    loss,
    network,
    optimizer,
    seeded,
    subject,
    tolerance,
    train,
)
from processes import in_processes
from torch import nn

from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import Adapter, merge_adapters, replace_linears, weight_of

each_layer = pytest.mark.parametrize("name", LAYERS)
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance(atol))


def assert_equal_states(got, wanted):
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def assert_equal_optimizers(got, wanted):
    assert got["param_groups"] == wanted["param_groups"]
    torch.testing.assert_close(got["state"], wanted["state"], rtol=0, atol=0)


# Adapters.


@each_layer
def test_a_rank_that_is_none_is_named(name):
    """The first thing that is looked at, before anything is drawn or decomposed; None is all ranks for some."""
    all_ranks = ("LoLDULinear", "SVFitLinear", "SingularCoreLinear")
    for rank in (0, -1, M + 1, 2.0, "8", True, *([] if name in all_ranks else [None])):
        base = linear()
        with pytest.raises((TypeError, ValueError), match=r"^rank: got|parameter 'rank'"):  # CI checks types as well
            LAYERS[name](base, rank=rank, generator=seeded())
        assert base.weight.requires_grad


@each_layer
def test_starts_at_the_base(name):
    layer, x = adapter(name, moved=False), batch(0)
    off = (layer(x) - layer.base(x)).abs().max()
    if name not in STARTS_ELSEWHERE:
        assert off <= tolerance(1e-12)
    elif off.dtype == torch.float64:  # a start of 1e-5 or less drowns in the rounding of other dtypes
        assert off > 1e-12


@each_layer
def test_forward_is_base_plus_delta_for_any_batch(name):
    layer = adapter(name).eval()
    x = batch(0)
    assert (layer(x) - layer.base(x)).abs().max() > 1e-2
    for rows in (x, x[0], x.reshape(2, 4, N), x[:0]):
        assert_close(layer(rows), layer.base(rows) + rows @ layer.delta_weight().T, 1e-11)


@each_layer
def test_merged_is_plain_and_computes_the_same(name):
    layer, x = adapter(name).eval(), batch(0)
    W = layer.base.weight.detach().clone()
    merged = layer.merged()
    assert type(merged) is nn.Linear and not any(p.requires_grad for p in merged.parameters())
    assert_close(merged(x), layer(x), 1e-11)
    assert torch.equal(merged.weight, layer.merged().weight)  # merging again adds nothing
    layer.train().eval()
    assert torch.equal(layer.base.weight, W) and merged.weight.data_ptr() != layer.base.weight.data_ptr()


@each_layer
def test_an_update_that_is_not_finite_is_not_merged(name):
    layer = adapter(name)
    with torch.no_grad():
        next(iter(layer.adapter_parameters().values())).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        layer.merged()


@each_layer
def test_a_merged_model_is_plain(name):
    model = replace_linears(nn.Sequential(linear(), nn.Tanh()), "0", lambda base: adapter(name, base=base)).eval()
    y = model(batch(0))
    merge_adapters(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh] and not isinstance(model[0], Adapter)
    assert_close(model(batch(0)), y, 1e-11)
    with pytest.raises(ValueError, match="contains an adapter"):
        merge_adapters(model)


@each_layer
def test_conv1d_gives_what_the_transposed_linear_layer_gives(name):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv, base = Conv1D(M, N).double(), linear()
    conv.weight, conv.bias = nn.Parameter(base.weight.T.clone()), nn.Parameter(base.bias.detach().clone())
    ours, wanted = adapter(name, base=conv).eval(), adapter(name, base=base).eval()
    assert_close(ours(batch(0)), wanted(batch(0)))
    assert_close(ours.merged().weight.T, wanted.merged().weight)
    assert_close(weight_of(ours.merged()), wanted.merged().weight)


@each_layer
def test_only_declared_parameters_get_gradients_and_they_count_as_stated(name):
    layer = adapter(name)
    layer(batch(0)).square().sum().backward()
    declared = set(layer.adapter_parameters())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == declared
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == declared
    assert all(p.grad.any() for p in layer.adapter_parameters().values())
    assert sum(p.numel() for p in layer.adapter_parameters().values()) == COUNTS[name](M, N)


@each_layer
def test_frozen_tensors_stay_and_trained_ones_move(name):
    layer = adapter(name)
    before = copy.deepcopy(layer.state_dict())
    train(layer, torch.optim.Adam(layer.parameters(), lr=0.01), range(3))
    for key, value in layer.state_dict().items():
        if key.startswith("base."):
            assert torch.equal(value, before[key]), key
        if key in layer.adapter_parameters():
            assert not torch.equal(value, before[key]), key


@each_layer
def test_randomness_comes_from_the_generator_only(name):
    base, state = linear(), torch.get_rng_state()
    first, same, other = (LAYERS[name](base, generator=seeded(s)).state_dict() for s in (1, 1, 2))
    assert_equal_states(same, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], other[k]) for k in first) == (name in NOT_RANDOM)


@each_layer
def test_training_is_deterministic(name):
    first, second = (adapter(name) for _ in range(2))
    for layer in (first, second):
        train(layer, torch.optim.Adam(layer.parameters(), lr=0.01), range(3))
    assert_equal_states(first.state_dict(), second.state_dict())


@each_layer
def test_a_bfloat16_base_stays_bfloat16_and_finite(name):
    layer = adapter(name, base=linear(torch.bfloat16))
    assert {p.dtype for p in layer.adapter_parameters().values()} == {torch.float32}
    train(layer, torch.optim.Adam(layer.parameters(), lr=0.01), range(3), dtype=torch.bfloat16)
    y = layer(batch(0, torch.bfloat16))
    assert y.dtype == torch.bfloat16 and bool(torch.isfinite(y).all())
    assert layer.merged().weight.dtype == torch.bfloat16


@each_layer
def test_autocast(name):
    layer, x = adapter(name, base=linear(torch.float32)), batch(0, torch.float32)
    with torch.autocast(battery.DEVICE, torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)
    assert all(p.grad.dtype == torch.float32 for p in layer.adapter_parameters().values())


@each_layer
def test_deepcopy_is_equal_and_independent(name):
    layer = adapter(name).eval()
    other = copy.deepcopy(layer)
    assert torch.equal(other(batch(0)), layer(batch(0)))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert layer.base.weight.any() and all(p.any() for p in layer.adapter_parameters().values())


@each_layer
def test_state_dict_round_trip(name, tmp_path):
    old, new = adapter(name, seed=1).eval(), adapter(name, seed=2, moved=False).eval()
    assert not torch.equal(old(batch(0)), new(batch(0)))
    torch.save(old.state_dict(), tmp_path / "x")
    new.load_state_dict(torch.load(tmp_path / "x", weights_only=True))
    assert torch.equal(old(batch(0)), new(batch(0)))


def one_layer_model(name, **options):
    return replace_linears(nn.Sequential(linear()), "0", lambda base: adapter(name, base=base, **options)).eval()


@each_layer
def test_file_round_trip_and_truncation(name, tmp_path):
    old, new = one_layer_model(name, seed=1), one_layer_model(name, seed=2, moved=False)
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(old(batch(0)), new(batch(0)))
    untouched = one_layer_model(name, seed=2)
    before = copy.deepcopy(untouched.state_dict())
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_adapters(untouched, tmp_path / "x")
    assert_equal_states(untouched.state_dict(), before)


@each_layer
def test_a_file_of_another_adapter_is_refused(name, tmp_path):
    model = one_layer_model(name)
    before = copy.deepcopy(model.state_dict())
    for other in LAYERS.keys() - {name}:
        save_adapters(one_layer_model(other), tmp_path / "x")
        with pytest.raises(ValueError, match="layer 0"):
            load_adapters(model, tmp_path / "x")
    assert_equal_states(model.state_dict(), before)


@each_layer
def test_exported_factors_are_the_update(name):
    layer = adapter(name)
    if not hasattr(layer, "lora_factors") or hasattr(layer, "magnitude"):
        pytest.skip("no plain LoRA")
    A, B, scale = layer.lora_factors()
    assert_close(scale * B @ A, layer.delta_weight())


@each_layer
def test_compiles_to_one_graph(name, no_shape_checks):
    torch._dynamo.reset()
    layer, x = adapter(name), batch(0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert_close(y, layer(x))
    y.square().sum().backward()
    got = {n: p.grad.clone() for n, p in layer.adapter_parameters().items()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    for key, p in layer.adapter_parameters().items():
        assert_close(got[key], p.grad, 1e-10)


@each_layer
def test_bad_bases_raise(name):
    make = partial(LAYERS[name], generator=seeded())
    whole = linear()
    whole.weight = nn.Parameter(whole.weight.to(torch.int8), requires_grad=False)
    for base in (adapter(name), nn.ReLU(), nn.Conv1d(N, M, 1), whole):
        with pytest.raises(TypeError, match="base"):
            make(base)


@each_layer
def test_exports_with_trained_parameters(name, no_shape_checks):
    layer, x = adapter(name), batch(0)
    assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


# Optimizers.


@each_optimizer
def test_the_loss_falls_and_every_parameter_moves(name):
    model = network()
    start = copy.deepcopy(model.state_dict())
    before = loss(model, batch(0))
    train(model, optimizer(name, model), [0] * 20)
    assert loss(model, batch(0)) < before
    assert not any(torch.equal(value, start[key]) for key, value in model.state_dict().items())


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_bit_identically(name, dtype, tmp_path):
    straight = network(dtype)
    train(straight, optimizer(name, straight), range(7), dtype=dtype)

    first = network(dtype)
    stopped = optimizer(name, first)
    train(first, stopped, range(3), dtype=dtype)
    torch.save({"model": first.state_dict(), "optimizer": stopped.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    second = network(dtype)
    second.load_state_dict(saved["model"])
    resumed = optimizer(name, second)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(3, 7), dtype=dtype)
    assert_equal_states(second.state_dict(), straight.state_dict())


@each_optimizer
def test_bfloat16_parameters_stay_finite(name):
    model = network(torch.bfloat16)
    train(model, optimizer(name, model), range(5), dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and bool(torch.isfinite(p).all()) for p in model.parameters())


@each_optimizer
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_gradient_raises_and_changes_nothing(name, value):
    model = network()
    steps = optimizer(name, model)
    train(model, steps, range(2))
    before = copy.deepcopy((model.state_dict(), steps.state_dict()))
    model(batch(2)).sum().backward()
    model[2].weight.grad[0, 0] = value  # not the first parameter: the ones before it must not move either
    with pytest.raises(ValueError, match="grad"):
        steps.step()
    assert_equal_states(model.state_dict(), before[0])
    assert_equal_optimizers(steps.state_dict(), before[1])


@each_optimizer
def test_no_new_parameters(name):
    model = network()
    parameters = list(model.parameters())
    train(model, optimizer(name, model), range(3))
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(p.requires_grad and p.grad.shape == p.shape for p in parameters)


@each_optimizer
def test_a_parameter_without_gradient_stays(name):
    model = network()
    start = copy.deepcopy(model.state_dict())
    model[2].requires_grad_(False)
    train(model, optimizer(name, model), range(2))
    assert torch.equal(model[2].weight, start["2.weight"]) and not torch.equal(model[0].weight, start["0.weight"])


@each_optimizer
def test_a_closure_gives_the_same_step_and_its_loss(name):
    plain, closed = network(), network()
    train(plain, optimizer(name, plain), range(2))
    steps = optimizer(name, closed)
    for step in range(2):

        def closure(step=step):
            steps.zero_grad()
            value = loss(closed, batch(step))
            value.backward()
            return value

        with torch.no_grad():
            assert steps.step(closure).requires_grad
    assert_equal_states(closed.state_dict(), plain.state_dict())


@each_optimizer
def test_deepcopy_goes_on_as_the_original(name):
    model = network()
    steps = optimizer(name, model)
    train(model, steps, range(3))
    other, other_steps = copy.deepcopy((model, steps))
    train(other, other_steps, range(3, 6))
    assert not torch.equal(other[0].weight, model[0].weight)
    train(model, steps, range(3, 6))
    assert_equal_states(other.state_dict(), model.state_dict())


@each_optimizer
def test_a_foreign_state_is_refused(name):
    model = network()
    steps = optimizer(name, model)
    train(model, steps, range(2))
    before = copy.deepcopy(steps.state_dict())
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, range(1))
    small = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    for foreign in (adam.state_dict(), optimizer(name, small).state_dict()):
        with pytest.raises(ValueError):
            steps.load_state_dict(foreign)
    assert_equal_optimizers(steps.state_dict(), before)


@each_optimizer
def test_a_key_of_a_group_that_nobody_reads_is_refused(name):
    with pytest.raises(ValueError, match="params: got unknown 'update_proj_gap'.*wanted some of"):
        OPTIMIZERS[name]([{"params": list(network().parameters()), "update_proj_gap": 3}])


@each_optimizer
@pytest.mark.parametrize("size", [3e-5, 300.0])
def test_float16_neither_overflows_nor_vanishes(name, size):
    """Squares of gradients do: moments and norms have to be wider than the weights."""
    ends = []
    for dtype in (torch.float16, torch.float32):
        model = network(torch.float16).to(dtype)
        steps = optimizer(name, model)
        for step in range(4):
            for i, p in enumerate(model.parameters()):
                drawn = size * torch.randn(p.shape, generator=seeded(10 * step + i))
                p.grad = drawn.half().to(p)
            steps.step()
        ends.append([p.detach().float() for p in model.parameters()])
    for got, wanted, start in zip(*ends, network(torch.float16).parameters()):
        way = (wanted - start.float()).norm()
        assert (got - wanted).norm() <= 0.02 * way + 4 * 2**-11 * (1 + wanted.norm())


@each_optimizer
def test_a_sparse_gradient_and_a_flattened_parameter_are_named(name):
    table = nn.Embedding(7, 4, sparse=True).to(battery.DEVICE)
    steps = OPTIMIZERS[name](list(table.parameters()))
    table(torch.tensor([1, 2], device=battery.DEVICE)).sum().backward()
    with pytest.raises(ValueError, match="grad: got a sparse gradient"):
        steps.step()
    model = network()
    steps = optimizer(name, model)
    train(model, steps, range(1))
    before = copy.deepcopy(model.state_dict())
    loss(model, batch(1)).backward()
    W = model[2].weight
    W.data, W.grad = W.data.flatten(), W.grad.flatten()
    with pytest.raises(ValueError, match=r"params: got shape \(60,\), wanted \(6, 10\)"):
        steps.step()
    W.data = W.data.view(6, 10)
    assert_equal_states(model.state_dict(), before)


@each_optimizer
def test_gradients_of_zeros_decide_no_basis(name):
    """As of a layer behind a zero-initialised head. Vectors take plain steps, which count zeros; here they rest."""
    ends = []
    for zeros in (0, 1, 3):
        model = network()
        steps = optimizer(name, model)
        for p in model.parameters():
            p.requires_grad_(p.ndim == 2)
            p.grad = torch.zeros_like(p) if p.ndim == 2 else None
        for _ in range(zeros):
            steps.step()
        assert_equal_states(model.state_dict(), network().state_dict())
        train(model, steps, range(4))
        ends.append(model.state_dict())
    assert_equal_states(ends[1], ends[0])
    assert_equal_states(ends[2], ends[0])


# Actions.

each_action = pytest.mark.parametrize("name", battery.ACTIONS)


def acting(name, attached, times=range(7), wrap=None, saved=None):
    """Train a case of an action along a rate that falls to 0; return (model, optimizer, schedule, actions)."""
    model, steps, actions = battery.ACTIONS[name]()
    schedule = torch.optim.lr_scheduler.LambdaLR(steps, lambda t: max(0.0, 1 - t / 6))
    if saved is not None:
        for part, state in zip((model, steps, schedule, *actions), saved):
            part.load_state_dict(state)
    steps = steps if wrap is None else wrap(steps)
    for action in actions if attached else ():
        assert action.attach(steps) is action and action.attached
    for step in times:
        steps.zero_grad()
        loss(model, batch(step)).backward()
        steps.step()
        for action in () if attached else actions:
            action.step()
        schedule.step()
    return model, steps, schedule, actions


def assert_equal_runs(one, other):
    assert_equal_states(one[0].state_dict(), other[0].state_dict())
    for mine, its in zip(one[3], other[3]):
        torch.testing.assert_close(mine.state_dict(), its.state_dict(), rtol=0, atol=0)


def test_every_action_of_the_package_has_a_case():
    assert battery.action_names() == set(battery.ACTIONS)


@each_action
def test_an_attached_action_acts_as_by_hand_in_the_right_place(name):
    run = acting(name, True)
    assert_equal_runs(run, acting(name, False))
    alone, steps, _ = battery.ACTIONS[name]()
    schedule = torch.optim.lr_scheduler.LambdaLR(steps, lambda t: max(0.0, 1 - t / 6))
    for step in range(7):
        train(alone, steps, [step])
        schedule.step()
    assert any(str(value) != str(run[0].state_dict()[key]) for key, value in alone.state_dict().items())


@each_action
def test_an_attached_action_refuses_a_call_by_hand(name):
    model, steps, _, actions = acting(name, True, range(3))
    before = copy.deepcopy((model.state_dict(), [action.state_dict() for action in actions]))
    for action in actions:
        with pytest.raises(RuntimeError, match=f"this {type(action).__name__} is attached"):
            action.step()
        with pytest.raises(RuntimeError, match="attached already"):
            action.attach(steps)
    after = (model.state_dict(), [action.state_dict() for action in actions])
    assert str(after) == str(before)
    for action in actions:
        action.detach()
    assert not any(action.attached for action in actions)
    steps.zero_grad()
    steps.step()  # nothing acts any more
    assert str([action.state_dict() for action in actions]) == str(before[1])
    for action in actions:
        action.step()


@each_action
def test_a_run_with_an_attached_action_resumes_to_the_bit(name, tmp_path):
    first = acting(name, True, range(3))
    torch.save([part.state_dict() for part in (*first[:3], *first[3])], tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    assert_equal_runs(acting(name, True, range(3, 7), saved=saved), acting(name, True))


@each_action
def test_the_state_of_another_action_is_refused(name):
    model, _, _, actions = acting(name, True, range(3))
    before = str((model.state_dict(), actions[-1].state_dict()))
    for state in ({}, {"other": 1}, {**actions[-1].state_dict(), "more": 1}):
        with pytest.raises(ValueError, match="state"):
            actions[-1].load_state_dict(state)
    assert str((model.state_dict(), actions[-1].state_dict())) == before


@each_action
def test_a_copy_of_an_attached_action_is_not_attached(name):
    model, steps, _, actions = acting(name, True, range(3))
    *_, twins = copy.deepcopy((model, steps, actions))
    assert all(action.attached for action in actions) and not any(twin.attached for twin in twins)
    for action, twin in zip(actions, twins):
        torch.testing.assert_close(twin.state_dict(), action.state_dict(), rtol=0, atol=0)
        twin.step()


@each_action
def test_an_action_attaches_through_accelerates_wrapper(name):
    accelerate = pytest.importorskip("accelerate")
    assert_equal_runs(acting(name, True, wrap=accelerate.Accelerator(cpu=True).prepare), acting(name, True))


# Two processes.


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Train all cases under DDP in two processes, once; each sees half of every batch."""
    folder = tmp_path_factory.mktemp("ddp")
    in_processes(distributed, folder)
    return torch.load(folder / "results", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYERS, *OPTIMIZERS])
def test_two_processes_equal_one(name, two_processes):
    model, steps = subject(name)
    start = copy.deepcopy(model.state_dict())
    train(model, steps, range(3))
    for key, value in model.state_dict().items():
        assert_close(two_processes[name][key], value, 1e-9)
    assert any(not torch.equal(value, start[key]) for key, value in model.state_dict().items())
