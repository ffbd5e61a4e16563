"""Data come out of packages, whatever the environment says."""

import pytest


@pytest.fixture(autouse=True)
def embedded(monkeypatch):
    monkeypatch.delenv("LOWRANK_DATA", raising=False)
