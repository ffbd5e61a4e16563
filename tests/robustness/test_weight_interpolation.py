"""WiSE-FT: its ends, and the line between them."""

import copy

import pytest
import torch
from torch import nn

from lowrank_ref.robustness import interpolated


def two():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)) for _ in range(2)]


def test_ends_and_middle():
    start, end = two()
    end[1].running_mean.fill_(7.0)
    before = copy.deepcopy([start.state_dict(), end.state_dict()])
    for share in (0.0, 0.3, 1.0):
        mixed = interpolated(start, end, share)
        for name, p in mixed.named_parameters():
            wanted = (1 - share) * start.get_parameter(name) + share * end.get_parameter(name)
            torch.testing.assert_close(p, wanted)
        assert mixed[1].running_mean[0] == 7.0
    for model, state in zip((start, end), before):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_bad_input():
    start, end = two()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            interpolated(start, end, share)
    with pytest.raises(ValueError, match="end: got other parameters"):
        interpolated(start[0], end, 0.5)
