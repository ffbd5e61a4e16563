"""WeLore's surgery: plans count what the cut model has, cuts leave the rest alone, and what trains afterwards."""

import copy

import numpy as np
import pytest
import torch
from battery import distributed_layer, linear, train
from processes import in_processes
from spectral_cases import gaussian, network, seeded, welore_layer
from torch import nn

from lowrank_ref.compression import (
    WeLoreLinear,
    cut_model,
    plan_ranks,
    plan_within,
    train_low_rank_only,
    weight_spectra,
)
from lowrank_ref.compression.welore import NORMALISATIONS, normalised_spectrum, pruned_counts, uniform_pruning
from lowrank_ref.core.io import load_tensors, save_tensors
from lowrank_ref.lab.models import GPT


def assert_close(got, wanted, atol=1e-11):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("min_ratio", [0.0, 0.4999, 0.6])
def test_6_the_plan_counts_what_the_cut_model_has(min_ratio):
    model = network()
    plan = plan_ranks(model, 0.5, min_ratio=min_ratio, pattern="")
    before = {path: p.clone() for path, p in model.named_parameters()}
    cut_model(model, plan)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    assert sum(p.numel() for p in matrices) == plan.parameters
    assert plan.trainable == sum(p.numel() for path, p in model.named_parameters() if path.endswith(("A", "B")))
    assert plan.kept == pytest.approx(plan.parameters / (8 * 12 + 12 * 12 + 12 * 6))
    for path, p in model.named_parameters():  # what stays dense stays bit for bit
        assert path.endswith((".A", ".B")) or torch.equal(p, before[path])
    factored = [path for path, m in model.named_modules() if isinstance(m, WeLoreLinear)]
    assert tuple(factored) == plan.low_rank
    gone = sum(min(plan.shapes[path]) - plan.ranks[path] for path in factored)
    assert plan.reached == pytest.approx(gone / (8 + 12 + 6)) and plan.reached <= plan.nominal + 1e-12


def test_6_factors_can_be_larger_than_the_matrix():
    model = network()
    assert plan_ranks(model, 0.1, "", min_ratio=0.0).kept > 1


def test_7_only_factors_train_and_the_rest_keeps_its_bits():
    model = network()
    model.append(nn.LayerNorm(6).double())
    cut_model(model, plan_ranks(model, 0.5, ""))
    assert all(p.requires_grad for p in model.parameters())  # as with every layer that is the weight
    for keep, kept in ((None, set()), (r"^5\.", {"5.weight", "5.bias"})):
        train_low_rank_only(model, keep)
        trained = {path for path, p in model.named_parameters() if p.requires_grad}
        factored = {path for path, _ in model.named_parameters() if path.endswith((".A", ".B"))}
        assert trained == factored | kept and factored
    before = copy.deepcopy(model.state_dict())
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(gaussian(4, 8)).square().sum().backward()
    adam.step()
    for path, p in model.named_parameters():
        assert torch.equal(p, before[path]) != (path in trained)


def test_8_equal_spectra_are_cut_uniformly():
    model = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(3))).double()
    W = gaussian(9, 9)
    for i, layer in enumerate(model):
        layer.weight.data.copy_(torch.linalg.qr(gaussian(9, 9, seed=i)).Q @ W)
    for by in NORMALISATIONS:
        plan = plan_ranks(model, 4 / 9, "", by=by)
        assert [9 - r for r in plan.ranks.values()] == uniform_pruning([9, 9, 9], 4 / 9 + 1e-9)


@pytest.mark.parametrize("by", NORMALISATIONS)
def test_a_plan_within_a_share_is_the_largest_that_fits(by):
    model = network()
    spectra = weight_spectra(model, "")
    with pytest.raises(ValueError, match="share: got 0.05, wanted at least"):
        plan_within(model, 0.05, "", by=by)
    for share in (0.4, 0.6, 0.8, 1.0):
        plan = plan_within(model, share, by=by, spectra=spectra)
        assert plan.kept <= share
        values = torch.cat([normalised_spectrum(S, by) for S in spectra.values()]).tolist()
        fits = []
        for k in [*values, 2.0]:
            numbers = 0
            for path, S in spectra.items():
                m, n = plan.shapes[path]
                r = max(1, len(S) - pruned_counts([S], k, by)[0])
                numbers += min(r * (m + n), m * n)
            if numbers <= share * plan.parameters / plan.kept:
                fits.append(numbers)
        assert plan.parameters == max(fits)
        assert all(plan.ranks[p] * sum(plan.shapes[p]) < np.prod(plan.shapes[p]) for p in plan.low_rank)


def test_a_whole_gpt_round_trip(tmp_path):
    model = GPT(11, dim=16, layers=1, heads=2, length=8, generator=seeded())
    plan = plan_ranks(model, 0.55, r"^blocks\.", min_ratio=0.3)
    assert plan.low_rank and set(plan.ranks) == {p for p, m in model.named_modules() if isinstance(m, nn.Linear)} - {
        "head"
    }
    other = copy.deepcopy(model)
    cut_model(model, plan)
    save_tensors(model.state_dict(), tmp_path / "cut.safetensors", kind="welore")
    cut_model(other, plan).load_state_dict(load_tensors(tmp_path / "cut.safetensors", kind="welore"))
    tokens = torch.randint(11, (2, 8), generator=seeded())
    assert torch.equal(model(tokens), other(tokens))
    for path in plan.low_rank:
        dense = model.get_submodule(path).to_linear()
        x = torch.randn(3, dense.in_features, generator=seeded(1))
        assert_close(dense(x), model.get_submodule(path)(x), atol=1e-5)


def test_gpt2s_conv1d_and_half_precision(gpt2):
    model = gpt2()
    tokens = torch.randint(50, (2, 6), generator=seeded())
    with torch.no_grad():
        before = model(tokens).logits
        plan = plan_ranks(model, 0.2, r"c_(attn|fc|proj)$", min_ratio=0.0)
        full = plan.__class__({p: min(s) for p, s in plan.shapes.items()}, plan.shapes, plan.low_rank, 0.0, 0.0)
        cut_model(model, full)
        assert_close(model(tokens).logits, before, atol=1e-4)
    assert type(model.get_submodule(plan.low_rank[0]).to_linear()).__name__ == "Conv1D"
    half = WeLoreLinear.from_linear(nn.Linear(8, 6).to(torch.bfloat16), rank=3)
    assert half.A.dtype == torch.bfloat16 and half(torch.randn(2, 8).to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    in_processes(distributed_layer, tmp_path, welore_layer)
    first, second = (torch.load(tmp_path / f"rank {rank}", weights_only=True) for rank in range(2))
    alone = welore_layer(linear())
    train(alone, torch.optim.Adam(alone.parameters(), lr=0.01), range(3))
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], second[key])
        assert_close(first[key], value, 1e-9)


def test_surgery_that_cannot_be(no_shape_checks):
    model = network()
    before = copy.deepcopy(model.state_dict())
    plan = plan_ranks(model, 0.5, "")
    for call, message in [
        (lambda: cut_model(model, plan_ranks(model, 0.0, "")), "plan: got one without low-rank components"),
        (lambda: cut_model(nn.Sequential(nn.Tanh()), plan), "plan: got paths of another model, such as"),
        (lambda: plan_ranks(model, 0.5, min_ratio=2), "min_ratio: got 2"),
        (lambda: plan_within(model, 0), "share: got 0"),
        (lambda: train_low_rank_only(model), "model: got Sequential without low-rank component"),
        (lambda: weight_spectra(model, "attention"), "pattern: got 'attention', which matches nothing"),
        (lambda: weight_spectra(model, "", {"0": torch.eye(8)}), "covariances: got none for '2'"),
        (lambda: weight_spectra(model, "0", {"0": torch.eye(7)}), "covariances: got shape .7, 7. for '0'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(p, before[path]) for path, p in model.state_dict().items())
    with pytest.raises(TypeError, match="model: got int"):
        weight_spectra(3)
    flags = [p.requires_grad for p in cut_model(model, plan).parameters()]
    with pytest.raises(ValueError, match="keep: got 'norm', which matches nothing"):
        train_low_rank_only(model, "norm")
    assert [p.requires_grad for p in model.parameters()] == flags
