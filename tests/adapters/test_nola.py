"""NOLA: equations against loops, the exact invariants in float64, checkpoints, export, and bad input."""

import copy
import math
from functools import partial

import pytest
import torch
from battery import assert_dropout_on_the_update, gaussian, loss, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, nola_bases, save_peft
from lowrank_ref.adapters.nola import (
    NOLALinear,
    coefficient_gradients,
    combine,
    delta_weight,
    init_coefficients,
    start_matrix,
)
from lowrank_ref.adapters.nola_bases import draw_bases
from lowrank_ref.adapters.nola_bits import rounded
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import adapters, replace_linears


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def nola(m, n, r, *, k=5, seed=0, moved=True, **options):
    """A layer in float64, its coefficients moved as training would."""
    base = nn.Linear(n, m).double()
    with torch.no_grad():
        base.weight.copy_(gaussian(m, n, seed=11))
        base.bias.zero_()
    layer = NOLALinear(base, r, bases=k, generator=seeded(seed), **options)
    if moved:
        for i, p in enumerate(layer.adapter_parameters().values()):
            p.data += gaussian(*p.shape, seed=20 + i)
    return layer


def parts(layer):
    """α, β, all Aᵢ, all Bⱼ, A₀ and s: the arguments of `delta_weight`."""
    m, n, r, seed = layer.out_features, layer.in_features, layer.rank, layer.recipe[0]
    k, l = len(layer.alpha), len(layer.beta)
    A = draw_bases(seed, 0, 0, k, (r, n), k, torch.float64)
    B = draw_bases(seed, 1, 0, l, (m, r), l, torch.float64)
    A0 = start_matrix(seed, r, n, torch.float64)
    return layer.alpha, layer.beta, A, B, A0 if layer.start == "offset" else torch.zeros(r, n).double(), layer.scale


# Equations.


@given(shapes(), st.integers(1, 4), st.integers(1, 4))
def test_the_update_is_the_formula_number_by_number(shape, k, l):
    m, n, r = shape
    alpha, beta = gaussian(k), gaussian(l, seed=1)
    A, B, A0 = gaussian(k, r, n, seed=2), gaussian(l, m, r, seed=3), gaussian(r, n, seed=4)
    wanted = torch.zeros(m, n, dtype=torch.float64)
    for a in range(m):
        for b in range(n):
            for rho in range(r):
                left = sum(beta[j] * B[j, a, rho] for j in range(l))
                right = A0[rho, b] + sum(alpha[i] * A[i, rho, b] for i in range(k))
                wanted[a, b] += 0.7 * left * right
    assert_close(delta_weight(alpha, beta, A, B, A0, 0.7), wanted)


@given(shapes(), st.integers(1, 7), st.integers(1, 7), st.sampled_from(["offset", "random"]))
def test_the_layer_is_the_formula(shape, k, l, start):
    m, n, r = shape
    layer, x = nola(m, n, r, k=(k, l), start=start, scale=1.5), gaussian(4, n)
    W = delta_weight(*parts(layer))
    assert_close(layer.delta_weight(), W)
    assert_close(layer.update(x), x @ W.T)
    assert_close(layer(x), layer.base(x) + x @ W.T)


@given(shapes(), st.integers(1, 5))
def test_gradients_are_inner_products_with_the_bases(shape, k):
    m, n, r = shape
    layer, x = nola(m, n, r, k=k), gaussian(6, n)
    W = (layer.base.weight + layer.delta_weight()).detach().requires_grad_()
    (x @ W.T + layer.base.bias).square().sum().backward()
    layer(x).square().sum().backward()
    A, B = layer.factors()
    _, _, A_bases, B_bases, _, s = parts(layer)
    got = coefficient_gradients(W.grad, A, B, A_bases, B_bases, s)
    loop = [sum((s * (B.T @ W.grad)[a, b] * A_bases[i, a, b]) for a in range(r) for b in range(n)) for i in range(k)]
    torch.testing.assert_close(got[0], torch.stack(loop), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.alpha.grad, got[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.beta.grad, got[1], rtol=1e-10, atol=1e-10)


def test_starts():
    alpha, beta = init_coefficients((3, 4), "offset", torch.float64)
    assert alpha.shape == (3,) and beta.shape == (4,) and not alpha.any() and not beta.any()
    alpha, beta = init_coefficients((20_000, 4), "random", torch.float32, seeded())
    assert abs(alpha.mean()) < 0.03 and abs(alpha.std() - 1) < 0.03 and not beta.any()
    A0 = start_matrix(torch.tensor(5), 40, 25, torch.float64)
    assert A0.abs().max() < 1 / 5 and abs(A0.std() - 1 / 5 / math.sqrt(3)) < 0.005


# The card's invariants, by number.


@given(shapes(), st.sampled_from(["offset", "random"]))
def test_1_it_starts_at_the_base_to_the_bit_and_only_beta_moves_at_first(shape, start):
    m, n, r = shape
    layer, x = nola(m, n, r, moved=False, start=start), gaussian(5, n)
    assert not layer.delta_weight().any() and torch.equal(layer(x), layer.base(x))
    layer(x).square().sum().backward()
    assert not layer.alpha.grad.any() and layer.beta.grad.any()


def test_1_without_the_offset_zeros_are_a_saddle():
    layer = nola(5, 6, 2, moved=False, start="random")
    layer.alpha.data.zero_()
    layer(gaussian(5, 6)).square().sum().backward()
    assert not layer.alpha.grad.any() and not layer.beta.grad.any()


@given(shapes(), st.integers(1, 9), st.integers(1, 9))
def test_4_the_count_is_k_and_l_whatever_the_shape(shape, k, l):
    m, n, r = shape
    assert sum(p.numel() for p in nola(m, n, r, k=(k, l)).parameters() if p.requires_grad) == k + l


def test_5_the_global_generator_is_left_alone():
    layer, state = nola(5, 6, 2), torch.get_rng_state()
    layer(gaussian(5, 6)).sum().backward()
    layer.merged()
    assert torch.equal(torch.get_rng_state(), state)
    first = NOLALinear(nn.Linear(4, 4), 2)  # without a generator the seed is PyTorch's own
    assert not torch.equal(first.recipe, NOLALinear(nn.Linear(4, 4), 2).recipe)


def test_5_layers_of_one_generator_have_seeds_of_their_own():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    replace_linears(model, "", partial(NOLALinear, rank=2, generator=seeded()))
    assert model[0].recipe[0] != model[1].recipe[0]
    again = copy.deepcopy(model[0].base)
    assert torch.equal(NOLALinear(again, 2, generator=seeded()).recipe, model[0].recipe)


def test_6_a_checkpoint_is_two_vectors_and_a_recipe_and_rebuilds_the_layer(tmp_path):
    old, new, x = (nn.Sequential(nola(9, 7, 2, seed=s)) for s in (1, 2)), None, gaussian(5, 7)
    old, new = old
    new[0].base.load_state_dict(old[0].base.state_dict())
    held = {k: tuple(v.shape) for k, v in old.state_dict().items() if "base" not in k}
    assert held == {"0.alpha": (5,), "0.beta": (5,), "0.recipe": (2,)}
    assert not torch.allclose(old(x), new(x))
    save_adapters(old, tmp_path / "x")
    load_adapters(new, tmp_path / "x")
    assert torch.equal(old(x), new(x))


def test_6_a_wrong_seed_is_refused_and_changes_nothing():
    layer = nola(9, 7, 2)
    state, before, y = layer.state_dict(), copy.deepcopy(layer.state_dict()), layer(gaussian(3, 7))
    damaged = state | {"recipe": state["recipe"] + torch.tensor([1, 0])}
    with pytest.raises(ValueError, match="recipe: got seed"):
        layer.load_state_dict(damaged)
    with pytest.raises(ValueError, match="recipe: got torch.bfloat16"):  # what casting a state dict does to it
        layer.load_state_dict({k: v.bfloat16() for k, v in state.items()})
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(layer(gaussian(3, 7)), y)


@pytest.mark.parametrize("change", [{"r": 3}, {"scale": 1.0}, {"start": "random"}, {"bits": 4}, {"k": 6}])
def test_6_files_of_other_settings_are_refused(change, tmp_path):
    save_adapters(nn.Sequential(nola(9, 7, 2)), tmp_path / "x")
    other = nn.Sequential(nola(9, 7, change.pop("r", 2), **change))
    with pytest.raises(ValueError, match="mismatch"):
        load_adapters(other, tmp_path / "x")


@pytest.mark.parametrize("m, n, r", [(4, 3, 2), (3, 5, 1), (3, 3, 3)])
def test_7_enough_bases_reach_every_lora(m, n, r):
    layer = nola(m, n, r, k=(r * n, m * r), start="random")
    _, _, A_bases, B_bases, _, s = parts(layer)
    A, B = gaussian(r, n, seed=5), gaussian(m, r, seed=6)
    layer.alpha.data = torch.linalg.solve(A_bases.flatten(1).T, A.flatten())
    layer.beta.data = torch.linalg.solve(B_bases.flatten(1).T, B.flatten())
    assert_close(layer.delta_weight(), s * B @ A, 1e-9)
    few = A_bases[:-1].flatten(1).T  # one fewer does not
    assert (few @ torch.linalg.lstsq(few, A.flatten()).solution - A.flatten()).norm() > 1e-3


@given(shapes())
def test_8_merged_and_exported_layers_are_the_layer(shape):
    m, n, r = shape
    layer, x = nola(m, n, r), gaussian(4, n)
    assert_close(layer.merged()(x), layer(x), 1e-10)
    A, B, s = layer.lora_factors()
    twin = LoRALinear(layer.base, r, alpha=s * r)
    twin.A.data, twin.B.data = A.detach(), B.detach()
    assert_close(twin(x), layer(x))


@pytest.mark.parametrize("bits", [None, 4])
def test_8_a_peft_folder_holds_an_ordinary_lora(bits, tmp_path):
    def base():
        plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        with torch.no_grad():
            for p in plain.parameters():
                p.copy_(gaussian(*p.shape))
        return plain

    model, x = base(), gaussian(3, 6).float()
    replace_linears(model, "", partial(NOLALinear, rank=3, scale=0.25, bits=bits, generator=seeded()))
    for _, layer in adapters(model):
        for p in layer.adapter_parameters().values():
            p.data += gaussian(*p.shape).float()
    save_peft(model, tmp_path)
    again = load_peft(base(), tmp_path)
    assert {type(layer) for _, layer in adapters(again)} == {LoRALinear}
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=1e-5)


@given(shapes(), st.floats(0.1, 5))
def test_9_rank_is_at_most_r_and_the_update_is_bilinear(shape, c):
    m, n, r = shape
    layer = nola(m, n, r, k=9)
    delta = layer.delta_weight()
    assert torch.linalg.matrix_rank(delta, rtol=1e-9) <= r
    alpha, beta, A, B, A0, s = parts(layer)
    assert_close(delta_weight(alpha, c * beta, A, B, A0, s), c * delta, 1e-10)
    assert_close(delta_weight(c * alpha, beta, A, B, c * A0, s), c * delta, 1e-10)


def test_10_what_a_layer_keeps_for_backward_does_not_grow_with_k():
    kept = []
    for k in (4, 400):
        layer, x = nola(6, 7, 2, k=k), gaussian(3, 7)
        own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):  # noqa: B023
            layer(x)
        kept.append(sum(t.numel() for t in held if t.untyped_storage().data_ptr() not in own))
    assert 0 < kept[0] == kept[1] <= 2 * 1 + 2 * (6 + 7) + 3 * 2  # two seeds, A and B, s·xAᵀ


# Options.


def steps(layer, count=3):
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for i in range(count):
        optimizer.zero_grad()
        loss(layer, gaussian(8, layer.in_features, seed=i)).backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"start": "random"}, {"dropout": 0.5}])
def test_kept_bases_train_to_the_same_numbers(options):
    ends = []
    for keep in (False, True):
        torch.manual_seed(0)
        ends.append(steps(nola(6, 7, 2, keep=keep, moved=False, **options)))
    assert ends[0].alpha.any() and not ends[0]._held and set(ends[1]._held) == {0, 1}
    for p, q in zip(ends[0].adapter_parameters().values(), ends[1].adapter_parameters().values()):
        assert_close(p, q, 1e-10)


def test_kept_bases_follow_the_seed_the_dtype_and_copies():
    x, layer, other = gaussian(3, 7), nola(6, 7, 2, keep=True), nola(6, 7, 2, seed=1)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), nola(6, 7, 2, seed=1, keep=True)(x))
    assert_close(layer(x), other(x))
    with torch.no_grad():
        layer.recipe.copy_(nola(6, 7, 2, seed=3).recipe)  # as DDP does
    assert_close(layer.factors()[0], mixed_by_hand(layer))
    single = copy.deepcopy(layer).float()
    assert single(x.float()).dtype == torch.float32 and single._held[0][1].dtype == torch.float32
    assert_close(layer.factors()[0], mixed_by_hand(layer))
    assert "_held" not in str(list(layer.state_dict()))


def mixed_by_hand(layer):
    alpha, _, A, _, A0, _ = parts(layer)
    return A0 + combine(alpha, A)


def test_kept_bases_first_drawn_in_inference_mode_train():
    layer, x = nola(6, 7, 2, keep=True), gaussian(3, 7)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.alpha.grad.any()


def test_bits_round_what_the_layer_computes_with_and_not_what_trains():
    layer, x = nola(6, 7, 2), gaussian(3, 7)
    exact, alpha = layer(x), layer.alpha.detach().clone()
    layer.bits = 3
    assert torch.equal(layer.alpha, alpha) and not torch.allclose(layer(x), exact)
    other = nola(6, 7, 2)
    for p in other.adapter_parameters().values():
        p.data = rounded(p.data, 3)
    assert torch.equal(layer(x), other(x))
    for each in (layer, other):
        each(x).square().sum().backward()
    assert torch.equal(layer.alpha.grad, other.alpha.grad)  # straight-through
    layer.bits = 17
    with pytest.raises(ValueError, match="bits: got 17"):
        layer(x)


def test_dropout_acts_on_the_update_only():
    layer, x = nola(5, 5, 2, dropout=0.5), gaussian(200, 5)
    assert_dropout_on_the_update(layer, x)


def test_activation_checkpointing_draws_the_same_bases_again():
    layer, x = nola(6, 7, 2), gaussian(3, 7).requires_grad_()
    layer(x).square().sum().backward()
    wanted = layer.alpha.grad.clone()
    layer.alpha.grad = None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.alpha.grad, wanted)


def test_a_buffer_that_is_written_between_forward_and_backward_does_no_harm():
    """DDP sends buffers before every forward; two forwards may come before a backward."""
    layer, x = nola(6, 7, 2), gaussian(3, 7)
    wanted = torch.autograd.grad(layer(x).square().sum(), layer.alpha)
    y = layer(x)
    with torch.no_grad():
        layer.recipe.copy_(layer.recipe.clone())
    assert torch.equal(torch.autograd.grad(y.square().sum(), layer.alpha)[0], wanted[0])


def test_blocks_are_as_large_as_the_device_likes(monkeypatch):
    layer, x = nola(30, 40, 4, k=50), gaussian(3, 40)
    wanted, drawn = layer(x), []
    plain = nola_bases.draw_bases
    monkeypatch.setattr(nola_bases, "draw_bases", lambda *args: drawn.append(args[3] - args[2]) or plain(*args))
    monkeypatch.setitem(nola_bases.BLOCKS, "cpu", 1000)
    assert_close(layer(x), wanted, 1e-10)
    assert max(drawn) == 8 and len(drawn) == 9 + 7  # 6 of 160 numbers for A, 8 of 120 for B


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0, wanted 1 <= rank <= 4"),
        ({"rank": 5}, ValueError, "rank: got 5, wanted 1 <= rank <= 4"),
        ({"rank": 2.0}, TypeError, "rank"),
        ({"bases": 0}, ValueError, "bases: got 0, wanted an integer >= 1"),
        ({"bases": (3, 0)}, ValueError, "bases: got 0"),
        ({"bases": (1, 2, 3)}, TypeError, "bases"),
        ({"bases": 2.5}, TypeError, "bases"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"scale": math.nan}, ValueError, "scale: got nan"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
        ({"start": "zero"}, ValueError, "start: got 'zero', wanted one of"),
        ({"bits": 1}, ValueError, "bits: got 1"),
        ({"bits": 9}, ValueError, "bits: got 9, wanted an integer from 2 to 8"),
    ],
)
def test_bad_options_raise(options, error, message):
    base = nn.Linear(4, 6)
    with pytest.raises(error, match=message):
        NOLALinear(base, **{"rank": 2, **options})
    assert base.weight.requires_grad
