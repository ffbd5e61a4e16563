import importlib
import pkgutil
import re
import types

import pytest

from lowrank_ref.core import registry
from lowrank_ref.core.registry import PAGES, PARTS, PaperInfo, papers, reading_order

CARD = {"name": "N", "title": "T", "authors": ("A",), "arxiv": "2401.00001v1", "summary": "S."}
CARD |= {"use_when": "you test", "instead": {}}


def test_every_planned_name_stands_once():
    keys = [key for _, keys in PARTS.values() for key in keys]
    assert len(keys) == len(set(keys)) == 36


def test_cards_agree_with_their_place():
    found = papers()
    assert "lora" in found
    for key, info in found.items():
        assert info.key == key
        assert importlib.import_module(info.module).PAPER is info
        assert info.name and info.title and info.authors and info.summary.endswith(".")
        assert info.use_when.startswith("you ") and not info.use_when.endswith(".")
        assert key not in info.instead
        assert info.verified or info.status == "draft"
        for function in info.equations.values():
            assert hasattr(importlib.import_module(info.module), function), f"{info.module} has no {function}"
        for made in (*info.layers.values(), *info.optimizers.values()):
            assert callable(made)


def test_cards_come_in_the_order_of_the_book():
    order = [key for _, keys in PARTS.values() for key in keys]
    assert list(papers()) == [key for key in order if key in papers()]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"part": "nowhere"}, "part: got 'nowhere', wanted one of"),
        ({"key": "galore"}, "key: got 'galore', wanted one of"),
        ({"instead": {"lorra": "never"}}, r"instead: got \['lorra'\], wanted keys"),
        ({"needs": ("primmer",)}, r"needs: got \['primmer'\], wanted keys"),
        ({"status": "done"}, "status: got 'done', wanted"),
        ({"use_when": "memory is short"}, "use_when: got 'memory is short', wanted"),
        ({"use_when": "you lack memory."}, "use_when: got 'you lack memory.', wanted"),
        ({"verified": "yesterday"}, "verified: got 'yesterday', wanted ISO dates"),
        ({"changes": {"2026-11-23": "New"}}, r"changes: got \['New'\], wanted sentences"),
        ({"changes": {"23 Nov": "New."}}, "changes, verified: got '23 Nov', wanted ISO dates"),
    ],
)
def test_a_card_of_no_place_raises(change, message):
    with pytest.raises(ValueError, match=message):
        PaperInfo(**{"key": "lora", "part": "adapters", **CARD, **change})


@pytest.mark.parametrize("card", [None, PaperInfo(key="svfit", part="adapters", **CARD)])
def test_a_module_with_no_card_or_anothers_raises(card, monkeypatch):
    module = types.SimpleNamespace(PAPER=card) if card else types.SimpleNamespace()
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: module)
    with pytest.raises(ValueError, match=r"PAPER: got .* wanted a PaperInfo with part='adapters' and key='lora'"):
        papers()


def test_what_a_chapter_needs_exists_and_comes_before_it():
    found = papers()
    for key, info in found.items():
        assert set(info.needs) <= set(found) | set(PAGES), f"{key} needs a chapter that does not exist"
        assert key not in info.needs
        assert all(text.endswith(".") for text in info.changes.values())
    order = list(reading_order({key: info.needs for key, info in found.items()}))
    assert set(order) >= set(found)
    for key, info in found.items():
        assert all(order.index(need) < order.index(key) for need in info.needs)


def test_reading_order_stays_close_to_what_is_needed():
    needs = {"a": ("start",), "b": ("start",), "c": ("a",), "d": ("b", "c"), "alone": ()}
    assert list(reading_order(needs).items()) == [
        ("start", 0), ("a", 1), ("c", 2), ("b", 1), ("d", 3), ("alone", 0)
    ]  # fmt: skip
    assert reading_order({}) == {}


@pytest.mark.parametrize("needs", [{"a": ("a",)}, {"a": ("b",), "b": ("c",), "c": ("a",)}])
def test_a_circle_of_needs_raises(needs):
    with pytest.raises(ValueError, match=r"needs: got the circle (\w)( -> \w)* -> \1, wanted none"):
        reading_order(needs)


@pytest.mark.parametrize("part", PARTS)
def test_the_face_of_a_part_lists_its_papers_and_then_its_companions(part):
    package = importlib.import_module(f"lowrank_ref.{part}")
    named = re.findall(r"^    (\w+)  +\S", package.__doc__, re.MULTILINE)
    modules = {item.name for item in pkgutil.iter_modules(package.__path__)}
    there = [key for key in PARTS[part][1] if key in modules]
    assert named[: len(there)] == there
    assert sorted(named) == sorted(modules)
