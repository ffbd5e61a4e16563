"""What layers read, summed by hooks, against sums by hand; and a cut that uses it."""

import copy

import pytest
import torch
from spectral_cases import gaussian, network

from lowrank_ref.compression import cut_model, input_covariances, plan_ranks, weight_spectra


def test_covariances_by_hand_and_through_a_model():
    model, X = network(), gaussian(30, 5, 8)
    found = input_covariances(model, lambda: [model(x) for x in X], "", damping=1e-3)
    first, x = found["0"], X.flatten(0, 1)
    C = sum(torch.outer(row, row) for row in x) / len(x)
    torch.testing.assert_close(
        first, C + 1e-3 * C.diagonal().mean() * torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-11
    )
    assert not any(layer._forward_pre_hooks for layer in model)
    plan = plan_ranks(model, 0.5, spectra=weight_spectra(model, "", found), min_ratio=0.0)
    before = model(x)
    blind, aware = copy.deepcopy(model), copy.deepcopy(model)
    cut_model(blind, plan)
    cut_model(aware, plan, found)
    first_layer = model[0](x)
    errors = [float((m[0](x) - first_layer).detach().square().sum()) for m in (blind, aware)]
    assert errors[1] < errors[0] and aware(x).shape == before.shape


def test_what_cannot_be_measured(no_shape_checks):
    model = network()
    with pytest.raises(ValueError, match="damping: got 0"):
        input_covariances(model, lambda: None, damping=0)
    with pytest.raises(ValueError, match="run: got no input for '2'"):
        input_covariances(model, lambda: model[0](gaussian(3, 8)), "")
    with pytest.raises(TypeError, match="model: got int"):
        input_covariances(3, lambda: None)
    with pytest.raises(RuntimeError, match="broken"):
        input_covariances(model, lambda: (_ for _ in ()).throw(RuntimeError("broken")), "")
    assert not any(layer._forward_pre_hooks for layer in model)
