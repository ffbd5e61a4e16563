"""Loss scaling beside torch.amp.GradScaler, and what it is for."""

import math

import pytest
import torch

from lowrank_ref.lowbit import FORMATS, LossScale, nearest


def run(scaler, step, gradients):
    """Give these gradients of the scaled loss, one a step; return factors and weights."""
    p = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([p, torch.nn.Parameter(torch.ones(()))], lr=0.1)
    found = []
    for gradient in gradients:
        p.grad = torch.tensor(float(gradient))
        step(scaler, optimizer)
        found.append((scaler.scale if isinstance(scaler, LossScale) else scaler.get_scale(), p.item()))
    return found


def test_factors_and_weights_are_those_of_torch():
    gradients = [8.0, math.inf, 4.0, math.nan, 4.0, 4.0, 4.0, 4.0]
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def step(scaler, optimizer):
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()

    assert run(LossScale(8.0, every=3), LossScale.step, gradients) == run(theirs, step, gradients)


def test_small_gradients_survive_in_float16():
    g = torch.tensor([1e-8, 3e-5])
    assert nearest(g, FORMATS["fp16"])[0] == 0
    scale = LossScale(2.0**12)
    back = nearest(scale.scaled(g), FORMATS["fp16"]) / scale.scale
    torch.testing.assert_close(back.float(), g, rtol=1e-2, atol=0)


def test_goes_on_from_a_saved_state():
    first, again = LossScale(4.0, every=2), LossScale()
    run(first, LossScale.step, [1.0])
    again.load_state_dict(first.state_dict())
    again.every = 2
    assert run(again, LossScale.step, [1.0])[0][0] == 8.0


def test_refuses():
    with pytest.raises(ValueError, match="scale: got 0"):
        LossScale(0)
    with pytest.raises(ValueError, match="every: got 0"):
        LossScale(every=0)
