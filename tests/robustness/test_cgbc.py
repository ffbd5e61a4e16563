"""CGBC against loops, its invariants, and its guarantee: what outliers can do to a score, and what they cannot."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from battery import seeded
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.robustness.cgbc import (
    REACH,
    TRIMS,
    concept_similarities,
    marginal_score,
    median_and_mad,
    outlier_share,
    score_bounds,
    soft_trim,
    trim_sharpness,
    trim_weights,
)
from lowrank_ref.robustness.concept_rules import fixed_trim, mean_score, upper_half

close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
each_side = pytest.mark.parametrize("side", TRIMS)
sizes = st.integers(1, 60)
seeds = st.integers(0, 10_000)


def scores(*shape, seed=0):
    return 25 + 0.8 * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def by_loop(values, side, threshold=2.5, slope=1.0):
    """One class and one image, with lists and the standard library."""
    values = [float(v) for v in values]
    M = len(values)
    m = sorted(values)[(M - 1) // 2]
    mad = sorted(abs(v - m) for v in values)[(M - 1) // 2] + 1e-6
    share = sum(abs(v - m) > threshold * mad for v in values) / M
    if side == "lower":
        kappa = 4.0 if share == 0 else min(max(math.log((1 - share) / share), 0.1), 4.0)
        weights = [1 / (1 + math.exp(-kappa * (v - m) / mad)) for v in values]
    else:
        share = min(max(share, 1 / M), 0.5)
        kappa = slope * math.log((1 - share) / share)
        weights = [1 / (1 + math.exp(min(kappa * abs(v - m) / mad, 700))) for v in values]
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


@each_side
@given(sizes, seeds)
def test_score_equals_a_loop(side, M, seed):
    S = scores(2, 3, M, seed=seed)
    S[0, 0, : M // 5] -= 6
    wanted = [[by_loop(row, side) for row in image] for image in S]
    close(soft_trim(S, side=side), torch.tensor(wanted, dtype=torch.float64))
    close(soft_trim(S, side=side, threshold=1.5, slope=0.5)[1, 2].item(), by_loop(S[1, 2], side, 1.5, 0.5))


def test_similarities_equal_a_loop_and_do_not_depend_on_the_batch():
    V, T = scores(4, 7) - 25, scores(3, 5, 7, seed=1) - 25
    S = concept_similarities(V, T, scale=30.0, temperature=2.0)
    for b in range(4):
        for k in range(3):
            for j in range(5):
                cosine = (V[b] @ T[k, j]) / (V[b].norm() * T[k, j].norm())
                assert S[b, k, j].item() == pytest.approx(15 * cosine.item(), abs=1e-12)
    close(concept_similarities(V[2:3], T, scale=30.0, temperature=2.0), S[2:3])
    assert concept_similarities(V.bfloat16(), T.bfloat16()).dtype == torch.float32
    assert concept_similarities(V, T.float()).dtype == torch.float64


def test_the_median_of_an_even_number_is_the_lower_one_not_numpy_s_mean():
    S = torch.tensor([4.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    m, mad = median_and_mad(S, eps=0.0)
    assert (m.item(), mad.item()) == (2.0, 1.0)
    assert np.median(S.numpy()) == 3.0


@each_side
@given(st.integers(2, 60), seeds, st.floats(-50, 50), st.floats(0.1, 10))
def test_translation_scale_order_and_duplicates(side, M, seed, shift, factor):
    S = scores(2, M, seed=seed)
    score = partial(soft_trim, side=side)
    torch.testing.assert_close(score(S + shift), score(S) + shift, rtol=0, atol=1e-8)
    torch.testing.assert_close(score(factor * S), factor * score(S), rtol=1e-4, atol=1e-4)  # the 1e-6 beside MAD
    close(score(S[:, torch.randperm(M, generator=seeded(seed))]), score(S))
    if side == "lower":
        close(score(torch.cat([S, S], dim=1)), score(S))
    else:  # the floor of ρ̂ is 1/M, so only a class with outliers keeps its κ
        same = outlier_share(S).squeeze(-1) >= 1 / M
        close(score(torch.cat([S, S], dim=1))[same], score(S)[same])


@each_side
def test_one_concept_and_equal_concepts_give_their_score(side):
    S = scores(4, 1)
    close(soft_trim(S, side=side), S.squeeze(-1))
    kappa = trim_sharpness(S, side=side)
    close(trim_weights(S, kappa, side=side), torch.full_like(S, 0.5))
    close(soft_trim(torch.full((3, 9), 7.0, dtype=torch.float64), side=side), torch.full((3,), 7.0).double())


@given(sizes, seeds)
def test_one_sided_weights_rise_and_the_score_is_at_least_the_mean(M, seed):
    S = scores(3, M, seed=seed)
    w = trim_weights(S, trim_sharpness(S))
    assert bool((w > 0).all()) and bool((w <= 1).all())
    ordered = w.gather(1, S.argsort(dim=1))
    assert bool((ordered.diff(dim=1) >= 0).all())
    m, _ = median_and_mad(S)
    close(w[m == S], torch.full_like(w[m == S], 0.5))
    assert bool((soft_trim(S) >= mean_score(S) - 1e-12).all())


@given(st.integers(1, 30), seeds)
def test_two_sided_weights_fall_from_a_half_and_symmetric_scores_give_the_median(half, seed):
    d = scores(half, seed=seed).abs()
    S = torch.cat([3 - d, torch.tensor([3.0], dtype=torch.float64), 3 + d])
    w = trim_weights(S, trim_sharpness(S, side="both"), side="both")
    assert bool((w <= 0.5).all())
    close(w[:half], w[half + 1 :])
    close(soft_trim(S, side="both").item(), 3.0)


@given(st.integers(2, 60), seeds)
def test_limits_of_kappa(M, seed):
    S = scores(2, M, seed=seed)
    close(fixed_trim(S, 0.0), mean_score(S))
    close(fixed_trim(S, 0.0, side="both"), mean_score(S))
    if bool((S.sort(dim=1).values.diff(dim=1) > 1e-3).all()):
        torch.testing.assert_close(fixed_trim(S, 1e7), upper_half(S), rtol=1e-8, atol=1e-8)


def test_raising_one_similarity_can_lower_the_score():
    S = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    found = []
    for side in TRIMS:
        for j in range(5):
            for step in (0.3, 0.9, 2.0):
                higher = S.clone()
                higher[j] += step
                found.append((side, bool(soft_trim(higher, side=side) < soft_trim(S, side=side) - 1e-3)))
    assert {side for side, lower in found if lower} == set(TRIMS)


@given(sizes, seeds, st.floats(1, 5))
def test_at_most_half_are_outliers_so_kappa_is_never_negative(M, seed, threshold):
    S = torch.randn(4, M, generator=seeded(seed), dtype=torch.float64).pow(3)
    assert float(outlier_share(S, threshold=threshold).max()) <= 0.5
    for side in TRIMS:
        assert float(trim_sharpness(S, side=side, threshold=threshold).min()) >= 0


def test_kappa_of_a_clean_and_of_a_dirty_class():
    S = torch.arange(20.0, dtype=torch.float64)
    assert outlier_share(S).item() == 0 and trim_sharpness(S).item() == 4.0
    assert trim_sharpness(S, side="both").item() == pytest.approx(math.log(19))
    assert trim_sharpness(S, side="both", slope=0.5).item() == pytest.approx(math.log(19) / 2)
    S[:4] = -500.0
    assert outlier_share(S).item() == pytest.approx(0.2)
    assert trim_sharpness(S).item() == pytest.approx(math.log(4))


# --- the guarantee


def test_the_constant_of_the_bound():
    x = torch.linspace(0, 5, 500_001, dtype=torch.float64)
    assert pytest.approx(2 * float((x * torch.sigmoid(-x)).max()), abs=1e-9) == REACH


@each_side
@given(
    st.integers(2, 60),
    seeds,
    st.floats(0.0, 1.0),
    st.sampled_from([-1e6, -30.0, -3.0, 2.0, 3.0, 40.0, 1e6]),
    st.one_of(st.none(), st.floats(0.01, 8)),
)
def test_the_score_stays_within_its_bounds_whatever_the_outliers_are(side, M, seed, share, place, kappa):
    S = scores(3, M, seed=seed)
    S[:, : int(share * M)] = 25 + place + 0.1 * S[:, : int(share * M)]
    kappa = trim_sharpness(S, side=side) if kappa is None else kappa
    score = marginal_score(S, trim_weights(S, kappa, side=side))
    low, high = score_bounds(S, kappa, side=side)
    room = 1e-9 * (1 + S.abs().amax(dim=1))
    assert bool((score >= low - room).all()) and bool((score <= high + room).all())


def test_the_bounds_are_not_idle():
    """24 of 50 where x·σ(-κx) is largest, as many at the median: the score moves a fifth of the way and more."""
    far = 1.2784645427610738 / 0.5
    S = torch.tensor([-far] * 24 + [0.0] * 24 + [1.0] * 2, dtype=torch.float64)
    assert [x.item() for x in median_and_mad(S, eps=0.0)] == [0.0, 1.0]
    low, _ = score_bounds(S, 0.5, side="both")
    assert 0.2 < fixed_trim(S, 0.5, side="both").item() / low.item() <= 1


def test_a_minority_cannot_move_the_two_sided_score_away_and_a_majority_can():
    clean = scores(50)
    width = float(clean.max() - clean.min())
    for place in (-1e4, 1e4):
        for count, breaks in ((10, False), (20, False), (26, True)):
            S = clean.clone()
            S[:count] = place
            moved = abs(float(soft_trim(S, side="both")) - 25)
            assert (moved > 1e3) is breaks, (place, count, moved)
            if not breaks:
                kappa = trim_sharpness(S, side="both").item()
                assert moved <= width * (1 + REACH / (kappa * torch.tensor(-kappa).sigmoid().item()))


def test_a_minority_can_make_kappa_zero_where_their_number_is_even():
    S = torch.tensor([0.0, 1.0, 10.0, 1e6], dtype=torch.float64)
    assert outlier_share(S).item() == 0.5 and trim_sharpness(S, side="both").item() == 0
    close(soft_trim(S, side="both"), S.mean())
    assert score_bounds(S, trim_sharpness(S, side="both"), side="both")[1].item() == math.inf


@given(st.integers(1, 20), seeds)
def test_of_an_odd_number_fewer_than_half_are_outliers_so_a_minority_cannot(half, seed):
    """ρ̂ <= (M - 1)/(2M), so κ >= log((M + 1)/(M - 1)) and the score stays within 0.56·M of clean ranges."""
    M = 2 * half + 1
    g = seeded(seed)
    S = torch.randn(3, M, generator=g, dtype=torch.float64)
    clean = S[:, half:].clone()
    near = clean.gather(1, torch.randint(half + 1, (3, half), generator=g))
    S[:, :half] = torch.where(torch.rand(3, half, generator=g) < 0.8, near, torch.tensor(1e9, dtype=torch.float64))
    kappa = trim_sharpness(S, side="both")
    assert float(kappa.min()) >= math.log((M + 1) / (M - 1)) - 1e-12
    width = clean.amax(1) - clean.amin(1) + 1e-6
    off = (soft_trim(S, side="both") - median_and_mad(S)[0][:, 0]).abs()
    assert bool((off <= 0.56 * M * width + 1e-6).all())


def test_one_side_resists_low_outliers_but_not_a_single_high_one():
    clean = scores(50)
    low, high = clean.clone(), clean.clone()
    low[:20], high[0] = -1e4, 1e4
    assert abs(float(soft_trim(low)) - 25) < 3
    assert float(soft_trim(high)) - 25 > 100
    assert abs(float(soft_trim(high, side="both")) - 25) < 1


def test_a_pool_whose_majority_describes_a_rival_is_beyond_repair():
    """Both classes have 50 concepts; 30 of the true class's describe the rival: every rule votes for the rival."""
    right, wrong = scores(400, 50), scores(400, 50, seed=1) - 4
    pool = torch.where(torch.arange(50) < 30, wrong, right)  # the true class, mostly low
    rival = torch.where(torch.arange(50) < 30, right, wrong)  # the rival, mostly high
    for side in TRIMS:
        assert bool((soft_trim(pool, side=side) < soft_trim(rival, side=side)).float().mean() > 0.95)
    few = torch.where(torch.arange(50) < 20, wrong, right)
    assert float((soft_trim(few, side="both") > soft_trim(wrong, side="both")).float().mean()) == 1.0


# --- prior, missing concepts, bad input


@each_side
def test_missing_concepts_are_as_if_they_were_not_there(side):
    S = scores(4, 9)
    padded = torch.cat([S, torch.full((4, 5), math.nan, dtype=torch.float64)], dim=1)
    close(soft_trim(padded, side=side), soft_trim(S, side=side))


@each_side
@pytest.mark.parametrize("absent", [[8], [0, 3], [0, 1, 2, 3, 4, 5, 6]])
def test_missing_concepts_do_not_spoil_the_gradient(side, absent):
    """A NaN must not reach a product: 0·NaN is NaN, in the gradient of every concept that is there."""
    S = scores(4, 9)
    S[:, 1] -= 6
    keep = [j for j in range(9) if j not in absent]
    few = S[:, keep].clone().requires_grad_()
    soft_trim(few, side=side).square().sum().backward()
    S[:, absent] = math.nan
    S.requires_grad_()
    soft_trim(S, side=side).square().sum().backward()
    close(S.grad[:, keep], few.grad)
    assert bool((S.grad[:, absent] == 0).all())


def test_a_missing_concept_does_not_spoil_the_gradient_of_images_and_concepts():
    V, T = scores(4, 7) - 25, scores(3, 5, 7, seed=1) - 25
    T[1, 2:] = math.nan
    T[2, 0, 3] = math.nan  # one NaN of a feature is enough
    V.requires_grad_()
    T.requires_grad_()
    S = concept_similarities(V, T)
    assert torch.equal(S.isnan()[0], T.isnan().any(dim=2))
    S.nan_to_num().square().sum().backward()
    assert bool(V.grad.isfinite().all()) and float(V.grad.abs().min()) > 0
    assert bool(T.grad.isfinite().all()) and bool((T.grad[1, 2:] == 0).all())


def test_a_prior_weighs_and_a_uniform_one_does_nothing():
    S = scores(4, 9)
    close(soft_trim(S, prior=torch.full((9,), 0.3).double()), soft_trim(S))
    one = torch.zeros(9, dtype=torch.float64)
    one[3] = 2.0
    close(soft_trim(S, prior=one), S[:, 3])


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda S: trim_sharpness(S, side="upper"), "side"),
        (lambda S: trim_weights(S, 1.0, side="upper"), "side"),
        (lambda S: score_bounds(S, 1.0, side="upper"), "side"),
        (lambda S: soft_trim(S, threshold=0.5), "threshold"),
        (lambda S: soft_trim(S, slope=0.0), "slope"),
        (lambda S: soft_trim(S, slope="1"), "slope"),
        (lambda S: concept_similarities(S, S[None], scale=0.0), "scale"),
        (lambda S: concept_similarities(S, S[None], temperature=-1.0), "temperature"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input_is_named(call, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
        call(scores(2, 5))
