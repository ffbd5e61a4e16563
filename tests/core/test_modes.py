"""A model in eval mode for a block."""

import pytest
from torch import nn

from lowrank_ref.core.modes import eval_mode


def test_every_module_comes_back_to_its_own_mode():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)))
    model[1].eval()
    model[1][1].train()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, False, True]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_after_an_error_too():
    model = nn.Dropout(0.5)
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        1 / 0  # noqa: B018
    assert model.training
