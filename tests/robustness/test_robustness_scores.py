"""The scores against loops over the data sets, at their limits, and against published values."""

import math

import pytest
import torch
from battery import seeded
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.robustness.robustness_scores import (
    CLASSES,
    WAR_WEIGHTS,
    aggregated_robustness,
    improved_robustness,
    relative_robustness,
)

SHARES = st.floats(0.01, 1.0)


def accuracies(models=3, sets=5, seed=0):
    low, high = torch.rand(2, models, sets, generator=seeded(seed), dtype=torch.float64)
    return low, 0.05 + 0.95 * high


@given(SHARES, SHARES, st.integers(2, 1000))
def test_the_improved_score_equals_its_formula(low, high, classes):
    skill = max(high - 1 / classes, 0)
    wanted = low / high * (1 - math.exp(-200 * skill**2))
    a, b = torch.tensor([[low], [high]], dtype=torch.float64)
    found = improved_robustness(a, b, 1 / classes)
    assert found.item() == pytest.approx(wanted, abs=1e-12)


def test_limits():
    low, high = accuracies()
    gamma = relative_robustness(low, high)
    assert torch.equal(relative_robustness(high, high), torch.ones_like(high))
    assert bool((gamma > 1).any())  # not clipped
    improved = improved_robustness(low, high, 0.1)
    assert bool((improved <= gamma).all())
    assert not improved_robustness(low, torch.full_like(low, 0.1), 0.1).any()
    assert not improved_robustness(low, torch.full_like(low, 0.02), 0.1).any()  # below chance is no skill
    torch.testing.assert_close(improved_robustness(low, high, 0.0, sharpness=1e9), gamma)


@pytest.mark.parametrize("skill, factor", [(0.02, 0.077), (0.05, 0.39), (0.10, 0.86), (0.20, 0.9997)])
def test_how_much_of_the_score_is_kept_near_chance(skill, factor):
    one = torch.tensor([0.1 + skill]).double()
    assert improved_robustness(one, one, 0.1).item() == pytest.approx(factor, abs=0.005)


def test_aggregates_equal_loops():
    low, high = accuracies()
    gamma, weights = relative_robustness(low, high), torch.tensor([0.1, 2.0, 0.0, 1.0, 0.5]).double()
    for i, row in enumerate(gamma.tolist()):
        assert aggregated_robustness(gamma)[i].item() == pytest.approx(sum(row) / 5, abs=1e-12)
        wanted = sum(w * g for w, g in zip(weights.tolist(), row)) / sum(weights.tolist())
        assert aggregated_robustness(gamma, weights)[i].item() == pytest.approx(wanted, abs=1e-12)
    same = aggregated_robustness(gamma, 7 * weights)
    torch.testing.assert_close(same, aggregated_robustness(gamma, weights), rtol=0, atol=1e-12)
    even = aggregated_robustness(gamma, torch.ones(5).double())
    torch.testing.assert_close(even, aggregated_robustness(gamma), rtol=0, atol=1e-12)
    one = improved_robustness(low, high, 0.1)[:, :1]
    torch.testing.assert_close(aggregated_robustness(one, torch.ones(1).double()), one[:, 0])


def test_the_published_weights():
    assert WAR_WEIGHTS.keys() == CLASSES.keys() and len(WAR_WEIGHTS) == 15
    total = sum(WAR_WEIGHTS.values())
    assert total == pytest.approx(4.525, abs=5e-4)
    assert sum(WAR_WEIGHTS[name] for name in ("EuroSAT", "ImageNet-A", "Aircraft")) / total == pytest.approx(
        0.62, abs=0.01
    )


def test_a_published_model_comes_out():
    """CLIP ViT-B/32: accuracies at 16 and 224 pixels from its table; γ of Pets there is 28.35/87.49."""
    low = [10.69, 2.28, 8.87, 12.78, 2.39, 42.64, 9.31, 11.09, 12.86, 3.63, 3.36, 28.35, 14.05, 10.52, 14.96]
    high = [63.41, 31.48, 55.99, 68.6, 42.31, 87.5, 43.99, 82.27, 62.84, 59.31, 19.74, 87.49, 66.38, 46.76, 62.68]
    low, high = torch.tensor([low, high]).double() / 100
    chance = 1 / torch.tensor(list(CLASSES.values())).double()
    weights = torch.tensor(list(WAR_WEIGHTS.values())).double()
    improved = improved_robustness(low, high, chance)
    assert aggregated_robustness(improved, weights).item() == pytest.approx(0.169, abs=5e-4)
    assert relative_robustness(low, high)[11].item() == pytest.approx(0.32404, abs=5e-6)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: relative_robustness(torch.tensor([1]), torch.tensor([1.0])), TypeError, "accuracy: got dtype"),
        (lambda: relative_robustness(torch.tensor([28.0]), torch.tensor([1.0])), ValueError, "accuracy.*percent"),
        (lambda: relative_robustness(torch.tensor([0.5]), torch.tensor([math.nan])), ValueError, "high: got values"),
        (lambda: relative_robustness(torch.tensor([0.0]), torch.tensor([0.0])), ValueError, "high: got 0"),
        (lambda: improved_robustness(torch.ones(1), torch.ones(1), 0.1, sharpness=0.0), ValueError, "sharpness"),
        (lambda: aggregated_robustness(torch.ones(2), torch.ones(3)), ValueError, "weights: got"),
        (lambda: aggregated_robustness(torch.ones(2), torch.tensor([1.0, -1.0])), ValueError, "weights: got"),
        (lambda: aggregated_robustness(torch.ones(2), torch.zeros(2)), ValueError, "weights: got"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
