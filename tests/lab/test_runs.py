"""Runs that are stored one by one: what the benchmarks do, so that a table can grow over several days."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from common import Runs, arguments
from lowrank_ref.core.linalg import svd  # a result of this script depends on that file

args = arguments("A benchmark.", ("all",))
runs = Runs(args.out, "all", setting="tiny", packages=("numpy",), seconds=args.seconds, unit="nats")
for seed in range(3):
    runs.row({"method": "a", "seed": seed}, lambda: print("measured", seed) or {"loss": seed / 2, "curve": [1, 2]})
"""


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "bench.py").write_text(SCRIPT)

    def run(*arguments, code=0):
        path = os.pathsep.join([str(ROOT / "tests" / "benchmarks"), str(ROOT)])
        command = [sys.executable, "bench.py", "--out", "out.json", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        assert done.returncode == code, done.stderr
        stored = tmp_path / "out.json"
        return done.stdout + done.stderr, json.loads(stored.read_text()) if stored.exists() else {}

    return run


def test_a_table_grows_over_several_days_and_measures_nothing_twice(bench, tmp_path):
    told, stored = bench("--seconds", "-1")
    assert "time is up: 0 rows are stored; next would be {'method': 'a', 'seed': 0}" in told and stored == {}
    told, stored = bench()
    assert told.count("measured") == 3
    part = stored["all"]
    assert [(row["method"], row["seed"], row["loss"], row["run"]) for row in part["rows"]] == [
        ("a", 0, 0.0, 0), ("a", 1, 0.5, 0), ("a", 2, 1.0, 0),
    ]  # fmt: skip
    assert part["unit"] == "nats" and part["provenance"] == part["runs"][0]
    assert {"date", "hardware", "python", "versions", "command", "commit", "files"} <= set(part["provenance"])
    assert {"lowrank_ref/core/linalg.py", "tests/benchmarks/common.py"} <= set(part["provenance"]["files"])
    again, unchanged = bench()
    assert "measured" not in again and unchanged == stored
    # Another day: one row is missing, and the new one says so.
    part["rows"].pop(1)
    part["runs"][0]["date"] = "2000-01-01"
    (tmp_path / "out.json").write_text(json.dumps(stored))
    told, grown = bench()
    assert told.count("measured") == 1
    assert [(row["seed"], row["run"]) for row in grown["all"]["rows"]] == [(0, 0), (2, 0), (1, 1)]
    assert [run["date"] == "2000-01-01" for run in grown["all"]["runs"]] == [True, False]


def test_processes_together_leave_each_other_what_they_began(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_TOGETHER", "day1")
    told, stored = bench()
    assert told.count("measured") == 3
    del stored["all"]["rows"][0]  # as if it were still being measured
    (tmp_path / "out.json").write_text(json.dumps(stored))
    assert "measured" not in bench()[0]
    monkeypatch.setenv("LOWRANK_TOGETHER", "day2")
    told, stored = bench()
    assert told.count("measured") == 1 and len(stored["all"]["rows"]) == 3


def test_rows_of_another_setting_are_not_mixed(bench, tmp_path):
    (tmp_path / "out.json").write_text(json.dumps({"all": {"setting": "large", "rows": [], "provenance": {}}}))
    told, stored = bench(code=1)
    assert "path: got rows of another setting" in told and stored["all"]["setting"] == "large"


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "benchmarks").glob("bench_*.py")), ids=lambda p: p.stem)
def test_benchmarks_import_what_exists(script):
    """A name that moved would be missed on a GPU only, when time is short."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowrank_ref"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                there = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert there, f"{node.module} has no {alias.name}"
