"""The chapters' view of the package's source."""

import json
import re
from html import unescape

import pytest

from lowrank_ref.adapters.lora import LoRALinear, delta_weight, lora_scaling
from lowrank_ref.lab.draw.source import beside, source


def test_shows_code_without_docstring():
    shown = source(lora_scaling)
    assert shown.startswith("def lora_scaling(alpha: float, rank: int) -> float:\n    ") and '"""' not in shown
    assert shown.endswith("\n    return alpha / rank")
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


def data(pair):
    return json.loads(unescape(re.search('data-terms="(.*?)"', pair._repr_markdown_())[1]))


def test_beside_shows_equation_and_code():
    pair = beside(3, r"\Delta W = «s»\,«BA»", delta_weight, terms=["scale", "B @ A"])
    assert repr(pair) == r"\Delta W = s\,BA \tag{3}" + f"\n\n{source(delta_weight)}"
    shown = pair._repr_markdown_().split("\n\n")
    assert shown[1:] == ["$$\n\\Delta W = s\\,BA \\tag{3}\n$$", source(delta_weight)._repr_markdown_(), "</div>"]
    assert shown[0].startswith('<div class="lr-beside" data-terms="') and "\\" not in shown[0]


def test_beside_finds_every_place_of_a_term():
    pair = beside(1, r"«s»«A»", delta_weight, terms=["scale", "A"])
    code = source(delta_weight)
    found = data(pair)
    assert found["tex"] == r"\class{lr-term lr-t0}{s}\class{lr-term lr-t1}{A}" and found["number"] == "(1)"
    scale, A = ([code[a:b] for a, b in places] for places in found["code"])
    assert scale == ["scale"] * 2 and A == ["A"] * 2  # argument and use
    assert [code[a - 1] for a, _ in found["code"][1]] == ["(", " "]


def test_quotes_and_signs_survive():
    pair = beside(1, r"a < «b» \text{\"&\"}", delta_weight, terms=['Float[Tensor, "r n"]'])
    assert data(pair)["tex"] == r"a < \class{lr-term lr-t0}{b} \text{\"&\"}"


@pytest.mark.parametrize(
    "equation, terms, message",
    [
        ("«a» b", [], "terms: got 0 for 1 marked"),
        ("a b", ["scale"], "terms: got 1 for 0 marked"),
        ("«a", [], "got 0 for 0"),
        ("«a «b»»", ["A"], "got 1 for 1"),
        ("«a»", ["scal"], "terms: got 'scal', wanted code that stands in"),
        ("«a»", ["A @ B"], "terms: got 'A @ B'"),
        ("«a»", [""], "terms: got ''"),
    ],
)
def test_beside_refuses(equation, terms, message):
    with pytest.raises(ValueError, match=message):
        beside(1, equation, delta_weight, terms=terms)


def test_beside_needs_a_function():
    with pytest.raises(ValueError, match="objects: got none"):
        beside(1, "a")
