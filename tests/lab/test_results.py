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
