"""The page With Hugging Face: how short a run is, and that ten mistakes end in a message or do no harm."""

import re

import nbformat
from links import ROOT

CELLS = nbformat.read(ROOT / "book" / "huggingface.ipynb", as_version=4).cells
HARMLESS = {2, 8}


def test_a_trainer_run_takes_eighteen_lines():
    source = next(cell.source for cell in CELLS if cell.cell_type == "code" and "trainer.train()" in cell.source)
    assert {"Trainer(", "replace_linears(", "save_peft("} <= set(re.findall(r"\w+\(", source))
    assert len([line for line in source.splitlines() if line.strip()]) <= 18


def test_ten_mistakes_end_in_a_message_or_do_no_harm():
    found = {}
    for text, code in zip(CELLS, CELLS[1:]):
        if text.cell_type == "markdown" and (number := re.match(r"\*\*(\d+)\. ", text.source)):
            found[int(number[1])] = "".join(output.get("text", "") for output in code.outputs)
    assert sorted(found) == list(range(1, 11))
    told = {n for n, text in found.items() if re.match("ValueError: |TypeError: |WARNING: |warning: ", text)}
    assert told == set(found) - HARMLESS and all(found.values())
