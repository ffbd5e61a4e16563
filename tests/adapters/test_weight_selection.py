"""Which weights of a matrix are trained."""

import pytest
import torch
from battery import gaussian, seeded, shapes
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.adapters.weight_selection import RULES, below, pick_entries, smallest, threshold_for_density


def test_below_is_what_a_loop_finds_and_zeros_are_always_there():
    P = torch.tensor([[0.5, -0.01, 0.3], [0.02, -0.4, 0.0], [0.015, 0.2, -0.03]])
    wanted = [i * 3 + j for i in range(3) for j in range(3) if abs(float(P[i, j])) < 0.05]
    assert below(P, 0.05).tolist() == wanted == [1, 3, 5, 6, 8]
    assert below(P, 0.0).tolist() == [] and below(P, 0.01).tolist() == [5]
    assert len(below(P, 1e9)) == 9


@given(shapes(), st.floats(0, 1))
def test_the_smallest_are_as_many_as_wanted_and_no_other_is_smaller(shape, density):
    m, n, _ = shape
    P = (4 * gaussian(m, n)).round() / 4  # with ties
    count = round(density * m * n)
    places = smallest(P, count)
    assert places.dtype == torch.int32 and places.tolist() == sorted(set(places.tolist())) and len(places) == count
    inside = torch.zeros(m * n, dtype=torch.bool).index_fill(0, places.long(), True)
    sizes = P.abs().flatten()
    if 0 < count < m * n:
        assert sizes[inside].max() <= sizes[~inside].min()
        tied = (sizes == sizes[inside].max()).nonzero()[:, 0]  # of equal ones the first
        assert tied[inside[tied]].tolist() == tied[: int(inside[tied].sum())].tolist()


def test_the_controls_are_what_they_say():
    P = torch.tensor([[0.0, -1.0, 2.0, -3.0], [4.0, -5.0, 6.0, -7.0]])
    assert pick_entries(P, 2, "largest").tolist() == [6, 7]
    assert pick_entries(P, 2, "middle").tolist() == [3, 4]
    assert pick_entries(P, 2).tolist() == smallest(P, 2).tolist() == [0, 1]
    one, same, other = (pick_entries(P, 4, "random", seeded(s)).tolist() for s in (1, 1, 2))
    assert one == same != other and one == sorted(set(one)) and len(one) == 4
    for rule in RULES:
        assert pick_entries(P, 8, rule, seeded()).tolist() == list(range(8))
        assert pick_entries(P, 0, rule, seeded()).tolist() == []


def test_one_threshold_for_many_tensors_leaves_the_stated_share_below():
    weights = [gaussian(7, 9), 5 * gaussian(4, 3, seed=1), gaussian(11, seed=2)]
    theta = threshold_for_density(weights, 0.25)
    assert sum(int((W.abs() < theta).sum()) for W in weights) == round(0.25 * (63 + 12 + 11))
    assert threshold_for_density([torch.zeros(3), torch.ones(1)], 0.5) == 0.0  # three are equal to it: none is below


def test_bad_input_is_named(no_shape_checks):
    P = torch.ones(2, 3)
    for call, name in (
        (lambda: below(P, -1.0), "threshold"),
        (lambda: below(P, float("nan")), "threshold"),
        (lambda: smallest(P, -1), "count"),
        (lambda: smallest(P, 7), "count"),
        (lambda: smallest(P, 2.0), "count"),
        (lambda: pick_entries(P, 2, "tiny"), "rule"),
        (lambda: threshold_for_density([P], 1.0), "density"),
        (lambda: threshold_for_density([P], -0.1), "density"),
        (lambda: threshold_for_density([], 0.5), "density"),
        (lambda: threshold_for_density([P.int()], 0.5), "weights"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
            call()
