"""Arguments have the names of the table in CONTRIBUTING."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import lowrank_ref

TABLE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().partition("## Names")[2].partition("\n## ")[0]
ROWS = [
    [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1::2][:2]] for line in TABLE.splitlines() if "|" in line
]
#: From before the table. `sparsity` is a word of the papers there: an inverse density in RandLoRA, and the share of
#: pixels that an l1 attack moves; `strength` is λ of two gate penalties.
EXCEPTIONS = {"sparsity": ("adapters.randlora", "robustness"), "strength": ("lowbit.hgf", "ranks.sora")}


def arguments():
    """(module, function, argument) of everything public."""
    for item in pkgutil.walk_packages(lowrank_ref.__path__, "lowrank_ref."):
        if item.ispkg or "._" in item.name or ".kernels." in item.name:
            continue
        module = importlib.import_module(item.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", "") != item.name:
                continue
            inside = vars(thing).values() if inspect.isclass(thing) else [thing]
            for function in filter(inspect.isfunction, inside):
                for argument in inspect.signature(function).parameters:
                    yield item.name.removeprefix("lowrank_ref."), name, argument


def test_no_argument_has_another_name_for_what_the_table_names():
    wrong = {name for _, last in ((row[0], row[-1]) for row in ROWS) for name in last} - {
        n for row in ROWS for n in row[0]
    }
    wrong -= {"scaling"}
    assert {"learning_rate", "lora_alpha", "sparsity"} <= wrong
    found = [(m, f, a) for m, f, a in arguments() if a in wrong and not m.startswith(EXCEPTIONS.get(a, "-"))]
    assert found == []


def test_every_exception_is_still_one():
    names = list(arguments())
    for argument, rooms in EXCEPTIONS.items():
        for room in rooms:
            assert any(a == argument and m.startswith(room) for m, _, a in names)
