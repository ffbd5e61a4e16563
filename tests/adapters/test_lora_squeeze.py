"""LoRA-Squeeze: equations against slow forms, the exact invariants in float64, models, PEFT, bad input."""

import copy
from functools import partial

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import (
    DoRALinear,
    LoRALinear,
    LoRAXSLinear,
    PiSSALinear,
    RandLoRALinear,
    load_peft,
    peft_ranks,
    ranks_for_energy,
    save_peft,
    squeeze,
)
from lowrank_ref.adapters.lora_squeeze import (
    carried_moments,
    rank_for_energy,
    retained_energy,
    split_factors,
    squeezed_factors,
)
from lowrank_ref.core.accounting import parameter_report
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears
from lowrank_ref.core.linalg import randomized_svd, svd
from lowrank_ref.core.peft import read_peft
from lowrank_ref.ranks import SoRALinear


def assert_close(got, wanted, atol=1e-10):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def factors(m, n, r, seed=0):
    return gaussian(r, n, seed=seed), gaussian(m, r, seed=seed + 1)


def best(W, k):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k] * S[:k] @ Vh[:k]


def net(make=LoRALinear, rank=4, sizes=(7, 6, 9), dtype=torch.float64, **options):
    torch.manual_seed(5)
    layers = [layer for n, m in zip(sizes, sizes[1:]) for layer in (nn.Linear(n, m), nn.Tanh())]
    model = nn.Sequential(*layers).to(dtype)
    replace_linears(model, "", partial(make, rank=rank, alpha=7, generator=seeded(), **options))
    for _, layer in adapters(model):
        with torch.no_grad():
            layer.B.copy_(gaussian(*layer.B.shape, seed=3))
    return model


def updates(model):
    return {path: layer.delta_weight().detach() for path, layer in adapters(model)}


# The equations.


@given(shapes(), st.integers(1, 8), st.sampled_from(["balanced", "left"]), st.sampled_from([None, 0.3, 4.0]))
def test_the_squeezed_product_is_the_truncated_svd_of_the_dense_one(shape, k, split, new_scale):
    """Invariants 2, 3 and 6: neither the split nor s' nor the way there changes ΔW', and no rank-k matrix is nearer."""
    (m, n, r), s = shape, 0.7
    k = min(k, r)
    A, B = factors(m, n, r)
    A_new, B_new, S = squeezed_factors(A, B, s, k, new_scale=new_scale, split=split)
    assert A_new.shape == (k, n) and B_new.shape == (m, k)
    dW, s_new = s * B @ A, new_scale or s
    assert_close(s_new * B_new @ A_new, best(dW, k))
    assert_close(S, torch.linalg.svdvals(dW)[:r])
    assert_close((dW - s_new * B_new @ A_new).square().sum(), S[k:].square().sum())
    other = gaussian(m, k, seed=7) @ gaussian(k, n, seed=8)
    assert (dW - other).norm() >= (dW - s_new * B_new @ A_new).norm() - 1e-10


@given(shapes(), st.integers(0, 3))
def test_enough_rank_changes_nothing(shape, spare):
    """Invariant 1, in float64 to 1e-12 of the norm and in float32 to 1e-5."""
    m, n, r = shape
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        A, B = (t.to(dtype) for t in factors(m, n, r))
        A_new, B_new, _ = squeezed_factors(A, B, 2.0, r)
        assert (B_new @ A_new - B @ A).norm() <= bound * (B @ A).norm()


@given(shapes())
def test_the_split_by_loops(shape):
    m, n, r = shape
    U, S, Vh = svd(gaussian(m, n), r)
    s = 1.6
    for split in ("balanced", "left"):
        A, B = split_factors(U, S, Vh, s, split)
        for i in range(r):
            left = (S[i] / s) ** 0.5 if split == "balanced" else S[i] / s
            for j in range(n):
                assert_close(A[i, j], (S[i] / s) ** 0.5 * Vh[i, j] if split == "balanced" else Vh[i, j])
            for j in range(m):
                assert_close(B[j, i], left * U[j, i])


@given(shapes())
def test_a_balanced_split_has_equal_gram_matrices(shape):
    """Invariant 7: B'ᵀB' = A'A'ᵀ = diag(S)/s'."""
    m, n, r = shape
    A, B, S = squeezed_factors(*factors(m, n, r), 0.7, r, new_scale=0.4)
    assert_close(B.T @ B, (S / 0.4).diag())
    assert_close(A @ A.T, (S / 0.4).diag())


@given(st.integers(1, 6), st.integers(1, 6))
def test_two_squeezes_are_one(first, second):
    """Invariant 4."""
    k1, k2 = max(first, second), min(first, second)
    A, B = factors(9, 8, 6)
    A1, B1, _ = squeezed_factors(A, B, 2.0, k1)
    twice, once = squeezed_factors(A1, B1, 2.0, k2), squeezed_factors(A, B, 2.0, k2)
    assert_close(twice[1] @ twice[0], once[1] @ once[0])


@given(shapes())
def test_another_gauge_is_squeezed_to_the_same(shape):
    """Invariant 5: (BM, M⁻¹A) is the same update, and even the factors come out the same, for signs are fixed."""
    m, n, r = shape
    (A, B), M = factors(m, n, r), torch.eye(r, dtype=torch.float64) + 0.3 * gaussian(r, r, seed=9)
    k = max(1, r - 1)
    one, other = squeezed_factors(A, B, 2.0, k), squeezed_factors(torch.linalg.solve(M, A), B @ M, 2.0, k)
    assert_close(other[1] @ other[0], one[1] @ one[0], 1e-8)
    assert_close(other[0], one[0], 1e-6)


def test_a_sketch_is_exact_where_it_spans_the_columns_and_close_where_it_does_not():
    A, B = factors(40, 50, 16)
    exact = squeezed_factors(A, B, 2.0, 6)
    wide = squeezed_factors(A, B, 2.0, 6, oversample=10, generator=seeded())
    assert_close(wide[1] @ wide[0], exact[1] @ exact[0])
    narrow = squeezed_factors(A, B, 2.0, 2, oversample=2, generator=seeded())
    exact = squeezed_factors(A, B, 2.0, 2)
    error = float((narrow[1] @ narrow[0] - exact[1] @ exact[0]).norm() / (exact[1] @ exact[0]).norm())
    assert 1e-6 < error < 0.5
    dense = randomized_svd(2.0 * B @ A, 6, oversample=10, generator=seeded())
    assert_close(2.0 * wide[1] @ wide[0], dense[0] * dense[1] @ dense[2])


def test_directions_without_energy_can_still_train():
    """√0·√0 would leave both sides at zero, from where no gradient leads away."""
    A, whole = factors(6, 5, 3)
    for B, count in ((torch.zeros_like(whole), 3), (whole[:, :1].expand(6, 3).contiguous(), 2)):
        for split, length in (("balanced", 3**-0.5), ("left", 1.0)):
            A_new, B_new, _ = squeezed_factors(A, B, 2.0, 3, split=split)
            assert_close(B_new @ A_new, B @ A)
            assert bool((B_new[:, -count:] == 0).all()) and bool((B_new[:, :-count].norm(dim=0) > 0.1).all())
            assert_close(A_new[-count:].norm(dim=1), torch.full((count,), length, dtype=torch.float64))
            layer = LoRALinear(nn.Linear(5, 6).double(), 3)
            layer.A, layer.B = nn.Parameter(A_new), nn.Parameter(B_new)
            layer(gaussian(4, 5)).square().sum().backward()
            assert bool((layer.B.grad.norm(dim=0) > 0).all())


def test_bfloat16_factors_cost_a_rounding():
    """Invariant 10: storage in bfloat16 costs at most 1e-2 of the norm."""
    A, B = factors(30, 20, 8)
    A_new, B_new, _ = squeezed_factors(A.bfloat16(), B.bfloat16(), 2.0, 8)
    assert A_new.dtype == torch.float32
    rounded = B_new.bfloat16().double() @ A_new.bfloat16().double()
    assert 1e-5 < (rounded - B @ A).norm() / (B @ A).norm() < 1e-2


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_energy_by_a_loop(values):
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    V, total = retained_energy(S), sum(v * v for v in S.tolist())
    for k in range(1, len(S) + 1):
        wanted = sum(v * v for v in S.tolist()[:k]) / total if total > 0 else 1.0
        assert abs(float(V[k - 1]) - wanted) <= 1e-9
    k = rank_for_energy(S, 0.9)
    assert float(V[k - 1]) >= 0.9 - 1e-12 and (k == 1 or float(V[k - 2]) < 0.9)
    assert rank_for_energy(S, 1.0) == max(1, int((V < 1 - 2e-15).sum()) + 1)


def test_small_numbers_keep_their_energy():
    S = torch.tensor([2e-30, 1e-30], dtype=torch.float32)
    assert_close(retained_energy(S), torch.tensor([0.8, 1.0]), 1e-6)


# Moments.


@given(shapes(), st.sampled_from(["balanced", "left"]))
def test_carried_first_moments_are_the_gradients_of_the_new_factors(shape, split):
    """Where A' = M A and B' = B N exactly, a gradient of the old factors becomes that of the new ones."""
    m, n, r = shape
    A, B = factors(m, n, r)
    G, s, s_new, k = gaussian(m, n, seed=5), 0.7, 1.9, max(1, r - 1)
    A_new, B_new, _ = squeezed_factors(A, B, s, k, new_scale=s_new, split=split)
    old = s * B.T @ G, s * G @ A.T
    got = carried_moments((A, B, s), (A_new, B_new, s_new), old, 1)
    assert_close(got[0], s_new * B_new.T @ G, 1e-8)
    assert_close(got[1], s_new * G @ A_new.T, 1e-8)


def test_carried_second_moments_by_a_loop():
    (A, B), s = factors(5, 4, 3), 2.0
    A_new, B_new, _ = squeezed_factors(A, B, s, 2, new_scale=1.0)
    M, N = A_new @ torch.linalg.pinv(A), torch.linalg.pinv(B) @ B_new
    v_A, v_B = gaussian(3, 4, seed=5).square(), gaussian(5, 3, seed=6).square()
    got = carried_moments((A, B, s), (A_new, B_new, 1.0), (v_A, v_B), 2)
    for i in range(2):
        for j in range(4):
            assert_close(got[0][i, j], sum((0.5 * N[p, i]) ** 2 * v_A[p, j] for p in range(3)))
        for j in range(5):
            assert_close(got[1][j, i], sum((0.5 * M[i, p]) ** 2 * v_B[j, p] for p in range(3)))


# What the squeeze is the best of.


def test_post_squeeze_of_a_linear_teacher_is_the_best_of_its_rank():
    """Invariant 8: with isotropic inputs it equals the optimum, to which direct training at rank k descends too."""
    dW = gaussian(6, 5, seed=3)
    U, S, Vh = svd(dW)
    A, B, _ = squeezed_factors(Vh, U * S, 1.0, 2)
    direct = [nn.Parameter(0.1 * t) for t in factors(6, 5, 2, seed=11)]
    optimizer = torch.optim.LBFGS(direct, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        optimizer.zero_grad()
        value = (dW - direct[1] @ direct[0]).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert_close((B @ A), (direct[1] @ direct[0]).detach(), 1e-5)


def test_inputs_with_a_covariance_want_another_truncation():
    """ΔW = diag(2, 1) and inputs of deviation (0.1, 1): the smaller singular value carries more of the output."""
    dW, root = torch.diag(torch.tensor([2.0, 1.0]).double()), torch.diag(torch.tensor([0.1, 1.0]).double())
    plain = best(dW, 1)
    weighted = best(dW @ root, 1) @ torch.linalg.inv(root)
    assert plain[0, 0] == 2 and abs(float(weighted[1, 1]) - 1) < 1e-12
    assert ((dW - weighted) @ root).square().sum() < ((dW - plain) @ root).square().sum() / 20


# Models.


@pytest.mark.parametrize("make", [LoRALinear, SoRALinear, PiSSALinear, LoRAXSLinear])
def test_a_squeezed_model_has_the_truncated_updates_and_the_fewer_numbers(make):
    options = {"gate": "ones"} if make is SoRALinear else {}
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 9)).double()
    replace_linears(model, "", partial(make, rank=3, generator=seeded(), dropout=0.0, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(gaussian(*p.shape, seed=4) / 5 if p.requires_grad else 0)
    full, mode = updates(model), model.eval()
    assert squeeze(model, 2) is mode
    for path, layer in adapters(model):
        assert type(layer) is LoRALinear and layer.rank == 2 and not layer.training
        assert_close(layer.delta_weight(), best(full[path], 2))
    assert parameter_report(model).trainable == 2 * (7 + 6) + 2 * (6 + 9)


def test_patterns_rank_layers_one_by_one_and_never_raise_a_rank():
    model = net(sizes=(7, 6, 9, 5))
    full = updates(model)
    kept = dict(adapters(model))["4"]
    squeeze(model, {"^0": 1, "2": 9})
    layers = dict(adapters(model))
    assert [layer.rank for layer in layers.values()] == [1, 4, 4] and layers["4"] is kept
    assert_close(layers["0"].delta_weight(), best(full["0"], 1))
    assert_close(layers["2"].delta_weight(), full["2"])


def test_scale_and_alpha_do_not_change_the_update_and_dropout_stays():
    model, x = net(dropout=0.25), gaussian(3, 7)
    twin = copy.deepcopy(model)
    squeeze(model, 2)
    squeeze(twin, 2, scale=1.0, split="left")
    assert [layer.scale for _, layer in adapters(model)] == [7 / 4] * 2
    assert [layer.scale for _, layer in adapters(twin)] == [1.0] * 2
    assert all(layer.dropout.p == 0.25 and layer.dropout.training for _, layer in adapters(model))
    assert_close(model.eval()(x), twin.eval()(x))


def test_a_tied_layer_stays_tied_and_merges():
    layer, x = nn.Linear(6, 6).double(), gaussian(3, 6)
    model = replace_linears(nn.Sequential(layer, nn.Tanh(), layer), "", partial(LoRALinear, rank=3, generator=seeded()))
    with torch.no_grad():
        model[0].B.copy_(gaussian(6, 3))
    squeeze(model, 2)
    assert model[0] is model[2]
    y = model(x)
    assert_close(merge_adapters(model)(x), y)


def test_ranks_by_energy_are_a_pattern_for_the_squeeze():
    model = net(sizes=(7, 6, 9, 5))
    full, pattern = updates(model), ranks_for_energy(model, 0.8)
    for path, dW in full.items():
        V = retained_energy(torch.linalg.svdvals(dW))
        k = pattern["^" + path]
        assert V[k - 1] >= 0.8 and (k == 1 or V[k - 2] < 0.8)
    squeeze(model, pattern)
    assert {path: layer.rank for path, layer in adapters(model)} == {key[1:]: k for key, k in pattern.items()}


def test_gpt2_is_squeezed_through_its_transposed_layers(gpt2):
    model = replace_linears(gpt2(), ["c_attn", "c_fc"], partial(LoRALinear, rank=4, generator=seeded()))
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.B.copy_(torch.randn(layer.B.shape, generator=seeded(2)) / 4)
    full = updates(model)
    squeeze(model, 2)
    for path, layer in adapters(model):
        assert_close(layer.delta_weight(), best(full[path], 2), 1e-5)


# PEFT.


def test_ranks_go_to_peft_and_back(tmp_path):
    """save_peft writes rank_pattern and alpha_pattern; load_peft reads them; the model can be squeezed again."""
    model, x = net(sizes=(7, 6, 9, 5), dtype=torch.float32), gaussian(3, 7).float()
    plain = nn.Sequential(*(getattr(layer, "base", layer) for layer in copy.deepcopy(model)))
    squeeze(model, {"0": 1, "2": 3})
    save_peft(model, tmp_path)
    config = read_peft(tmp_path).config
    told = peft_ranks(model)
    assert {key: config[key] for key in told} == told
    assert sorted([told["r"], *told["rank_pattern"].values()]) == [1, 3, 4]
    again = load_peft(copy.deepcopy(plain), tmp_path)
    assert {path: (a.rank, a.scale) for path, a in adapters(again)} == {"0": (1, 1.75), "2": (3, 1.75), "4": (4, 1.75)}
    assert_close(again(x), model(x), 1e-6)
    squeeze(again, 2)
    squeeze(model, 2)
    assert_close(again(x), model(x), 1e-5)


def test_peft_computes_the_same_and_builds_the_same_shapes(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = net(sizes=(7, 6, 9, 5), dtype=torch.float32), gaussian(3, 7).float()
    plain = nn.Sequential(*(getattr(layer, "base", layer) for layer in copy.deepcopy(model)))
    squeeze(model, {"0": 1, "4": 2})
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert_close(theirs(x), model(x), 1e-5)
    config = peft.LoraConfig(target_modules=["0", "2", "4"], **peft_ranks(model))
    fresh = peft.get_peft_model(copy.deepcopy(plain), config).base_model.model
    for path, layer in adapters(model):
        wanted = fresh.get_submodule(path)
        assert wanted.lora_A["default"].weight.shape == layer.A.shape and wanted.scaling["default"] == layer.scale


@pytest.mark.parametrize("rank", [2, 0.8])
def test_peft_converts_to_the_same_update(rank, tmp_path):
    """An independent implementation: peft's `convert_to_lora` goes through the dense ΔW."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "convert_to_lora"):
        pytest.skip("this peft has no convert_to_lora")
    model = net(dtype=torch.float32, sizes=(7, 6, 9, 5))
    plain = nn.Sequential(*(getattr(layer, "base", layer) for layer in copy.deepcopy(model)))
    save_peft(model, tmp_path)
    config, state = peft.convert_to_lora(peft.PeftModel.from_pretrained(plain, tmp_path), rank=rank)
    squeeze(model, rank if isinstance(rank, int) else ranks_for_energy(model, rank), scale=1.0, split="left")
    for path, layer in adapters(model):
        A, B = (next(v for k, v in state.items() if f".{path}." in k and f"lora_{f}" in k) for f in "AB")
        assert A.shape == layer.A.shape
        assert_close(B @ A, layer.delta_weight().detach(), 1e-5)
        assert_close(A.norm(dim=1), layer.A.detach().norm(dim=1), 1e-5)  # the split is the same: rows of length 1


# Bad input.


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0, wanted 1 <= rank <= 3"),
        ({"rank": 4}, ValueError, "rank: got 4, wanted 1 <= rank <= 3"),
        ({"rank": 2.0}, TypeError, "rank: got 2.0"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"scale": float("nan")}, ValueError, "scale: got nan"),
        ({"new_scale": -1.0}, ValueError, "scale: got -1.0"),
        ({"split": "right"}, ValueError, "split: got 'right', wanted one of"),
        ({"oversample": -1}, ValueError, "oversample: got -1"),
        ({"A": torch.ones(3, 5).long()}, TypeError, "A: got dtype torch.int64"),
        ({"A": torch.ones(3, 5) * 1j}, TypeError, "A: got dtype torch.complex64"),
        ({"A": torch.ones(5)}, ValueError, "A: got shape"),
        ({"A": torch.ones(0, 5)}, ValueError, "A: got shape"),
        ({"A": torch.full((3, 5), torch.nan)}, ValueError, "A: got 15 NaN"),
        ({"B": torch.full((4, 3), torch.inf)}, ValueError, "B: got 12 NaN or infinite"),
        ({"B": torch.ones(4, 2)}, ValueError, "A, B: got shapes"),
    ],
)
def test_bad_arguments_are_named(change, error, message, no_shape_checks):
    good = {"A": torch.ones(3, 5), "B": torch.ones(4, 3), "scale": 1.0, "rank": 2}
    with pytest.raises(error, match=message):
        squeezed_factors(**{**good, **change})


def test_bad_spectra_and_shares(no_shape_checks):
    for S in (torch.tensor([]), torch.tensor([1.0, -1.0]), torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match="S: got"):
            retained_energy(S)
    for share in (0.0, 1.5, torch.nan):
        with pytest.raises(ValueError, match="share: got"):
            rank_for_energy(torch.ones(2), share)
    with pytest.raises(TypeError, match="share: got '0.9'"):
        ranks_for_energy(net(), "0.9")


@pytest.mark.parametrize(
    "rank, options, error, message",
    [
        (0, {}, ValueError, "rank: got 0"),
        (True, {}, TypeError, "rank: got True"),
        (1.5, {}, TypeError, "rank: got 1.5"),
        (None, {}, TypeError, "rank: got None"),
        ({}, {}, ValueError, "rank: got no pattern"),
        ({"0": 0}, {}, ValueError, r"rank\['0'\]: got 0"),
        ({"nose": 2}, {}, ValueError, "rank: got nose, which names no layer, wanted .*0, 2"),
        ({"(": 2}, {}, ValueError, "pattern: got"),
        (2, {"scale": 0}, ValueError, "scale: got 0"),
        (2, {"split": "up"}, ValueError, "split: got 'up'"),
        (2, {"oversample": 1.0}, TypeError, "oversample: got 1.0"),
    ],
)
def test_a_bad_squeeze_leaves_the_model_as_it_was(rank, options, error, message, no_shape_checks):
    model = net()
    before = {path: id(layer) for path, layer in adapters(model)}
    with pytest.raises(error, match=message):
        squeeze(model, rank, **options)
    assert {path: id(layer) for path, layer in adapters(model)} == before


def test_one_bad_layer_leaves_all_as_they_were():
    model = net()
    with torch.no_grad():
        model[2].A[0, 0] = torch.nan
    first = model[0]
    with pytest.raises(ValueError, match="A: got 1 NaN"):
        squeeze(model, 2)
    assert model[0] is first and first.rank == 4


def test_models_without_plain_lora_are_refused():
    mixed = nn.ModuleDict({"a": LoRALinear(nn.Linear(4, 4), 2), "b": DoRALinear(nn.Linear(4, 4), 2)})
    for model, got in (
        (nn.Linear(2, 2), "Linear"),
        (mixed, "DoRALinear at 'b'"),
        (nn.Sequential(RandLoRALinear(nn.Linear(4, 4), 2)), "RandLoRALinear at '0'"),
        (LoRALinear(nn.Linear(2, 2), 1), "the layer LoRALinear itself"),
    ):
        with pytest.raises(ValueError, match=f"model: got {got}"):
            squeeze(model, 1)
    with pytest.raises(ValueError, match="model: got"):
        peft_ranks(mixed)
