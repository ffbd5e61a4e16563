"""Chains against a loop over images, and the consistency against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.robustness import augmentation_chains as augment
from lowrank_ref.robustness.augmentation_chains import OPERATIONS, chained, consistent_loss, jensen_shannon
from lowrank_ref.robustness.corruptions import CORRUPTIONS

close = torch.testing.assert_close


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=5, seed=0, c=1, h=9, w=9):
    return torch.rand(n, c, h, w, generator=seeded(seed), dtype=torch.float64)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 100))
def test_chains_equal_a_loop_over_images(n, chains, longest, seed):
    x, g = images(n), seeded(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64)

    w, m = -(1 - uniform(n, chains)).log(), uniform(n)
    wanted = [torch.zeros_like(x[:1]) for _ in range(n)]
    for i in range(chains):
        length, links = uniform(n), [x[k : k + 1] for k in range(n)]
        for place in range(longest):
            which, u = uniform(n), uniform(n)
            for k in range(n):
                if place < 1 + math.floor(longest * length[k]):
                    operation = OPERATIONS[math.floor(len(OPERATIONS) * which[k])]
                    links[k] = operation(links[k], 2 * u[k : k + 1] - 1)
        for k in range(n):
            wanted[k] = wanted[k] + w[k, i] / w[k].sum() * links[k]
    got = chained(x, chains=chains, longest=longest, generator=seeded(seed))
    for k in range(n):
        close(got[k], (m[k] * x[k] + (1 - m[k]) * wanted[k][0]).clamp(0, 1))


def test_the_limits_of_the_mixture():
    x = images(50)
    assert torch.equal(chained(x, mix=1.0, generator=seeded()), x)
    assert not torch.equal(chained(x, mix=0.0, generator=seeded()), x)
    same = [lambda x, u: x]
    close(chained(x, operations=same, generator=seeded()), x)  # weights sum to 1
    y = chained(x, generator=seeded(3))
    assert y.min() >= 0 and y.max() <= 1 and torch.equal(y, chained(x, generator=seeded(3)))
    assert not torch.equal(y, chained(x, generator=seeded(4)))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_operations_keep_range_and_shape(operation):
    x, u = images(7, c=2, h=8, w=11), torch.linspace(-1, 1, 7, dtype=torch.float64)
    y = operation(x, u)
    assert y.shape == x.shape and y.dtype == x.dtype and y.min() >= 0 and y.max() <= 1
    assert not torch.allclose(y[0], x[0]) and operation.__name__ not in CORRUPTIONS
    close(operation(x[3:4], u[3:4]), y[3:4])
    if operation not in (augment.posterised, augment.solarised):
        close(y[3], x[3])  # u = 0


def test_operations_do_what_they_say():
    x = torch.zeros(1, 1, 10, 10, dtype=torch.float64)
    x[0, 0, 4, 4] = 1
    one = torch.ones(1, dtype=torch.float64)
    assert augment.moved_sideways(x, one)[0, 0, 4, 3].item() == pytest.approx(1)  # a tenth of ten pixels
    assert augment.moved_up_or_down(x, -one)[0, 0, 5, 4].item() == pytest.approx(1)
    column = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    column[..., 4] = 1
    leaning = augment.sheared_rows(column, one)[0, 0]
    assert leaning[4, 4] == 1 and leaning[0, 4] < 0.9 and leaning[0].sum() > 0.9
    assert augment.sheared_columns(column.mT, one)[0, 0][4, 4] == 1
    quarter = augment.turned(column, torch.full((1,), 4.5, dtype=torch.float64))  # 90 degrees
    close(quarter, column.mT)
    y = images(1)
    assert len(augment.posterised(y, one).unique()) == 2
    close(augment.solarised(y, one), torch.where(y > 0.5, 1 - y, y))
    close(augment.darkened_or_lightened(y, one), y**3)
    dark = augment.lit_from_a_side(torch.zeros_like(y), one)[0, 0, 0]
    close(dark, torch.linspace(0.5, 0, 9, dtype=torch.float64))
    close(augment.lit_from_a_side(torch.zeros_like(y), -one)[0, 0, 0], dark.flip(0))


@given(st.integers(1, 5), st.integers(2, 4), st.integers(2, 5), st.integers(0, 100))
def test_jensen_shannon_equals_a_loop(n, classes, count, seed):
    logits = [torch.randn(n, classes, generator=seeded(seed + k), dtype=torch.float64) for k in range(count)]
    total = 0.0
    for row in range(n):
        p = [z[row].softmax(0).tolist() for z in logits]
        mean = [sum(q[j] for q in p) / count for j in range(classes)]
        total += sum(q[j] * math.log(q[j] / mean[j]) for q in p for j in range(classes)) / count
    got = jensen_shannon(logits)
    assert got.item() == pytest.approx(total / n, abs=1e-12) and 0 <= got <= math.log(count) + 1e-12
    close(jensen_shannon([logits[0]] * count), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    close(jensen_shannon(logits[::-1]), got)


def test_opposite_answers_reach_the_bound():
    z = 1e3 * torch.eye(2, dtype=torch.float64)
    assert jensen_shannon([z, z.flip(0)]).item() == pytest.approx(math.log(2))


def test_the_loss_is_cross_entropy_and_consistency():
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 4)).double()
    x, y = images(6), torch.arange(6) % 4
    views = [chained(x, generator=seeded(k)) for k in range(2)]
    wanted = F.cross_entropy(model(x), y) + 3 * jensen_shannon([model(x), *map(model, views)])
    close(consistent_loss(model, x, views, y, weight=3.0), wanted)
    close(consistent_loss(model, x, views, y, weight=0.0), F.cross_entropy(model(x), y))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: chained(images(), chains=0), ValueError, "chains"),
        (lambda: chained(images(), longest=1.5), TypeError, "longest"),
        (lambda: chained(images(), mix=1.5), ValueError, "mix"),
        (lambda: chained(images(), operations=()), ValueError, "operations: got none"),
        (lambda: jensen_shannon([torch.ones(2, 3)]), ValueError, "logits: got 1"),
        (lambda: consistent_loss(nn.Flatten(), images(), [], torch.zeros(5).long()), ValueError, "logits: got 1"),
        (lambda: consistent_loss(nn.Flatten(), images(), [images()], torch.zeros(5).long(), weight=-1.0), ValueError,
         "weight"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
