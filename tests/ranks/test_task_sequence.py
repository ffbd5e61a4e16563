"""The four scores of a sequence of tasks: a matrix by hand, loops, and what is refused. The cycle: `test_codyra.py`."""

import math

import pytest
import torch
from battery import gaussian
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.ranks.task_sequence import task_scores


def test_scores_of_a_matrix_by_hand():
    scores = task_scores(torch.tensor([[0.8, 0.5], [0.6, 0.9]], dtype=torch.float64))
    got = (scores.last, scores.average, scores.transfer, scores.forgetting)
    assert got == pytest.approx((0.75, 0.7, 0.5, 0.2), abs=1e-12)


@given(st.integers(2, 6))
def test_scores_by_loops(count):
    R = gaussian(count, count).sigmoid()
    last = sum(R[count - 1, i].item() for i in range(count)) / count
    average = sum(R[t, i].item() for t in range(count) for i in range(count)) / count**2
    transfer = sum(sum(R[t, i].item() for t in range(i)) / i for i in range(1, count)) / (count - 1)
    forgetting = sum((R[i, i] - R[count - 1, i]).item() for i in range(count - 1)) / (count - 1)
    scores = task_scores(R)
    got = (scores.last, scores.average, scores.transfer, scores.forgetting)
    assert got == pytest.approx((last, average, transfer, forgetting), abs=1e-12)


def test_an_accuracy_of_zero_counts_as_one():
    R = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.6], [1.0, 1.0, 1.0]])
    assert task_scores(R).transfer == pytest.approx(0.15)  # mean of 0 and (0 + 0.6)/2; without zeros it would be 0.6


@pytest.mark.parametrize(
    "R, error",
    [
        (torch.ones(1, 1), ValueError),
        (torch.ones(2, 3), ValueError),
        (torch.ones(4), ValueError),
        (torch.ones(0, 0), ValueError),
        (torch.ones(2, 2, 2), ValueError),
        (torch.full((2, 2), math.nan), ValueError),
        (torch.full((2, 2), math.inf), ValueError),
        (torch.ones(2, 2, dtype=torch.int64), TypeError),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError),
        ([[1.0, 0.0], [0.0, 1.0]], TypeError),
    ],
)
def test_no_matrix_of_accuracies(R, error, no_shape_checks):
    with pytest.raises(error, match="R: got"):
        task_scores(R)
