"""The tools that run, convert and check chapters."""

import asyncio
import json
import sys

import check
import execute
import fresh
import nbformat
import pytest
from convert import convert
from docstrings import tables_as_rst
from kernel_notebooks import converted
from links import chapters, install_cell
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

CHAPTER = """# %% [markdown]
# # Title

# %% tags=["plot"] mystnb={"image": {"alt": "A line that rises from left to right."}}
import matplotlib.pyplot as plt
plt.plot( [0, 1] ); plt.show()

# %%
print("one"); print("two", object())
"""


def run(folder, *paths):
    return asyncio.run(execute.run_all(list(paths), folder, 2))


def save(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def test_convert_makes_a_minimal_notebook(tmp_path):
    (tmp_path / "chapter.py").write_text(CHAPTER)
    convert(tmp_path / "chapter.py", tmp_path / "part" / "chapter.ipynb")
    notebook = json.loads((tmp_path / "part" / "chapter.ipynb").read_text())
    assert [cell["id"] for cell in notebook["cells"]] == ["c01", "c02", "c03", "c04"]
    assert [cell["cell_type"] for cell in notebook["cells"]] == ["markdown", "code", "code", "code"]
    assert "".join(notebook["cells"][1]["source"]) == install_cell()
    assert notebook["cells"][1]["metadata"] == {"tags": ["remove-cell"]}
    assert notebook["cells"][2]["metadata"]["mystnb"]["image"]["alt"].startswith("A line")
    assert "plt.plot([0, 1])\n" in notebook["cells"][2]["source"]  # formatted
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


def test_convert_drops_empty_cells(tmp_path):
    """One above the title would hide the install cell, and a second one would be made."""
    text = f"# %%\n\n# %% [markdown]\n# # Title\n\n# %%\n{install_cell()}\n"
    (tmp_path / "chapter.py").write_text(text)
    convert(tmp_path / "chapter.py", tmp_path / "chapter.ipynb")
    notebook = nbformat.read(tmp_path / "chapter.ipynb", as_version=4)
    assert [cell.source for cell in notebook.cells] == ["# Title", install_cell()]


def test_convert_mends_a_stale_install_cell(tmp_path):
    stale = install_cell().replace("git+", "git+https://old.example/")
    commented = "\n".join(f"# {line}" if "%pip" in line else line for line in stale.split("\n"))
    (tmp_path / "chapter.py").write_text(f"# %% [markdown]\n# # Title\n\n# %%\n{commented}\n")
    convert(tmp_path / "chapter.py", tmp_path / "chapter.ipynb")
    notebook = nbformat.read(tmp_path / "chapter.ipynb", as_version=4)
    assert [cell.source for cell in notebook.cells] == ["# Title", install_cell()]


def test_two_runs_give_the_same_bytes(tmp_path):
    (tmp_path / "chapter.py").write_text(CHAPTER)
    path = tmp_path / "chapter.ipynb"
    convert(tmp_path / "chapter.py", path)
    assert [r.error for r in run(tmp_path, path)] == [""]
    first = path.read_bytes()
    run(tmp_path, path)
    assert path.read_bytes() == first
    assert first.endswith(b"}\n")
    cells = nbformat.read(path, as_version=4).cells
    assert [cell.execution_count for cell in cells[1:]] == [1, 2, 3]
    assert [out.text for out in cells[3].outputs] == ["one\ntwo <object object at 0x0>\n"]  # one stream
    assert "execution" not in cells[3].metadata


def test_normalise_drops_what_differs_from_run_to_run():
    widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "f00"}})
    shown = new_output("execute_result", {"text/html": "<b>f at 0x7f3a</b>", "image/png": "at 0x7f3a"})
    cell = new_code_cell("f", outputs=[widget, shown], metadata={"execution": {}, "scrolled": True, "tags": ["plot"]})
    text = new_markdown_cell("text", metadata={"editable": True})
    metadata = {"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3.11.7"}}
    notebook = execute.normalise(new_notebook(cells=[text, cell], metadata=metadata))
    assert notebook.metadata == {"kernelspec": execute.KERNEL, "language_info": {"name": "python"}}
    assert [c.metadata for c in notebook.cells] == [{}, {"tags": ["plot"]}]
    assert [c.id for c in notebook.cells] == ["c01", "c02"]
    assert [out.data for out in cell.outputs] == [{"text/html": "<b>f at 0x0</b>", "image/png": "at 0x7f3a"}]


def test_a_failing_cell_is_named_and_the_others_go_on(tmp_path, capsys):
    bad = save(tmp_path / "bad.ipynb", "x = 2", "y = x - 2\nx / y")
    good = save(tmp_path / "good.ipynb", "1 + 1")
    before = bad.read_bytes()
    runs = run(tmp_path, bad, good)
    assert execute.report(runs) == 1
    printed = capsys.readouterr().out
    assert "bad.ipynb, cell 2 of 2:\n\n    y = x - 2\n    x / y\n" in printed
    assert "ZeroDivisionError: division by zero" in printed
    assert "\x1b" not in printed
    assert bad.read_bytes() == before
    assert nbformat.read(good, as_version=4).cells[0].outputs[0].data["text/plain"] == "2"


def test_a_dying_kernel_is_an_error(tmp_path):
    (dead,) = run(tmp_path, save(tmp_path / "dead.ipynb", "import os\nos._exit(1)"))
    assert "dead.ipynb, cell 1 of 1" in dead.error
    assert "DeadKernelError" in dead.error


def test_slow_chapters_are_reported(capsys):
    slow = execute.Run("slow.ipynb", seconds=71.2, slow_cells=[(4, 33.3)])
    assert execute.report([slow, execute.Run("quick.ipynb", seconds=59.0)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "slow: slow.ipynb, cell 5: 33 s > 30 s",
        "slow: slow.ipynb: 71 s > 60 s",
    ]


@pytest.mark.parametrize(("seconds", "stored"), [(3.9, 5), (41.0, 45), (57.0, 45), (60.0, 60), (31.0, 30)])
def test_timings_keep_still(tmp_path, seconds, stored):
    path = tmp_path / "timings.json"
    if seconds > 10:
        execute.store_timings([execute.Run("adapters/lora.ipynb", seconds=45.2)], path)
    execute.store_timings([execute.Run("adapters/lora.ipynb", seconds=seconds)], path)
    timing = json.loads(path.read_text())["adapters/lora"]
    assert timing["seconds"] == stored
    assert timing["hardware"].endswith("CPU")


def test_tables_of_docstrings():
    lines = ["Head.", "", "| paper | here |", "|---|---|", "| eq. 3 | `update` |", "", "Tail."]
    assert tables_as_rst(lines) == [
        *["Head.", "", "", ".. list-table::", "   :header-rows: 1", ""],
        *["   * - paper", "     - here", "   * - eq. 3", "     - `update`", "", "Tail."],
    ]


def test_longest_chapters_come_first(tmp_path, monkeypatch):
    path = tmp_path / "timings.json"
    path.write_text(json.dumps({"part/short": {"seconds": 5}, "part/long": {"seconds": 45}, "primer": {"seconds": 15}}))
    monkeypatch.setattr(execute, "TIMINGS", path)
    names = ["part/short.ipynb", "primer.ipynb", "part/new.ipynb", "part/long.ipynb"]
    order = execute.longest_first([tmp_path / name for name in names])
    assert [path.stem for path in order] == ["new", "long", "primer", "short"]
    assert check.command(check.STEPS["chapters"])[-len(chapters()) :] == list(
        map(str, execute.longest_first(chapters()))
    )


def test_ci_leaves_no_check_out():
    steps = list(check.STEPS)
    assert check.wanted([]) == [name for name in steps if name != "fresh"]
    assert check.wanted(["--ci"]) == [name for name in steps if name != "chapters"]
    assert check.wanted(["book", "unit"]) == ["book", "unit"]
    with pytest.raises(SystemExit, match="other: wanted some of style"):
        check.wanted(["unit", "other"])


def test_a_fresh_notebook_stands_alone(tmp_path):
    for path in chapters():
        copy = fresh.alone(path, tmp_path)
        assert [file.name for file in copy.parent.iterdir()] == [path.name]
        assert " " in copy.parent.name
        made = nbformat.read(copy, as_version=4)
        assert [c.source for c in made.cells] == [c.source for c in converted(path).cells]
        outputs = [[c.outputs for c in n.cells if c.cell_type == "code"] for n in (made, nbformat.read(path, 4))]
        assert outputs[0] == outputs[1]  # with explorers, as a kernel will make them


def test_a_fresh_notebook_must_install(tmp_path):
    path = save(tmp_path / "a.ipynb", "print(1)")
    with pytest.raises(ValueError, match="a.ipynb: its first cell does not install"):
        fresh.alone(path, tmp_path)


def test_a_fresh_run_compares_in_the_new_environment(tmp_path, monkeypatch, capfd):
    """Here its kernel is this Python with a mark, which nothing else has."""
    folder = tmp_path / "share" / "jupyter" / "kernels" / fresh.KERNEL
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "", "language": "python", "env": {"MARK": "new"}}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setattr(fresh, "FRESH", tmp_path)
    said = [new_output("stream", text="new ['a.ipynb']\n")], [new_output("stream", text="old ['b.ipynb']\n")]
    for name, outputs in zip("ab", said):
        source = "import os\nprint(os.environ['MARK'], os.listdir())"
        cells = [new_code_cell(install_cell(), execution_count=1)]
        cells += [new_code_cell(source, execution_count=2, outputs=outputs)]
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    assert fresh.run([tmp_path / "a.ipynb", tmp_path / "b.ipynb"]) == 1
    printed = capfd.readouterr().out
    assert "FAILED b alone/b.ipynb::Cell 1" in printed and "1 failed, 3 passed" in printed
