"""What ledger, chooser and state of the book make of the chapters' claim tables and of stored results."""

import json

import nbformat
import registry_pages
from bs4 import BeautifulSoup
from links import ROOT

from lowrank_ref.lab.claims import Claims
from lowrank_ref.lab.compare import Arm, compare
from lowrank_ref.lab.results import code_digest


def notebook():
    arms = {"a": Arm("A", steps=1), "b": Arm("B", steps=1)}
    losses = {"a": 1.0, "b": 2.0}
    runs = compare(lambda arm, lr, seed: {"loss": losses[arm] + seed / 10}, arms, lrs=[1.0], seeds=range(3), workers=1)
    claims = Claims("lora")
    claims.beats("a", "b", runs, "loss", claim="a beats b", where="Table 1", cause=["trains"], verdict="holds")
    words = dict(where="Table 2", measured="{x:.1f}", numbers={"x": 1.0}, condition="x > 0")
    claims.add("x is there", **words, verdict="open", missing="a longer run")
    output = nbformat.v4.new_output("display_data", data={"text/html": claims._repr_html_()})
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("claims", outputs=[output])])


def test_a_claim_keeps_its_interval_its_seeds_and_its_verdict():
    rows = registry_pages.claims_of(notebook())
    assert rows == [
        ["a beats b", "Table 1", "a 1.100, b 2.100; difference −1.000", "−1.000 to −1.000", "3", "holds"],
        ["x is there", "Table 2", "1.0; open: a longer run", "x > 0", "", "open"],
    ]
    assert all(len(row) == len(registry_pages.COLUMNS) for row in rows)


def test_open_claims_are_counted_and_intervals_are_told():
    rows = registry_pages.claims_of(notebook())
    assert registry_pages.counted(rows) == "1 held, 1 open"
    told = registry_pages.told(rows)
    assert "a beats b: −1.000 to −1.000, 3 seeds, <b>holds</b>" in told and "x is there" not in told
    assert registry_pages.told(rows[1:]) == ""


def test_results_older_than_their_code_are_told(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    script = "tests/benchmarks/common.py"
    parts = {"new": code_digest(ROOT / script), "old": "0" * 12}
    stored = {name: {"rows": [], "provenance": {"files": {script: digest}}} for name, digest in parts.items()}
    (tmp_path / "results" / "x_scale.json").write_text(json.dumps(stored))
    monkeypatch.setattr(registry_pages, "stored", lambda name: stored)
    told = registry_pages.gpu_results(tmp_path, "x", ["a GPU"])
    assert told == "a GPU<br>x_scale, old: older than common.py"


def test_scaling_is_shown_when_it_has_been_measured(tmp_path, monkeypatch):
    assert registry_pages.scaling(tmp_path) == ""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/scaling.json").touch()

    def row(processes, ms, method="LoRA"):
        return {"method": method, "processes": processes, "ms_per_step": ms}

    day = {"hardware": "a GPU", "date": "2026-01-02"}
    strong = {"setting": "a GPT", "provenance": day, "rows": [row(1, 90.0), row(1, 70.0, "full"), row(2, 60.0)]}
    monkeypatch.setattr(registry_pages, "stored", lambda name: {"strong": strong, "weak": {"rows": [row(2, 100.0)]}})
    page = BeautifulSoup(registry_pages.scaling(tmp_path), "html.parser")
    assert page.p.get_text() == "a GPT. a GPU, 2026-01-02."
    cells = [[cell.get_text() for cell in line.find_all("td")] for line in page.select("tbody tr")]
    assert cells == [["LoRA", "90", "60", "1.50", "100", "1.80"], ["full", "70", "", "", "", ""]]
