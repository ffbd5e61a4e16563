"""Maestro's convolution against PyTorch's, and models that are taken apart, cut and put together again."""

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.compression.maestro import MaestroLinear, group_lasso, prefix_product
from lowrank_ref.compression.maestro_layers import (
    MaestroConv2d,
    decompose,
    deployed,
    maestro_layers,
    penalty,
    ranks_by_loss,
    resorted,
)
from lowrank_ref.core.io import load_tensors, save_tensors


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(model, seed=7):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gaussian(*p.shape, seed=seed + i) / 3)
    return model.double()


def conv(*sizes, **options):
    return fill(nn.Conv2d(*sizes, **options))


def net():
    """Two convolutions, a batch norm and two linear layers on pictures (2, 8, 8)."""
    layers = [("conv1", nn.Conv2d(2, 6, 3, padding=1)), ("norm", nn.BatchNorm2d(6)), ("relu1", nn.ReLU())]
    layers += [("conv2", nn.Conv2d(6, 8, 3, stride=2, bias=False)), ("relu2", nn.ReLU()), ("flat", nn.Flatten())]
    layers += [("hidden", nn.Linear(72, 12)), ("relu3", nn.ReLU()), ("head", nn.Linear(12, 3))]
    return fill(nn.Sequential(OrderedDict(layers)))


X = gaussian(4, 2, 8, 8, seed=50)


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# The convolution. Invariant 7.

options = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 2, 3, (1, 3), (3, 2)]),
        "stride": st.sampled_from([1, 2, (1, 2)]),
        "padding": st.sampled_from([0, 1, (2, 1)]),
        "dilation": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


@given(st.integers(1, 3), st.integers(1, 6), options, st.data())
def test_7_a_convolution_is_filters_and_a_mix(channels, filters, options, data):
    base, x = conv(channels, filters, **options), gaussian(2, channels, 7, 8)
    layer = MaestroConv2d.from_conv2d(base)
    r = min(filters, base.weight[0].numel())
    assert layer.rank == r and layer.dense_weight().shape == base.weight.shape
    assert_close(layer.dense_weight(), base.weight)
    assert_close(layer(x), base(x))
    layer.cut = b = data.draw(st.integers(1, r))
    W = prefix_product(layer.A, layer.B, b).view_as(base.weight)
    wanted = F.conv2d(x, W, base.bias, base.stride, base.padding, base.dilation)
    assert_close(layer(x), wanted)
    plain = layer.plain(b)
    assert_close(plain(x), wanted)
    m, n = filters, base.weight[0].numel()
    assert sum(p.numel() for p in plain.parameters()) == min(b * (m + n), m * n) + m * options["bias"]
    layer(x).square().sum().backward()
    assert not layer.A.grad[b:].any() and not layer.B.grad[:, b:].any()


def test_a_convolution_takes_single_pictures_and_same_padding():
    base = conv(2, 5, 3, padding="same")
    layer = MaestroConv2d.from_conv2d(base)
    for x in (X, X[0], X[:0]):
        assert_close(layer(x), base(x))
        assert_close(layer.plain(3)(x), MaestroConv2d.from_conv2d(base).plain(3)(x))


def test_the_best_filters_come_first():
    base = conv(3, 6, 3)
    layer = MaestroConv2d.from_conv2d(base)
    S = torch.linalg.svdvals(base.weight.flatten(1))
    for b in range(1, 7):
        gap = prefix_product(layer.A, layer.B, b) - base.weight.flatten(1)
        assert gap.square().sum().item() == pytest.approx(S[b:].square().sum().item(), abs=1e-10)


def test_bad_convolutions_raise():
    with pytest.raises(ValueError, match="groups = 2"):
        MaestroConv2d.from_conv2d(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="padding_mode = 'reflect'"):
        MaestroConv2d.from_conv2d(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    for other in (nn.Linear(3, 3), nn.Conv1d(2, 2, 1)):
        with pytest.raises(TypeError, match="base"):
            MaestroConv2d.from_conv2d(other)


def test_half_precision_and_autocast():
    layer = MaestroConv2d.from_conv2d(conv(2, 5, 3).bfloat16())
    y = layer(X.bfloat16())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and all(bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    layer = MaestroConv2d.from_conv2d(conv(2, 5, 3).float())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(X.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(X.float()), rtol=0.05, atol=0.1)


def test_a_convolution_compiles_to_one_graph(no_shape_checks):
    torch._dynamo.reset()
    layer = MaestroConv2d.from_conv2d(conv(2, 5, 3))
    layer.cut = 3
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(X), layer(X))


# Models.


def test_decompose_keeps_the_function_and_trains_everything():
    model = net()
    model.norm.weight.requires_grad_(False)
    y = model(X)
    old = {id(p) for p in model.parameters()}
    assert decompose(model) is model
    found = dict(maestro_layers(model))
    assert list(found) == ["conv1", "conv2", "hidden", "head"]
    assert [type(layer) for layer in found.values()] == [MaestroConv2d] * 2 + [MaestroLinear] * 2
    assert_close(model(X), y)
    assert all(p.requires_grad for p in model.parameters())
    assert len(old & {id(p) for p in model.parameters()}) == 2  # of the norm


def test_decompose_is_deterministic_and_leaves_the_global_generator():
    bases, state = [net(), net()], torch.get_rng_state()
    first, second = (decompose(base).state_dict() for base in bases)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_decompose_takes_what_the_pattern_takes_or_names_candidates():
    assert [path for path, _ in maestro_layers(decompose(net(), "^conv|head"))] == ["conv1", "conv2", "head"]
    model = net()
    with pytest.raises(ValueError, match=r"near candidates are: .*conv"):
        decompose(model, "^cnv$")
    model.conv2 = nn.Conv2d(6, 8, 3, groups=2)
    before = list(model.modules())
    with pytest.raises(ValueError, match="groups = 2"):
        decompose(model)
    assert list(model.modules()) == before


def test_penalty_is_the_sum_over_layers_of_all_that_is_stored():
    model = decompose(net())
    layers = [layer for _, layer in maestro_layers(model)]
    layers[1].rank, layers[1].cut = 3, 1
    wanted = sum(group_lasso(layer.A, layer.B) for layer in layers)
    assert penalty(model).item() == pytest.approx(wanted.item())
    penalty(model).backward()
    assert layers[1].A.grad[2].any() and layers[1].A.grad[3:].any()  # dropped rows go on falling, as in I_b they count
    with pytest.raises(ValueError, match="without Maestro layer"):
        penalty(net())


def test_8_deployed_computes_what_the_masked_model_does_with_fewer_numbers():
    model = decompose(net()).eval()
    before = copy.deepcopy(model.state_dict())
    full, ranks = model(X), [3, 2, 5, 1]
    small = deployed(model, ranks)
    masked = copy.deepcopy(model)
    for (_, layer), rank in zip(maestro_layers(masked), ranks):
        layer.rank = rank
    assert_close(small(X), masked(X))
    assert (small(X) - full).abs().max() > 1e-3
    assert not list(maestro_layers(small)) and type(small.hidden) is nn.Sequential
    assert {type(m).__module__.split(".")[0] for m in small.modules()} == {"torch"}
    costs = [(6, 18), (8, 54), (12, 72), (3, 12)]
    numbers = sum(min(r * (m + n), m * n) for r, (m, n) in zip(ranks, costs)) + (6 + 12 + 3) + 12
    assert sum(p.numel() for p in small.parameters()) == numbers
    assert torch.equal(model(X), full) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert_close(deployed(masked)(X), masked(X))  # without ranks: what is kept


def test_at_full_rank_deployed_is_the_dense_model_again():
    base = net().eval()
    again = deployed(decompose(copy.deepcopy(base)))
    assert [type(m) for m in again] == [type(m) for m in base]
    assert again.state_dict().keys() == base.state_dict().keys()
    for key, value in again.state_dict().items():
        assert_close(value, base.state_dict()[key])
    assert sum(p.numel() for p in decompose(copy.deepcopy(base)).parameters()) > sum(
        p.numel() for p in base.parameters()
    )


def test_a_layer_at_two_places_and_a_model_that_is_one_layer():
    shared = nn.Linear(4, 4).double()
    model = decompose(nn.Sequential(shared, nn.Tanh(), shared))
    assert model[0] is model[2] and len(list(maestro_layers(model))) == 1
    small = deployed(model, [1])
    assert small[0] is small[2] and type(small[0]) is nn.Sequential
    single = MaestroLinear.from_linear(shared)
    x = gaussian(3, 4)
    assert_close(deployed(single)(x), shared(x))


def test_resorted_computes_the_same_and_has_the_best_prefixes():
    model = decompose(net()).eval()
    for i, (_, layer) in enumerate(maestro_layers(model)):
        with torch.no_grad():  # factors without any order
            M = gaussian(len(layer.A), len(layer.A), seed=i) + 3 * torch.eye(len(layer.A), dtype=torch.float64)
            layer.A.copy_(M @ layer.A)
            layer.B.copy_(layer.B @ torch.linalg.inv(M))
        layer.rank -= 1
    before = copy.deepcopy(model.state_dict())
    sorted_model = resorted(model)
    assert_close(sorted_model(X), model(X), 1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for (_, old), (_, new) in zip(maestro_layers(model), maestro_layers(sorted_model)):
        W = old.dense_weight().flatten(1)
        S = torch.linalg.svdvals(W)
        assert new.rank == old.rank
        for b in range(1, new.rank + 1):
            gap = (W - prefix_product(new.A, new.B, b)).square().sum()
            assert gap.item() == pytest.approx(S[b:].square().sum().item(), abs=1e-9)
    with pytest.raises(ValueError, match="without Maestro layer"):
        resorted(net())


def searched(model, costs, budget):
    """The greedy search by slow loops: every candidate is built by `deployed`."""
    ranks, y = [layer.rank for _, layer in maestro_layers(model)], model(X)

    def loss(ranks):
        return F.mse_loss(deployed(model, ranks)(X), y).item()

    while sum(r * c for r, c in zip(ranks, costs)) > budget:
        best = (float("inf"), None)
        for i, rank in enumerate(ranks):
            if rank > 1:
                fewer = max(1, rank // 10)
                then = [*ranks[:i], rank - fewer, *ranks[i + 1 :]]
                best = min(best, ((loss(then) - loss(ranks)) / (fewer * costs[i]), then))
        ranks = best[1]
    return ranks


@pytest.mark.parametrize("share", [0.9, 0.4, 0.15])
def test_ranks_by_loss_is_the_greedy_search_and_leaves_the_model(share):
    model = decompose(net()).eval()
    layers = [layer for _, layer in maestro_layers(model)]
    costs = [float(layer.A.shape[1] + len(layer.B)) for layer in layers]
    budget = share * sum(c * layer.rank for c, layer in zip(costs, layers))
    before, y = copy.deepcopy(model.state_dict()), model(X).detach()
    model.train()
    for layer in layers:
        layer.cut = 1  # cuts of training must not act
    found = ranks_by_loss(model, lambda m: F.mse_loss(m(X), y), costs, budget)
    assert model.training and [layer.rank for layer in layers] == [len(layer.A) for layer in layers]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found == searched(model.eval(), costs, budget)
    assert sum(r * c for r, c in zip(found, costs)) <= budget and min(found) >= 1


def test_ranks_by_loss_spares_the_layer_that_matters():
    model = decompose(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double())
    with torch.no_grad():
        model[1].B[:, 1:] = 0  # the second layer has one component, whatever its rank
    x = gaussian(20, 6)
    y = model(x).detach()
    assert ranks_by_loss(model, lambda m: F.mse_loss(m(x), y), [1, 1], 7) == [6, 1]


@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [([1.0], 9, "costs: got 1"), ([1.0, 0.0, 1.0, 1.0], 9, "costs"), ([1.0] * 4, 3.5, "budget: got 3.5")],
)
def test_ranks_by_loss_refuses(costs, budget, message):
    with pytest.raises(ValueError, match=message):
        ranks_by_loss(decompose(net()), lambda m: 0.0, costs, budget)
    with pytest.raises(ValueError, match="layers"):
        ranks_by_loss(net(), lambda m: 0.0, [], 1)


def test_deployed_refuses_other_numbers_of_ranks():
    model = decompose(net())
    for ranks, message in [([1, 1], "ranks: got"), ([1, 1, 1, 4], "rank: got 4"), ([0, 1, 1, 1], "rank: got 0")]:
        with pytest.raises(ValueError, match=message):
            deployed(model, ranks)
    with pytest.raises(ValueError, match="ranks"):
        deployed(net())


def test_file_round_trip(tmp_path):
    old, new = decompose(net()).eval(), decompose(fill(net(), seed=90)).eval()
    next(maestro_layers(old))[1].rank = 2
    assert not torch.equal(old(X), new(X))
    save_tensors(old.state_dict(), tmp_path / "x", kind="maestro")
    new.load_state_dict(load_tensors(tmp_path / "x", kind="maestro"))
    assert torch.equal(old(X), new(X)) and next(maestro_layers(new))[1].rank == 2
    with pytest.raises(ValueError, match="kind"):
        load_tensors(tmp_path / "x", kind="adapters")
    with pytest.raises(RuntimeError):
        net().load_state_dict(load_tensors(tmp_path / "x", kind="maestro"))
