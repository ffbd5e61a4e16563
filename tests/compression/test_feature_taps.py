"""Features by hooks: what comes back, in which order, and that the model is left as it was."""

import pytest
import torch
from spectral_cases import gaussian, network
from torch import nn

from lowrank_ref.compression import tapped
from lowrank_ref.lab.models import MLP


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_features_are_what_the_modules_return():
    model, x = network(), gaussian(5, 8)
    with tapped(model, ["1", "3"]) as found:
        y = model(x)
    h = model[1](model[0](x))
    assert len(found) == 2 and torch.equal(found[0], h) and torch.equal(found[1], model[3](model[2](h)))
    assert torch.equal(y, model(x)) and not hooks(model)


def test_a_module_that_is_called_several_times_counts_as_often():
    model = MLP((4, 6, 6, 3), activation=nn.GELU)
    x = torch.ones(2, 4)
    with tapped(model, r"^activation$") as found:
        model(x)
        assert len(found) == 2
        model(x)
    assert len(found) == 4 and torch.equal(found[0], found[2])
    assert torch.equal(found[0], model.activation(model.layers[0](x)))


def test_the_first_of_several_results_counts():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, "weights"

    model = nn.Sequential(Pair())
    with tapped(model, "0") as found:
        model(torch.zeros(2))
    assert found[0].tolist() == [1.0, 1.0]


def test_hooks_go_also_after_an_error():
    model = network()
    with pytest.raises(RuntimeError, match="broken"), tapped(model, "0"):
        raise RuntimeError("broken")
    assert not hooks(model)


def test_taps_that_mean_nothing(no_shape_checks):
    model = network()
    for taps, kind, message in [
        ("attention", ValueError, "taps: got 'attention', which matches nothing"),
        ("*", ValueError, "taps: got '\\*', no regular expression"),
        ([], ValueError, "taps: got an empty list"),
        (3, TypeError, "taps: got 3"),
    ]:
        with pytest.raises(kind, match=message), tapped(model, taps):
            pass
    assert not hooks(model)
