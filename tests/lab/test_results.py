"""Stored results are found beside a chapter, or fetched."""

import io
import json

import pytest

from lowrank_ref.lab import results

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


def test_found_beside_the_chapter(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text(json.dumps(PART))
    (tmp_path / "adapters").mkdir()
    monkeypatch.chdir(tmp_path / "adapters")
    assert results.stored("x") == PART


def test_fetched_from_the_repository(tmp_path, monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(json.dumps(PART).encode())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results.urllib.request, "urlopen", answer)
    assert results.stored("x") == PART
    assert asked[0].startswith("https://") and asked[0].endswith("/raw/main/book/results/x.json")


def test_missing_everywhere(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results.urllib.request, "urlopen", refuse)
    with pytest.raises(FileNotFoundError, match="name: got 'x'"):
        results.stored("x")


def test_provenance_line():
    lines = results.provenance(PART).split("\n")
    assert lines[-2:] == ["Measured 2026-01-02 on a GPU with Python 3.12, torch 2.11.", "python run.py"]
    assert " ".join(lines[:-2]) == PART["setting"].strip() and max(map(len, lines)) <= 79
