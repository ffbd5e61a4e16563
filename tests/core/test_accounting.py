import pytest
import torch
from torch import nn

from lowrank_ref.core import accounting
from lowrank_ref.core.accounting import parameter_report


def test_tensors_count_once():
    a, b = torch.ones(2, 3), torch.ones(4, dtype=torch.bfloat16)
    assert accounting.numel([a, b, a]) == 10
    assert accounting.nbytes([a, b, a]) == 6 * 4 + 4 * 2
    assert accounting.numel([]) == accounting.nbytes([]) == 0
    assert accounting.numel(t for t in (a, b)) == 10


def test_adam_keeps_two_numbers_for_each_and_counters_are_left_out():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    assert accounting.state_numel(optimizer) == 0
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert accounting.state_numel(optimizer) == 2 * 8
    assert accounting.state_bytes(optimizer) == 2 * 8 * 4


def test_nested_state_is_counted():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p])
    optimizer.state[p] = {"step": 3, "moments": [torch.ones(2), (torch.ones(3),)], "inner": {"P": torch.ones(2, 2)}}
    assert accounting.state_numel(optimizer) == 2 + 3 + 4


def test_linear_flops_by_hand():
    # 2 rows, m = 3 outputs of n = 4 products and additions each
    assert accounting.linear_flops(2, 3, 4) == 2 * 3 * 4 * 2


def test_report_counts_shared_parameters_once_and_names_what_trains():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    report = parameter_report(model)
    assert (report.trainable, report.total) == (12, 13)
    assert report.rows == (("0.weight", (3, 3), 9), ("2.weight", (1, 3), 3))
    assert str(report).splitlines()[-1] == "trains 12 of 13 numbers (92.31 %)"


@pytest.mark.parametrize("model, line", [(nn.ReLU(), "trains 0 of 0 numbers (0.00 %)")])
def test_report_of_nothing(model, line):
    assert str(parameter_report(model)).splitlines()[-1] == line


def test_a_long_report_is_cut():
    model = nn.Sequential(*(nn.Linear(1, 2, bias=False) for _ in range(673)))
    lines = str(parameter_report(model)).splitlines()
    assert len(lines) == 1 + accounting.MOST + 1 and lines[-2].split() == ["and", "610", "more", "1,220"]
    assert lines[-1] == "trains 1,346 of 1,346 numbers (100.00 %)"
    assert len(parameter_report(model).rows) == 673
