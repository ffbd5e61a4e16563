"""Every public class shows its use, in lines that can be pasted into a new interpreter."""

import doctest
import importlib
import inspect

import pytest

import lowrank_ref
from lowrank_ref.core.registry import PARTS

#: Where public names are imported from.
ROOMS = [*PARTS, "core.layers", "core.actions", "core.accounting", "core.groups", "core.io", "core.trainer"]
#: Nobody builds these: what functions return, whose example shows the function, and a base of optimizers.
NOT_BUILT = {
    "Attacked",
    "GaLore",
    "Heads",
    "Inverted",
    "LatentDirections",
    "MergedUpdate",
    "ParameterReport",
    "Profile",
    "TaskScores",
    "Truncation",
}


def public():
    found = {name: getattr(lowrank_ref, name) for name in lowrank_ref.__all__}
    for room in ROOMS:
        module = importlib.import_module(f"lowrank_ref.{room}")
        names = getattr(module, "__all__", None) or [n for n, t in vars(module).items() if is_own(module, n, t)]
        found.update({f"{room}.{name}": getattr(module, name) for name in names})
    return found


def is_own(module, name, thing):
    return not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__


CLASSES = {name: thing for name, thing in public().items() if inspect.isclass(thing)}


def examples(thing):
    return doctest.DocTestParser().get_doctest(inspect.getdoc(thing), {}, thing.__name__, None, None)


def fails(test):
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_has_an_example_that_pastes(name):
    test, own = examples(CLASSES[name]), name.rpartition(".")[2]
    assert own in NOT_BUILT or any(own in example.source for example in test.examples), "no example"
    assert not fails(test)


@pytest.mark.parametrize("name", lowrank_ref.__all__)
def test_a_name_of_the_top_level_has_an_example_that_pastes(name):
    test = examples(getattr(lowrank_ref, name))
    assert test.examples, "no example"
    assert not fails(test)


def test_an_example_that_does_not_paste_is_seen():
    def function():
        """Return it.

        >>> torch.ones(1).item()
        1.0
        """

    assert "NameError" in fails(examples(function))
