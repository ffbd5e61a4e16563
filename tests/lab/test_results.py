"""Stored results are found in the repository and in an installed package."""

import importlib.util
import json
import shutil
import tomllib
from pathlib import Path

import pytest

from lowrank_ref.lab import results

ROOT = Path(__file__).resolve().parents[2]
PART = {
    "setting": "one model, " + "many words " * 8,
    "provenance": {
        "date": "2026-01-02",
        "hardware": "a GPU",
        "python": "3.12",
        "versions": {"torch": "2.11"},
        "command": "python run.py",
    },
}


def test_every_file_of_the_repository_is_found():
    names = {path.stem for path in (ROOT / "book" / "results").glob("*.json")}
    assert "lora_scale" in names
    for name in names:
        assert results.stored(name) == json.loads((ROOT / "book" / "results" / f"{name}.json").read_text())


def test_the_wheel_takes_them_along(tmp_path, monkeypatch):
    """Where pip puts the package, the repository's folder is not beside it."""
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert hatch["wheel"]["force-include"] == {"book/results": "lowrank_ref/lab/_results"}
    assert "book/results" in hatch["sdist"]["include"]
    installed = tmp_path / "lowrank_ref" / "lab"
    (installed / "_results").mkdir(parents=True)
    (installed / "_results" / "x.json").write_text(json.dumps(PART))
    shutil.copy(results.__file__, installed)
    spec = importlib.util.spec_from_file_location("installed_results", installed / "results.py")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.stored("x") == PART
    with pytest.raises(FileNotFoundError, match="name: got 'lora_scale'"):
        copy.stored("lora_scale")


def test_missing_everywhere():
    with pytest.raises(FileNotFoundError, match="name: got 'x'"):
        results.stored("x")


def test_provenance_line():
    lines = results.provenance(PART).split("\n")
    assert lines[-2:] == ["Measured 2026-01-02 on a GPU with Python 3.12, torch 2.11.", "python run.py"]
    assert " ".join(lines[:-2]) == PART["setting"].strip() and max(map(len, lines)) <= 79


def test_layers_stand_beside_their_peers():
    rows = [
        {"method": "frozen nn.Linear", "median_ms": 1.0, "extra_mib": 64.0},
        {"method": "LoRA", "median_ms": 2.0, "extra_mib": 65.4, "peer": "PEFT LoRA"},
        {"method": "PEFT LoRA", "median_ms": 4.0, "extra_mib": 384.2},
    ]
    frozen = ["frozen nn.Linear", "1.00", "-", "-", "1.00", "64", "-"]
    lora = ["LoRA", "2.00", "4.00", "0.50", "0.50", "65", "384"]
    assert results.layer_table({"rows": rows}).rows == [frozen, lora]
    assert results.layer_table({"rows": rows}, "LoRA").rows == [lora]
    with pytest.raises(ValueError, match="names: got 'DoRA', wanted some of frozen nn.Linear, LoRA, PEFT LoRA"):
        results.layer_table({"rows": rows}, "DoRA")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("../secret", None, "name: got '../secret', wanted the name of a file in book/results"),
        ("torn", b'{"a": ', "torn.json is no whole JSON file"),
        ("bytes", b"\xff\xfe", "bytes.json is no whole JSON file"),
        ("list", b"[1]", "list.json holds a list, wanted an object"),
    ],
)
def test_files_that_are_no_results(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_FOLDERS", (tmp_path / "results",))
    (tmp_path / "results").mkdir()
    (tmp_path / "secret.json").write_text("{}")
    if content is not None:
        (tmp_path / "results" / f"{name}.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        results.stored(name)


# --- what a result depends on -----------------------------------------------------------------------------------------

CODE = 'def f(x):\n    """Double."""\n    return 2 * x\n'


@pytest.mark.parametrize(
    "text, same",
    [
        ('def f(x):  # why\n    """Twice."""\n    return 2*x', True),
        ("def f(x):\n    return 2 * x", True),
        ('"""Head."""\n' + CODE, True),
        (CODE + 'PAPER = PaperInfo(key="a")\n', True),
        (CODE.replace("2", "3"), False),
        (CODE.replace("x", "y"), False),
        (CODE + 'OTHER = ["", 1]\n', False),
        (CODE + "f(1)", False),
    ],
)
def test_a_digest_follows_what_code_does(text, same, tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text(CODE)
    b.write_text(text)
    assert (results.code_digest(a) == results.code_digest(b)) == same


def test_a_digest_is_the_same_under_every_python(tmp_path):
    """3.12 gives functions a list of type parameters, and f-strings with a nested width an empty end."""
    (tmp_path / "a.py").write_text("class A:\n    def f(self, x, w):\n        return f'{x:{w}} of {x:,}', ['']\n")
    assert results.code_digest(tmp_path / "a.py") == "d7fce6965645"


def test_results_older_than_their_code_are_named(tmp_path):
    (tmp_path / "a.py").write_text(CODE)
    digest = results.code_digest(tmp_path / "a.py")
    part = {"rows": [], "provenance": {"files": {"a.py": digest}}}
    assert results.older_than_code({"speed": part}, tmp_path) == {}
    assert results.older_than_code({"speed": {"provenance": {}}}, tmp_path) == {}
    grown = {**part, "runs": [{"files": {"a.py": "old", "gone.py": "x"}}, part["provenance"]]}
    assert results.older_than_code({"speed": part, "grown": grown}, tmp_path) == {"grown": ["a.py", "gone.py"]}
    (tmp_path / "a.py").write_text(CODE.replace("2", "3"))
    assert results.older_than_code({"speed": part}, tmp_path) == {"speed": ["a.py"]}


def test_provenance_of_a_part_that_grew_names_every_day():
    later = {**PART["provenance"], "date": "2026-02-03", "commit": "abc"}
    text = results.provenance({**PART, "runs": [PART["provenance"], later], "provenance": later})
    assert "Measured 2026-01-02" in text and "Measured 2026-02-03" in text and "commit abc." in text
