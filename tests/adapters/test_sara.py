"""SaRA against loops, masked full fine-tuning, PyTorch's nuclear norm, and what the card states."""

import copy
import math

import pytest
import torch
from battery import batch, gaussian, linear, loss, network, seeded, shapes, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import ProgressiveSelection, SaRALinear, rank_penalty, save_peft
from lowrank_ref.adapters.sara import learning_rate, nuclear_norm, nuclear_subgradient, sara_layers, vlhi
from lowrank_ref.adapters.weight_selection import RULES, below
from lowrank_ref.core.accounting import state_numel
from lowrank_ref.core.layers import replace_linears

P = torch.tensor([[0.5, -0.01, 0.3], [0.02, -0.4, 0.0], [0.015, 0.2, -0.03]], dtype=torch.float64)


def layer_on(W, density=0.1, **options):
    base = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    with torch.no_grad():
        base.weight.copy_(W)
    return SaRALinear(base, density, **options)


def masked(layer):
    """P ∘ M as a dense matrix, from the layer's own numbers."""
    X = layer.values.new_zeros(layer.out_features * layer.in_features)
    return X.index_put((layer.support,), layer.values).view(layer.out_features, layer.in_features)


# Start and selection.


@given(shapes(), st.floats(0, 1), st.sampled_from(RULES))
def test_construction_changes_no_bit(shape, density, rule):
    m, n, _ = shape
    W = gaussian(m, n)
    layer, x = layer_on(W, density, rule=rule, generator=seeded()), gaussian(4, n, seed=1)
    assert torch.equal(layer.base.weight, W) and len(layer.values) == round(density * m * n)
    assert torch.equal(layer(x), layer.base(x)) and not layer.delta_weight().any()
    assert torch.equal(layer.values, W.flatten()[layer.support])  # with their signs, which the released code drops


def test_the_golden_example_and_its_signs():
    layer = layer_on(P, threshold=0.05)
    assert masked(layer).ne(0).int().tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 1]]
    assert layer.support.tolist() == [1, 3, 5, 6, 8] == below(P, 0.05).tolist()
    assert layer.values.tolist() == [-0.01, 0.02, 0.0, 0.015, -0.03]
    assert float(layer.nuclear_norm().detach()) == pytest.approx(0.0622015, abs=5e-8)
    values = torch.linalg.svdvals(masked(layer))
    torch.testing.assert_close(values, values.new_tensor([0.0351146, 0.0170869, 0.01]), rtol=0, atol=5e-8)
    layer.nuclear_norm().backward()
    wanted = layer.values.new_tensor([-1.0, 0.957826, 0.287348, 0.287348, -0.957826])
    torch.testing.assert_close(layer.values.grad, wanted, rtol=0, atol=5e-7)


def test_a_threshold_trains_what_is_below_it_and_a_density_keeps_one():
    W = gaussian(8, 9)
    assert len(layer_on(W, threshold=0.5).values) == int((W.abs() < 0.5).sum())
    assert len(layer_on(W, threshold=0.0).values) == 0 and len(layer_on(W, threshold=1e9).values) == 72
    layer = layer_on(W, 0.25)
    assert len(below(W, layer.threshold.item())) == len(layer.values) == 18


def test_bfloat16_ties_are_cut_at_the_wanted_count():
    W = (gaussian(16, 16).sign() * 0.5).bfloat16()
    assert len(layer_on(W, 0.25).values) == 64 and layer_on(W, 0.25).values.dtype == torch.float32


# Training.


def masked_full(model, masks, make, steps):
    """Full fine-tuning with masked gradients; what is outside is put back after each step, which may decay it."""
    model = copy.deepcopy(model)
    weights = [model[i].weight for i in (0, 2)]
    start = [W.detach().clone() for W in weights]
    optimizer = make(weights)
    for step in steps:
        optimizer.zero_grad()
        loss(model, batch(step)).backward()
        for W, mask in zip(weights, masks):
            W.grad *= mask
        optimizer.step()
        for W, mask, before in zip(weights, masks, start):
            W.data = torch.where(mask == 1, W.data, before)
    return weights


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.3, momentum=0.9),
        lambda ps: torch.optim.Adam(ps, lr=0.05),
        lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_the_path_is_that_of_masked_full_fine_tuning(make, density):
    base = network()
    model = replace_linears(copy.deepcopy(base), "", lambda layer: SaRALinear(layer, density))
    layers = [*sara_layers(model).values()]
    masks = [torch.zeros_like(a.base.weight).flatten().index_fill(0, a.support.long(), 1) for a in layers]
    masks = [mask.view(a.base.weight.shape) for a, mask in zip(layers, masks)]
    optimizer = make([a.values for a in layers])
    train(model, optimizer, range(6))
    for layer, mask, W in zip(layers, masks, masked_full(base, masks, make, range(6))):
        start, merged = layer.base.weight, layer.merged().weight
        assert torch.equal(merged[mask == 0], start[mask == 0])  # frozen to the bit, decay included
        assert not torch.equal(merged, start)
        torch.testing.assert_close(merged[mask == 1], W[mask == 1], rtol=0, atol=1e-12)
    if not isinstance(optimizer, torch.optim.SGD):
        assert state_numel(optimizer) == 2 * sum(len(a.values) for a in layers)


def test_nothing_trains_below_nothing():
    model = replace_linears(network(), "", lambda layer: SaRALinear(layer, 0.0))
    before, x = copy.deepcopy(model.state_dict()), batch(0)
    train(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1), range(2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), network()(x))


def test_an_entry_that_is_not_active_gets_no_gradient_on_either_way():
    layer, x = layer_on(gaussian(10, 12), 0.5), batch(0)
    layer.active[::3] = False
    grads = []
    for forward in (layer, super(SaRALinear, layer).forward):
        layer.zero_grad()
        forward(x).square().sum().backward()
        grads.append(layer.values.grad.clone())
    assert not grads[0][::3].any() and grads[0][1::3].any()
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


# The rank loss.


@given(shapes())
def test_the_nuclear_norm_is_pytorchs_and_so_is_its_gradient(shape):
    m, n, _ = shape
    X = gaussian(m, n).requires_grad_()
    nuclear_norm(X).backward()
    Y = X.detach().clone().requires_grad_()
    torch.linalg.matrix_norm(Y, "nuc").backward()
    torch.testing.assert_close(nuclear_norm(X), torch.linalg.matrix_norm(Y, "nuc"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(X.grad, Y.grad, rtol=0, atol=1e-8)


@given(shapes())
def test_the_norms_in_order_and_the_subgradient_where_rank_is_missing(shape):
    m, n, rank = shape
    X = gaussian(m, rank) @ gaussian(rank, n, seed=1)
    nuclear, frobenius = float(nuclear_norm(X)), float(X.norm())
    assert frobenius - 1e-10 <= nuclear <= math.sqrt(rank) * frobenius + 1e-10
    assert (nuclear - frobenius < 1e-9 * frobenius) == (rank == 1)
    Z = nuclear_subgradient(X)
    assert torch.linalg.matrix_norm(Z, 2) <= 1 + 1e-10 and torch.linalg.matrix_rank(Z, tol=1e-6) == rank
    for seed in range(3):  # ‖Y‖ >= ‖X‖ + <Z, Y - X> for every Y
        Y = X + 0.3 * gaussian(m, n, seed=seed)
        assert nuclear_norm(Y) >= nuclear + float((Z * (Y - X)).sum()) - 1e-9


def test_finite_differences_of_the_masked_norm():
    layer, h = layer_on(gaussian(5, 6), 0.4), 1e-6
    layer.nuclear_norm().backward()
    for i in range(len(layer.values)):
        ends = []
        for sign in (1, -1):
            other = copy.deepcopy(layer)
            other.values.data[i] += sign * h
            ends.append(float(torch.linalg.matrix_norm(masked(other).detach(), "nuc")))
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float(layer.values.grad[i]), abs=1e-6)


def test_the_penalty_of_a_model_is_the_sum_and_one_drawn_layer_is_right_on_average():
    model = replace_linears(network(), "", lambda layer: SaRALinear(layer, 0.3))
    parts = [float(torch.linalg.matrix_norm(masked(a).detach(), "nuc")) for a in sara_layers(model).values()]
    assert float(rank_penalty(model).detach()) == pytest.approx(sum(parts), rel=1e-12)
    drawn = {round(float(rank_penalty(model, one=True, generator=seeded(s)).detach()), 13) for s in range(12)}
    assert sorted(drawn) == pytest.approx(sorted(2 * part for part in parts), rel=1e-12)
    assert float(rank_penalty(model, of="update").detach()) == 0.0
    for layer in sara_layers(model).values():
        layer.values.data.add_(0.1)
    moved = [torch.linalg.matrix_norm(a.delta_weight().detach(), "nuc") for a in sara_layers(model).values()]
    assert float(rank_penalty(model, of="update").detach()) == pytest.approx(float(sum(moved)), rel=1e-12)
    rank_penalty(model).backward()
    assert all(a.values.grad.any() and a.base.weight.grad is None for a in sara_layers(model).values())


# The rest.


def test_the_score_is_between_zero_and_two_and_knows_no_units():
    fid, clip = [150.7, 146.2, 134.9, 133.7], [27.96, 27.82, 27.08, 26.42]
    scores = vlhi(fid, clip)
    assert all(0 <= s <= 2 for s in scores) and scores[3] == 1.0
    other = vlhi([3 * f + 7 for f in fid], [0.1 * c - 2 for c in clip])
    assert other == pytest.approx(scores, abs=1e-12)
    assert vlhi(fid[:3], clip[:3])[2] != pytest.approx(scores[2])  # one model less changes every score


def test_the_rate_of_the_paper():
    assert [learning_rate(t) for t in (2e-3, 8e-4, 2e-4)] == pytest.approx([4.966e-4, 7.558e-4, 9.324e-4], rel=1e-4)


def test_export_to_peft_is_refused_and_says_why(tmp_path):
    model = replace_linears(nn.Sequential(linear()), "0", SaRALinear)
    with pytest.raises(ValueError, match="got SaRALinear at '0'.*is sparse and of high rank, no LoRA: merge it"):
        save_peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bad_input_is_named(no_shape_checks):
    for call, name in (
        (lambda: layer_on(P, 1.5), "density"),
        (lambda: layer_on(P, "half"), "density"),
        (lambda: layer_on(P, threshold=-1.0), "threshold"),
        (lambda: layer_on(P, rule="small"), "rule"),
        (lambda: layer_on(P * float("nan")), "base.weight"),
        (lambda: rank_penalty(nn.Linear(2, 2)), "model"),
        (lambda: rank_penalty(layer_on(P), of="delta"), "of"),
        (lambda: nuclear_norm(P * float("inf")), "X"),
        (lambda: learning_rate(-1.0), "threshold"),
        (lambda: vlhi([1.0, 1.0], [1.0, 2.0]), "fid, clip"),
        (lambda: vlhi([1.0, 3.0], [1.0, 2.0, 3.0]), "fid, clip"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
            call()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_agrees_with_pytorch_optimizers_sara(decay):
    """An independent optimizer of the same method on dense gradients (4.1.0), its progressive step included."""
    theirs = pytest.importorskip("pytorch_optimizer").SaRA
    base, model = network(torch.float32), network(torch.float32)
    replace_linears(model, "", lambda layer: SaRALinear(layer, threshold=0.2))
    weights = [base[i].weight for i in (0, 2)]
    peer = theirs(weights, lr=0.01, threshold=0.2, progressive_iter=3, lambda_rank=0.0, weight_decay=decay)
    ours = torch.optim.AdamW([a.values for a in sara_layers(model).values()], lr=0.01, weight_decay=decay)
    ProgressiveSelection(model, ours, at=3).attach(ours)
    for step in range(6):
        for net, optimizer in ((base, peer), (model, ours)):
            optimizer.zero_grad()
            loss(net, batch(step, torch.float32)).backward()
            optimizer.step()
    for W, layer in zip(weights, sara_layers(model).values()):
        torch.testing.assert_close(layer.merged().weight, W.detach(), rtol=0, atol=1e-5)
