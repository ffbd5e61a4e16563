"""Arguments have the names of the table in CONTRIBUTING, and a public name stands in one file."""

import ast
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
#: Names that many files define, with one meaning: a paper's card, and ΔW from the trained tensors of an adapter.
SHARED = {"PAPER": "", "delta_weight": "lowrank_ref/adapters/"}
#: Modules whose names may change in any version, and which repeat a definition in a faster form.
PRIVATE = {"fast", "products", "idle", "matching"}


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


def defined(text):
    """Public names that a file defines at its top: functions, classes, constants and aliases."""
    for node in ast.parse(text).body:
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        for name in (getattr(target, "name", getattr(target, "id", "_")) for target in targets):
            if not isinstance(node, ast.Import | ast.ImportFrom) and not name.startswith("_"):
                yield name


def twins(files):
    """name -> the files that define it, where there are several and the name is not theirs to share."""
    homes = {}
    for path, text in files.items():
        for name in defined(text):
            homes.setdefault(name, set()).add(path)
    return {
        name: paths
        for name, paths in homes.items()
        if len(paths) > 1 and not all(path.startswith(SHARED.get(name, "-")) for path in paths)
    }


def test_a_public_name_is_defined_in_one_file():
    root = Path(__file__).parents[1]
    files = {str(p.relative_to(root)): p.read_text() for p in sorted((root / "lowrank_ref").rglob("*.py"))}
    public = {path: text for path, text in files.items() if Path(path).stem not in PRIVATE and "/kernels/" not in path}
    assert len(public) > 60
    assert twins(public) == {}


def test_kernels_and_definitions_share_one_eps():
    root = Path(__file__).parents[1] / "lowrank_ref"
    assert [p.parent.name for p in root.rglob("*.py") if "EPS" in defined(p.read_text())] == ["kernels"]


def test_twins_are_seen():
    other = {
        "a/x.py": "def gates(): ...\nclass A: ...\nB: int = 1\n_C = 2",
        "b/y.py": "gates = 1\nB = 2\n_C = 1\nPAPER = 1",
    }
    assert set(twins(other)) == {"gates", "B"}
    assert set(twins({"lowrank_ref/adapters/a.py": "def delta_weight(): ...", "b.py": "def delta_weight(): ..."}))
    assert not twins({f"lowrank_ref/adapters/{x}.py": "PAPER = 1\ndef delta_weight(): ..." for x in "ab"})
