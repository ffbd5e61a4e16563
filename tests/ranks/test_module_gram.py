"""The Gram matrices of DiffoRA's theory: golden values, loops, Monte Carlo, Weyl."""

import itertools
import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.ranks.module_gram import error_bound, module_grams, relu_gram, smallest_eigenvalue

X = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)


def net():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return replace_linears(model, "", partial(LoRALinear, rank=2, alpha=3, generator=seeded()))


def test_numbers_of_the_card():
    H = relu_gram(X)
    assert H[0, 1].item() == pytest.approx(0.2114498, abs=1e-7)
    assert torch.linalg.eigvalsh(H).tolist() == pytest.approx([0.2885502, 0.7114498], abs=1e-7)
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert float(y @ torch.linalg.solve(H, y)) == pytest.approx(6.931204, abs=1e-6)
    assert error_bound(H, y) == pytest.approx(math.sqrt(6.931204))
    assert smallest_eigenvalue(H) == pytest.approx(0.2885502, abs=1e-7)


@given(st.integers(1, 6), st.integers(1, 5))
def test_relu_gram_by_loops_and_half_a_square_on_the_diagonal(rows, n):
    X = gaussian(rows, n)
    H = relu_gram(X)
    for i in range(rows):
        assert H[i, i].item() == pytest.approx(float(X[i].square().sum()) / 2)
        for j in range(rows):
            if i != j:
                dot = float(X[i] @ X[j])
                cosine = max(-1.0, min(1.0, dot / float(X[i].norm() * X[j].norm())))
                angle = math.acos(cosine)
                assert H[i, j].item() == pytest.approx(dot * (math.pi - angle) / (2 * math.pi), abs=1e-7)
    assert smallest_eigenvalue(H) > -1e-9


def test_relu_gram_is_the_mean_over_normal_weights():
    w = gaussian(200_000, 2)
    on = (w @ X.T >= 0).double()
    estimate = (X @ X.T) * (on.T @ on) / len(w)
    torch.testing.assert_close(estimate, relu_gram(X), rtol=0, atol=5e-3)


def test_module_grams_are_jacobians_by_loops():
    model, x = net(), gaussian(5, 4)
    grams = module_grams(model, x)
    assert list(grams) == ["0", "2", "4"]
    for path, K in grams.items():
        B = model.get_submodule(path).B
        rows = [
            torch.stack([torch.autograd.grad(model(x[i])[o], B)[0].flatten() for o in range(3)]) for i in range(len(x))
        ]
        for i, j in itertools.product(range(len(x)), repeat=2):
            assert K[i, j].item() == pytest.approx(float((rows[i] * rows[j]).sum()) / 3, rel=1e-9, abs=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model)


def test_fewer_modules_never_raise_the_smallest_eigenvalue_of_the_sum():
    """Weyl; of the mean it can rise."""
    grams = module_grams(net(), gaussian(4, 4))
    whole = smallest_eigenvalue(sum(grams.values()))
    means = []
    for count in (1, 2, 3):
        for chosen in itertools.combinations(grams, count):
            total = sum(grams[path] for path in chosen)
            assert smallest_eigenvalue(total) <= whole + 1e-12
            means.append(smallest_eigenvalue(total / count))
    assert max(means) > whole / 3 + 1e-6


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="X: got a row of zeros"):
        relu_gram(torch.zeros(2, 3))
    for bad in (torch.ones(3), torch.full((2, 2), math.nan), torch.ones(0, 3)):
        with pytest.raises(ValueError, match="X: got"):
            relu_gram.__wrapped__(bad) if hasattr(relu_gram, "__wrapped__") else relu_gram(bad)
    for bad in (torch.ones(2, 3), torch.full((2, 2), math.inf)):
        with pytest.raises(ValueError, match="H: got"):
            smallest_eigenvalue.__wrapped__(bad) if hasattr(
                smallest_eigenvalue, "__wrapped__"
            ) else smallest_eigenvalue(bad)
    with pytest.raises(ValueError, match="without LoRA layers"):
        module_grams(nn.Linear(3, 3), torch.ones(2, 3))
