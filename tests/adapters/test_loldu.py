"""LoLDU: equations against loops, the exact invariants in float64, starts, the official form, files, bad input."""

import copy
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import load_peft, save_peft
from lowrank_ref.adapters.ldu_factors import LDU_STARTS, ldu_gram
from lowrank_ref.adapters.loldu import (
    LDU_TRAINS,
    LoLDULinear,
    delta_weight,
    diagonal_gradient,
    ldu,
    ldu_residual,
    residual_forward,
)
from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.adapters.svfit import SVFitLinear
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import merge_adapters, replace_linears


def base(m, n, dtype=torch.float64, seed=9):
    layer = nn.Linear(n, m, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(gaussian(m, n, seed=seed))
        layer.bias.copy_(gaussian(m, seed=8))
    return layer


def loldu(m, n, rank=None, *, moved=True, dtype=torch.float64, **options):
    """A layer; `moved` shifts what trains, as training would."""
    layer = LoLDULinear(base(m, n, dtype), rank, generator=seeded(), **options)
    if moved:
        with torch.no_grad():
            for i, p in enumerate(layer.adapter_parameters().values()):
                p.add_(gaussian(*p.shape, seed=1 + i))
    return layer


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# The factorisation.


def eliminated(W):
    """Gaussian elimination with partial pivoting, in lists: rows in the order of elimination, L, and what is left."""
    W = [row[:] for row in W.tolist()]
    m, n = len(W), len(W[0])
    rows, L = list(range(m)), [[0.0] * min(m, n) for _ in range(m)]
    for k in range(min(m, n)):
        best = max(range(k, m), key=lambda i: abs(W[i][k]))
        for table in (W, rows, L):
            table[k], table[best] = table[best], table[k]
        L[k][k] = 1.0
        for i in range(k + 1, m):
            L[i][k] = W[i][k] / W[k][k]
            W[i] = [a - L[i][k] * b for a, b in zip(W[i], W[k])]
    return rows, L, W[: min(m, n)]


@given(shapes())
def test_ldu_by_loops(shape):
    m, n, _ = shape
    W = gaussian(m, n)
    order, L, D, U = ldu(W)
    rows, lower, upper = eliminated(W)
    assert [rows[i] for i in order.tolist()] == list(range(m))
    scale = float(U.abs().max())
    assert_close(L, torch.tensor(lower, dtype=torch.float64).view(m, -1))
    for i, row in enumerate(upper):
        assert D[i].item() == pytest.approx(row[i])
        assert_close(U[i], torch.tensor(row, dtype=torch.float64) / row[i], 1e-11 * scale)


@given(shapes(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]))
def test_the_factors_are_triangular_and_give_the_weight(shape, precision):
    m, n, _ = shape
    dtype, atol = precision
    W = gaussian(m, n).to(dtype)
    order, L, D, U = ldu(W)
    k = min(m, n)
    assert_close(L[order] * D @ U, W, atol)
    assert sorted(order.tolist()) == list(range(m))
    assert torch.equal(L, L.tril()) and torch.equal(U, U.triu())
    assert torch.equal(L.diagonal(), torch.ones(k, dtype=dtype))
    assert_close(U.diagonal(), torch.ones(k, dtype=dtype), 1e-6)
    assert L.abs().max() <= 1


def test_half_precision_is_factored_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        W = gaussian(5, 7).to(dtype)
        order, L, D, U = ldu(W)
        assert {t.dtype for t in (L, D, U)} == {torch.float32}
        assert_close(L[order] * D @ U, W.float(), 1e-5)


def singular_weights():
    W = gaussian(6, 6)
    column, row, low, zeros, shift = W.clone(), W.clone(), gaussian(6, 2) @ gaussian(2, 6, seed=1), 0 * W, 0 * W
    column[:, 0], row[4] = 0, row[1]
    shift[range(5), range(1, 6)] = 1  # its diagonal is zero, and no row swap helps
    return {"a zero column": column, "a row twice": row, "rank 2": low, "zeros": zeros, "a shift": shift}


@pytest.mark.parametrize("name", singular_weights())
@pytest.mark.parametrize("part", [slice(None), slice(0, 3)])
def test_a_singular_weight_has_finite_factors_and_trains(name, part):
    for W in (singular_weights()[name][part], singular_weights()[name][:, part]):
        order, L, D, U = ldu(W)
        assert all(bool(t.isfinite().all()) for t in (L, D, U))
        assert_close(L[order] * D @ U, W, 1e-12)
        assert U.abs().amax(dim=1).min() > 0.9  # no direction is dead
        plain = nn.Linear(W.shape[1], len(W)).double()
        plain.weight.data.copy_(W)
        layer = LoLDULinear(plain)
        layer(gaussian(3, W.shape[1])).square().sum().backward()
        assert bool((layer.delta.grad != 0).all() and layer.delta.grad.isfinite().all())


def test_a_tiny_weight_is_not_taken_for_a_singular_one():
    order, L, D, U = ldu(W := 1e-30 * gaussian(5, 5).float())
    assert_close(1e30 * (L[order] * D @ U - W), torch.zeros(5, 5), 1e-5)
    assert_close(U.diagonal(), torch.ones(5), 1e-6)


def test_what_pivoting_swaps():
    """Rows: the factors follow them. Inputs: other factors."""
    W, x = gaussian(6, 6), gaussian(4, 6, seed=2)
    swap = torch.tensor([3, 0, 5, 1, 4, 2])
    order, L, D, U = ldu(W)
    again = ldu(W[swap])
    assert torch.equal(again[0], order[swap])
    for old, new in zip((L, D, U), again[1:]):
        assert_close(new, old)
    layers = {}
    for name, weight in (("plain", W), ("rows", W[swap]), ("inputs", W[:, swap])):
        plain = nn.Linear(6, 6, bias=False).double()
        plain.weight.data.copy_(weight)
        layers[name] = LoLDULinear(plain)
        layers[name].delta.data.copy_(gaussian(6, seed=3))
    assert_close(layers["rows"].update(x), layers["plain"].update(x)[:, swap])
    assert (layers["inputs"].delta_weight() - layers["plain"].delta_weight()[:, swap]).abs().max() > 0.1
    before, after = (SVFitLinear(layers[name].base) for name in ("plain", "inputs"))  # does not care
    assert_close((before.U * before.S @ before.Vh)[:, swap], after.U * after.S @ after.Vh)
    for i in range(6):
        assert_close(torch.outer(after.U[:, i], after.Vh[i]), torch.outer(before.U[:, i], before.Vh[i, swap]))


def ldu_span(left, right):
    """The matrices lᵢuᵢᵀ, one a row."""
    return torch.einsum("mi,in->imn", left, right).flatten(1)


@given(shapes())
def test_r_terms_give_r_columns_and_r_rows_exactly(shape):
    m, n, r = shape
    W = gaussian(m, n)
    order, L, D, U = ldu(W)
    rest = ldu_residual(W, L[order][:, :r], D[:r], U[:r])
    assert_close(rest[:, :r], torch.zeros(m, r).double())
    assert_close(rest[order < r], torch.zeros(r, n).double())


def test_a_term_may_raise_the_energy_that_is_left():
    W = torch.tensor([[1.0, 3.0], [1.0, -3.0]]).double()
    order, L, D, U = ldu(W)
    rest = ldu_residual(W, L[order][:, :1], D[:1], U[:1])
    assert_close(rest, torch.tensor([[0.0, 0.0], [0.0, -6.0]]).double())
    assert rest.square().sum() > W.square().sum()


# The update.


def test_delta_weight_by_loops():
    left, delta, right = gaussian(4, 2), gaussian(2, seed=1), gaussian(2, 3, seed=2)
    W = delta_weight(left, delta, right, 0.5)
    for i in range(4):
        for j in range(3):
            wanted = sum(left[i, k].item() * delta[k].item() * right[k, j].item() for k in range(2))
            assert W[i, j].item() == pytest.approx(wanted / 2)


@given(shapes())
def test_the_gradient_by_loops_and_by_the_whole_weight(shape):
    m, n, r = shape
    layer, x = loldu(m, n, r, scale=0.7), gaussian(4, n)
    layer(x).pow(3).sum().backward()
    W = layer.merged().weight.detach().requires_grad_()
    F.linear(x, W, layer.base.bias).pow(3).sum().backward()
    G, bound = W.grad, 1e-9 * float(W.grad.abs().max()) * float(layer.right.abs().max())
    for k in range(r):
        wanted = sum(layer.left[i, k] * G[i, j] * layer.right[k, j] for i in range(m) for j in range(n))
        assert layer.delta.grad[k].item() == pytest.approx(0.7 * wanted.item(), rel=1e-8, abs=bound)
    torch.testing.assert_close(
        diagonal_gradient(layer.left, G, layer.right, 0.7), layer.delta.grad, rtol=1e-8, atol=bound
    )


@given(shapes(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_starts_at_the_base_to_the_bit_whatever_the_start(shape, dtype):
    m, n, r = shape
    for start in LDU_STARTS:
        for trains in LDU_TRAINS:
            layer = loldu(m, n, r, moved=False, dtype=dtype, start=start, trains=trains, scale=0.3)
            x = gaussian(4, n).to(dtype)
            assert torch.equal(layer(x), layer.base(x)), (start, trains)


@pytest.mark.parametrize("start", LDU_STARTS)
def test_without_compensation_only_lu_starts_at_the_base(start):
    """The official code leaves out the last four starts; the others it compensates by writing into D itself."""
    layer = loldu(6, 5, moved=False, start=start, compensated=False)
    off = (layer.merged().weight - layer.base.weight).abs().max()
    assert (off == 0) == (start == "lu")
    assert_close(layer.delta_weight(), delta_weight(layer.left, layer.z_start - layer.D, layer.right))
    if start == "zeros":  # at full rank nothing of W is left
        assert_close(layer.merged().weight, torch.zeros(6, 5).double())
    assert_close(loldu(6, 5, moved=False, start=start).delta_weight(), torch.zeros(6, 5).double())


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("trains", LDU_TRAINS)
@pytest.mark.parametrize("start", LDU_STARTS)
def test_the_official_form_is_the_same_function_with_the_same_gradients(start, trains, compensated):
    """R in the place of W, and s·P·L·diag(z)·U computed from z itself: outputs, gradients, and five steps of Adam."""
    layer, x = (
        loldu(6, 5, 4, start=start, trains=trains, compensated=compensated, scale=0.6, moved=False),
        gaussian(7, 5),
    )
    z, sigma = layer.z_start.clone().requires_grad_(), torch.full((1,), 0.6, dtype=torch.float64).requires_grad_()
    known = layer.z_start if compensated else layer.D
    rest = ldu_residual(layer.base.weight.detach(), layer.left, known, layer.right, 0.6)
    theirs = [p for name, p in (("diagonal", z), ("scale", sigma)) if trains in (name, "both")]
    ours = list(layer.adapter_parameters().values())
    adam = [torch.optim.Adam(group, lr=0.05) for group in (ours, theirs)]
    for _ in range(5):
        outputs = layer(x), residual_forward(x, rest, layer.left, z, layer.right, sigma) + layer.base.bias
        assert_close(*outputs, 1e-10)
        for optimizer, y in zip(adam, outputs):
            optimizer.zero_grad()
            y.pow(2).sum().backward()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
        for optimizer in adam:
            optimizer.step()


@given(shapes())
def test_what_trains_and_what_is_frozen(shape):
    m, n, r = shape
    for trains, wanted in (
        ("diagonal", {"delta": r}),
        ("scale", {"sigma": 1}),
        ("both", {"delta": r, "sigma": 1}),
    ):
        layer = loldu(m, n, r, trains=trains)
        assert {name: p.numel() for name, p in layer.named_parameters() if p.requires_grad} == wanted
    assert len(loldu(m, n).delta) == min(m, n)


def test_the_scale_alone_multiplies_the_eliminated_part():
    layer = loldu(6, 5, trains="scale", moved=False)
    layer.sigma.data.fill_(1.5)
    assert_close(layer.merged().weight, 1.5 * layer.base.weight)  # with all pivots, all of W
    layer = loldu(6, 5, 2, trains="scale", moved=False)
    layer.sigma.data.fill_(1.5)
    assert_close(layer.delta_weight(), delta_weight(layer.left, 0.5 * layer.D, layer.right))


@given(shapes())
def test_the_gram_matrix_is_the_geometry_of_the_update(shape):
    m, n, r = shape
    layer = loldu(m, n, r)
    square = layer.delta @ ldu_gram(layer.left, layer.right) @ layer.delta
    torch.testing.assert_close(layer.delta_weight().square().sum(), square, rtol=1e-9, atol=1e-9)


def test_of_a_diagonal_weight_svfit_and_loldu_write_the_same():
    """Rows permuted or not, all values or pivots."""
    W = torch.diag(torch.tensor([3.0, -2.0, 0.5, 1.0])).double()[torch.tensor([2, 0, 3, 1])]
    plain = nn.Linear(4, 4).double()
    plain.weight.data.copy_(W)
    ours, theirs = LoLDULinear(plain), SVFitLinear(plain)
    spans = [torch.linalg.qr(ldu_span(*pair).T).Q for pair in ((ours.left, ours.right), (theirs.U, theirs.Vh))]
    assert_close(*(Q @ Q.T for Q in spans))


def test_decay_pulls_to_the_pretrained_weight_and_spares_the_scale():
    layer = loldu(5, 7, trains="both", scale=0.5)
    groups = optimizer_groups(layer, lr=0.1, weight_decay=1.0)
    assert [group["weight_decay"] for group in groups] == [0.0] and layer.no_decay == ("sigma",)
    layer = loldu(5, 7)
    optimizer = torch.optim.AdamW([layer.delta], lr=0.1, weight_decay=1.0)
    layer.delta.grad = torch.zeros_like(layer.delta)
    for _ in range(300):
        optimizer.step()
    assert_close(layer.merged().weight, layer.base.weight, 1e-10)


# Files.


def two_layers(seed=0, **options):
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 7)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(gaussian(*p.shape, seed=seed + i))
    replace_linears(model, "", partial(LoLDULinear, generator=seeded(seed), **options))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            for p in layer.adapter_parameters().values():
                p.add_(gaussian(len(p), seed=77 + seed))
    return model


@pytest.mark.parametrize("store", [True, False])
def test_a_file_has_the_factors_or_can_do_without(store, tmp_path):
    old, new, x = two_layers(store_bases=store), two_layers(store_bases=store), gaussian(5, 12)
    with torch.no_grad():
        new[0].delta.zero_()
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(old(x), new(x))
    numbers = sum(t.numel() for t in load_file(tmp_path / "x").values())
    assert numbers == (12 * 26 + 7 * (2 + 19) if store else 12 + 7 + 2 * 4)


@pytest.mark.parametrize(
    "options", [{"trains": "both", "start": "uniform"}, {"compensated": False, "start": "s_normal"}]
)
@pytest.mark.parametrize("store", [True, False])
def test_a_drawn_start_is_in_the_file_where_it_counts(options, store, tmp_path):
    old, x = two_layers(store_bases=store, **options), gaussian(5, 12)
    new = two_layers(store_bases=store, **options)
    for layer in (new[0], new[2]):
        layer.z_start.copy_(gaussian(len(layer.D), seed=50))
    assert not torch.equal(old(x), new(x))
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(old(x), new(x))


def test_a_file_without_factors_is_refused_by_another_weight(tmp_path):
    save_adapters(two_layers(store_bases=False), tmp_path / "x")
    other = two_layers(seed=5, store_bases=False)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"0\.mark: got that of other factors"):
        load_adapters(other, tmp_path / "x")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match=r"missing: 0\.left"):
        load_adapters(two_layers(), tmp_path / "x")


@pytest.mark.parametrize("factors", ["ldu", "normalised"])
@pytest.mark.parametrize("rank", [2, None])
def test_stored_factors_of_another_weight_are_refused_and_of_a_rounded_one_are_not(factors, rank, tmp_path):
    options = {"factors": factors, "rank": rank}
    save_adapters(old := two_layers(**options), tmp_path / "x")
    other, x = two_layers(seed=5, **options), gaussian(5, 12)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"0\.left, 0\.right: got those of another weight"):
        load_adapters(other, tmp_path / "x")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    rounded = two_layers(**options)
    for layer in (rounded[0], rounded[2]):
        layer.base.weight.data = layer.base.weight.data.bfloat16().double()
    load_adapters(rounded, tmp_path / "x")
    assert_close(rounded[0].delta_weight(), old[0].delta_weight())
    other.load_state_dict(old.state_dict())  # all of a model: the weight comes along
    assert_close(other(x), old(x))


def test_a_pivot_that_rounding_changes_is_noticed():
    """Two entries of the first column differ by less than bfloat16 can hold: another row comes first."""
    W = gaussian(6, 6)
    W[:, 0] = torch.tensor([0.1, 1.0, -1.001, 0.2, 0.3, 0.0])
    layers = []
    for weight in (W, W.bfloat16().double()):
        plain = nn.Linear(6, 6).double()
        plain.weight.data.copy_(weight)
        layers.append(LoLDULinear(plain, store_bases=False))
    assert ldu(W)[0][2] == 0 and ldu(W.bfloat16())[0][1] == 0
    with pytest.raises(ValueError, match="mark: got that of other factors"):
        layers[1].load_state_dict({"delta": layers[0].delta, "mark": layers[0].mark}, strict=False)


@pytest.mark.parametrize("options", [{"trains": "both"}, {"rank": 5}, {"compensated": False}])
def test_a_file_of_other_settings_is_refused(options, tmp_path):
    save_adapters(two_layers(), tmp_path / "x")
    with pytest.raises(ValueError, match="layer 0|missing|0\\."):
        load_adapters(two_layers(**options), tmp_path / "x")


def test_the_export_is_a_lora_of_rank_r(tmp_path):
    model, x = two_layers(rank=4, trains="both", scale=0.5), gaussian(3, 12)
    save_peft(model, tmp_path)
    plain = nn.Sequential(*(copy.deepcopy(m.base) if hasattr(m, "base") else m for m in model))
    loaded = load_peft(plain, tmp_path)
    assert type(loaded[0]) is LoRALinear and loaded[0].rank == 4
    assert_close(loaded(x), model(x), 1e-4)  # the format's numbers are float32


@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = two_layers(), gaussian(3, 12)
    save_peft(model, tmp_path)
    plain = nn.Sequential(*(copy.deepcopy(m.base) if hasattr(m, "base") else m for m in model))
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).double()
    assert_close(theirs(x), model(x), 1e-4)
    wanted = model(x)
    assert_close(merge_adapters(model)(x), wanted)


def test_training_stops_and_goes_on_to_the_same_bits(tmp_path):
    x = gaussian(16, 12)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    straight, first, second = (two_layers(store_bases=False, trains="both") for _ in range(3))
    adam = lambda model: torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)  # noqa: E731
    steps(straight, adam(straight), 6)
    stopped = adam(first)
    steps(first, stopped, 3)
    torch.save({"model": first.state_dict(), "optimizer": stopped.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = adam(second)
    resumed.load_state_dict(saved["optimizer"])
    steps(second, resumed, 3)
    assert torch.equal(second(x), straight(x))


# Bad input.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0, wanted 1 <= rank <= 4"),
        ({"rank": 5}, ValueError, "rank: got 5, wanted 1 <= rank <= 4"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"scale": math.nan}, ValueError, "scale: got nan"),
        ({"scale": math.inf}, ValueError, "scale: got inf"),
        ({"start": "svd"}, ValueError, "start: got 'svd', wanted"),
        ({"trains": "all"}, ValueError, "trains: got 'all', wanted"),
        ({"factors": "qr"}, ValueError, "factors: got 'qr' of rank 4, wanted one of"),
        ({"factors": "shuffled", "rank": 1}, ValueError, "factors: got 'shuffled' of rank 1"),
    ],
)
def test_bad_options_raise_and_leave_the_base(options, error, message):
    layer = base(4, 6)
    with pytest.raises(error, match=message):
        LoLDULinear(layer, **options)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_raise(value):
    layer = base(4, 3)
    with torch.no_grad():
        layer.weight[0, 0] = value
    with pytest.raises(ValueError, match="W: got 1 NaN"):
        LoLDULinear(layer)
    assert layer.weight.requires_grad
    for W in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, 2)):
        with pytest.raises((TypeError, ValueError), match="W: got shape|parameter 'W'"):  # CI checks types as well
            ldu(W)
    for W in (torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="W: got dtype|parameter 'W'"):
            ldu(W)


def test_a_pattern_without_a_match_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="nowhere"):
        replace_linears(model, "nowhere", LoLDULinear)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
