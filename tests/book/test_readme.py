"""The README's example runs and prints what it says."""

import re

from links import ROOT

from lowrank_ref.core.registry import PARTS


def test_the_example_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in code.split("\n") if line and not line.startswith(("import", "from"))]) <= 6
    exec(compile(code, "README.md", "exec"), {})
    said = re.search(r"# (trains [\d,]+ of [\d,]+ numbers)", code)[1]
    assert said in capsys.readouterr().out


def test_no_list_that_goes_stale():
    """What exists is told by the built pages, not by hand."""
    text = (ROOT / "README.md").read_text()
    assert "Ready now" not in text
    assert text.count("planned") == 0
    papers_named = int(re.search(r"the (\d+) other papers", text)[1])
    assert papers_named + 2 == sum(len(keys) for _, keys in PARTS.values())
