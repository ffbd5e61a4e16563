"""Pruning a trained LoRA by its singular values: against the full SVD, and within the budget."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import DoRALinear, LoRAConv2d, LoRAEmbedding, LoRALinear
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.ranks.sora import SoRALinear
from lowrank_ref.ranks.svd_pruning import prune_by_svd, ranks_by_energy


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def net(make=LoRALinear):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 9)).double()
    replace_linears(model, "", partial(make, rank=3, alpha=7, generator=seeded()))
    for _, layer in adapters(model):
        with torch.no_grad():
            layer.B.copy_(gaussian(*layer.B.shape, seed=3))
    return model


@given(st.integers(0, 10))
def test_with_equal_costs_no_other_choice_keeps_more_energy(count):
    spectra = {"a": torch.tensor([3.0, 1.0, 0.5]), "b": torch.tensor([2.5, 2.0]), "c": torch.tensor([0.7])}
    ranks = ranks_by_energy(spectra, dict.fromkeys(spectra, 4), 4 * count + 3)

    def energy(r):
        return sum(float(S[:k].square().sum()) for S, k in zip(spectra.values(), r))

    choices = itertools.product(range(4), range(3), range(2))
    assert energy(ranks.values()) == max(energy(r) for r in choices if sum(r) <= count)
    assert sum(ranks.values()) == min(count, 6)


def test_dear_layers_must_earn_their_place():
    spectra = {"cheap": torch.tensor([1.0]), "dear": torch.tensor([1.5])}
    assert ranks_by_energy(spectra, {"cheap": 10, "dear": 30}, 30) == {"cheap": 1, "dear": 0}
    assert ranks_by_energy(spectra, {"cheap": 10, "dear": 20}, 30) == {"cheap": 1, "dear": 1}
    assert ranks_by_energy({"a": torch.tensor([0.0])}, {"a": 1}, 5) == {"a": 0}  # nothing to keep


@pytest.mark.parametrize("make", [LoRALinear, SoRALinear])
def test_a_budget_that_holds_everything_changes_nothing(make):
    model, x = net(make), gaussian(4, 5)
    y = model(x)
    assert prune_by_svd(model, 1000) is model
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-10)
    assert all(type(layer) is LoRALinear and layer.rank == 3 for _, layer in adapters(model))


@given(st.integers(0, 90))
def test_a_pruned_model_stays_within_its_budget_and_is_the_truncated_svd(budget):
    model = net()
    full = {path: layer.delta_weight().detach() for path, layer in adapters(model)}
    bases = {path: layer.base for path, layer in adapters(model)}
    prune_by_svd(model, budget)
    left = dict(adapters(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= budget
    for path, dW in full.items():
        if path not in left:
            assert model.get_submodule(path) is bases[path]
            continue
        U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
        r = left[path].rank
        torch.testing.assert_close(left[path].delta_weight(), U[:, :r] * S[:r] @ Vh[:r], rtol=0, atol=1e-10)


def test_pruning_keeps_dropout_and_mode_and_takes_dead_layers():
    model = replace_linears(
        nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)).double(), "", partial(SoRALinear, rank=3, dropout=0.25)
    ).eval()
    with torch.no_grad():
        model[0].g.zero_()
        model[1].B.copy_(gaussian(4, 3))
    prune_by_svd(model, 1000)
    assert type(model[0]) is nn.Linear and model[1].dropout.p == 0.25 and not model[1].dropout.training


@pytest.mark.parametrize(
    "other", [DoRALinear(nn.Linear(4, 4), 2), LoRAEmbedding(nn.Embedding(9, 4), 2), LoRAConv2d(nn.Conv2d(4, 4, 1), 2)]
)
def test_an_adapter_that_it_cannot_cut_is_named_and_nothing_changes(other):
    """It stood outside the budget: 40 became 99 numbers."""
    model = nn.ModuleDict({"a": LoRALinear(nn.Linear(4, 4), 2), "b": other})
    with pytest.raises(ValueError, match=f"model: got {type(other).__name__} at 'b'"):
        prune_by_svd(model, 40)
    assert model["a"].rank == 2 and model["b"] is other


@pytest.mark.parametrize(
    "spectra, costs, budget, error, message",
    [
        ({"a": [1.0, float("nan")]}, {"a": 4}, 10, ValueError, r"spectra\['a'\]: got 1 NaN"),
        ({"a": [1.0, -1.0]}, {"a": 4}, 10, ValueError, "negative"),
        ({"a": [1.0]}, {}, 10, ValueError, "costs: got"),
        ({"a": [1.0]}, {"a": 0}, 10, ValueError, r"costs\['a'\]: got 0"),
        ({"a": [1.0]}, {"a": 4}, -1, ValueError, "budget: got -1"),
        ({"a": [1.0]}, {"a": 4}, float("nan"), TypeError, "budget: got nan"),
    ],
)
def test_bad_spectra_are_named(spectra, costs, budget, error, message, no_shape_checks):
    with pytest.raises(error, match=message):
        ranks_by_energy({path: torch.tensor(S) for path, S in spectra.items()}, costs, budget)


def test_bad_input():
    with pytest.raises(ValueError, match="budget: got -1"):
        prune_by_svd(net(), -1)
    with pytest.raises(TypeError, match="budget"):
        prune_by_svd(net(), 1.5)
    for model in (nn.Sequential(nn.Linear(2, 2)), LoRALinear(nn.Linear(2, 2), 1), net(DoRALinear)):
        with pytest.raises(ValueError, match="model: got"):
            prune_by_svd(model, 10)
