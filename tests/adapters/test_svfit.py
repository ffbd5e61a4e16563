"""SVFit: equations against loops, the exact invariants in float64, relatives, files without bases, bad input."""

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

from lowrank_ref.adapters import load_peft, save_peft
from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.adapters.svfit import (
    SVFitLinear,
    delta_weight,
    energy_rank,
    principal_split,
    projected,
    split_forward,
    svfit_update,
)
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import merge_adapters, replace_linears
from lowrank_ref.core.linalg import svd


def base(m, n, dtype=torch.float64, seed=9):
    layer = nn.Linear(n, m, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(gaussian(m, n, seed=seed))
        layer.bias.copy_(gaussian(m, seed=8))
    return layer


def svfit(m, n, rank=None, *, moved=True, dtype=torch.float64, **options):
    """A layer; `moved` gives δ random values, as training would."""
    layer = SVFitLinear(base(m, n, dtype), rank, generator=seeded(), **options)
    if moved:
        with torch.no_grad():
            layer.delta.copy_(gaussian(*layer.delta.shape, seed=1))
    return layer


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# Each equation against a loop.


def test_delta_weight_by_loops():
    U, delta, Vh = gaussian(4, 2), gaussian(2, seed=1), gaussian(2, 3, seed=2)
    W = delta_weight(U, delta, Vh)
    for i in range(4):
        for j in range(3):
            wanted = sum(U[i, k].item() * delta[k].item() * Vh[k, j].item() for k in range(2))
            assert W[i, j].item() == pytest.approx(wanted)


@given(shapes())
def test_update_is_delta_weight_times_x(shape):
    m, n, r = shape
    U, delta, Vh, x = gaussian(m, r), gaussian(r, seed=1), gaussian(r, n, seed=2), gaussian(4, n, seed=3)
    assert_close(svfit_update(x, U, delta, Vh), x @ delta_weight(U, delta, Vh).T)


@given(shapes())
def test_principal_split_is_the_svd_cut_in_two(shape):
    m, n, r = shape
    W = gaussian(m, n)
    U, S, Vh, rest = principal_split(W, r)
    assert_close(U @ S.diag() @ Vh + rest, W)
    left, values, right = (t.numpy() for t in (U, S, Vh))
    for k in range(r):  # W vᵢ = σᵢ uᵢ, and the rest knows nothing of the pair
        assert_close(W @ torch.tensor(right[k]), torch.tensor(values[k] * left[:, k]))
        assert_close(rest @ Vh[k], torch.zeros(m, dtype=torch.float64))
        assert_close(U[:, k] @ rest, torch.zeros(n, dtype=torch.float64))
    assert_close(svd(rest)[1][: min(m, n) - r], svd(W)[1][r:])


@given(shapes())
def test_projected_by_loops(shape):
    m, n, r = shape
    U, _, Vh = svd(gaussian(m, n), r)
    D = gaussian(m, n, seed=1)
    found = projected(U, D, Vh)
    for k in range(r):
        wanted = sum(U[i, k] * D[i, j] * Vh[k, j] for i in range(m) for j in range(n))
        assert found[k].item() == pytest.approx(wanted.item(), abs=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_energy_rank_by_a_loop(share, power):
    for seed in range(5):
        S = gaussian(12, seed=seed).abs().sort(descending=True).values
        r, total = 1, sum(s.item() ** power for s in S)
        while sum(s.item() ** power for s in S[:r]) < share * total * (1 - 1e-15) and r < 12:
            r += 1
        assert energy_rank(S, share, power=power) == r


def test_energy_rank_at_its_ends():
    assert energy_rank(torch.tensor([1.0, 1.0, 0.0, 0.0]), 1.0) == 2
    assert energy_rank(torch.zeros(3)) == 1
    assert energy_rank(torch.tensor([1e-30, 1e-30]), 0.6) == 2  # the squares underflow in float32
    layer = svfit(6, 9, energy=0.9)
    assert layer.rank == energy_rank(svd(layer.base.weight)[1], 0.9) == len(layer.delta)


# Exact invariants.


@given(shapes(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_starts_at_the_base_to_the_bit(shape, dtype):
    m, n, r = shape
    layer, x = svfit(m, n, r, moved=False, dtype=dtype), gaussian(4, n).to(dtype)
    assert torch.equal(layer(x), layer.base(x))


@given(shapes(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]))
def test_the_papers_split_form_is_the_same_function(shape, precision):
    m, n, r = shape
    dtype, atol = precision
    for moved in (False, True):
        layer, x = svfit(m, n, r, moved=moved, dtype=dtype), gaussian(4, n).to(dtype)
        U, S, Vh, rest = principal_split(layer.base.weight.detach(), r)
        assert_close(split_forward(x, U, S + layer.delta, Vh, rest) + layer.base.bias, layer(x), 20 * atol)


@given(shapes())
def test_the_gradient_is_the_diagonal_of_the_whole_one(shape):
    m, n, r = shape
    layer, x = svfit(m, n, r), gaussian(4, n)
    layer(x).pow(3).sum().backward()
    W = layer.merged().weight.detach().requires_grad_()
    nn.functional.linear(x, W, layer.base.bias).pow(3).sum().backward()
    for k in range(r):
        assert layer.delta.grad[k].item() == pytest.approx((layer.U[:, k] @ W.grad @ layer.Vh[k]).item(), rel=1e-8)
    torch.testing.assert_close(projected(layer.U, W.grad, layer.Vh), layer.delta.grad, rtol=1e-8, atol=1e-8)


@given(shapes())
def test_what_trains_and_what_is_frozen(shape):
    m, n, r = shape
    layer = svfit(m, n, r)
    assert {name: p.numel() for name, p in layer.named_parameters() if p.requires_grad} == {"delta": r}
    assert_close(layer.U.T @ layer.U, torch.eye(r, dtype=torch.float64))
    assert_close(layer.Vh @ layer.Vh.T, torch.eye(r, dtype=torch.float64))
    assert len(svfit(m, n).delta) == min(m, n)


@given(shapes())
def test_the_merged_weight_is_diagonal_in_the_bases(shape):
    m, n, r = shape
    layer = svfit(m, n, r)
    W = layer.merged().weight
    U, S, Vh = svd(layer.base.weight)
    inside = layer.U.T @ W @ layer.Vh.T
    assert_close(inside, (layer.S + layer.delta).diag())
    assert_close(layer.U.T @ W @ Vh[r:].T, torch.zeros(r, min(m, n) - r, dtype=torch.float64))
    wanted = torch.cat([(layer.S + layer.delta).abs(), S[r:]]).sort(descending=True).values
    assert_close(svd(W)[1], wanted)  # values may cross, or turn negative


@given(shapes())
def test_relatives_write_the_same_update(shape):
    m, n, r = shape
    layer = svfit(m, n, r)
    A, B, s = layer.lora_factors()
    assert A.shape == (r, n) and B.shape == (m, r) and s == 1
    assert_close(s * B @ A, layer.delta_weight())
    R = (layer.delta / layer.S).diag()  # LoRA-XS, the values in its A
    assert_close(layer.U @ R @ (layer.S[:, None] * layer.Vh), layer.delta_weight())
    times = SVFitLinear(layer.base, r, form="multiplicative")  # SVF of Transformer²
    with torch.no_grad():
        times.delta.copy_(layer.delta / layer.S)
    assert_close(times.delta_weight(), layer.delta_weight())
    assert_close(times.lora_factors()[1], B)
    times(x := gaussian(3, n)).pow(2).sum().backward()
    layer(x).pow(2).sum().backward()
    torch.testing.assert_close(times.delta.grad, layer.S * layer.delta.grad)


@given(shapes())
def test_the_best_update_towards_a_wanted_change(shape):
    m, n, r = shape
    layer, D = svfit(m, n, r), gaussian(m, n, seed=5)
    best = projected(layer.U, D, layer.Vh)
    missed = (D - delta_weight(layer.U, best, layer.Vh)).square().sum()
    assert_close(missed, D.square().sum() - best.square().sum())
    for seed in range(3):
        other = best + 0.1 * gaussian(r, seed=seed)
        assert (D - delta_weight(layer.U, other, layer.Vh)).square().sum() > missed


def test_a_random_change_leaves_one_part_in_the_larger_side_on_the_diagonal():
    U, _, Vh = svd(gaussian(48, 80))
    shares = []
    for seed in range(30):
        D = gaussian(48, 80, seed=100 + seed)
        shares.append((projected(U, D, Vh).square().sum() / D.square().sum()).item())
    assert sum(shares) / 30 == pytest.approx(1 / 80, rel=0.15)  # k of mn entries; 30 draws of 48 spread by 4 %


@given(shapes())
def test_the_map_from_delta_to_the_update_is_an_isometry(shape):
    m, n, r = shape
    layer = svfit(m, n, r)
    columns = [delta_weight(layer.U, e, layer.Vh).flatten() for e in torch.eye(r, dtype=torch.float64)]
    assert_close(torch.linalg.svdvals(torch.stack(columns)), torch.ones(r, dtype=torch.float64))


def fitted(W, target):
    """The squared distance left after Newton's one step, since the loss is quadratic with the identity as Hessian."""
    plain = nn.Linear(W.shape[1], W.shape[0], bias=False).double()
    plain.weight.data.copy_(W)
    layer = SVFitLinear(plain)
    (layer.weight - target).square().sum().div(2).backward()
    with torch.no_grad():
        layer.delta.sub_(layer.delta.grad)
    return (layer.weight - target).square().sum().item()


def test_other_values_are_reached_and_a_rotation_is_not():
    W = gaussian(6, 6)
    U, S, Vh = svd(W)
    Q = torch.linalg.qr(gaussian(6, 6, seed=1)).Q
    assert fitted(W, U @ gaussian(6, seed=2).diag() @ Vh) < 1e-20
    assert fitted(W, Q @ W) > 0.1 * W.square().sum().item()


@given(shapes())
def test_signs_and_order_of_pairs_do_not_matter(shape):
    m, n, r = shape
    layer, x = svfit(m, n, r), gaussian(3, n)
    order = torch.randperm(r, generator=seeded(3))
    signs = torch.where(gaussian(r, seed=4) > 0, 1.0, -1.0).double()
    U, Vh, delta = (layer.U * signs)[:, order], (signs[:, None] * layer.Vh)[order], layer.delta[order]
    assert_close(svfit_update(x, U, delta, Vh), layer.update(x))


def test_decay_pulls_to_the_pretrained_weight():
    layer = svfit(5, 7)
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
    replace_linears(model, "", partial(SVFitLinear, **options))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.delta.copy_(gaussian(len(layer.delta), seed=77 + seed))
    return model


@pytest.mark.parametrize("store", [True, False])
def test_a_file_has_the_bases_or_can_do_without(store, tmp_path):
    old, new, x = two_layers(store_bases=store), two_layers(store_bases=store), gaussian(5, 12)
    with torch.no_grad():
        new[0].delta.zero_()
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(old(x), new(x))
    numbers = sum(t.numel() for t in load_file(tmp_path / "x").values())
    assert numbers == (12 * 26 + 7 * (2 + 19) if store else 3 * (12 + 7))
    moved = copy.deepcopy(old).float().double()
    assert_close(moved(x), old(x), 1e-4)


def test_a_file_without_bases_is_refused_by_another_weight(tmp_path):
    save_adapters(two_layers(store_bases=False), tmp_path / "x")
    other = two_layers(seed=5, store_bases=False)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"0\.S: got that of other bases"):
        load_adapters(other, tmp_path / "x")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match=r"missing: 0\.U"):
        load_adapters(two_layers(), tmp_path / "x")


def test_equal_values_with_other_vectors_are_noticed():
    """All values are 1, and any orthonormal vectors will do: a library may find these or those."""
    layers = []
    for weight in (torch.eye(4).double(), torch.linalg.qr(gaussian(4, 4)).Q):
        plain = nn.Linear(4, 4).double()
        plain.weight.data.copy_(weight)
        layers.append(SVFitLinear(plain, store_bases=False))
    assert_close(layers[0].S, layers[1].S)
    with pytest.raises(ValueError, match="mark: got that of other bases"):
        layers[0].load_state_dict(layers[1].state_dict())


def test_a_bfloat16_copy_of_the_weight_has_other_bases():
    layer = svfit(8, 8, store_bases=False)
    rounded = copy.deepcopy(layer.base)
    rounded.weight.data = rounded.weight.data.bfloat16().double()
    with pytest.raises(ValueError, match="other bases"):
        SVFitLinear(rounded, store_bases=False).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("options", [{"form": "multiplicative"}, {"pairs": "bottom"}, {"rank": 5}])
def test_a_file_of_other_settings_is_refused(options, tmp_path):
    save_adapters(two_layers(), tmp_path / "x")
    with pytest.raises(ValueError, match="layer 0"):
        load_adapters(two_layers(**options), tmp_path / "x")


def test_the_export_is_a_lora_of_rank_r(tmp_path):
    model, x = two_layers(rank=4), gaussian(3, 12)
    save_peft(model, tmp_path)
    plain = nn.Sequential(*(copy.deepcopy(m.base) if hasattr(m, "base") else m for m in model))
    loaded = load_peft(plain, tmp_path)
    assert type(loaded[0]) is LoRALinear and loaded[0].rank == 4
    assert_close(loaded(x), model(x), 1e-6)  # the format's numbers are float32


@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = two_layers(), gaussian(3, 12)
    save_peft(model, tmp_path)
    plain = nn.Sequential(*(copy.deepcopy(m.base) if hasattr(m, "base") else m for m in model))
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).double()
    assert_close(theirs(x), model(x), 1e-5)
    wanted = model(x)
    assert_close(merge_adapters(model)(x), wanted)


def test_training_stops_and_goes_on_to_the_same_bits(tmp_path):
    x = gaussian(16, 12)

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    straight, first, second = (two_layers(store_bases=False) for _ in range(3))
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
        ({"rank": 2, "energy": 0.9}, ValueError, "rank, energy: got 2 and 0.9, wanted one of the two"),
        ({"energy": 0.0}, ValueError, "share: got 0.0"),
        ({"energy": 1.5}, ValueError, "share: got 1.5"),
        ({"energy": math.nan}, ValueError, "share: got nan"),
        ({"form": "relative"}, ValueError, "form: got 'relative', wanted"),
        ({"pairs": "best"}, ValueError, "pairs: got 'best' of rank 4, wanted one of"),
        ({"pairs": "shuffled", "rank": 1}, ValueError, "pairs: got 'shuffled' of rank 1"),
    ],
)
def test_bad_options_raise_and_leave_the_base(options, error, message):
    layer = base(4, 6)
    with pytest.raises(error, match=message):
        SVFitLinear(layer, **options)
    assert layer.weight.requires_grad


def test_bad_weights_and_powers_raise():
    layer = base(4, 3)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    for options in ({}, {"energy": 0.9}):
        with pytest.raises(ValueError, match="W: got 1 NaN"):
            SVFitLinear(layer, **options)
    assert layer.weight.requires_grad
    with pytest.raises(ValueError, match="power: got 3, wanted 1 or 2"):
        energy_rank(torch.ones(3), power=3)
