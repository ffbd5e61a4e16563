"""Intervals: coverage by simulation, and the pairing of a bootstrap."""

import pytest
import torch

from lowrank_ref.robustness.intervals import bootstrap_interval, success_interval


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_wilson_covers(share):
    counts = torch.distributions.Binomial(40, share)
    torch.manual_seed(0)
    inside = [low <= share <= high for low, high in (success_interval(int(c), 40) for c in counts.sample((500,)))]
    assert sum(inside) / 500 > 0.9


def test_wilson_at_its_ends():
    low, high = success_interval(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and 0.1 < high < 0.2
    low, high = success_interval(20, 20)
    assert 0.8 < low < 0.9 and high == pytest.approx(1)
    # the bound solves |share - p| = z √(p (1 - p) / n)
    low, high = success_interval(7, 20)
    for p in (low, high):
        assert (7 / 20 - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / 20)


def test_bootstrap_covers_the_mean():
    inside = 0
    for seed in range(60):
        sample = torch.rand(50, generator=seeded(seed), dtype=torch.float64)
        low, high = bootstrap_interval(torch.mean, sample, generator=seeded(seed), draws=200)
        inside += low <= 0.5 <= high
    assert inside >= 50


def test_the_same_queries_are_drawn_together():
    old = torch.rand(50, generator=seeded(), dtype=torch.float64)

    def gain(new, old):
        return new.mean() - old.mean()

    low, high = bootstrap_interval(gain, old + 0.1, old, generator=seeded(1), draws=100)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    low, high = bootstrap_interval(gain, old + 0.1, old[:40], generator=seeded(1), draws=100, together=False)
    assert low < 0.08 < 0.12 < high


def test_bad_input():
    with pytest.raises(ValueError, match="cases: got 3"):
        success_interval(4, 3)
    with pytest.raises(ValueError, match="samples: got lengths"):
        bootstrap_interval(torch.mean, torch.ones(2), torch.ones(3), generator=seeded())
    with pytest.raises(ValueError, match="samples: got 1 NaN"):
        bootstrap_interval(torch.mean, torch.tensor([1.0, torch.nan]), generator=seeded())
    with pytest.raises(ValueError, match="draws: got 0"):
        bootstrap_interval(torch.mean, torch.ones(2), generator=seeded(), draws=0)
