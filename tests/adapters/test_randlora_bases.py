"""The random bases: distributions, places that do not move, and columns that must not be zero."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.adapters.randlora_bases import (
    DISTRIBUTIONS,
    RandomBases,
    random_a,
    random_rows,
    seed_of,
    shared_bases,
    stacked,
)

CPU = torch.device("cpu")


def bases(seed=0, rank=3, distribution="uniform", sparsity=3.0, dtype=torch.float64):
    return RandomBases(seed, rank, distribution, sparsity, CPU, dtype)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_zero_and_variance_one(distribution):
    x = random_rows(0, "B 0", 2000, 50, distribution)
    assert x.dtype == torch.float64 and x.shape == (2000, 50) and bool(torch.isfinite(x).all())
    assert abs(x.mean().item()) < 4 / math.sqrt(1e5) and x.var().item() == pytest.approx(1, rel=0.025)


def test_each_distribution_is_what_it_says():
    uniform, normal = (random_rows(1, "A", 1000, 100, name) for name in ("uniform", "gaussian"))
    assert 1.73 < uniform.abs().max() <= math.sqrt(3)
    assert normal.pow(4).mean().item() == pytest.approx(3, rel=0.05)
    for threshold, share in ((1.0, 0.3173), (2.0, 0.0455)):
        assert (normal.abs() > threshold).double().mean().item() == pytest.approx(share, rel=0.06)
    for sparsity in (1.0, 3.0, 8.0):
        x = random_rows(1, "A", 1000, 100, "ternary", sparsity)
        assert set(x.unique().tolist()) <= {-math.sqrt(sparsity), 0.0, math.sqrt(sparsity)}
        for sign in (-1, 1):
            p = 0.5 / sparsity
            assert abs((x.sign() == sign).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / 1e5)
        assert bool((x == 0).any()) == (sparsity > 1)


@given(st.integers(0, 2**63 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_more_rows_begin_with_the_same_rows(seed, few, more, rank):
    for name in DISTRIBUTIONS:
        long = random_rows(seed, "B 3", few + more, rank, name)
        assert torch.equal(long[:few], random_rows(seed, "B 3", few, rank, name))
        assert torch.equal(random_a(seed, rank, few + more, name)[:, :few], random_a(seed, rank, few, name))


def test_streams_and_seeds_differ():
    draws = [random_rows(seed, name, 20, 20) for seed in (0, 1, 2**40) for name in ("A", "B 0", "B 1")]
    assert all(abs((a * b).mean().item()) < 0.25 for i, a in enumerate(draws) for b in draws[:i])


def test_nothing_is_drawn_from_the_global_generator():
    state = torch.get_rng_state()
    bases().grow(2, 8, 6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sparsity, rank", [(3.0, 6), (3.0, 10), (8.0, 6)])
def test_dead_columns_are_as_many_as_predicted_and_none_after_redrawing(sparsity, rank):
    d, p = 20_000, (1 - 1 / sparsity) ** rank
    plain = random_a(0, rank, d, "ternary", sparsity, redraw=False)
    dead = (plain == 0).all(dim=0)
    assert abs(dead.double().mean().item() - p) < 3 * math.sqrt(p * (1 - p) / d)
    redrawn = random_a(0, rank, d, "ternary", sparsity)
    assert bool(redrawn.any(dim=0).all())
    assert torch.equal(redrawn[:, ~dead], plain[:, ~dead])  # the others stay


def test_growing_keeps_what_was_there_and_never_shrinks():
    grown, whole = bases(), bases()
    grown.grow(2, 8, 6)
    before = [t.clone() for t in grown.slices(2, 8, 6)]
    grown.grow(5, 3, 10)
    grown.grow(1, 12, 2)
    whole.grow(5, 12, 10)
    assert torch.equal(grown.A, whole.A) and torch.equal(grown.B, whole.B)
    assert all(torch.equal(a, b) for a, b in zip(before, grown.slices(2, 8, 6)))


def test_slices_and_stacks_are_views():
    one = bases()
    one.grow(4, 9, 7)
    A, B = one.slices(3, 5, 4)
    assert A.shape == (3, 4) and B.shape == (3, 5, 3)
    for view, whole in ((A, one.A), (B, one.B), (stacked(B), one.B)):
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    for j in range(3):
        for k in range(3):
            assert torch.equal(stacked(B)[3 * j + k], B[j, :, k])


def test_one_object_for_one_description():
    keys = [(s, 2, name, 3.0, CPU, t) for s in (0, 1) for name in DISTRIBUTIONS for t in (torch.float32, torch.float64)]
    objects = [shared_bases(*key) for key in keys]
    assert len({id(o) for o in objects}) == len(keys)
    assert all(shared_bases(*key) is o for key, o in zip(keys, objects))


def test_the_recipe_tells_bases_apart():
    recipes = {
        tuple(bases(s, 4, name, t).recipe.tolist()) for s in (0, 1) for name in DISTRIBUTIONS for t in (2.0, 3.0)
    }
    assert len(recipes) == 2 * 4  # sparsity matters for ternary bases only
    assert bases(7).recipe[0] == 7 and torch.equal(bases(7).recipe, bases(7, dtype=torch.bfloat16).recipe)


def test_seeds_are_signed_64_bit():
    assert [seed_of(torch.Generator().manual_seed(s)) for s in (0, 5, 2**63, 2**64 - 1)] == [0, 5, -(2**63), -1]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"sparsity": 0.9}, ValueError, "sparsity: got 0.9"),
        ({"sparsity": 1e6}, ValueError, "sparsity: got 1000000.0"),
        ({"distribution": "cauchy"}, ValueError, "distribution: got 'cauchy'"),
    ],
)
def test_bad_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        bases(**options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: random_a(0, 0, 4), "rank: got 0"),  # no column would ever be alive
        (lambda: random_a(0, -1, 4), "rank: got -1"),
        (lambda: random_a(0, 2, -4), "d: got -4"),
        (lambda: random_a(0, 2, 4, "ternary", math.inf), "sparsity: got inf"),
        (lambda: random_a(0, 2, 4, "ternary", 1e300), "sparsity: got 1e.300"),
        (lambda: random_rows(0, "A", 2, 0), "rank: got 0"),
        (lambda: random_rows(0, "A", -2, 2), "rows: got -2"),
        (lambda: random_rows(0, "A", 2, 2, "ternary", math.nan), "sparsity: got nan"),
    ],
)
def test_what_could_not_be_drawn_raises_and_does_not_hang(call, message):
    with pytest.raises(ValueError, match=message):
        call()
