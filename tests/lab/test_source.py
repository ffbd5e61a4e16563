"""The chapters' view of the package's source."""

import pytest

from lowrank_ref.adapters.lora import LoRALinear, delta_weight, lora_scaling
from lowrank_ref.lab.source import source


def test_shows_code_without_docstring():
    shown = source(lora_scaling)
    assert shown == "def lora_scaling(alpha: float, rank: int) -> float:\n    return alpha / rank"
    assert shown._repr_markdown_() == f"```python\n{shown}\n```"
    assert repr(shown) == str(shown)


def test_several_objects_and_classes():
    shown = source(lora_scaling, delta_weight)
    assert shown.count("def ") == 2 and '"""' not in shown
    whole = source(LoRALinear)
    assert '"""' not in whole and "self.A, self.B" in whole
    compile(whole, "shown", "exec")


def test_nothing_to_show():
    with pytest.raises(ValueError, match="objects: got none"):
        source()
    with pytest.raises(TypeError):
        source(len)
