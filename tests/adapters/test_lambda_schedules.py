"""The factors on BA-LoRA's weights, at the steps of the official code and at their ends."""

import math

import pytest
import torch
from battery import gaussian

from lowrank_ref.adapters import confident_penalty, cosine_fall, two_phase


def test_values_of_the_card():
    assert cosine_fall(0.0) == 1 and cosine_fall(1.0) == pytest.approx(0.1) and cosine_fall(0.5) == pytest.approx(0.55)
    assert [two_phase(d) for d in (0.0, 0.2, 0.225, 0.25, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_two_phases_by_counting_steps():
    steps = 200
    wait, ramp = 40, 10
    for step in range(steps):
        wanted = 0.0 if step < wait else min(1.0, (step - wait) / ramp)
        assert two_phase(step / steps) == pytest.approx(wanted, abs=1e-12)
    assert two_phase(0.1, wait=0.1, ramp=0.0) == 1 and two_phase(0.09, wait=0.1, ramp=0.0) == 0


def test_a_sure_teacher_gives_the_upper_end_and_an_unsure_one_the_lower():
    sure, unsure = 1000 * torch.eye(5), torch.ones(4, 5)
    assert confident_penalty(sure, low=0.1, high=0.7) == pytest.approx(0.7)
    assert confident_penalty(unsure, low=0.1, high=0.7) == pytest.approx(0.1)
    z = gaussian(4, 5)
    p = (z / 2).softmax(1)
    entropy = -(p * p.log()).sum(1).mean().item()
    assert confident_penalty(z, low=0.1, high=0.7) == pytest.approx(0.1 + 0.6 * (1 - entropy / math.log(5)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cosine_fall(-0.1), "done: got -0.1"),
        (lambda: two_phase(1.1), "done: got 1.1"),
        (lambda: two_phase(0.5, wait=-1.0), "wait: got -1.0"),
        (lambda: two_phase(0.5, ramp=-1.0), "ramp: got -1.0"),
        (lambda: confident_penalty(gaussian(2, 3), low=0.5, high=0.1), "low: got 0.5"),
        (lambda: confident_penalty(gaussian(2, 3), low=0.0, high=math.nan), "high: got nan"),
        (lambda: confident_penalty(gaussian(2, 1), low=0.0, high=1.0), "teacher: got shape .*at least 2 classes"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
