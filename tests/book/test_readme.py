"""The README's example runs and prints what it says."""

import re

from links import ROOT


def test_the_example_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in code.split("\n") if line and not line.startswith(("import", "from"))]) <= 6
    exec(compile(code, "README.md", "exec"), {})
    said = re.search(r"# (trains [\d,]+ of [\d,]+ numbers)", code)[1]
    assert said in capsys.readouterr().out
